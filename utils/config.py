"""The configuration: every key with its default, merging of files and flags, and checks.

A key that is not listed here is an error, and so is a value of another type. Values derived from the configuration
(a learning rate scaled to the batch) are never written back to it.
"""

import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml
from yacs.config import CfgNode

from utils.errors import UserError, listing


def default_config() -> CfgNode:
    """All keys, at the values of the published ImageNet-1K recipe wherever it states one."""
    return CfgNode(
        {
            "DATA": {
                "DATA_PATH": "",
                "DATASET": "folder",  # or, for timm's create_dataset: tar, torch/.., wds/.., hfds/.., hfids/.., tfds/..
                "TRAIN_SPLIT": "train",  # folder, tar file or split of that name
                "VAL_SPLIT": "val",
                "BATCH_SIZE": 128,  # on each rank, for one micro-batch
                "IMG_SIZE": 224,
                "INTERPOLATION": "bicubic",
                "MEAN": [0.485, 0.456, 0.406],  # of ImageNet's pixels
                "STD": [0.229, 0.224, 0.225],
                "NUM_WORKERS": 8,  # on each rank, at most as many as it has cores
                "PIN_MEMORY": True,
                "LOADING": "exact",  # PIL's pixels; or fast: nearly the same ones, in training only
                "ON_ERROR": "stop",  # at a broken image; or skip: another one takes its place, in training only
                "MAX_BROKEN": 0.01,  # share of the training images that may be broken
            },
            "MODEL": {
                "TYPE": "groupmixformer",
                "NAME": "groupmixformer",  # names the output folder
                "RESUME": "",
                "PRETRAINED": "",
                "LABEL_SMOOTHING": 0.1,
                "GMA": {
                    "PATCH_SIZE": 4,
                    "IN_DIM": 3,
                    "NUM_STAGES": 4,
                    "NUM_CLASSES": 1000,  # 0: as many as the data has
                    "EMBEDDING_DIMS": [80, 160, 320, 320],
                    "SERIAL_DEPTHS": [2, 4, 12, 4],
                    "NUM_HEADS": 8,
                    "MLP_RATIOS": [4.0, 4.0, 4.0, 4.0],
                    "QKV_BIAS": True,
                    "QKV_SCALE": None,
                    "DROP_RATE": 0.0,
                    "ATTN_DROP_RATE": 0.0,
                    "DROP_PATH_RATE": 0.2,
                },
            },
            "TRAIN": {
                "START_EPOCH": 0,
                "EPOCHS": 300,
                "WARMUP_EPOCHS": 20,
                "WARMUP_UPDATES": 0,  # instead of WARMUP_EPOCHS, where it is above 0
                "WEIGHT_DECAY": 0.05,
                "BASE_LR": 5e-4,  # these three for a batch of LR_BATCH; scaled to the batch over all ranks and steps
                "WARMUP_LR": 5e-7,
                "MIN_LR": 5e-6,
                "LR_BATCH": 512,
                "LAYER_DECAY": 1.0,  # below 1: each layer's learning rate is this much below the next one's
                "CLIP_GRAD": 5.0,  # largest gradient norm of an update; 0: no clipping
                "AUTO_RESUME": True,
                "ALLOW_CHANGES": False,  # go on with a run under other settings
                "ELASTIC": False,  # go on with a run on another number of ranks
                "SAVE_UPDATES": 0,  # updates between checkpoints inside an epoch; 0: none
                "SAVE_MINUTES": 15.0,  # minutes after which the next update inside an epoch is saved; 0: never
                "ON_NONFINITE": "stop",  # at a loss that is no number; or skip: leave the batch out
                "MAX_LEFT_OUT": 20,  # so many updates in a row left out, for that or under the fp16 scaler, end the run
                "ACCUMULATION_STEPS": 1,
                "USE_CHECKPOINT": False,  # recompute activations in the backward pass
                "RECOMPUTE": "all",  # of a block, under USE_CHECKPOINT; or cheap: keep products and convolutions
                "EMA_DECAY": 0.0,  # 0: no moving average
                "EMA_WARMUP": False,  # smaller decays first, for runs that are short beside 1 / (1 - EMA_DECAY) updates
                "SYNC_BN": True,  # where several GPUs train
                "COMPILE": False,  # by torch.compile, once for the blocks of each stage
                "LR_SCHEDULER": {
                    "NAME": "cosine",  # or linear, or by DECAY_RATE: step at DECAY_EPOCHS, multistep at MILESTONES
                    "DECAY_EPOCHS": 30,
                    "DECAY_RATE": 0.1,
                    "MILESTONES": [],  # epochs
                },
                "OPTIMIZER": {"NAME": "adamw", "EPS": 1e-8, "BETAS": [0.9, 0.999], "MOMENTUM": 0.9},
            },
            "AUG": {
                "SCALE": [0.08, 1.0],  # area of the random crop
                "RATIO": [0.75, 4 / 3],  # its width over its height
                "HFLIP": 0.5,
                "COLOR_JITTER": 0.4,  # where AUTO_AUGMENT is none or 3a
                "AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",  # timm's notation, also augmix-.., original, 3a; or none
                "REPROB": 0.25,
                "REMODE": "pixel",
                "RECOUNT": 1,
                "REPEATS": 1,  # above 1: repeated augmentation
                "MIXUP": 0.8,
                "CUTMIX": 1.0,
                "CUTMIX_MINMAX": None,
                "MIXUP_PROB": 1.0,
                "MIXUP_SWITCH_PROB": 0.5,
                "MIXUP_MODE": "batch",
            },
            "DISTILL": {
                "TEACHER": "",  # a checkpoint of this code, or a network of timm; empty: no distillation
                "WEIGHTS": "",  # file of a timm teacher's weights; empty: those that timm downloads
                "KIND": "soft",  # or hard: the teacher's first class alone
                "ALPHA": 0.5,  # share of the teacher in the loss
                "TEMPERATURE": 1.0,
            },
            "TEST": {"CROP": True},  # False: squash the whole image into the square
            "DEVICE": "auto",
            "RANK_TIMEOUT": 600,  # seconds that ranks wait for one another
            "DETERMINISTIC": False,  # on a GPU: the same bits on every run, slower
            "PRECISION": "auto",  # of training: bf16 or fp16 on a GPU, fp32 on a CPU
            "CHANNELS_LAST": True,
            "AMP_OPT_LEVEL": "",  # apex's name for PRECISION: O0 is fp32, O1 and O2 are fp16
            "OUTPUT": "output",
            "TAG": "default",
            "WANDB": "",  # project of Weights & Biases to log to as well; nothing where it is empty
            "SAVE_FREQ": 1,  # epochs between numbered checkpoints
            "KEEP": 3,  # how many of them to keep
            "PRINT_FREQ": 10,  # updates between logged lines
            "SEED": 0,
            "EVAL_MODE": False,
            "THROUGHPUT_MODE": False,
        }
    )


_CHOICES = {
    "MODEL.TYPE": ("groupmixformer",),
    "DATA.LOADING": ("exact", "fast"),
    "DATA.ON_ERROR": ("stop", "skip"),
    "TRAIN.ON_NONFINITE": ("stop", "skip"),
    "TRAIN.RECOMPUTE": ("all", "cheap"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "lanczos", "nearest"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step", "multistep"),
    "DISTILL.KIND": ("soft", "hard"),
    "AUG.REMODE": ("pixel", "rand", "const"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "DEVICE": ("auto", "cpu", "cuda"),
    "PRECISION": ("auto", "fp32", "bf16", "fp16"),
    "AMP_OPT_LEVEL": ("", "O0", "O1", "O2"),
}

# (least, most, what the value is)
_RANGES: dict[str, tuple[float, float, str]] = {
    "DATA.BATCH_SIZE": (1, math.inf, "images"),
    "DATA.IMG_SIZE": (32, math.inf, "pixels"),
    "DATA.NUM_WORKERS": (0, math.inf, "processes"),
    "DATA.MAX_BROKEN": (0, 1, "a share"),
    "TRAIN.SAVE_UPDATES": (0, math.inf, "updates, 0 for none inside an epoch"),
    "TRAIN.SAVE_MINUTES": (0, math.inf, "minutes, 0 for never"),
    "TRAIN.MAX_LEFT_OUT": (1, math.inf, "updates"),
    "RANK_TIMEOUT": (1, 86400, "seconds"),
    "MODEL.LABEL_SMOOTHING": (0, 0.999, "a share"),
    "MODEL.GMA.IN_DIM": (1, math.inf, "channels"),
    "MODEL.GMA.NUM_CLASSES": (0, math.inf, "classes, 0 to take them from the data"),
    "MODEL.GMA.DROP_RATE": (0, 0.999, "a probability"),
    "MODEL.GMA.DROP_PATH_RATE": (0, 0.999, "a probability"),
    "TRAIN.EPOCHS": (1, math.inf, "epochs"),
    "TRAIN.WARMUP_EPOCHS": (0, math.inf, "epochs"),
    "TRAIN.WARMUP_UPDATES": (0, math.inf, "updates, 0 for WARMUP_EPOCHS"),
    "TRAIN.LR_BATCH": (1, math.inf, "images"),
    "TRAIN.WEIGHT_DECAY": (0, math.inf, "a decay"),
    "TRAIN.BASE_LR": (0, math.inf, "a learning rate"),
    "TRAIN.WARMUP_LR": (0, math.inf, "a learning rate"),
    "TRAIN.MIN_LR": (0, math.inf, "a learning rate"),
    "TRAIN.LAYER_DECAY": (1e-6, 1, "a factor"),
    "TRAIN.CLIP_GRAD": (0, math.inf, "a norm, 0 for no clipping"),
    "TRAIN.ACCUMULATION_STEPS": (0, math.inf, "steps"),
    "TRAIN.EMA_DECAY": (0, 0.999999999, "a factor, 0 for no moving average"),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": (1, math.inf, "epochs"),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": (0, 1, "a factor"),
    "TRAIN.OPTIMIZER.EPS": (0, math.inf, "a small number"),
    "TRAIN.OPTIMIZER.MOMENTUM": (0, 1, "a factor"),
    "AUG.HFLIP": (0, 1, "a probability"),
    "AUG.COLOR_JITTER": (0, math.inf, "a strength"),
    "AUG.REPROB": (0, 1, "a probability"),
    "AUG.RECOUNT": (1, math.inf, "a count"),
    "AUG.REPEATS": (1, math.inf, "a count"),
    "AUG.MIXUP": (0, math.inf, "a strength"),
    "AUG.CUTMIX": (0, math.inf, "a strength"),
    "AUG.MIXUP_PROB": (0, 1, "a probability"),
    "AUG.MIXUP_SWITCH_PROB": (0, 1, "a probability"),
    "DISTILL.ALPHA": (0, 1, "a share"),
    "DISTILL.TEMPERATURE": (1e-3, math.inf, "a temperature"),
    "SAVE_FREQ": (1, math.inf, "epochs"),
    "KEEP": (1, math.inf, "checkpoints"),
    "PRINT_FREQ": (1, math.inf, "updates"),
    "SEED": (0, math.inf, "a seed"),
}

# Keys of published files that the network leaves no choice about: the only value, and what to do about another.
_FIXED = {
    "MODEL.GMA.PATCH_SIZE": (4, "the stem is two 3x3 convolutions of stride 2: remove the key"),
    "MODEL.GMA.ATTN_DROP_RATE": (0.0, "no attention matrix is ever formed to drop from: use MODEL.GMA.DROP_RATE"),
    "TRAIN.START_EPOCH": (0, "a resumed run knows its epoch: use --resume"),
}

_KINDS = {"TRAIN.LR_SCHEDULER.MILESTONES": int}  # of what is in lists that are empty by default
_OPTIONAL = {"MODEL.GMA.QKV_SCALE": float, "AUG.CUTMIX_MINMAX": list}  # may be None, else of this type


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with duplicate keys an error instead of a silent overwriting."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} stands twice: remove one", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path} is no configuration: name a .yaml file")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file: name a .yaml file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a file with --cfg, such as those in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem or error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError: a date that is none
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys: write KEY: value lines, as in configs/")
    return values


def load_config(path: str | Path, defaults: Callable[[], CfgNode] = default_config) -> CfgNode:
    """The defaults of a task, overridden by a file and by the files that its BASE names, the file last.

    Raises:
        UserError: If a file is missing or malformed, or holds an unknown key or a value of the wrong type.
    """
    config = defaults()
    _merge_file(config, Path(path), ())
    return config


def _merge_file(config: CfgNode, path: Path, above: tuple[str, ...]) -> None:
    if os.path.realpath(path) in above:
        raise UserError(f"{path}: BASE leads back to the file itself: break the circle")
    values = _read_yaml(path)
    bases = values.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: BASE is {bases!r}: name a file, or a list of files")
    for base in bases:
        if base:
            _merge_file(config, path.parent / base, (*above, os.path.realpath(path)))
    merge(config, values, str(path))


def merge(config: CfgNode, values: dict[str, Any], source: str, prefix: str = "") -> None:
    """Overrides keys of a configuration, in place.

    Args:
        config: The configuration, or the part of it under `prefix`.
        values: Nested keys and values.
        source: Where the values come from, for errors.
        prefix: Dotted name of the part, with a dot at its end.

    Raises:
        UserError: If a key is unknown, which those of another task are, or a value of the wrong type.
    """
    if not prefix:
        _refuse_other_tasks(values, source, task_of(config))
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in config:
            near = difflib.get_close_matches(str(key), config, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {listing(list(config), 20)}"
            raise UserError(f"{source}: unknown key {name}: {hint}")
        if isinstance(config[key], CfgNode):
            if not isinstance(value, dict):
                raise UserError(f"{source}: {name} is {value!r} but holds keys: write them below it")
            merge(config[key], value, source, f"{name}.")
        else:
            config[key] = _coerce(value, config[key], name, source)


def merge_options(config: CfgNode, options: list[str]) -> None:
    """Overrides keys with a flat list of dotted names and values, as --opts gives it.

    Raises:
        UserError: If the list is of odd length, a key is unknown or a value of the wrong type.
    """
    if len(options) % 2:
        raise UserError(f"--opts needs pairs of KEY value, got {len(options)} words ending in {options[-1]!r}")
    for name, text in zip(options[::2], options[1::2], strict=True):
        try:
            value = text if _is_text(config, name) else yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"--opts {name} {text!r}: the value is not valid YAML: quote it") from None
        merge_value(config, name, value, "--opts")


def merge_value(config: CfgNode, name: str, value: Any, source: str) -> None:
    """Overrides one key by its dotted name, as `merge` does."""
    for part in reversed(name.split(".")):
        value = {part: value}
    merge(config, value, source)


def _is_text(config: CfgNode, name: str) -> bool:
    """Whether a dotted name is that of a text key, for which TAG 5 and TAG '' are as good as TAG five."""
    try:
        return isinstance(lookup(config, name), str)
    except (KeyError, TypeError):
        return False


def _coerce(value: Any, default: Any, name: str, source: str) -> Any:
    """The value as the type of the default: ints pass for floats, and YAML's text `5e-4` is a number."""
    wanted = _OPTIONAL.get(name) or type(default)
    if name in _OPTIONAL and (value is None or value == "None"):
        return None
    if wanted is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if wanted is list and isinstance(value, (list, tuple)):
        kind = type(default[0]) if default else _KINDS.get(name, float)
        return [_coerce(item, kind(), f"{name}[{i}]", source) for i, item in enumerate(value)]
    if wanted is str and name == "AUG.AUTO_AUGMENT" and value in (None, "", "None"):
        return "none"
    if type(value) is wanted:
        return value
    if name == "MODEL.GMA.NUM_HEADS" and isinstance(value, list) and value and value == value[:1] * len(value):
        return _coerce(value[0], default, name, source)  # published files may give one number for each stage
    raise UserError(f"{source}: {name} is {value!r} but must be {_TYPE_NAMES[wanted]}")


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "text", list: "a list of numbers"}


def lookup(config: CfgNode, name: str) -> Any:
    """The value under a dotted name."""
    for part in name.split("."):
        config = config[part]
    return config


def check(config: CfgNode) -> None:
    """Refuses values of a classifier's configuration that cannot work, alone or together.

    Raises:
        UserError: Naming the key and what to do.
    """
    check_to_score(config)
    if mixes(config) and config.DATA.BATCH_SIZE % 2:
        raise UserError(
            f"DATA.BATCH_SIZE {config.DATA.BATCH_SIZE} is odd, but mixup and cutmix pair the images: "
            "use an even one, or set AUG.MIXUP and AUG.CUTMIX to 0"
        )
    minmax, size = config.AUG.CUTMIX_MINMAX, config.DATA.IMG_SIZE
    if minmax is not None and int(size * minmax[0]) == int(size * minmax[1]):  # timm draws below the upper one
        raise UserError(
            f"AUG.CUTMIX_MINMAX {minmax} are the same pixel of DATA.IMG_SIZE {size}, and no side can be drawn between "
            "them: give shares farther apart, or None"
        )
    if config.DATA.INTERPOLATION == "lanczos" and config.AUG.AUTO_AUGMENT not in ("none", "3a"):
        raise UserError(
            f"DATA.INTERPOLATION lanczos cannot rotate, as AUG.AUTO_AUGMENT {config.AUG.AUTO_AUGMENT} does: "
            "choose bicubic or bilinear, or AUG.AUTO_AUGMENT none"
        )


def check_to_score(config: CfgNode) -> None:
    """As `check`, for a classifier that is scored and not trained: nothing is mixed or rotated.

    Raises:
        UserError: Naming the key and what to do.
    """
    check_shared(config)
    _check_augmentation(config)


def check_folder(config: CfgNode) -> None:
    """Refuses names by which a run's folder would not lie below OUTPUT, or be OUTPUT itself.

    Raises:
        UserError: Naming the key and what to do.
    """
    for name in ("MODEL.NAME", "TAG"):
        path = PurePath(lookup(config, name))
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise UserError(f"{name} is {lookup(config, name)!r}: give the name of a folder, of parts such as a or a/b")


def check_shared(
    config: CfgNode,
    choices: Mapping[str, tuple[str, ...]] | None = None,
    ranges: Mapping[str, tuple[float, float, str]] | None = None,
) -> None:
    """Refuses values that cannot work, alone or together, of the keys that a task shares with others.

    Args:
        config: The configuration of any task, which may lack some of the keys.
        choices: The allowed values of keys of the task's own.
        ranges: (least, most, what the value is) of keys of the task's own.

    Raises:
        UserError: Naming the key and what to do.
    """
    values = dict(flatten(config))
    for name, (only, advice) in _FIXED.items():
        if values.get(name, only) != only:
            raise UserError(f"{name} is {values[name]} but can only be {only}: {advice}")
    for name, allowed in {**_CHOICES, **(choices or {})}.items():
        if values.get(name, allowed[0]) not in allowed:
            listed = ", ".join(choice or "''" for choice in allowed)
            raise UserError(f"{name} is {values[name]!r}: choose one of {listed}")
    for name, (least, most, meaning) in {**_RANGES, **(ranges or {})}.items():
        value = values.get(name, least)
        if not (least <= value <= most and math.isfinite(value)):
            bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise UserError(f"{name} is {value}: give {meaning}, {bounds}")
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UserError(f"{name} is {value}: give finite numbers")
    _check_network(config)
    _check_training(config)


def _check_network(config: CfgNode) -> None:
    gma = config.MODEL.GMA
    for name in ("EMBEDDING_DIMS", "SERIAL_DEPTHS", "MLP_RATIOS"):
        if len(gma[name]) != gma.NUM_STAGES:
            raise UserError(
                f"MODEL.GMA.{name} has {len(gma[name])} numbers but NUM_STAGES is {gma.NUM_STAGES}: make them agree"
            )
    for name in ("MEAN", "STD"):
        if len(config.DATA[name]) != gma.IN_DIM:
            raise UserError(
                f"DATA.{name} has {len(config.DATA[name])} numbers but MODEL.GMA.IN_DIM is {gma.IN_DIM}: "
                "give one for each channel"
            )
    if min(config.DATA.STD) <= 0:
        raise UserError(f"DATA.STD is {config.DATA.STD}: give numbers above 0")


def _check_training(config: CfgNode) -> None:
    train, betas = config.TRAIN, config.TRAIN.OPTIMIZER.BETAS
    if len(betas) < 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"TRAIN.OPTIMIZER.BETAS is {betas}: give two numbers or more from 0 to below 1")
    if not train.WARMUP_UPDATES and train.WARMUP_EPOCHS > train.EPOCHS:
        raise UserError(f"TRAIN.WARMUP_EPOCHS {train.WARMUP_EPOCHS} is more than TRAIN.EPOCHS {train.EPOCHS}: lower it")
    milestones = train.LR_SCHEDULER.MILESTONES
    if milestones != sorted(set(milestones)) or (milestones and milestones[0] < 1):
        raise UserError(f"TRAIN.LR_SCHEDULER.MILESTONES is {milestones}: give epochs from 1 on, in rising order")
    if train.LR_SCHEDULER.NAME == "multistep" and not milestones:
        raise UserError("TRAIN.LR_SCHEDULER.NAME multistep needs TRAIN.LR_SCHEDULER.MILESTONES: give its epochs")
    if config.AMP_OPT_LEVEL and config.PRECISION != "auto":
        raise UserError(
            f"AMP_OPT_LEVEL {config.AMP_OPT_LEVEL} and PRECISION {config.PRECISION} both say how to compute: give one"
        )
    if train.get("COMPILE") and train.USE_CHECKPOINT and train.RECOMPUTE == "cheap":
        raise UserError(
            "TRAIN.RECOMPUTE cheap does not fit TRAIN.COMPILE, whose code writes over what would be kept: use "
            "TRAIN.RECOMPUTE all, or leave one of them off"
        )


def _check_augmentation(config: CfgNode) -> None:
    aug, minmax = config.AUG, config.AUG.CUTMIX_MINMAX
    for name in ("SCALE", "RATIO"):
        if len(aug[name]) != 2 or not 0 < aug[name][0] <= aug[name][1]:
            raise UserError(f"AUG.{name} is {aug[name]}: give a lower and an upper bound above 0")
    if aug.SCALE[1] > 1:
        raise UserError(f"AUG.SCALE is {aug.SCALE}: give shares of an image's area, of which the upper is at most 1")
    if config.DATA.LOADING == "fast" and config.DATA.INTERPOLATION not in ("bicubic", "bilinear"):
        raise UserError(
            f"DATA.LOADING fast cannot resize with DATA.INTERPOLATION {config.DATA.INTERPOLATION}: "
            "choose bicubic or bilinear, or DATA.LOADING exact"
        )
    if minmax is not None and (len(minmax) != 2 or not 0 <= minmax[0] <= minmax[1] <= 1):
        raise UserError(f"AUG.CUTMIX_MINMAX is {minmax}: give a lower and an upper share from 0 to 1, or None")


def mixes(config: CfgNode) -> bool:
    """Whether training mixes images, by mixup or cutmix."""
    return config.AUG.MIXUP > 0 or config.AUG.CUTMIX > 0 or config.AUG.CUTMIX_MINMAX is not None


def accumulation_steps(config: CfgNode) -> int:
    """Micro-batches of one update; published files write 0 for 1."""
    return max(config.TRAIN.ACCUMULATION_STEPS, 1)


def flatten(config: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys with their dotted names."""
    for key, value in config.items():
        if isinstance(value, CfgNode):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(config: CfgNode, text: str) -> dict[str, str]:
    """The keys in which a configuration differs from one saved as YAML text, and in words, 'KEY: saved -> now'.

    Of the keys that tasks share, those that are newer than the saved one had their defaults.
    """
    defaults = dict(flatten(default_config()))
    saved = {name: defaults[name] for name, _ in flatten(config) if name in defaults}
    saved |= dict(flatten(CfgNode(yaml.safe_load(text))))
    return {
        name: f"{name}: {saved.get(name)} -> {value}" for name, value in flatten(config) if saved.get(name) != value
    }


# Keys of MODEL that one task has and no other.
_TASKS = {
    "LABEL_SMOOTHING": "classification",
    "DECODER": "segmentation",
    "DETECTOR": "detection",
    "FREEZE_STATISTICS": "detection",
}


def task_of(values: Mapping[str, Any]) -> str:
    """The task that nested keys are of, where one of MODEL tells; else an empty text."""
    return next(iter(_telling_keys(values).values()), "")


def _telling_keys(values: Mapping[str, Any]) -> dict[str, str]:
    """The keys of MODEL that tell of a task, and of which."""
    of_model = values.get("MODEL")
    return {key: task for key, task in _TASKS.items() if isinstance(of_model, Mapping) and key in of_model}


def check_task(values: Mapping[str, Any], path: str | Path, wanted: str, *others: str) -> None:
    """Refuses a checkpoint of another task.

    Args:
        values: The nested keys of its configuration.
        path: Its file.
        wanted: The task that the program is of.
        others: Tasks that will do, too.

    Raises:
        UserError: Naming the programs that take it.
    """
    task = task_of(values)
    if task not in ("", wanted, *others):
        raise UserError(f"{path} is of {task} and not of {wanted}: use {_programs(task)}, or name another")


def _refuse_other_tasks(values: Mapping[str, Any], source: str, wanted: str) -> None:
    told = _telling_keys(values)
    if wanted and told and wanted not in told.values():
        key, task = next(iter(told.items()))
        raise UserError(f"{source} has MODEL.{key}, a key of {task} and not of {wanted}: use {_programs(task)}")


def _programs(task: str) -> str:
    folder = "" if task == "classification" else f"{task}/"
    return f"{folder}train.py or {folder}test.py"


_KEYS_OF_INPUT = frozenset(
    {"DATA.IMG_SIZE", "DATA.INTERPOLATION", "DATA.MEAN", "DATA.STD", "DATA.SHORT_SIDE", "DATA.SHORT_SIDES"}
    | {"DATA.LONG_SIDE", "DATA.REDUCE_ZERO_LABEL", "TEST.CROP"}
    | {"MODEL.DETECTOR.ANCHOR_SIZES", "MODEL.DETECTOR.ANCHOR_RATIOS"}
)
_DROPOUT_KEYS = frozenset(f"MODEL.GMA.{name}_RATE" for name in ("DROP", "ATTN_DROP", "DROP_PATH"))


def changes_answers(key: str) -> bool:
    """Whether a key changes what the same weights answer for an image."""
    of_network = key.startswith("MODEL.GMA.") and key != "MODEL.GMA.NUM_CLASSES" and key not in _DROPOUT_KEYS
    return of_network or key in _KEYS_OF_INPUT
