"""The folder that timm and the Hugging Face hub read: weights, configuration, model card."""

from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save

from data.transforms import eval_settings
from models.build import network_settings
from models.groupmixformer import GroupMixFormer
from tools.exporting.card import model_card
from tools.exporting.checking import Run
from utils.checkpoint import write_json, write_text
from utils.trained import Trained

_VARIANTS = "groupmixformer_*"
_OTHERWISE = "groupmixformer_small"  # the entry point that takes any dims


def variant_of(network: GroupMixFormer) -> str | None:
    """The registered variant whose tensors have the shapes of a network's, or None."""
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for name in timm.list_models(_VARIANTS):
        other = timm.create_model(name, num_classes=network.num_classes, in_chans=network.in_chans, device="meta")
        if {key: tensor.shape for key, tensor in other.state_dict().items()} == shapes:
            return name
    return None


def hub_config(trained: Trained, variant: str | None) -> dict[str, Any]:
    """What config.json holds, in the form of timm's hub.

    Args:
        trained: The classifier.
        variant: The registered network that it is, or None.
    """
    config, network, data = trained.config, trained.network, trained.config.DATA
    architecture = variant or _OTHERWISE
    arguments = {
        name: value
        for name, value in {"in_chans": network.in_chans, **network_settings(config)}.items()
        if value is not None and not name.endswith("_rate")  # which are for training
    }
    defaults = timm.get_pretrained_cfg(architecture).to_dict(remove_source=True)
    settings = eval_settings(config)
    pretrained = defaults | {
        "input_size": [network.in_chans, data.IMG_SIZE, data.IMG_SIZE],
        "pool_size": [-(-data.IMG_SIZE // 32)] * 2,
        "interpolation": settings["interpolation"],
        "crop_pct": settings["crop_pct"],
        "crop_mode": settings["crop_mode"],
        "mean": list(data.MEAN),
        "std": list(data.STD),
        "num_classes": network.num_classes,
    }
    pretrained.pop("architecture", None)
    labels: dict[str, Any] = {"label_names": trained.classes or trained.labels}
    if trained.classes and trained.classes != trained.labels:
        labels["label_descriptions"] = dict(zip(trained.classes, trained.labels, strict=True))
    return {
        "architecture": architecture,
        "num_classes": network.num_classes,
        "num_features": network.num_features,
        "global_pool": network.head.global_pool.pool_type,
        **labels,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }


def write_folder(trained: Trained, folder: Path, licence: str | None) -> None:
    """Writes model.safetensors, config.json and README.md, the model card.

    Args:
        trained: The classifier; its weights are written under our names, not fused.
        folder: Made here.
        licence: Of the weights, by the hub's name for it, or None.
    """
    folder.mkdir()
    variant = variant_of(trained.network)
    weights = {name: tensor.contiguous() for name, tensor in trained.network.state_dict().items()}
    # Not by save_file, whose files nobody else may read.
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    write_json(folder / "config.json", hub_config(trained, variant))
    write_text(folder / "README.md", model_card(trained, variant, licence))


def open_folder(folder: Path) -> Run:
    """Has timm make the network of a folder, with its weights."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
