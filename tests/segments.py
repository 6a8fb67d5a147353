"""A small tree of images with label maps, a small configuration, and ways to start segmentation's programs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Result, Run
from helpers_segmentation import TINY, write_tree


@pytest.fixture(scope="session")
def pairs(shared: Callable[..., Path]) -> Path:
    """The tree of `write_tree`."""
    return shared("pairs", write_tree)


@pytest.fixture(scope="session")
def tiny_segmentation(shared: Callable[..., Path]) -> Path:
    """The small configuration's file."""
    fill = lambda folder: (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))  # noqa: E731
    return shared("segmentation_configs", fill) / "tiny.yaml"


@pytest.fixture(scope="session")
def segmentation_words(pairs: Path, tiny_segmentation: Path) -> Callable[..., list[str]]:
    """What follows segmentation/train.py or test.py: `segmentation_words(output, opts="KEY value")`."""

    def make(output: Path, opts: str = "") -> list[str]:
        where = ["--cfg", tiny_segmentation, "--data-path", pairs, "--output", output, "--tag", "run"]
        return [*map(str, where), *(["--opts", *opts.split()] if opts else [])]

    return make


@pytest.fixture(scope="session")
def segmented(
    call: Callable[..., Result], shared_run: Callable[..., Run], segmentation_words: Callable[..., list[str]]
) -> Run:
    """A run of segmentation/train.py: three epochs of three updates, with a moving average, saved every two updates."""
    words = "TRAIN.SAVE_UPDATES 2"
    run = shared_run("segmented", lambda output: call("segmentation/train.py", *segmentation_words(output, words)))
    assert run.result.code == 0, run.result.stderr
    return run
