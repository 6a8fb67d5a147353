"""How long a run is and how far, counted and carried through a file."""

import torch
from helpers_unit import examples
from hypothesis import given
from hypothesis import strategies as st

from utils.progress import Progress, Steps, Window


def counts(progress):
    return progress.epoch, progress.place, progress.updates, progress.left_out, progress.left_out_in_row


@given(
    steps_per_epoch=st.integers(1, 60),
    accumulation=st.integers(1, 9),
    epochs=st.integers(1, 5),
    start=st.integers(0, 4),
)
@examples(100)
def test_steps_and_updates_agree_with_counting_them(steps_per_epoch, accumulation, epochs, start):
    steps = Steps(steps_per_epoch, accumulation, epochs)
    sizes, held = [], 0
    for step in range(steps_per_epoch):
        held += 1
        if held == accumulation or step == steps_per_epoch - 1:  # the tail of an epoch counts
            sizes.append(held)
            held = 0
    assert [len(steps.batches_of_update(update)) for update in range(steps.updates_per_epoch)] == sizes
    assert steps.updates == epochs * len(sizes)


def test_a_new_run_is_at_its_beginning():
    assert counts(Progress()) == (0, 0, 0, 0, 0)
    assert Progress().window == Window(0, 0.0, 0.0)


def test_an_update_that_is_taken_moves_the_place_and_the_schedule():
    progress = Progress()
    progress.take(2.0, 0.5)
    progress.take(1.0, 0.25)
    assert counts(progress) == (0, 2, 2, 0, 0)
    assert progress.window == Window(2, 3.0, 0.75)


def test_an_update_that_is_left_out_moves_the_place_only():
    progress = Progress()
    progress.take(2.0, 0.5)
    progress.leave_out()
    progress.leave_out()
    assert counts(progress) == (0, 3, 1, 2, 2)
    assert progress.window == Window(1, 2.0, 0.5)


def test_an_update_that_is_taken_ends_a_row_of_those_left_out():
    progress = Progress()
    progress.leave_out()
    progress.take(1.0, 1.0)
    progress.leave_out()
    assert counts(progress) == (0, 3, 1, 2, 1)


def test_an_epoch_that_ends_keeps_the_counts_of_the_run():
    progress = Progress()
    progress.take(2.0, 0.5)
    progress.leave_out()
    progress.end_epoch()
    assert counts(progress) == (1, 0, 1, 1, 1)


def advanced():
    progress = Progress(epoch=2, broken=["a.png: empty", "b.png: text"])
    progress.take(0.1 + 0.2, 1 / 3)
    progress.leave_out()
    return progress


def test_progress_comes_back_from_a_file_as_it_was(tmp_path):
    torch.save(advanced().state_dict(), tmp_path / "progress.pth")
    back = Progress()
    back.load_state_dict(torch.load(tmp_path / "progress.pth", weights_only=True))
    assert back == advanced()


def test_what_a_checkpoint_adds_is_not_taken_over():
    back = Progress()
    back.load_state_dict({**advanced().state_dict(), "ranks": 2, "images": 48})
    assert back == advanced()
    assert not hasattr(back, "ranks")


def test_neither_what_was_given_nor_what_was_taken_over_changes_with_the_run():
    progress, other = advanced(), Progress()
    state = progress.state_dict()
    other.load_state_dict(state)
    for one in (progress, other):
        one.take(1.0, 1.0)
        one.broken.append("c.png: empty")
    assert state == advanced().state_dict()
