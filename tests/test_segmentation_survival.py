"""Segmentation runs that are killed or stopped, and go on as if they had not been."""

from signal import SIGTERM

import pytest
import torch

pytest_plugins = ["segments", "survival"]
pytestmark = pytest.mark.slow


def test_kills_and_a_stop_leave_no_trace(begin_life, segmentation_words, segmented, tmp_path, check_same_end):
    words = segmentation_words(tmp_path / "output", "TRAIN.SAVE_UPDATES 2")
    life = begin_life(words, tmp_path / "output", program="segmentation/train.py")
    life.kill("update 4")
    assert life.reached() == (1, 0)
    started = life.start(("step 4.0", "listen"))
    started.wait_for_fault()
    started.send(SIGTERM)
    result = started.end()
    assert result.code == 128 + SIGTERM, result.stderr
    assert life.reached() == (1, 2)
    check_same_end(life.run(life.go_on()), segmented)


def test_a_run_on_another_number_of_ranks_keeps_its_images_an_update(call, segmentation_words, segmented, tmp_path):
    segmented.stopped_after(1, tmp_path)
    words = segmentation_words(tmp_path, "TRAIN.SAVE_UPDATES 2")
    result = call("segmentation/train.py", *words, "--batch-size", 2, "--elastic")
    assert result.code == 0, result.stderr
    assert "in 2 step(s) an update" in result.stdout
    progress = torch.load(tmp_path / "tiny/run/last.pth", weights_only=True)["progress"]
    assert (progress["epoch"], progress["updates"], progress["images_per_update"]) == (3, 9, 4)
