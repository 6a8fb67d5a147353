"""Fixtures of detection: a small data set, the configuration of a tiny detector, and a run of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers_detection import TINY, add_crowd, write_coco


@pytest.fixture(scope="session")
def coco_tree(shared: Callable[..., Path]) -> Path:
    """12 images to train on and 7 to score, of three sizes; the first one to score has a crowd."""

    def fill(folder: Path) -> None:
        write_coco(folder, "train2017", 12, seed=0)
        write_coco(folder, "val2017", 7, seed=1, edit=add_crowd)

    return shared("coco_tree", fill)


@pytest.fixture(scope="session")
def tiny_detector(shared: Callable[..., Path]) -> Path:
    """The file of `configured()`."""
    return shared("detector_configs", lambda folder: (folder / "tiny.yaml").write_text(TINY)) / "tiny.yaml"


@pytest.fixture(scope="session")
def detector_words(coco_tree: Path, tiny_detector: Path) -> Callable[..., list[str]]:
    """What follows detection/train.py: `detector_words(output, "KEY value", tag="run")`."""

    def make(output: Path, opts: str = "", tag: str = "run") -> list[str]:
        where = ["--cfg", tiny_detector, "--data-path", coco_tree, "--output", output, "--tag", tag]
        return [str(word) for word in (*where, *(["--opts", *opts.split()] if opts else []))]

    return make


@pytest.fixture(scope="session")
def trained_detector(
    start: Callable[..., Any], shared_run: Callable[..., Any], detector_words: Callable[..., list[str]]
) -> Any:
    """A run of detection/train.py, started as a user does: two epochs of six updates."""
    run = shared_run("trained_detector", lambda output: start("detection/train.py", *detector_words(output)))
    assert run.result.code == 0, run.result.stderr
    return run
