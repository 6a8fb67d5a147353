"""Keys, defaults, files, merging and checks of the configuration."""

import ast
import functools
import inspect
import math
import re
import tempfile
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers_unit import ROOT, configured, examples
from hypothesis import given
from hypothesis import strategies as st
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from models import GroupMixFormer
from models.build import build_model
from utils import config as config_module
from utils.config import (
    accumulation_steps,
    changes_answers,
    check,
    check_to_score,
    default_config,
    differences,
    flatten,
    load_config,
    lookup,
    merge_options,
    mixes,
)
from utils.errors import UserError

SIZES = ("miny", "tiny", "small", "base", "large")
CONFIGS = [f"groupmixformer_{size}{suffix}.yaml" for size in SIZES for suffix in ("", "_384")]

# The published keys, each with the value that the recipe states for it, or ANY.
ANY = object()
PUBLISHED_DEFAULTS = {
    "DATA.DATA_PATH": "",
    "DATA.DATASET": ANY,
    "DATA.BATCH_SIZE": 128,
    "DATA.IMG_SIZE": 224,
    "DATA.INTERPOLATION": "bicubic",
    "DATA.NUM_WORKERS": ANY,
    "DATA.PIN_MEMORY": True,
    "MODEL.TYPE": "groupmixformer",
    "MODEL.NAME": "groupmixformer",
    "MODEL.RESUME": "",
    "MODEL.PRETRAINED": "",
    "MODEL.LABEL_SMOOTHING": 0.1,
    "MODEL.GMA.PATCH_SIZE": 4,
    "MODEL.GMA.IN_DIM": 3,
    "MODEL.GMA.NUM_STAGES": 4,
    "MODEL.GMA.NUM_CLASSES": 1000,
    "MODEL.GMA.EMBEDDING_DIMS": ANY,
    "MODEL.GMA.SERIAL_DEPTHS": ANY,
    "MODEL.GMA.NUM_HEADS": 8,
    "MODEL.GMA.MLP_RATIOS": ANY,
    "MODEL.GMA.QKV_BIAS": True,
    "MODEL.GMA.QKV_SCALE": None,
    "MODEL.GMA.DROP_RATE": 0.0,
    "MODEL.GMA.ATTN_DROP_RATE": 0.0,
    "MODEL.GMA.DROP_PATH_RATE": ANY,
    "TRAIN.START_EPOCH": 0,
    "TRAIN.EPOCHS": 300,
    "TRAIN.WARMUP_EPOCHS": 20,
    "TRAIN.WEIGHT_DECAY": 0.05,
    "TRAIN.BASE_LR": 5e-4,
    "TRAIN.WARMUP_LR": 5e-7,
    "TRAIN.MIN_LR": 5e-6,
    "TRAIN.CLIP_GRAD": 5.0,
    "TRAIN.AUTO_RESUME": True,
    "TRAIN.ACCUMULATION_STEPS": ANY,
    "TRAIN.USE_CHECKPOINT": False,
    "TRAIN.LR_SCHEDULER.NAME": "cosine",
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": 30,
    "TRAIN.LR_SCHEDULER.DECAY_RATE": 0.1,
    "TRAIN.OPTIMIZER.NAME": "adamw",
    "TRAIN.OPTIMIZER.EPS": 1e-8,
    "TRAIN.OPTIMIZER.BETAS": [0.9, 0.999],
    "TRAIN.OPTIMIZER.MOMENTUM": 0.9,
    "AUG.COLOR_JITTER": 0.4,
    "AUG.AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
    "AUG.REPROB": 0.25,
    "AUG.REMODE": "pixel",
    "AUG.RECOUNT": 1,
    "AUG.MIXUP": 0.8,
    "AUG.CUTMIX": 1.0,
    "AUG.CUTMIX_MINMAX": None,
    "AUG.MIXUP_PROB": 1.0,
    "AUG.MIXUP_SWITCH_PROB": 0.5,
    "AUG.MIXUP_MODE": "batch",
    "TEST.CROP": True,
    "AMP_OPT_LEVEL": ANY,
    "OUTPUT": ANY,
    "TAG": "default",
    "SAVE_FREQ": 1,
    "PRINT_FREQ": 10,
    "SEED": 0,
    "EVAL_MODE": False,
    "THROUGHPUT_MODE": False,
}

PUBLISHED_FILE = """
DATA:
  BATCH_SIZE: 64
  DATASET: imagenet
  DATA_PATH: imagenet
  IMG_SIZE: 224
  INTERPOLATION: bicubic
  NUM_WORKERS: 32
  PIN_MEMORY: True
MODEL:
  TYPE: groupmixformer
  NAME: groupmixformer
  RESUME: ''
  PRETRAINED: ''
  LABEL_SMOOTHING: 0.1
  GMA:
    PATCH_SIZE: 4
    IN_DIM: 3
    NUM_STAGES: 4
    NUM_CLASSES: 1000
    EMBEDDING_DIMS: [ 80, 160, 200, 240 ]
    SERIAL_DEPTHS: [ 4, 4, 12, 4 ]
    NUM_HEADS: 8
    MLP_RATIOS: [ 4, 4, 4, 4 ]
    QKV_BIAS: True
    QKV_SCALE: None
    DROP_RATE: 0.
    ATTN_DROP_RATE: 0.
    DROP_PATH_RATE: 0.1
TRAIN:
  START_EPOCH: 0
  EPOCHS: 300
  WARMUP_EPOCHS: 20
  WEIGHT_DECAY: 0.05
  BASE_LR: 5e-4
  WARMUP_LR: 5e-7
  MIN_LR: 5e-6
  CLIP_GRAD: 5.0
  AUTO_RESUME: True
  ACCUMULATION_STEPS: 0
  USE_CHECKPOINT: False
  LR_SCHEDULER:
    NAME: cosine
    DECAY_EPOCHS: 30
    DECAY_RATE: 0.1
  OPTIMIZER:
    NAME: adamw
    EPS: 1e-8
    BETAS: [ 0.9, 0.999 ]
    MOMENTUM: 0.9
AUG:
  COLOR_JITTER: 0.4
  AUTO_AUGMENT: rand-m9-mstd0.5-inc1
  REPROB: 0.25
  REMODE: pixel
  RECOUNT: 1
  MIXUP: 0.8
  CUTMIX: 1.0
  CUTMIX_MINMAX: None
  MIXUP_PROB: 1.0
  MIXUP_SWITCH_PROB: 0.5
  MIXUP_MODE: batch
TEST:
  CROP: True
AMP_OPT_LEVEL: O1
OUTPUT: output
TAG: default
SAVE_FREQ: 1
PRINT_FREQ: 10
SEED: 0
EVAL_MODE: False
THROUGHPUT_MODE: False
"""


def written(folder, text, name="given.yaml"):
    path = Path(folder) / name
    path.write_text(text)
    return path


def load_text(folder, text):
    return load_config(written(folder, text))


def leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Defaults and published files


@pytest.mark.parametrize(("name", "value"), PUBLISHED_DEFAULTS.items(), ids=PUBLISHED_DEFAULTS)
def test_every_published_key_exists_with_the_recipes_default(name, value):
    found = lookup(default_config(), name)
    assert value is ANY or (found == value and type(found) is type(value))


SAFE_DEFAULTS = {
    "DATA.ON_ERROR": "stop",
    "DATA.MAX_BROKEN": 0.01,
    "TRAIN.ALLOW_CHANGES": False,
    "TRAIN.ELASTIC": False,
    "TRAIN.SAVE_UPDATES": 0,
    "TRAIN.SAVE_MINUTES": 15.0,
    "TRAIN.ON_NONFINITE": "stop",
    "TRAIN.MAX_LEFT_OUT": 20,
    "RANK_TIMEOUT": 600,
    "DETERMINISTIC": False,
}


@pytest.mark.parametrize(("name", "value"), SAFE_DEFAULTS.items(), ids=SAFE_DEFAULTS)
def test_without_a_key_a_run_stops_at_what_is_wrong_and_saves_often(name, value):
    found = lookup(default_config(), name)
    assert (found, type(found)) == (value, type(value))


def test_images_are_normalised_as_timm_does_by_default():
    data = default_config().DATA
    assert list(IMAGENET_DEFAULT_MEAN) == data.MEAN
    assert list(IMAGENET_DEFAULT_STD) == data.STD


def test_defaults_pass_the_checks():
    check(default_config())


def test_a_file_may_hold_any_letters(tmp_path, ascii_locale):
    (tmp_path / "a.yaml").write_text("TAG: Käse\n", encoding="utf-8")
    assert load_config(tmp_path / "a.yaml").TAG == "Käse"


def test_default_configurations_share_no_values():
    first = default_config()
    first.DATA.MEAN[0] = 9.0
    first.MODEL.GMA.EMBEDDING_DIMS.append(1)
    assert default_config() == default_config() != first


def test_a_published_file_loads_unchanged(tmp_path):
    config = load_text(tmp_path, PUBLISHED_FILE)
    check(config)
    for name, value in leaves(yaml.safe_load(PUBLISHED_FILE)):
        wanted = {"5e-4": 5e-4, "5e-7": 5e-7, "5e-6": 5e-6, "1e-8": 1e-8, "None": None}.get(str(value), value)
        assert lookup(config, name) == wanted, name
    assert accumulation_steps(config) == 1  # published files write 0 for no accumulation


def test_a_number_beyond_all_floats_is_refused_in_a_line():
    with pytest.raises(UserError, match=r"^--opts: TRAIN\.BASE_LR is .* but must be "):
        merge_options(default_config(), ["TRAIN.BASE_LR", "9" * 400])


def test_a_published_file_builds_the_network_that_it_describes(tmp_path):
    config = load_text(tmp_path, PUBLISHED_FILE)
    with torch.device("meta"):
        ours = build_model(config, 1000).state_dict()
        tiny = timm.create_model("groupmixformer_tiny").state_dict()
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in tiny.items()}


@pytest.mark.parametrize("size", SIZES)
def test_our_imagenet_configurations_follow_the_recipe(size):
    config = load_config(ROOT / "configs" / f"groupmixformer_{size}.yaml")
    check(config)
    assert config.DATA.BATCH_SIZE == 64
    own = ("DATA.BATCH_SIZE", "MODEL.NAME")
    for name, value in PUBLISHED_DEFAULTS.items():
        if value is not ANY and name not in own:
            assert lookup(config, name) == value, name


@pytest.mark.parametrize("file", CONFIGS)
def test_our_configurations_describe_the_registered_variants(file, monkeypatch):
    monkeypatch.setattr("models.groupmixformer.build_model_with_cfg", lambda *args, **kwargs: kwargs)
    gma = load_config(ROOT / "configs" / file).MODEL.GMA
    registered = timm.models.model_entrypoint(file.removesuffix(".yaml").removesuffix("_384"))()
    assert list(registered["embed_dims"]) == gma.EMBEDDING_DIMS
    assert list(registered["depths"]) == gma.SERIAL_DEPTHS
    assert list(registered["mlp_ratios"]) == gma.MLP_RATIOS
    assert set(registered) <= {"embed_dims", "depths", "mlp_ratios", "pretrained_filter_fn", "feature_cfg"}
    defaults = {name: value.default for name, value in inspect.signature(GroupMixFormer).parameters.items()}
    names = {"IN_DIM": "in_chans", "NUM_CLASSES": "num_classes", "NUM_HEADS": "num_heads", "QKV_BIAS": "qkv_bias"}
    names |= {"QKV_SCALE": "qk_scale", "DROP_RATE": "proj_drop_rate"}
    for key, argument in names.items():
        assert gma[key] == defaults[argument], key


@pytest.mark.parametrize("size", SIZES)
def test_fine_tuning_keeps_the_network_and_enlarges_the_images(size):
    trained = load_config(ROOT / "configs" / f"groupmixformer_{size}.yaml")
    tuned = load_config(ROOT / "configs" / f"groupmixformer_{size}_384.yaml")
    check(tuned)
    assert tuned.MODEL.GMA == trained.MODEL.GMA
    assert (tuned.DATA.IMG_SIZE, trained.DATA.IMG_SIZE) == (384, 224)
    assert tuned.TRAIN.BASE_LR < trained.TRAIN.BASE_LR
    assert tuned.TRAIN.EPOCHS < trained.TRAIN.EPOCHS


def test_each_configuration_has_a_name_of_its_own():
    names = [load_config(ROOT / "configs" / file).MODEL.NAME for file in CONFIGS]
    assert names == [file.removesuffix(".yaml") for file in CONFIGS]
    assert load_config(ROOT / "configs" / "digits.yaml").MODEL.NAME not in names


@functools.cache
def _names_in_product_code():
    """Attribute names and whole string constants, without the tables that only check keys or pass them on."""
    tables = {"default_config", "_RANGES", "_CHOICES", "_OPTIONAL", "_KEYS", "_FREE_KEYS"}
    names = set()
    for path in [*ROOT.glob("*.py"), *(p for d in ("utils", "data", "models") for p in (ROOT / d).glob("*.py"))]:
        for node in ast.parse(path.read_text()).body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            declared = {getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)}
            if declared & tables:
                continue
            for part in ast.walk(node):
                if isinstance(part, ast.Attribute):
                    names.add(part.attr)
                elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                    names.add(part.value)
    return names


@pytest.mark.parametrize("name", [name for name, _ in flatten(default_config())])
def test_every_key_is_read_somewhere(name):
    found = _names_in_product_code()
    only_choice = len(config_module._CHOICES.get(name, (1, 2))) == 1  # any other value is an error
    assert name.split(".")[-1] in found or name in found or only_choice


# Files


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("DATA: {IMGSIZE: 224}", "DATA.IMGSIZE", "did you mean DATA.IMG_SIZE?"),
        ("TRAIN: {OPTIMIZER: {BETA: [0.9, 0.999]}}", "TRAIN.OPTIMIZER.BETA", "did you mean TRAIN.OPTIMIZER.BETAS?"),
        ("MODEL: {GMA: {DEPTHS: [1, 1]}}", "MODEL.GMA.DEPTHS", "SERIAL_DEPTHS"),
        ("TARIN: {EPOCHS: 3}", "TARIN", "did you mean TRAIN?"),
        ("TEST: {zzz: 3}", "TEST.zzz", "CROP"),
        ("3: 4", "3", "DATA"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(tmp_path, text, key, hint):
    with pytest.raises(UserError) as caught:
        load_text(tmp_path, text)
    message = str(caught.value)
    assert f"unknown key {key}" in message
    assert hint in message
    assert "given.yaml" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "key", "wanted"),
    [
        ("DATA: {IMG_SIZE: '224'}", "DATA.IMG_SIZE", "whole number"),
        ("DATA: {IMG_SIZE: 224.0}", "DATA.IMG_SIZE", "whole number"),
        ("DATA: {BATCH_SIZE: True}", "DATA.BATCH_SIZE", "whole number"),
        ("DATA: {PIN_MEMORY: 1}", "DATA.PIN_MEMORY", "True or False"),
        ("TRAIN: {BASE_LR: small}", "TRAIN.BASE_LR", "number"),
        ("TRAIN: {BASE_LR: False}", "TRAIN.BASE_LR", "number"),
        ("TRAIN: {BASE_LR: }", "TRAIN.BASE_LR", "number"),
        ("DATA: {MEAN: 0.5}", "DATA.MEAN", "list"),
        ("DATA: {MEAN: [0.5, x, 0.5]}", "DATA.MEAN[1]", "number"),
        ("MODEL: {GMA: {SERIAL_DEPTHS: [2, 2.5, 2, 2]}}", "MODEL.GMA.SERIAL_DEPTHS[1]", "whole number"),
        ("MODEL: {GMA: {NUM_HEADS: [8, 8, 4, 8]}}", "MODEL.GMA.NUM_HEADS", "whole number"),
        ("MODEL: {GMA: {QKV_SCALE: large}}", "MODEL.GMA.QKV_SCALE", "number"),
        ("AUG: {CUTMIX_MINMAX: 0.5}", "AUG.CUTMIX_MINMAX", "list"),
        ("TAG: 5", "TAG", "text"),
        ("DATA: {ON_ERROR: False}", "DATA.ON_ERROR", "text"),
        ("TRAIN: {SAVE_UPDATES: 2.5}", "TRAIN.SAVE_UPDATES", "whole number"),
        ("TRAIN: {SAVE_MINUTES: often}", "TRAIN.SAVE_MINUTES", "number"),
        ("RANK_TIMEOUT: 0.5", "RANK_TIMEOUT", "whole number"),
        ("DETERMINISTIC: 1", "DETERMINISTIC", "True or False"),
        ("DATA: 5", "DATA", "keys"),
        ("TRAIN:", "TRAIN", "keys"),
        ("TRAIN: {OPTIMIZER: adamw}", "TRAIN.OPTIMIZER", "keys"),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path, text, key, wanted):
    with pytest.raises(UserError, match=re.escape(key)) as caught:
        load_text(tmp_path, text)
    assert wanted in str(caught.value)
    assert "given.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just a sentence",
        "[1, 2]",
        "DATA: [",
        "DATA:\n\tIMG_SIZE: 3",
        "? [a]\n: b",
        "OUTPUT: !!python/object:os.system x",
        "TAG: 2024-13-45",
    ],
    ids=["empty", "text", "list", "open bracket", "tab", "key that is a list", "code", "date that is none"],
)
def test_a_malformed_file_is_refused_by_its_name(tmp_path, text):
    with pytest.raises(UserError, match=r"given\.yaml") as caught:
        load_text(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["DATA: {IMG_SIZE: 224, IMG_SIZE: 384}", "DATA:\n  IMG_SIZE: 224\nTAG: x\nDATA:\n  BATCH_SIZE: 2\n"],
    ids=["inner", "outer"],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"given\.yaml line \d+: the key (DATA|IMG_SIZE) stands twice"):
        load_text(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", ["train.py", "weights.pth", "folder"])
def test_a_file_that_is_no_yaml_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"name a \.yaml file"):
        load_config(written(tmp_path, "DATA: {IMG_SIZE: 32}", name))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "given.yaml"
    path.write_bytes(b"\xff\xfe\x00DATA")
    with pytest.raises(UserError, match=r"given\.yaml cannot be read"):
        load_config(path)


def test_a_file_overrides_its_base_and_a_later_base_an_earlier_one(tmp_path):
    (tmp_path / "parts").mkdir()
    written(tmp_path, "DATA: {IMG_SIZE: 64, BATCH_SIZE: 2}\nTAG: first\nSEED: 1", "parts/first.yaml")
    written(tmp_path, "BASE: third.yaml\nDATA: {IMG_SIZE: 96}\nTAG: second", "parts/second.yaml")
    written(tmp_path, "PRINT_FREQ: 7\nTAG: third", "parts/third.yaml")
    config = load_text(tmp_path, "BASE: [parts/first.yaml, parts/second.yaml]\nSEED: 3")
    assert (config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE) == (96, 2)
    assert (config.TAG, config.SEED, config.PRINT_FREQ) == ("second", 3, 7)


@pytest.mark.parametrize("text", ["BASE: ['']", "BASE: ''", "BASE:", "BASE: []"])
def test_an_empty_base_is_none(tmp_path, text):
    assert load_text(tmp_path, f"{text}\nSEED: 3") == configured(SEED=3)


def test_the_same_base_may_be_reached_twice(tmp_path):
    written(tmp_path, "SEED: 4", "top.yaml")
    written(tmp_path, "BASE: top.yaml\nTAG: left", "left.yaml")
    written(tmp_path, "BASE: top.yaml\nPRINT_FREQ: 2", "right.yaml")
    config = load_text(tmp_path, "BASE: [left.yaml, right.yaml]")
    assert (config.SEED, config.TAG, config.PRINT_FREQ) == (4, "left", 2)


@pytest.mark.parametrize("circle", [["given.yaml"], ["other.yaml", "given.yaml"]], ids=["itself", "through another"])
def test_a_circle_of_bases_is_refused(tmp_path, circle):
    written(tmp_path, "BASE: given.yaml", "other.yaml")
    with pytest.raises(UserError, match="break the circle"):
        load_text(tmp_path, f"BASE: {circle[0]}")


def test_a_missing_base_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        load_text(tmp_path, "BASE: nowhere.yaml")


@pytest.mark.parametrize("base", ["3", "[3]", "True"])
def test_a_base_that_is_no_file_name_is_refused(tmp_path, base):
    with pytest.raises(UserError, match="BASE"):
        load_text(tmp_path, f"BASE: {base}")


@given(value=st.one_of(st.integers(0, 10**9), st.floats(0, 1e9)), spelling=st.sampled_from(["{!r}", "{:e}", "'{!r}'"]))
@examples(60)
def test_a_number_is_read_in_every_spelling(value, spelling):
    text = spelling.format(value)
    with tempfile.TemporaryDirectory() as folder:
        config = load_text(folder, f"TRAIN: {{BASE_LR: {text}}}")
    assert float(text.strip("'")) == config.TRAIN.BASE_LR
    assert type(config.TRAIN.BASE_LR) is float


def test_lists_of_numbers_take_whole_numbers(tmp_path):
    config = load_text(tmp_path, "MODEL: {GMA: {MLP_RATIOS: [4, 2, 3, 1]}}\nAUG: {SCALE: [1, 1]}")
    assert [type(ratio) for ratio in config.MODEL.GMA.MLP_RATIOS] == [float] * 4
    assert config.AUG.SCALE == [1.0, 1.0]


def test_one_number_of_heads_for_each_stage_is_taken_where_they_agree(tmp_path):
    config = load_text(tmp_path, "MODEL: {GMA: {NUM_HEADS: [8, 8, 8, 8]}}")
    assert config.MODEL.GMA.NUM_HEADS == 8


@pytest.mark.parametrize("text", ["None", "none", "''", "~", "null"])
def test_no_automatic_augmentation_has_many_names(tmp_path, text):
    assert load_text(tmp_path, f"AUG: {{AUTO_AUGMENT: {text}}}").AUG.AUTO_AUGMENT == "none"


# --opts


def test_options_override_in_their_order():
    config = default_config()
    options = ["DATA.IMG_SIZE", "64", "TRAIN.BASE_LR", "5e-4", "AUG.SCALE", "[0.5, 1]", "TEST.CROP", "False"]
    merge_options(config, [*options, "MODEL.GMA.QKV_SCALE", "0.25", "TAG", "a b", "DATA.IMG_SIZE", "96"])
    assert config == configured(
        DATA__IMG_SIZE=96,
        TRAIN__BASE_LR=5e-4,
        AUG__SCALE=[0.5, 1.0],
        TEST__CROP=False,
        MODEL__GMA__QKV_SCALE=0.25,
        TAG="a b",
    )


def test_no_options_change_nothing():
    config = default_config()
    merge_options(config, [])
    assert config == default_config()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["DATA.IMG_SIZE"], "pairs"),
        (["DATA.IMG_SIZE", "64", "TAG"], "'TAG'"),
        (["DATA.IMGSIZE", "64"], "DATA.IMG_SIZE"),
        (["DATA.IMG_SIZE", "large"], "DATA.IMG_SIZE"),
        (["DATA.IMG_SIZE.X", "64"], "DATA.IMG_SIZE"),
        (["DATA", "64"], "DATA"),
        (["", "64"], "unknown key"),
        (["AUG.SCALE", "[0.5, 1"], "AUG.SCALE"),
        (["SEED", "{a: 1, a: 2}"], "SEED"),
        (["SEED", "2024-13-45"], "SEED"),
    ],
)
def test_options_that_cannot_be_are_refused(options, told):
    with pytest.raises(UserError, match="--opts") as caught:
        merge_options(default_config(), options)
    assert told in str(caught.value)


@pytest.mark.parametrize("text", ["5", "2024-01-05", "", "yes", "[a"])
def test_an_option_of_a_text_key_is_taken_as_it_is_written(text):
    config = default_config()
    merge_options(config, ["TAG", text])
    assert text == config.TAG


# Saving and comparing


def _values_like(default):  # an empty list is of whole numbers
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(-(10**12), 10**12)
    if isinstance(default, float):
        return st.floats(allow_nan=False, allow_infinity=False)
    if isinstance(default, str):
        return st.text(st.characters(codec="utf-8"), max_size=12)
    return st.lists(_values_like(default[0] if default else 0), max_size=5)


_CHANGEABLE = {n: v for n, v in flatten(default_config()) if v is not None and n != "AUG.AUTO_AUGMENT"}


@given(data=st.data())
@examples(60)
def test_a_saved_configuration_loads_as_it_was(data):
    names = data.draw(st.lists(st.sampled_from(sorted(_CHANGEABLE)), max_size=8, unique=True))
    config = configured(**{n.replace(".", "__"): data.draw(_values_like(_CHANGEABLE[n]), n) for n in names})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.yaml"
        path.write_bytes(config.dump().encode())
        assert load_config(path) == config
    assert differences(config, config.dump()) == {}


@pytest.mark.parametrize("file", [*CONFIGS, "digits.yaml"])
def test_our_configurations_survive_saving(tmp_path, file):
    config = load_config(ROOT / "configs" / file)
    check(config)
    assert load_text(tmp_path, config.dump()) == config


def test_differences_name_the_key_and_both_values():
    saved = configured(SEED=3, AUG__SCALE=[0.2, 1.0]).dump()
    assert differences(default_config(), saved) == {
        "AUG.SCALE": "AUG.SCALE: [0.2, 1.0] -> [0.08, 1.0]",
        "SEED": "SEED: 3 -> 0",
    }


def test_a_key_that_is_newer_than_a_saved_configuration_had_its_default():
    saved = yaml.safe_load(default_config().dump())
    del saved["TRAIN"]["EMA_DECAY"]
    text = yaml.safe_dump(saved)
    assert differences(default_config(), text) == {}
    assert differences(configured(TRAIN__EMA_DECAY=0.5), text) == {"TRAIN.EMA_DECAY": "TRAIN.EMA_DECAY: 0.0 -> 0.5"}


# Checks

BAD_VALUES = [
    ("MODEL.GMA.PATCH_SIZE", 8),
    ("MODEL.GMA.ATTN_DROP_RATE", 0.1),
    ("TRAIN.START_EPOCH", 5),
    ("MODEL.TYPE", "swin"),
    ("DATA.INTERPOLATION", "cubic"),
    ("TRAIN.LR_SCHEDULER.NAME", "exponential"),
    ("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 0),
    ("TRAIN.LR_SCHEDULER.DECAY_RATE", -0.1),
    ("TRAIN.OPTIMIZER.BETAS", [0.9]),
    ("TRAIN.OPTIMIZER.BETAS", [0.9, 1.5]),
    ("TRAIN.OPTIMIZER.EPS", -1e-8),
    ("TRAIN.OPTIMIZER.MOMENTUM", -0.9),
    ("AUG.REMODE", "noise"),
    ("AUG.MIXUP_MODE", "half"),
    ("DEVICE", "tpu"),
    ("PRECISION", "fp8"),
    ("AMP_OPT_LEVEL", "O3"),
    ("DATA.BATCH_SIZE", 0),
    ("DATA.BATCH_SIZE", 63),
    ("DATA.IMG_SIZE", 31),
    ("DATA.NUM_WORKERS", -1),
    ("DATA.MEAN", [0.5]),
    ("DATA.STD", [0.5, 0.5]),
    ("DATA.STD", [0.5, 0.0, 0.5]),
    ("DATA.MEAN", [0.5, math.nan, 0.5]),
    ("DATA.STD", [0.5, math.nan, 0.5]),
    ("DATA.STD", [0.5, math.inf, 0.5]),
    ("DATA.LOADING", "faster"),
    ("DATA.ON_ERROR", "ignore"),
    ("DATA.MAX_BROKEN", -0.1),
    ("DATA.MAX_BROKEN", 1.1),
    ("DATA.MAX_BROKEN", math.nan),
    ("TRAIN.SAVE_UPDATES", -1),
    ("TRAIN.SAVE_MINUTES", -1.0),
    ("TRAIN.SAVE_MINUTES", math.inf),
    ("TRAIN.ON_NONFINITE", "ignore"),
    ("TRAIN.MAX_LEFT_OUT", 0),
    ("RANK_TIMEOUT", 0),
    ("RANK_TIMEOUT", 86401),
    ("MODEL.LABEL_SMOOTHING", 1.0),
    ("MODEL.LABEL_SMOOTHING", -0.1),
    ("MODEL.GMA.IN_DIM", 0),
    ("MODEL.GMA.NUM_CLASSES", -1),
    ("MODEL.GMA.DROP_RATE", 1.0),
    ("MODEL.GMA.DROP_PATH_RATE", 1.0),
    ("MODEL.GMA.EMBEDDING_DIMS", [40, 80]),
    ("MODEL.GMA.SERIAL_DEPTHS", [1]),
    ("MODEL.GMA.MLP_RATIOS", [4.0] * 5),
    ("TRAIN.EPOCHS", 0),
    ("TRAIN.WARMUP_EPOCHS", -1),
    ("TRAIN.WARMUP_EPOCHS", 301),
    ("TRAIN.WARMUP_UPDATES", -1),
    ("TRAIN.LR_BATCH", 0),
    ("TRAIN.LR_SCHEDULER.NAME", "multistep"),
    ("TRAIN.LR_SCHEDULER.MILESTONES", [0, 5]),
    ("TRAIN.LR_SCHEDULER.MILESTONES", [8, 5]),
    ("TRAIN.LR_SCHEDULER.MILESTONES", [5, 5]),
    ("TRAIN.WEIGHT_DECAY", -0.05),
    ("TRAIN.BASE_LR", -1e-3),
    ("TRAIN.BASE_LR", math.nan),
    ("TRAIN.BASE_LR", math.inf),
    ("TRAIN.WARMUP_LR", -1e-3),
    ("TRAIN.MIN_LR", -1e-3),
    ("TRAIN.LAYER_DECAY", 0.0),
    ("TRAIN.LAYER_DECAY", 1.1),
    ("TRAIN.CLIP_GRAD", -1.0),
    ("TRAIN.ACCUMULATION_STEPS", -1),
    ("TRAIN.EMA_DECAY", 1.0),
    ("TRAIN.EMA_DECAY", -0.1),
    ("AUG.SCALE", [1.0]),
    ("AUG.SCALE", [0.0, 1.0]),
    ("AUG.SCALE", [1.0, 0.5]),
    ("AUG.SCALE", [0.5, math.inf]),
    ("AUG.SCALE", [0.5, 1.5]),
    ("MODEL.GMA.QKV_SCALE", math.nan),
    ("AUG.RATIO", [1.3, 0.7]),
    ("AUG.HFLIP", 1.5),
    ("AUG.COLOR_JITTER", -0.1),
    ("AUG.REPROB", 1.1),
    ("AUG.RECOUNT", 0),
    ("AUG.REPEATS", 0),
    ("AUG.MIXUP", -0.1),
    ("AUG.CUTMIX", -0.1),
    ("AUG.CUTMIX_MINMAX", [0.2]),
    ("AUG.CUTMIX_MINMAX", [0.8, 0.2]),
    ("AUG.CUTMIX_MINMAX", [0.5, 0.5]),
    ("AUG.CUTMIX_MINMAX", [0.5, 0.504]),  # both 112 of 224 pixels
    ("AUG.MIXUP_PROB", 1.1),
    ("AUG.MIXUP_SWITCH_PROB", -0.1),
    ("DISTILL.KIND", "firm"),
    ("DISTILL.ALPHA", -0.1),
    ("DISTILL.ALPHA", 1.1),
    ("DISTILL.TEMPERATURE", 0.0),
    ("SAVE_FREQ", 0),
    ("KEEP", 0),
    ("PRINT_FREQ", 0),
    ("SEED", -1),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES, ids=[f"{name}={value}" for name, value in BAD_VALUES])
def test_a_value_that_cannot_work_is_refused_by_its_key(name, value):
    config = configured(**{name.replace(".", "__"): value})
    with pytest.raises(UserError, match=name.split(".")[-1]) as caught:
        check(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MODEL.GMA.NUM_CLASSES", 0),
        ("TRAIN.WARMUP_EPOCHS", 300),
        ("TRAIN.CLIP_GRAD", 0.0),
        ("TRAIN.ACCUMULATION_STEPS", 0),
        ("DATA.NUM_WORKERS", 0),
        ("DATA.IMG_SIZE", 33),
        ("AUG.CUTMIX_MINMAX", [0.2, 0.8]),
        ("AUG.CUTMIX_MINMAX", [0.5, 0.505]),
        ("AUG.SCALE", [1.0, 1.0]),
        ("AUG.MIXUP", 0.0),
        ("TRAIN.EMA_DECAY", 0.9999),
        ("DATA.LOADING", "fast"),
        ("DATA.ON_ERROR", "skip"),
        ("DATA.MAX_BROKEN", 0.0),
        ("DATA.MAX_BROKEN", 1.0),
        ("TRAIN.SAVE_UPDATES", 0),
        ("TRAIN.SAVE_MINUTES", 0.0),
        ("TRAIN.SAVE_MINUTES", 0.001),
        ("TRAIN.ON_NONFINITE", "skip"),
        ("TRAIN.MAX_LEFT_OUT", 1),
        ("RANK_TIMEOUT", 1),
        ("RANK_TIMEOUT", 86400),
        ("DETERMINISTIC", True),
        ("AMP_OPT_LEVEL", "O2"),
        ("PRECISION", "bf16"),
    ],
)
def test_a_value_at_the_edge_is_taken(name, value):
    check(configured(**{name.replace(".", "__"): value}))


def test_an_odd_batch_is_taken_where_nothing_mixes():
    check(configured(DATA__BATCH_SIZE=63, AUG__MIXUP=0.0, AUG__CUTMIX=0.0))
    check_to_score(configured(DATA__BATCH_SIZE=63, AUG__MIXUP=0.8))


@pytest.mark.parametrize("interpolation", ["lanczos", "nearest"])
def test_fast_loading_is_refused_where_torch_has_no_such_filter(interpolation):
    settings = {"DATA__INTERPOLATION": interpolation, "AUG__AUTO_AUGMENT": "none"}
    check(configured(**settings))
    with pytest.raises(UserError, match=rf"DATA\.LOADING fast .* DATA\.INTERPOLATION {interpolation}"):
        check(configured(**settings, DATA__LOADING="fast"))


@pytest.mark.parametrize("augmentation", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original"])
def test_augmentation_that_rotates_is_refused_with_lanczos_which_cannot(augmentation):
    settings = {"AUG__AUTO_AUGMENT": augmentation}
    for interpolation in ("bicubic", "bilinear", "nearest"):
        check(configured(**settings, DATA__INTERPOLATION=interpolation))
    check_to_score(configured(**settings, DATA__INTERPOLATION="lanczos"))
    for others in ("none", "3a"):
        check(configured(AUG__AUTO_AUGMENT=others, DATA__INTERPOLATION="lanczos"))
    with pytest.raises(
        UserError, match=rf"DATA\.INTERPOLATION lanczos cannot rotate, as AUG\.AUTO_AUGMENT {augmentation}"
    ):
        check(configured(**settings, DATA__INTERPOLATION="lanczos"))


@pytest.mark.parametrize("table", ["_CHOICES", "_RANGES", "_FIXED", "_KINDS", "_OPTIONAL"])
def test_what_is_checked_are_keys(table):
    """A task may lack some, so a name that no key has would never be found out by checking."""
    assert getattr(config_module, table).keys() <= dict(flatten(default_config())).keys()


def test_a_warm_up_in_updates_takes_the_place_of_one_in_epochs():
    check(configured(TRAIN__EPOCHS=10, TRAIN__WARMUP_EPOCHS=20, TRAIN__WARMUP_UPDATES=500))


def test_apexs_name_and_ours_for_the_precision_exclude_each_other():
    with pytest.raises(UserError, match="AMP_OPT_LEVEL O1 and PRECISION bf16"):
        check(configured(AMP_OPT_LEVEL="O1", PRECISION="bf16"))


def test_compiled_code_is_refused_where_some_of_what_it_computes_is_kept():
    cheap = {"TRAIN__COMPILE": True, "TRAIN__USE_CHECKPOINT": True, "TRAIN__RECOMPUTE": "cheap"}
    with pytest.raises(UserError, match=r"RECOMPUTE cheap does not fit TRAIN\.COMPILE"):
        check(configured(**cheap))
    for name, value in {"TRAIN__COMPILE": False, "TRAIN__USE_CHECKPOINT": False, "TRAIN__RECOMPUTE": "all"}.items():
        check(configured(**{**cheap, name: value}))


@pytest.mark.parametrize(
    ("mixup", "cutmix", "minmax", "mixed"),
    [(0.0, 0.0, None, False), (0.8, 0.0, None, True), (0.0, 1.0, None, True), (0.0, 0.0, [0.2, 0.8], True)],
)
def test_mixing_is_on_when_any_kind_of_it_is(mixup, cutmix, minmax, mixed):
    assert mixes(configured(AUG__MIXUP=mixup, AUG__CUTMIX=cutmix, AUG__CUTMIX_MINMAX=minmax)) is mixed


@pytest.mark.parametrize(("given_steps", "steps"), [(0, 1), (1, 1), (4, 4)])
def test_accumulation_of_none_is_one_step(given_steps, steps):
    assert accumulation_steps(configured(TRAIN__ACCUMULATION_STEPS=given_steps)) == steps


def test_what_changes_answers_is_all_of_the_network_and_of_what_its_input_is_made_by():
    keys = {key for key, _ in flatten(default_config()) if changes_answers(key)}
    of_network = {"PATCH_SIZE", "IN_DIM", "NUM_STAGES", "EMBEDDING_DIMS", "SERIAL_DEPTHS", "NUM_HEADS", "MLP_RATIOS"}
    of_network |= {"QKV_BIAS", "QKV_SCALE"}
    of_input = {"DATA.IMG_SIZE", "DATA.INTERPOLATION", "DATA.MEAN", "DATA.STD", "TEST.CROP"}
    assert keys == {f"MODEL.GMA.{name}" for name in of_network} | of_input
    assert changes_answers("MODEL.GMA.A_NEW_ONE")
