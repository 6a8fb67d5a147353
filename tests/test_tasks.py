"""What is of another task is refused at once, with the programs that take it; and what tasks differ in."""

import re
from unittest import mock

import pytest
import torch
from helpers_unit import ALONE, ROOT
from yacs.config import CfgNode

from detection.config import default_config as detection
from detection.task import detection as detecting
from segmentation.config import default_config as segmentation
from segmentation.task import segmentation as segmenting
from tools.runs.averaging import look_at
from utils import checkpoint
from utils.classification import classification as classifying
from utils.config import default_config as classification
from utils.config import load_config, merge_options
from utils.dist import World
from utils.distillation import check_teacher
from utils.errors import UserError
from utils.precision import Precision
from utils.resume import find_state, start_from_pretrained
from utils.scoring import read_weights
from utils.trained import load_trained
from utils.trainer import build_training

DEFAULTS = {"classification": classification, "segmentation": segmentation, "detection": detection}
PROGRAMS = {
    "classification": "use train.py or test.py",
    "segmentation": "use segmentation/train.py or segmentation/test.py",
    "detection": "use detection/train.py or detection/test.py",
}
FILES = {
    "classification": ["groupmixformer_small.yaml", "imagenet.yaml", "digits.yaml"],
    "segmentation": ["segmentation/upernet_small.yaml", "segmentation/semantic_fpn.yaml"],
    "detection": ["detection/mask_rcnn_small.yaml", "detection/coco_1x.yaml"],
}
OTHERS = [(task, other) for task in DEFAULTS for other in DEFAULTS if task != other]


def said(task, other):
    return f"of {other} and not of {task}: {PROGRAMS[other]}, or name another"


@pytest.fixture
def save(tmp_path):
    """Saves a checkpoint of a task, without a network."""

    def save_of(task):
        path = tmp_path / f"{task}.pth"
        progress = {"images_per_update": 4, "ranks": 1}
        checkpoint.save({"model": {}, "config": DEFAULTS[task]().dump(), "progress": progress}, path)
        return path

    return save_of


def configured(task: str, key: str, path: object) -> CfgNode:
    config = DEFAULTS[task]()
    merge_options(config, [key, str(path)])
    return config


@pytest.mark.parametrize(
    ("task", "file"), [(task, file) for task, other in OTHERS for file in FILES[other]], ids=lambda word: word
)
def test_a_configuration_of_another_task_is_told_by_its_task(task, file):
    other = next(name for name, files in FILES.items() if file in files)
    with pytest.raises(UserError) as caught:
        load_config(ROOT / "configs" / file, DEFAULTS[task])
    told = said(task, other).removesuffix(", or name another")
    assert re.search(rf"\.yaml has MODEL\.[A-Z_]+, a key {told}$", str(caught.value))


def test_an_option_of_another_task_is_told_by_its_task():
    with pytest.raises(UserError) as caught:
        merge_options(classification(), ["MODEL.DECODER.NAME", "fpn"])
    assert str(caught.value) == (
        "--opts has MODEL.DECODER, a key of segmentation and not of classification: "
        "use segmentation/train.py or segmentation/test.py"
    )


def test_a_key_of_another_task_among_ones_own_is_just_unknown(tmp_path):
    (tmp_path / "mixed.yaml").write_text("MODEL: {LABEL_SMOOTHING: 0.1, DECODER: {NAME: fpn}}")
    with pytest.raises(UserError, match=r"unknown key MODEL\.LABEL_SMOOTHING"):
        load_config(tmp_path / "mixed.yaml", segmentation)


@pytest.mark.parametrize(("task", "other"), OTHERS)
def test_a_checkpoint_of_another_task_is_neither_scored_nor_gone_on_with(save, tmp_path, task, other):
    config = configured(task, "MODEL.RESUME", save(other))
    with pytest.raises(UserError) as caught:
        read_weights(config)
    assert str(caught.value) == f"{save(other)} is {said(task, other)}"
    with pytest.raises(UserError) as caught:
        find_state(config, tmp_path / "run", ALONE)
    assert str(caught.value) == f"{save(other)} is {said(task, other)}"


@pytest.mark.parametrize(("task", "other"), OTHERS)
def test_training_starts_from_a_classifier_but_from_no_other_task(save, task, other):
    config, loaded = configured(task, "MODEL.PRETRAINED", save(other)), []

    def load(network, weights, source):
        loaded.append(source)
        return []

    if other == "classification":
        start_from_pretrained(config, None, None, load)
        assert loaded == [str(save(other))]
    else:
        with pytest.raises(UserError) as caught:
            start_from_pretrained(config, None, None, load)
        assert str(caught.value) == f"{save(other)} is {said(task, other)}"


@pytest.mark.parametrize("other", ["segmentation", "detection"])
@pytest.mark.parametrize(
    "use",
    [
        load_trained,
        lambda path: load_trained(path, ROOT / "configs" / "digits.yaml"),
        lambda path: look_at(path, "auto"),
        lambda path: check_teacher(configured("classification", "DISTILL.TEACHER", path), None),
    ],
    ids=["trained", "trained with a configuration", "averaged", "teacher"],
)
def test_a_checkpoint_of_another_task_is_no_classifier(save, use, other):
    with pytest.raises(UserError) as caught:
        use(save(other))
    assert str(caught.value) == f"{save(other)} is {said('classification', other)}"


def test_a_checkpoint_of_another_task_is_not_converted(call, save, tmp_path):
    result = call("tools/convert_checkpoint.py", save("detection"), tmp_path / "converted.pth")
    assert result.code == 2
    assert result.errors == [f"{save('detection')} is {said('classification', 'detection')}"]


@pytest.mark.parametrize("config", [None, "resnet", "a: [", "2024-13-41", {"MODEL": {"DECODER": {}}}], ids=str)
def test_a_checkpoint_that_tells_of_no_task_is_taken(tmp_path, config):
    checkpoint.save({"model": {}, "config": config}, tmp_path / "others.pth")
    assert checkpoint.load_for_task(tmp_path / "others.pth", "classification")["config"] == config


@pytest.mark.parametrize(
    ("task", "measures"),
    [(classifying(), True), (segmenting(), True), (detecting(detection()), False)],
    ids=["classification", "segmentation", "detection"],
)
def test_a_gpus_kernels_are_measured_where_all_images_to_train_on_are_of_one_size(monkeypatch, task, measures):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not measures)
    network, world = mock.Mock(), World(0, 1, torch.device("cuda"))
    network.to.side_effect = InterruptedError  # before a GPU is needed
    with pytest.raises(InterruptedError):
        build_training(classification(), world, Precision("fp32", "cuda"), task, network, 4)
    assert torch.backends.cudnn.benchmark is measures
