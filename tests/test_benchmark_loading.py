"""How loading is measured."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from helpers_unit import ROOT, noise, write_folder

from tools.benchmarking import loading
from tools.benchmarking.loading import add_loader_arguments, find_images, loader_tables, run_loader
from tools.benchmarking.ways import STAGES, Way, loading_ways
from utils.config import load_config
from utils.errors import UserError
from utils.seeding import seed_host

PROGRAM = "tools/benchmark.py"
MACHINE = {"cpu": "a processor", "cores": 2, "threads": 1, "torch": "2", "pillow": "12"}
RECIPE = ROOT / "configs" / "groupmixformer_small.yaml"


@pytest.fixture
def root(tmp_path):
    """Five JPEGs of two classes."""
    return write_folder(tmp_path / "data", {"a": 3, "b": 2}, noise, ".jpg")


@pytest.fixture
def measure(root, tmp_path, monkeypatch):
    """Measures the loading of small images, with more words on the command line."""
    monkeypatch.setattr(loading, "_LEAST", 6)
    (tmp_path / "small.yaml").write_text(f"BASE: {RECIPE}\nDATA: {{IMG_SIZE: 32}}\n")

    def run(*words, data=root, rounds=2):
        parser = argparse.ArgumentParser()
        add_loader_arguments(parser)
        given = ["--data-path", str(data), "--cfg", str(tmp_path / "small.yaml"), "--images", "6"]
        return run_loader(parser.parse_args([*given, *words], argparse.Namespace(rounds=rounds)))

    return run


def test_all_ways_of_loading_are_measured_stage_by_stage(measure):
    result = json.loads(json.dumps(measure("--workers", "1", "--gpu-speed", "50")))
    names = ["published", "exact", "fast"]
    assert list(result["stages_ms"]) == list(result["images_per_s_and_core"]) == names
    for name in names:
        stages = result["stages_ms"][name]
        assert tuple(stages) == STAGES
        assert all(stages[stage]["median"] > 0 for stage in STAGES if (name, stage) != ("published", "seed"))
        assert list(result["loaders"]["1"]["images_per_s"]) == names
    assert result["against_published"]["published"] == 1
    rows = loader_tables(result, MACHINE).splitlines()
    assert (
        rows[0]
        == "a processor, 2 cores, 1 thread, torch 2, Pillow 12; 5 files, 32 x 32, rand-m9-mstd0.5-inc1; 2 rounds."
    )
    assert rows[2] == "|  | published | exact | fast |"
    titles = [row.split(" | ")[0].removeprefix("| ") for row in rows[4:] if row.startswith("|")]
    assert titles == [
        *(f"{stage}, ms" for stage in STAGES),
        *("images/s of one core", "x published", "images/s of 1 worker", "x published"),
        "GPUs fed, of 50 images/s each",
    ]
    assert {row.count("|") for row in rows[2:] if row.startswith("|")} == {5}


def test_grey_images_are_loaded_as_grey_in_every_way(root):
    ways = loading_ways(load_config(ROOT / "configs" / "digits.yaml"))
    path = next(str(path) for path in root.rglob("*.jpg"))
    shapes = {}
    for name, way in ways.items():
        value = path
        for step in way.stages.values():
            value = step(value)
        shapes[name] = tuple(value.shape)
    assert shapes == dict.fromkeys(("published", "exact", "fast"), (1, 32, 32))


def test_a_recipe_that_fast_loading_cannot_do_is_refused():
    config = load_config(RECIPE)
    config.DATA.INTERPOLATION = "nearest"
    with pytest.raises(UserError, match=r"DATA\.LOADING fast cannot resize"):
        loading_ways(config)


def test_no_more_images_are_looked_at_than_are_loaded(root):
    for path in root.rglob("*.jpg"):
        path.unlink()
    whole = write_folder(root, {"a": 40, "b": 40}, noise, ".jpg")
    found = find_images(whole, 30)
    assert len(set(found)) == 30 and {Path(path).parent.name for path in found} == {"a", "b"}
    for path in set(map(str, whole.rglob("*.jpg"))) - set(found):
        Path(path).write_bytes(b"")
    assert find_images(whole, 30) == found


def test_a_machine_feeds_as_many_gpus_as_its_cores_load_for(measure, monkeypatch):
    monkeypatch.setattr(loading, "available_cores", lambda: 64)
    result = measure("--workers", "--gpu-speed", "2000")
    for name, speed in result["images_per_s_and_core"].items():
        assert result["gpus_fed"][name] == {"2000": pytest.approx(64 * speed["median"] / 2000)}


@pytest.mark.parametrize(("workers", "count"), [(1, 40), (3, 60)])
def test_worker_processes_load_enough_images_to_be_measured(root, monkeypatch, workers, count):
    monkeypatch.setattr(loading, "_LEAST", 40)
    loaded = []
    monkeypatch.setattr(loading, "DataLoader", lambda samples, *_, **__: loaded.append(len(samples)) or [])
    way = Way({}, list, is_seeded=True)
    loading.time_loaders({"way": way}, ["x"], workers, argparse.Namespace(images=20, rounds=1))
    assert loaded == [count]


def test_measuring_leaves_the_number_of_threads_as_it_was(measure):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        measure("--workers")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


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
    assert measure("--workers", data=root.parent)["images"].startswith("5 files")


def test_a_broken_image_is_told_in_a_line(measure, root):
    (root / "a" / "001.jpg").write_bytes((root / "a" / "001.jpg").read_bytes()[:-300])
    with pytest.raises(UserError, match=r"001\.jpg is broken") as caught:
        measure()
    assert "\n" not in str(caught.value)


# The program


def test_the_loader_is_reported_as_networks_are(call, root, tmp_path):
    files = {name: tmp_path / f"loader.{name}" for name in ("json", "markdown")}
    ended = call(
        *(PROGRAM, "--loader", "--data-path", root, "--rounds", 2, "--images", 2, "--workers", "--gpu-speed", 7),
        *(word for name, path in files.items() for word in (f"--{name}", path)),
    )
    assert ended.code == 0, ended.stderr
    assert "| GPUs fed, of 7 images/s each |" in ended.stdout
    assert ended.stdout == files["markdown"].read_text()
    written = json.loads(files["json"].read_text())
    assert list(written) == ["machine", "settings", "results"]
    assert written["machine"]["cores"] > 0 and written["machine"]["pillow"]
    assert str(ROOT) not in files["json"].read_text()
    assert written["settings"]["images"] == 2 and written["results"]["rounds"] == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--loader"], "--data-path"),
        (["--loader", "--data-path", "nowhere"], "nowhere is no folder"),
        (["--loader", "--data-path", "{root}", "--rounds", "0"], "--rounds: 0"),
        (["--loader", "--data-path", "{root}", "--images", "0"], "--images: 0"),
        (["--loader", "--data-path", "{root}", "--workers", "2", "0"], "--workers: 0"),
        (["--loader", "--data-path", "{root}", "--gpu-speed", "0"], "--gpu-speed 0"),
        (["--loader", "--data-path", "{root}", "--cfg", "no.yaml"], "no.yaml"),
        (["--loader", "--data-path", "{root}", "--json", "{root}"], "--json"),
        (["--loader", "--data-path", "{root}", "--png", "speed.png"], "--png speed.png"),
        (["--workers", "2"], "--workers 2"),
    ],
)
def test_a_flag_that_is_wrong_or_means_nothing_ends_in_one_line_that_names_it(call, root, words, told):
    ended = call(PROGRAM, *(word.format(root=root) for word in words))
    assert ended.code == 2 and len(ended.errors) == 1 and told in ended.errors[0]
