"""Runs that are killed, stopped, cut off from a rank or go wrong, and what the same command makes of them then."""

import shutil
import socket
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1

import pytest
import torch

from data.samplers import TrainBatchSampler
from utils import checkpoint

pytest_plugins = ["survival"]
pytestmark = pytest.mark.slow

EPOCHS, UPDATES = 3, 6


def last_is_whole(life):
    """last.pth is there and reads as it was written."""
    return "model" in checkpoint.load(life.folder / "last.pth")


# SIGKILL

AROUND_AN_EPOCH = [
    "step 1.0",
    "update 3",
    "updated 4",
    "update 5",
    "updated 5",
    "scoring 2",
    "scoring 8",
    "update 6",
    "updated 6",
]


def test_kills_around_an_epochs_end_leave_no_trace(make_life, undisturbed, check_same_end):
    life = make_life()
    for number, moment in enumerate(AROUND_AN_EPOCH):
        life.kill(moment)
        if number == 0:
            assert not list(life.folder.glob("*.pth"))
    life.start()
    check_same_end(life.end(), undisturbed(1))


def test_kills_of_a_run_with_workers_leave_no_trace(make_life, undisturbed, check_same_end):
    life = make_life(workers=2)
    started = life.start()
    started.wait_for_line("Train: [0/3][3/6]")
    assert len(started.alive()) >= 3
    started.send(SIGKILL)
    assert started.end().code == -SIGKILL
    for moment in ("scoring 7", "updated 11"):
        life.kill(moment)
    life.start()
    check_same_end(life.end(), undisturbed(1))


def test_kills_amid_a_checkpoint_leave_no_trace(make_life, undisturbed, check_same_end):
    life = make_life()
    life.kill("writing ckpt_epoch_0_update_2.pth")
    (unfinished,) = life.folder.glob("*.tmp")
    unfinished.rename(unfinished.with_name("ckpt_epoch_0_update_1.pth.tmp"))  # a name that is not written again
    assert life.checkpoints() == []
    life.kill("written ckpt_epoch_0_update_2.pth")
    assert life.checkpoints() == []
    life.kill("moved ckpt_epoch_0_update_2.pth")
    assert life.checkpoints() == ["ckpt_epoch_0_update_2.pth"]
    life.kill("moved last.pth")
    assert last_is_whole(life)
    life.kill("writing ckpt_epoch_1.pth")
    assert last_is_whole(life)
    assert list(life.folder.glob("*.tmp"))
    life.kill("removing ckpt_epoch_0_update_2.pth")
    assert last_is_whole(life)
    life.kill("moved best.pth")
    assert last_is_whole(life)
    assert str(life.starts[-1].pid) in (life.folder / "lock").read_text()
    life.start()
    check_same_end(life.end(), undisturbed(1))


def test_kills_of_two_ranks_leave_no_trace(make_life, undisturbed, check_same_end):
    life = make_life(ranks=2)
    result = life.kill("update 3", 0)
    (error,) = result.errors
    assert error.startswith("rank 1 lost another rank")
    result = life.kill("scoring 2", 1)
    (error,) = result.errors
    assert error.startswith("rank 0 lost another rank")

    newest = life.folder / checkpoint.LAST
    newest.write_bytes(newest.read_bytes()[:-1000])
    started = life.start()
    started.wait_for_line("Train: [1/3][2/6]")
    assert f"{newest} is no checkpoint" in started.output
    assert "going on from the one before" in started.output
    started.send_to_all(SIGKILL)
    assert started.end().code == -SIGKILL

    life.start()
    check_same_end(life.end(), undisturbed(2))


def test_torchrun_brings_two_ranks_with_workers_back(make_life, undisturbed, check_same_end):
    life = make_life(ranks=2, workers=2)
    life.start(("update 5", "kill", 1), ("writing ckpt_epoch_1_update_2.pth", "kill", 0), restarts=2)
    run = life.end()
    assert run.result.stdout.count("going on from") == 2
    check_same_end(run, undisturbed(2))


# Damaged checkpoints


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return type(self.folder).mkdir, (self.folder,)


@pytest.mark.parametrize("damage", [cut_short, flip_a_byte, empty])
def test_damaged_checkpoint_gives_way_to_the_one_before(halfway_life, undisturbed, check_same_end, damage):
    life = halfway_life
    newest, before = life.folder / "last.pth", life.folder / "ckpt_epoch_1.pth"
    damage(newest)
    result = life.go_on()
    assert f"{newest} is " in result.stdout
    assert f"going on from the one before: {before}" in result.stdout
    assert "Train: [0/3]" not in result.stdout
    check_same_end(life.run(result), undisturbed(1))


def test_run_without_its_last_name_goes_on_from_the_newest_number(halfway_life, undisturbed, check_same_end):
    life = halfway_life
    (life.folder / "last.pth").unlink()
    result = life.go_on()
    assert f"going on from {life.folder / 'ckpt_epoch_1_update_2.pth'}" in result.stdout
    check_same_end(life.run(result), undisturbed(1))


def test_run_whose_checkpoints_are_all_damaged_stops(halfway_life):
    life = halfway_life
    for path in life.folder.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    kept = {path: path.read_bytes() for path in life.folder.iterdir() if path.is_file()}
    result = life.go_on()
    assert result.code == 2
    (error,) = result.errors
    assert f"no checkpoint in {life.folder} can be read" in error
    assert "Train:" not in result.stdout
    assert {path: path.read_bytes() for path in life.folder.iterdir() if path.is_file()} == kept


def test_damaged_checkpoint_that_was_named_stops(halfway_life, tmp_path):
    named = shutil.copyfile(halfway_life.folder / "last.pth", tmp_path / "named.pth")
    flip_a_byte(named)
    result = halfway_life.go_on("--resume", named)
    assert result.code == 2
    (error,) = result.errors
    assert str(named) in error
    assert "Train:" not in result.stdout


def test_code_in_a_checkpoint_is_not_run(halfway_life, tmp_path, undisturbed, check_same_end):
    life, made = halfway_life, tmp_path / "made"
    (life.folder / "last.pth").unlink()
    torch.save({"model": {"weight": Code(made)}}, life.folder / "last.pth")
    named = life.go_on("--resume", life.folder / "last.pth")
    assert named.code == 2
    assert "nothing in it was run" in named.errors[0]
    result = life.go_on()
    assert f"{life.folder / 'last.pth'} is no checkpoint of plain tensors" in result.stdout
    assert not made.exists()
    check_same_end(life.run(result), undisturbed(1))


# Signals that ask a run to stop

LEAVE_S = 30


def test_signals_to_the_only_process_leave_one_checkpoint(make_life, undisturbed, check_same_end):
    life = make_life(workers=2)
    started = life.start(("step 2.1", "listen"), ("writing ckpt_epoch_0_update_3.pth", "hold"))
    started.wait_for_fault(0)
    started.send(SIGUSR1, SIGTERM)
    started.wait_for_fault(1)
    started.send(SIGINT, SIGTERM)
    started.let_go(1)
    started.pester(SIGTERM)
    assert started.end(LEAVE_S).code == 128 + SIGUSR1
    assert life.checkpoints() == ["ckpt_epoch_0_update_2.pth", "ckpt_epoch_0_update_3.pth"]
    assert life.reached() == (0, 3)

    started = life.start(("scoring 3", "listen"))
    started.wait_for_fault()
    started.send(SIGINT, SIGTERM)
    result = started.end(LEAVE_S)
    assert result.code == 128 + SIGINT
    assert "Acc@1" not in result.stdout
    assert life.checkpoints() == ["ckpt_epoch_0_update_4.pth", "ckpt_epoch_0_update_6.pth"]
    assert life.reached() == (0, UPDATES)

    started = life.start(("step 8.0", "listen"))
    started.wait_for_fault()
    assert len(started.alive()) >= 3
    started.send_to_all(SIGTERM)
    result = started.end(LEAVE_S)
    assert result.code == 128 + SIGTERM
    assert result.stderr == ""
    assert life.reached() == (1, 3)

    life.start()
    check_same_end(life.end(), undisturbed(1))


def test_signals_to_one_rank_or_to_the_launcher_stop_both_ranks(make_life, undisturbed, check_same_end):
    life = make_life(ranks=2)
    started = life.start(("step 2.1", "listen", 1))
    started.wait_for_fault()
    started.send(SIGTERM, SIGINT, to=started.rank(1))
    result = started.end(LEAVE_S)
    assert result.errors == []
    assert result.stdout.count("stopped by signal") == 1
    assert life.checkpoints() == ["ckpt_epoch_0_update_2.pth", "ckpt_epoch_0_update_3.pth"]
    assert life.reached() == (0, 3)

    started = life.start(("scoring 2", "listen", 1))
    started.wait_for_fault()
    started.send(SIGTERM)
    result = started.end(LEAVE_S)
    assert result.errors == []
    assert f"stopped by signal {SIGTERM:d}" in result.stdout
    assert life.checkpoints() == ["ckpt_epoch_0_update_4.pth", "ckpt_epoch_0_update_6.pth"]
    assert life.reached() == (0, UPDATES)

    life.start()
    check_same_end(life.end(), undisturbed(2))


def test_signals_to_all_processes_and_a_lost_launcher_stop_both_ranks(make_life, undisturbed, check_same_end):
    life = make_life(ranks=2, workers=2)
    started = life.start(("step 2.1", "listen", 1))
    started.wait_for_fault()
    started.send_to_all(SIGUSR1)
    result = started.end(LEAVE_S)
    assert result.errors == []
    assert life.reached() == (0, 3)

    started = life.start(("step 4.0", "listen", 0))
    started.wait_for_fault()
    started.send(SIGINT)
    assert started.end(LEAVE_S).errors == []
    assert life.reached() == (0, 5)

    started = life.start(("step 8.0", "hold", 0))
    started.wait_for_fault()
    rank = started.rank(0)
    started.send(SIGKILL)
    started.wait_for(lambda: started.has_lost_launcher(rank), "the launcher is gone")
    started.let_go()
    assert started.end(LEAVE_S).code == -SIGKILL
    assert life.reached() == (1, 3)

    life.start()
    check_same_end(life.end(), undisturbed(2))


# A rank that hangs, and one that cannot write


def test_rank_that_hangs_is_told_of_and_ended(make_life):
    life = make_life(ranks=2, opts="RANK_TIMEOUT 20")
    result = life.start(("step 3.0", "hang", 1)).end()
    assert result.code == 1
    (error,) = result.errors
    assert error.startswith("rank 0 lost another rank, which died or did not answer for 20 s")
    assert life.reached() == (0, 2)


def test_full_disk_of_the_first_rank_ends_both(make_life):
    life = make_life(ranks=2)
    too_late = ("step 6.0", "kill", 1)
    result = life.start(too_late, under="ulimit -f 900").end()
    (error,) = result.errors
    assert "ckpt_epoch_0_update_2.pth cannot be written" in error
    assert "exitcode  : 2" in result.stderr
    assert sorted(path.suffix for path in life.folder.iterdir() if path.suffix in (".pth", ".tmp")) == []


# Losses that are no numbers


def samples_of(survival_tree, update, rank):
    """The paths of a rank's samples of an update in the second epoch, on two ranks."""
    names = sorted(map(str, (survival_tree / "train").glob("*/*")))
    sampler = TrainBatchSampler(len(names), 2, rank, 2, seed=0)
    sampler.set_epoch(1)
    batches = list(sampler)[2 * update : 2 * update + 2]
    return [names[index] for batch in batches for index, _ in batch]


def test_loss_that_is_no_number_on_one_rank_stops_both(make_life, survival_tree):
    life = make_life(ranks=2)
    result = life.start(("step 8.1", "nan", 1)).end()
    assert result.code == 1
    (error,) = result.errors
    assert "nan on rank 1 at update 3 of epoch 1" in error
    path = life.folder / "not_finite_epoch_1_update_3.txt"
    assert str(path) in error
    of_rank = [[f"rank {rank}\t{name}" for name in samples_of(survival_tree, 2, rank)] for rank in range(2)]
    assert path.read_text().splitlines() == of_rank[0] + of_rank[1]
    assert of_rank[1][0].partition("\t")[2] in error
    assert life.checkpoints()[-1] == "ckpt_epoch_1_update_2.pth"
    assert life.reached() == (1, 2)


def test_loss_that_is_no_number_on_one_rank_is_left_out_by_both(make_life, undisturbed):
    life = make_life(ranks=2, opts="TRAIN.ON_NONFINITE skip")
    life.start(("step 8.0", "nan", 1))
    run = life.end()
    assert run.result.code == 0, run.result.stderr
    assert "nan on rank 1 at update 3 of epoch 1" in run.result.stdout
    progress = run.checkpoint()["progress"]
    assert (progress["updates"], progress["left_out"]) == (EPOCHS * UPDATES - 1, 1)
    losses, before = [[line["loss"] for line in each.updates()] for each in (run, undisturbed(2))]
    assert losses[:8] == before[:8]
    assert losses[8] is None
    assert None not in losses[9:]


def test_run_that_left_an_update_out_is_exact_when_killed(make_life, check_same_end):
    fault, skip = ("step 8.0", "nan"), "TRAIN.ON_NONFINITE skip"
    whole = make_life("whole", opts=skip)
    whole.start(fault)
    life = make_life(opts=skip)
    for moment in ("step 9.0", "updated 13"):
        life.kill(moment, 0, fault)
    life.start(fault)
    ended = whole.end()
    assert ended.result.code == 0, ended.result.stderr
    assert ended.checkpoint()["progress"]["left_out"] == 1
    check_same_end(life.end(), ended)


def test_overflows_of_fp16_are_counted_and_too_many_in_a_row_end_the_run(make_life):
    life = make_life(opts="PRECISION fp16 TRAIN.MAX_LEFT_OUT 3")
    life.start(*((f"step {place}.0", "nan") for place in (3, 8, 9, 10)))
    run = life.end()
    assert run.result.code == 2
    (error,) = run.result.errors
    assert "update 5 of epoch 1, and 3 updates in a row were left out" in error
    assert [line["left_out"] for line in run.updates()] == [0, 0, 0, 1, 1, 1, 1, 1, 2, 3]
    assert "1 left out" in run.result.stdout
    assert run.updates()[3]["lr"] == run.updates()[2]["lr"]


# Disk and folder


def test_full_disk_leaves_the_old_checkpoints(halfway_life, undisturbed, check_same_end):
    life = halfway_life
    kept = {path: path.read_bytes() for path in life.folder.glob("*.pth")}
    too_late = ("step 13.0", "kill")
    result = life.start(too_late, under="ulimit -f 900").end()
    assert result.code == 2
    (error,) = result.errors
    assert "ckpt_epoch_1_update_4.pth cannot be written" in error
    assert "Traceback" not in result.stderr
    assert not list(life.folder.glob("*.tmp"))
    assert {path: path.read_bytes() for path in life.folder.glob("*.pth")} == kept
    check_same_end(life.run(life.go_on()), undisturbed(1))


def test_output_that_is_a_file_is_refused(make_life):
    life = make_life()
    life.output.write_text("mine")
    result = life.go_on()
    assert result.code == 2
    assert str(life.output) in result.errors[0]
    assert "Train:" not in result.stdout
    assert life.output.read_text() == "mine"


def test_second_run_in_a_folder_is_refused_and_does_not_disturb_the_first(make_life, undisturbed, check_same_end):
    life = make_life()
    first = life.start(("step 3.0", "hold"))
    first.wait_for_fault()
    second = life.go_on()
    assert second.code == 2
    (error,) = second.errors
    assert f"{life.folder} is in use by process {first.pid} on {socket.gethostname()}" in error
    assert "Train:" not in second.stdout
    first.let_go()
    check_same_end(life.end(), undisturbed(1))
