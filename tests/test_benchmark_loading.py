"""How loading is measured."""

import argparse
import json

import pytest
import torch
from helpers_unit import ROOT, noise, write_folder

from tools.benchmarking import loading
from tools.benchmarking.loading import STAGES, Way, add_loader_arguments, loader_table, loading_ways, run_loader
from utils.config import load_config
from utils.errors import UserError
from utils.seeding import seed_host

RECIPE = ROOT / "configs" / "groupmixformer_small.yaml"


@pytest.fixture
def root(tmp_path):
    """Five JPEGs of two classes."""
    return write_folder(tmp_path / "data", {"a": 3, "b": 2}, noise, ".jpg")


@pytest.fixture
def measure(root, tmp_path):
    """Measures the loading of small images, with more words on the command line."""
    (tmp_path / "small.yaml").write_text(f"BASE: {RECIPE}\nDATA: {{IMG_SIZE: 32}}\n")

    def run(*words, data=root):
        parser = argparse.ArgumentParser()
        add_loader_arguments(parser)
        given = ["--loader-cfg", str(tmp_path / "small.yaml"), "--loader-images", "6", "--loader-rounds", "2", *words]
        return run_loader(parser.parse_args([*given, *(["--loader-data", str(data)] if data else [])]))

    return run


def test_all_ways_of_loading_are_measured_stage_by_stage(measure):
    result = json.loads(json.dumps(measure("--loader-workers", "1", "--loader-gpus", "50")))
    names = ["published", "exact", "fast"]
    assert list(result["stages_ms"]) == list(result["images_per_s_and_core"]) == names
    for name in names:
        stages = result["stages_ms"][name]
        assert tuple(stages) == STAGES
        assert all(stages[stage]["median"] > 0 for stage in STAGES if (name, stage) != ("published", "seed"))
        assert list(result["loaders"]["1"]["images_per_s"]) == names
    assert result["against_published"]["published"] == 1
    rows = loader_table(result).splitlines()
    assert rows[2] == "| | published | exact | fast |"
    assert [row for row in rows if row.startswith("| decode, ms | ")]
    assert {row.count("|") for row in rows[2:]} == {5}


def test_a_machine_feeds_as_many_gpus_as_its_cores_load_for(measure, monkeypatch):
    monkeypatch.setattr(loading, "available_cores", lambda: 64)
    result = measure("--loader-workers", "--loader-gpus", "2000")
    for name, speed in result["images_per_s_and_core"].items():
        assert result["gpus_fed"][name] == {"2000": pytest.approx(64 * speed["median"] / 2000)}


def test_every_stage_gets_its_own_time(monkeypatch):
    now = [0.0]

    def takes(seconds):
        def step(value):
            now[0] += seconds
            return value

        return step

    monkeypatch.setattr("time.process_time", lambda: now[0])
    way = Way({"read": takes(1.0), "decode": takes(20.0)}, takes(600.0), is_seeded=True)
    times = loading.time_stages({"way": way}, [["x"] * 6, ["x"] * 6])
    assert times == {"way": [{"seed": 0, "read": 1, "decode": 20, "collate": 100}] * 2}


def test_the_published_and_the_exact_way_load_the_same_images(root):
    config = load_config(RECIPE)
    config.merge_from_list(["DATA.IMG_SIZE", 32, "AUG.REPROB", 0.0, "DATA.MEAN", [0.0] * 3, "DATA.STD", [1.0] * 3])
    ways, images = loading_ways(config), {}
    for seed in range(20):
        for name in ("published", "exact"):
            seed_host(seed)
            value = str(root / "a" / "001.jpg")
            for step in ways[name].stages.values():
                value = step(value)
            images[name] = value
        assert torch.equal(images["published"], images["exact"] / 255)


def test_the_fast_way_is_the_one_of_its_name():
    ways = loading_ways(load_config(RECIPE))
    assert type(ways["fast"].stages["crop and resize"]).__name__ == "FastResize"


def test_images_are_found_below_train_too(measure, root):
    root.rename(root.parent / "train")
    assert measure("--loader-workers", data=root.parent)["images"].startswith("5 files")


def test_what_cannot_be_loaded_is_told_in_a_line(measure, root):
    with pytest.raises(UserError, match="--loader-data"):
        measure(data=None)
    with pytest.raises(UserError, match="--loader-rounds"):
        measure("--loader-rounds", "0")
    (root / "a" / "001.jpg").write_bytes((root / "a" / "001.jpg").read_bytes()[:-300])
    with pytest.raises(UserError, match=r"001\.jpg is broken") as caught:
        measure()
    assert "\n" not in str(caught.value)
