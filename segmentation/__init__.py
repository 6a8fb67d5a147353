"""Semantic segmentation on the same backbone: UperNet and Semantic FPN."""
