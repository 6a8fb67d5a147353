"""A model card, of nothing but what a checkpoint tells."""

from pathlib import Path
from typing import Any

import yaml

from utils.flops import count
from utils.trained import Trained

_LABELS_SHOWN = 20
_HEADER = {
    "tags": ["image-classification", "timm", "groupmixformer"],
    "pipeline_tag": "image-classification",
    "library_name": "timm",
}
_USE = """\
## Use

In the folder of the code, where `import models` registers the network with timm. `local-dir:FOLDER` is this folder on
disk; `hf-hub:USER/NAME` takes its place on the hub.

```python
import models
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(image)[None])  # image: PIL's, in mode {mode!r}
backbone = timm.create_model("local-dir:FOLDER", pretrained=True, features_only=True)
```
"""
_CREDIT = """\
## Credit

The architecture is of [Advancing Vision Transformers with Group-Mix Attention](https://arxiv.org/abs/2311.15157):

```bibtex
@article{ge2023advancing,
  title={Advancing Vision Transformers with Group-Mix Attention},
  author={Ge, Chongjian and Ding, Xiaohan and Tong, Zhan and Yuan, Li and Wang, Jiangliu and Song, Yibing and Luo, Ping},
  journal={arXiv preprint arXiv:2311.15157},
  year={2023}
}
```
"""  # noqa: E501


def model_card(trained: Trained, variant: str | None, licence: str | None) -> str:
    """The card as Markdown, with the hub's header; what the checkpoint does not tell is left out.

    Args:
        trained: The classifier.
        variant: The registered network that it is, or None.
        licence: Of the weights, by the hub's name for it, or None.
    """
    header = _HEADER | ({"license": licence} if licence else {})
    mode = {1: "L", 3: "RGB"}.get(trained.network.in_chans, "")
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n# {trained.config.MODEL.NAME}",
        "## The network\n\n" + _listed(_network(trained, variant)),
        "## The weights\n\n" + _listed(_weights(trained)),
        "## How it was trained\n\n" + _listed(_recipe(trained)) if "progress" in trained.state else "",
        "## Classes\n\n" + _classes(trained),
        _USE.format(mode=mode).rstrip(),
        _CREDIT.rstrip(),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _listed(facts: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value not in (None, ""))


def _network(trained: Trained, variant: str | None) -> dict[str, Any]:
    config, network = trained.config, trained.network
    gma, size = config.MODEL.GMA, config.DATA.IMG_SIZE
    counts = count(network, network.in_chans, size, size)
    return {
        "Variant": variant or "GroupMixFormer of other dimensions",
        "Widths, depths, MLP ratios": f"{gma.EMBEDDING_DIMS}, {gma.SERIAL_DEPTHS}, {gma.MLP_RATIOS}",
        "Parameters": f"{counts.parameters:,}",
        "FLOPs": f"{counts.flops:,} for an image of {size} x {size} (fvcore; a multiply-add is one)",
        "Input": f"{network.in_chans} channel(s), {size} x {size}; any size from 32 up",
        "Mean and standard deviation": f"{list(config.DATA.MEAN)}, {list(config.DATA.STD)}, of pixels in 0..1",
    }


def _weights(trained: Trained) -> dict[str, Any]:
    best, progress = trained.state.get("best"), trained.state.get("progress")
    of = "moving average of the weights" if trained.is_ema else "weights as trained"
    facts = {"File": trained.source.name, "Kind": of}
    if progress:
        facts["Trained for"] = f"{progress['epoch']} epochs, {progress['updates']:,} updates"
    # The record is of the end of the best epoch, numbered from 0: of later updates and other weights it says nothing.
    is_best = best and progress and (best["epoch"] + 1, 0) == (progress["epoch"], progress["place"])
    if is_best and (best["of"] == "ema") == trained.is_ema:
        split = trained.config.DATA.VAL_SPLIT
        facts["Accuracy"] = (
            f"{best['acc1']:.3f} % top-1 on the split `{split}` of the data it was trained on, of which the best epoch "
            "was chosen"
        )
    return facts


def _recipe(trained: Trained) -> dict[str, Any]:
    config, progress = trained.config, trained.state["progress"]
    data, train, aug = config.DATA, config.TRAIN, config.AUG
    clipping = f", gradients clipped at a norm of {train.CLIP_GRAD}" if train.CLIP_GRAD else ""
    warmup = f"{train.WARMUP_UPDATES} updates" if train.WARMUP_UPDATES else f"{train.WARMUP_EPOCHS} epochs"
    versions = trained.state.get("versions") or {}
    on = {
        "automatic augmentation": aug.AUTO_AUGMENT if aug.AUTO_AUGMENT != "none" else "",
        "colour jitter": aug.COLOR_JITTER if aug.AUTO_AUGMENT == "none" else 0,
        "horizontal flip": aug.HFLIP,
        "random erasing": aug.REPROB,
        "mixup": aug.MIXUP,
        "cutmix": aug.CUTMIX,
        "label smoothing": config.MODEL.LABEL_SMOOTHING,
        "drop path": config.MODEL.GMA.DROP_PATH_RATE,
    }
    return {
        "Data": f"`{Path(data.DATA_PATH).name or data.DATASET}`, split `{data.TRAIN_SPLIT}`",
        "Started from": Path(config.MODEL.PRETRAINED).name,
        "Optimizer": f"{train.OPTIMIZER.NAME}, weight decay {train.WEIGHT_DECAY}{clipping}",
        "Learning rate": f"{train.BASE_LR} for {train.LR_BATCH} images an update, {train.LR_SCHEDULER.NAME}, "
        f"{warmup} of warm-up, over {train.EPOCHS} epochs",
        "Teacher": Path(config.DISTILL.TEACHER).name,
        "Images of an update": f"{progress['images_per_update']} on {progress['ranks']} process(es)",
        "Moving average": f"decay {train.EMA_DECAY}" if train.EMA_DECAY else "",
        "Augmentation and regularisation": ", ".join(f"{name} {value}" for name, value in on.items() if value),
        "Seed": config.SEED,
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _classes(trained: Trained) -> str:
    shown = trained.labels[:_LABELS_SHOWN]
    rest = len(trained.labels) - len(shown)
    return f"{len(trained.labels)}: " + ", ".join(shown) + (f" and {rest} more, in config.json" if rest else "")
