"""The shared command line: what it overrides, what it refuses, and how a program ends."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_unit import ROOT, set_key
from torch.utils.data import DataLoader, Dataset

from utils.cli import Parser, at_least, check_report, config_from, make_parser, run
from utils.config import load_config, lookup
from utils.errors import BrokenDataError, LostRankError, OneRankError, Stopped, UserError

FILE = str(ROOT / "configs" / "groupmixformer_tiny.yaml")

PUBLISHED_FLAGS = (  # noqa: SIM905
    "--cfg --opts --batch-size --data-path --zip --cache-mode --pretrained --resume --accumulation-steps "
    "--use-checkpoint --amp-opt-level --output --tag --eval --throughput --local_rank --model-type --model-file"
).split()

OVERRIDES = [
    (["--batch-size", "32"], "DATA.BATCH_SIZE", 32),
    (["--data-path", "some/folder"], "DATA.DATA_PATH", "some/folder"),
    (["--pretrained", __file__], "MODEL.PRETRAINED", __file__),  # some file that exists
    (["--resume", __file__], "MODEL.RESUME", __file__),
    (["--allow-changes"], "TRAIN.ALLOW_CHANGES", True),
    (["--elastic"], "TRAIN.ELASTIC", True),
    (["--accumulation-steps", "4"], "TRAIN.ACCUMULATION_STEPS", 4),
    (["--use-checkpoint"], "TRAIN.USE_CHECKPOINT", True),
    (["--amp-opt-level", "O0"], "AMP_OPT_LEVEL", "O0"),
    (["--precision", "bf16"], "PRECISION", "bf16"),
    (["--device", "cpu"], "DEVICE", "cpu"),
    (["--output", "out"], "OUTPUT", "out"),
    (["--tag", "2024"], "TAG", "2024"),
    (["--seed", "7"], "SEED", 7),
    (["--eval"], "EVAL_MODE", True),
    (["--throughput"], "THROUGHPUT_MODE", True),
    (["--model-type", "groupmixformer"], "MODEL.TYPE", "groupmixformer"),
]


def parsed(*words, file=FILE):
    return make_parser("A program.").parse_args(["--cfg", file, *words])


def configuration(*words, file=FILE):
    return config_from(parsed(*words, file=file))


def test_the_published_flags_are_all_there():
    known = make_parser("A program.")._option_string_actions
    assert [flag for flag in PUBLISHED_FLAGS if flag not in known] == []


@pytest.mark.parametrize(
    ("program", "has_it"),
    [(f"{task}{name}.py", task == "" or (task, name) == ("segmentation/", "train"))
     for task in ("", "segmentation/", "detection/") for name in ("train", "test")],
)  # fmt: skip
def test_only_programs_that_measure_throughput_have_its_flag(call, program, has_it):
    assert ("--throughput" in call(program, "--help").stdout) is has_it


@pytest.mark.parametrize("task", ["", "segmentation/", "detection/"])
def test_programs_that_score_say_of_weights_that_they_are_scored(call, task):
    words = {name: " ".join(call(f"{task}{name}.py", "--help").stdout.split()) for name in ("train", "test")}
    assert "--resume FILE checkpoint to go on from, or to score with --eval" in words["train"]
    assert "--resume FILE checkpoint to score, the same as --pretrained" in words["test"]


def test_no_flag_has_a_default():
    values = vars(parsed())
    assert values.pop("cfg") == FILE
    assert {name for name, value in values.items() if value} == set()
    assert values.pop("zip") is False
    assert set(values.values()) == {None}


def test_without_flags_the_file_stands():
    assert configuration() == load_config(FILE)


@pytest.mark.parametrize(("words", "name", "value"), OVERRIDES, ids=[words[0] for words, _, _ in OVERRIDES])
def test_a_flag_overrides_its_key_and_no_other(words, name, value):
    config, untouched = configuration(*words), load_config(FILE)
    assert lookup(config, name) == value
    assert type(lookup(config, name)) is type(value)
    set_key(untouched, name, value)
    assert config == untouched


def test_options_override_the_file_and_flags_override_both(tmp_path):
    path = tmp_path / "given.yaml"
    path.write_text("TAG: file\nOUTPUT: file\nSEED: 1\n")
    config = configuration("--opts", "OUTPUT", "opts", "SEED", "2", "--seed", "3", file=str(path))
    assert (config.TAG, config.OUTPUT, config.SEED) == ("file", "opts", 3)
    config = configuration("--seed", "3", "--opts", "OUTPUT", "opts", "SEED", "2", file=str(path))
    assert (config.TAG, config.OUTPUT, config.SEED) == ("file", "opts", 3)


@pytest.mark.parametrize("words", [["--local_rank", "3"], ["--local-rank", "3"], ["--local_rank=3"]])
def test_old_launchers_may_pass_the_local_rank(words):
    assert configuration(*words) == load_config(FILE)


@pytest.mark.parametrize(
    "words",
    [
        ["--batchsize", "3"],
        ["--batch", "3"],
        ["--acc", "2"],
        ["--out", "x"],
        ["--ev"],
        ["stray"],
        ["--batch-size", "many"],
        ["--batch-size"],
        ["--amp-opt-level", "O3"],
        ["--precision", "fp8"],
        ["--device", "tpu"],
        ["--cache-mode", "all"],
    ],
    ids=" ".join,
)
def test_a_flag_that_is_none_ends_the_program(words):
    with pytest.raises(UserError, match="--help") as caught:
        parsed(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["1", "-3", "2.5", "two", ""])
def test_a_number_that_is_too_low_or_not_whole_is_refused(text):
    parser = Parser("A program.")
    parser.add_argument("--rounds", type=at_least(2))
    assert parser.parse_args(["--rounds", "2"]).rounds == 2
    with pytest.raises(UserError) as caught:
        parser.parse_args(["--rounds", text])
    assert str(caught.value) == f"argument --rounds: {text}: give a whole number, at least 2: --help tells the flags"


def test_a_parser_of_subcommands_takes_whatever_settings_argparse_gives_it():  # Python 3.14's gives `color`
    kinds = Parser("A program.").add_subparsers()
    kind = kinds.add_parser("kind", help="one", description="One of them.", epilog="The end.")
    assert kind.format_help().endswith("The end.\n")


def test_a_configuration_must_be_named():
    with pytest.raises(UserError, match="--cfg"):
        make_parser("A program.").parse_args([])


@pytest.mark.parametrize("words", [["--zip"], ["--cache-mode", "part"], ["--zip", "--cache-mode", "no"]])
def test_zip_mode_is_refused_with_what_replaced_it(words):
    with pytest.raises(UserError, match=r"--opts DATA\.DATASET tar"):
        configuration(*words)


def test_only_our_model_file_and_type_are_taken():
    assert configuration("--model-file", "groupmixformer.py") == load_config(FILE)
    with pytest.raises(UserError, match=r"--model-file other\.py"):
        configuration("--model-file", "other.py")
    with pytest.raises(UserError, match=r"MODEL\.TYPE"):
        configuration("--model-type", "swin")


def test_the_merged_configuration_is_checked():
    with pytest.raises(UserError, match=r"DATA\.BATCH_SIZE"):
        configuration("--batch-size", "0")


@pytest.mark.parametrize("flag", ["--resume", "--pretrained"])
@pytest.mark.parametrize("name", ["nowhere.pth", "."])
def test_a_checkpoint_that_is_no_file_is_told_of(tmp_path, flag, name):
    with pytest.raises(UserError) as caught:
        configuration(flag, str(tmp_path / name))
    assert str(caught.value) == f"{tmp_path / name} is no file: name a checkpoint"


@pytest.mark.parametrize("flag", ["--resume", "--pretrained"])
def test_a_run_that_has_begun_is_not_asked_for_the_checkpoint_that_it_began_with(tmp_path, flag):
    words = [flag, str(tmp_path / "gone.pth"), "--output", str(tmp_path), "--tag", "begun"]
    with pytest.raises(UserError, match="is no file"):
        configuration(*words)
    (tmp_path / configuration().MODEL.NAME / "begun").mkdir(parents=True)
    assert str(tmp_path / "gone.pth") in (configuration(*words).MODEL.RESUME, configuration(*words).MODEL.PRETRAINED)


WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    heavy = {"torch", "torchvision", "timm", "matplotlib"} & set(sys.modules)
    print(ended.code, sorted(heavy))
"""


@pytest.mark.parametrize("script", ["train.py", "test.py"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--resume", "nowhere.pth"], "error: nowhere.pth is no file: name a checkpoint"),
        (["--pretrained", "nowhere.pth"], "error: nowhere.pth is no file: name a checkpoint"),
        (["--opts", "DATA.IMGSIZE", "3"], "error: --opts: unknown key DATA.IMGSIZE: did you mean DATA.IMG_SIZE?"),
        (["--batch-size", "0"], f"error: {FILE} with the flags: DATA.BATCH_SIZE is 0: give images, at least 1"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_told_before_torch_is_imported(script, words, told):
    command = [sys.executable, "-c", WITHOUT_TORCH, script, "--cfg", FILE, *words]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("2 []\n", f"{told}\n")


@pytest.mark.parametrize("key", ["MODEL.NAME", "TAG"])
@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/x"])
def test_a_run_outside_its_folder_is_refused(key, name):
    with pytest.raises(UserError, match=f"{key} is '{name}': give the name of a folder"):
        configuration("--opts", key, name)


def test_a_run_in_a_folder_of_runs_is_not_refused():
    assert configuration("--tag", "sweep/lr..2").TAG == "sweep/lr..2"


# How a program ends


def ending(main, capsys):
    with pytest.raises(SystemExit) as caught:
        run(main)
    return caught.value.code, capsys.readouterr()


def test_a_program_that_succeeds_just_returns(capsys):
    seen = []
    run(lambda: seen.append(1))
    assert seen == [1]
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def pythons_newer_way():
    """How Python 3.14 starts processes."""
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(usual, force=True)


def test_a_programs_loaders_are_its_own_children_on_any_python(pythons_newer_way):
    seen = []
    run(lambda: seen.extend(DataLoader(Parents(), batch_size=None, num_workers=1)))
    assert seen == [os.getpid()]


class Parents(Dataset):
    """One sample: the parent of the process that reads it."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return os.getppid()


@pytest.mark.parametrize("environment", [{}, {"LOCAL_RANK": "0"}])
def test_a_users_error_is_one_line_and_exit_code_2(environment, monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def main():
        raise UserError("x.yaml: unknown key A: did you mean B?")

    assert ending(main, capsys) == (2, ("", "error: x.yaml: unknown key A: did you mean B?\n"))


class Unreadable(Dataset):
    """Samples that cannot be read."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise BrokenDataError(f"{index}.png is broken (empty): is the data still there?")


def test_a_users_error_in_a_loaders_worker_is_one_line_too(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    code, told = ending(lambda: list(DataLoader(Unreadable(), num_workers=1)), capsys)
    assert (code, told) == (2, ("", "error: 0.png is broken (empty): is the data still there?\n"))


@pytest.mark.parametrize("kind", [BrokenDataError, LostRankError, OneRankError])
def test_an_error_that_only_one_rank_meets_is_told(kind, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")

    def main():
        raise kind("rank 1 lost another rank: start the same command again")

    assert ending(main, capsys) == (2, ("", "error: rank 1 lost another rank: start the same command again\n"))


def test_an_error_that_all_ranks_meet_is_told_by_the_first_of_a_machine(monkeypatch, capsys):
    def main():
        raise UserError("x")

    for rank, told in (("0", "error: x\n"), ("1", ""), ("7", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert ending(main, capsys) == (2, ("", told))


class Killed(Dataset):
    """Samples whose reading ends the process that reads, as the system does where memory runs out."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_loaders_process_that_was_killed_is_told_of_in_one_line(capsys):
    code, (out, err) = ending(lambda: list(DataLoader(Killed(), num_workers=1)), capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: DataLoader worker (pid")
    assert "DATA.NUM_WORKERS" in err
    assert err.count("\n") == 1


_OF_A_GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.10 GiB is free. "
    "Including non-PyTorch memory, this process has 6.60 GiB memory in use."
)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("kind", ["of a GPU", "of a CPU"])
def test_memory_that_ran_out_is_told_of_in_one_line_on_each_rank(kind, rank, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", rank)

    def main():
        if kind == "of a GPU":
            raise torch.OutOfMemoryError(_OF_A_GPU)
        torch.empty(2**60, dtype=torch.uint8)

    code, (out, err) = ending(main, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: memory ran out (")
    assert ("2.00 GiB): " if kind == "of a GPU" else str(2**60)) in err
    assert "--batch-size" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_program_that_a_signal_stopped_says_so_by_its_exit_code(number, rank, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", rank)

    def main():
        raise Stopped(number)

    assert ending(main, capsys) == (128 + number, ("", ""))


def test_an_interrupted_program_ends_quietly(capsys):
    def main():
        raise KeyboardInterrupt

    assert ending(main, capsys) == (130, ("", ""))


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at its end", "before"])
def test_a_program_whose_output_is_no_longer_read_ends_quietly(lines):
    program = f"from utils.cli import run; run(lambda: [print('line') for _ in range({lines})])"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_another_broken_pipe_keeps_its_traceback():
    def main():
        raise BrokenPipeError("mine")

    with pytest.raises(BrokenPipeError, match="mine"):
        run(main)


def test_a_name_too_long_for_a_file_is_told_in_one_line(tmp_path, capsys):
    long = tmp_path / ("a" * 300) / "best.pth"
    told = f"error: {long} has a name that is too long for a file: shorten it\n"
    assert ending(long.open, capsys) == (2, ("", told))


def test_a_place_without_permission_is_told_in_one_line(capsys):
    def main():
        raise PermissionError(errno.EACCES, "Permission denied", "D/val")

    told = "error: D/val: Permission denied: mend its permissions or name another\n"
    assert ending(main, capsys) == (2, ("", told))


def test_a_report_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    check_report(tmp_path / "A.PNG", "--png", ".png")
    check_report(None, "--png", ".png")
    with pytest.raises(UserError, match=r"--png .*a\.jpg: end the name in \.png"):
        check_report(tmp_path / "a.jpg", "--png", ".png")
    with pytest.raises(UserError, match=r"--json .*: name a file in a folder that exists"):
        check_report(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    check_report(Path(os.devnull))
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written to"):
        check_report(tmp_path / "a.json")


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), RuntimeError("mine"), OSError("mine")], ids=repr)
def test_an_error_of_the_code_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error), match="mine"):
        run(main)
