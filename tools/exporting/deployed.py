"""The network as it is exported: float32 images in, float32 logits out, whatever it computes in."""

import copy

import torch
from torch import Tensor, nn

from models.fuse import fuse
from models.groupmixformer import GroupMixFormer


class Deployed(nn.Module):
    """A network behind the interface that all exported files have.

    Args:
        network: Takes and gives tensors of its weights' type.
        dtype: That type.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float32 images [B, C, H, W] -> float32 logits [B, classes]."""
        return self.network(images.to(self.dtype)).float()


def deploy(network: GroupMixFormer, fused: bool, precision: str) -> Deployed:
    """A copy of a network to export; the network stays as it is.

    Args:
        network: The network.
        fused: Whether to rewrite it for inference, in fp32, before its weights are rounded.
        precision: 'bf16' for weights and arithmetic in bfloat16; all others are float32 here.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    exported = fuse(network) if fused else copy.deepcopy(network)
    return Deployed(exported.to(dtype), dtype).eval().requires_grad_(False)
