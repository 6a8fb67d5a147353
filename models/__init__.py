"""Importing this package registers the GroupMixFormer variants with timm."""

from models.groupmixformer import GroupMixAttention, GroupMixFormer

__all__ = ["GroupMixAttention", "GroupMixFormer"]
