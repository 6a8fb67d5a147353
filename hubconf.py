"""Entry points of `torch.hub.load(REPOSITORY, name, source="local", trust_repo=True)`.

model = torch.hub.load(".", "groupmixformer_small", source="local", trust_repo=True, num_classes=10)
model = torch.hub.load(".", "trained", "best.pth", source="local", trust_repo=True)
"""

import pathlib

from torch import nn

from models.groupmixformer import (
    groupmixformer_base,
    groupmixformer_large,
    groupmixformer_miny,
    groupmixformer_small,
    groupmixformer_tiny,
)

__all__ = [
    "groupmixformer_base",
    "groupmixformer_large",
    "groupmixformer_miny",
    "groupmixformer_small",
    "groupmixformer_tiny",
    "trained",
]

dependencies = ["torch", "torchvision", "timm", "yacs", "yaml", "fvcore"]  # torch.hub checks that they are there


def trained(checkpoint: str, cfg: str | None = None, weights: str = "auto") -> nn.Module:
    """A trained classifier from a checkpoint of this code, or from a published one and its configuration.

    Args:
        checkpoint: A .pth or .safetensors file.
        cfg: A configuration such as those in configs/, where the checkpoint holds none: published weights.
        weights: 'model', 'ema' for the moving average, or 'auto' for what the best epoch was chosen by.

    Returns:
        The network, in evaluation mode, on the CPU.

    Raises:
        UserError: If the checkpoint cannot be read or does not fit.
    """
    from utils.trained import load_trained

    return load_trained(pathlib.Path(checkpoint), pathlib.Path(cfg) if cfg else None, weights).network
