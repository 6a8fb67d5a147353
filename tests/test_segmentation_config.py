"""Segmentation's keys: shared ones, its own, and values that cannot work."""

import ast

import pytest
import torch
from helpers_segmentation import FPN, tiny
from helpers_unit import ROOT

from segmentation.config import check, default_config
from segmentation.task import segmentation
from utils.config import default_config as shared_config
from utils.config import flatten, load_config
from utils.dist import World
from utils.errors import UserError

FILES = sorted((ROOT / "configs/segmentation").glob("*.yaml"))
VARIANTS = ["miny", "tiny", "small", "base", "large"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_a_configuration_that_opens_with_what_it_is(path):
    check(load_config(path, default_config))
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    if path.stem not in ("ade20k", "semantic_fpn"):
        assert f"segmentation/train.py --cfg configs/segmentation/{path.name} " in path.read_text()


@pytest.mark.parametrize("decoder", ["upernet", "fpn"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variants_are_those_that_classify(variant, decoder):
    ours = load_config(ROOT / f"configs/segmentation/{decoder}_{variant}.yaml", default_config)
    theirs = load_config(ROOT / f"configs/groupmixformer_{variant}.yaml")
    for key in ("EMBEDDING_DIMS", "SERIAL_DEPTHS", "MLP_RATIOS", "NUM_HEADS", "QKV_BIAS"):
        assert ours.MODEL.GMA[key] == theirs.MODEL.GMA[key]
    found = (ours.MODEL.NAME, ours.MODEL.DECODER.NAME, ours.MODEL.GMA.NUM_CLASSES)
    assert found == (f"{decoder}_{variant}", decoder, 150)


def test_larger_variants_have_deeper_drop_path():
    files = [load_config(ROOT / f"configs/segmentation/upernet_{variant}.yaml", default_config) for variant in VARIANTS]
    rates = [config.MODEL.GMA.DROP_PATH_RATE for config in files]
    assert rates == sorted(set(rates))


def test_the_recipe_is_the_fields():
    config = load_config(ROOT / "configs/segmentation/upernet_base.yaml", default_config)
    train = config.TRAIN
    assert train.EPOCHS * train.EPOCH_UPDATES == 160_000
    assert (train.BASE_LR, train.WEIGHT_DECAY, train.WARMUP_UPDATES, train.LR_BATCH) == (6e-5, 0.01, 1500, 16)
    assert (train.LR_SCHEDULER.NAME, train.MIN_LR, config.DATA.BATCH_SIZE * 8) == ("linear", 0, 16)


def test_every_key_of_its_own_is_read_somewhere():
    own = {
        name.split(".")[-1] for name in dict(flatten(default_config())).keys() - dict(flatten(shared_config())).keys()
    }
    read = set()
    for path in (ROOT / "segmentation").glob("*.py"):
        if path.name != "config.py":
            read |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert len(own) > 10
    assert own - read == set()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"AUG__SCALE": [2.0, 0.5]}, r"AUG\.SCALE is \[2\.0, 0\.5\]"),
        ({"TEST__SCALES": [0.0]}, r"TEST\.SCALES is \[0\.0\]"),
        ({"TEST__STRIDE": 40}, r"TEST\.STRIDE 40 is more than TEST\.WINDOW 32"),
        ({"MODEL__DECODER__NAME": "unet"}, r"MODEL\.DECODER\.NAME is 'unet': choose one of upernet, fpn"),
        ({"MODEL__DECODER__NAME": "fpn"}, r"MODEL\.DECODER\.CHANNELS 32 does not fit fpn's group norms"),
        ({"AUG__CAT_MAX_RATIO": 1.5}, r"AUG\.CAT_MAX_RATIO is 1\.5"),
        ({"TRAIN__EPOCH_UPDATES": -1}, r"TRAIN\.EPOCH_UPDATES is -1"),
        ({"DATA__SHORT_SIDE": -1}, r"DATA\.SHORT_SIDE is -1"),
    ],
)
def test_values_that_cannot_work_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        check(tiny(**values))


@pytest.mark.parametrize(
    ("decoder", "device", "said"),
    [
        ({}, "cuda", "DETERMINISTIC does not fit upernet"),
        ({}, "cpu", "DATA_PATH is empty"),  # the data is opened, but none is named
        (FPN, "cuda", "DATA_PATH is empty"),
    ],
    ids=["upernet on a GPU", "upernet on a CPU", "fpn on a GPU"],
)
def test_deterministic_training_is_judged_by_the_device_that_is_used(decoder, device, said):
    config = tiny(DETERMINISTIC=True, DEVICE="auto", **decoder)
    check(config)
    with pytest.raises(UserError, match=said):
        segmentation().open_data(config, World(0, 1, torch.device(device)))


@pytest.mark.parametrize(
    ("values", "device", "ranks", "said"),
    [
        ({}, "cuda", 1, r"DATA\.BATCH_SIZE 1 does not fit upernet"),
        ({}, "cpu", 2, r"DATA\.BATCH_SIZE 1 does not fit upernet"),
        ({"TRAIN__SYNC_BN": False}, "cuda", 2, r"DATA\.BATCH_SIZE 1 does not fit upernet"),
        ({}, "cuda", 2, "DATA_PATH is empty"),  # norms see the images of both GPUs
        (FPN, "cpu", 1, "DATA_PATH is empty"),
    ],
    ids=["a GPU", "CPUs", "GPUs that normalise alone", "GPUs that normalise together", "fpn"],
)
def test_training_on_single_images_is_refused_where_a_norm_would_see_one_pixel(values, device, ranks, said):
    config = tiny(DATA__BATCH_SIZE=1, **values)
    check(config)  # scoring, which the same keys are for, needs no batch
    with pytest.raises(UserError, match=said):
        segmentation().open_data(config, World(0, ranks, torch.device(device)))


def test_three_stages_are_refused():
    lists = {"EMBEDDING_DIMS": [40] * 3, "SERIAL_DEPTHS": [1] * 3, "MLP_RATIOS": [2.0] * 3, "NUM_STAGES": 3}
    with pytest.raises(UserError, match=r"MODEL\.GMA\.NUM_STAGES is 3: the decoders take 4 stages"):
        check(tiny(MODEL__GMA=lists))


def test_keys_that_mean_nothing_here_are_unknown(tmp_path):
    (tmp_path / "a.yaml").write_text("AUG:\n  MIXUP: 0.8\n")
    with pytest.raises(UserError, match=r"unknown key AUG\.MIXUP"):
        load_config(tmp_path / "a.yaml", default_config)
