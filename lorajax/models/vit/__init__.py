"""The vision transformer and its kin, and their checkpoints by those who publish them."""

from collections.abc import Mapping

import numpy as np

from lorajax.models import layers, vision
from lorajax.models.family import Family
from lorajax.models.vit.augreg import AUGREG
from lorajax.models.vit.clip import CLIP, SIGLIP
from lorajax.models.vit.dinov2 import DINOV2
from lorajax.models.vit.dinov3 import DINOV3
from lorajax.models.vit.huggingface import HUGGINGFACE
from lorajax.models.vit.model import SIZES, ViT, ViTConfig
from lorajax.models.vit.timm import TIMM
from lorajax.models.vit.torchvision import TORCHVISION

__all__ = ["FAMILY", "ViT", "ViTConfig"]


def _named(size: str, patch: str) -> ViTConfig:
    width, depth, heads = SIZES[size]
    return ViTConfig(patch_size=int(patch), width=width, depth=depth, heads=heads)


def resized(
    arrays: Mapping[str, np.ndarray], config: ViTConfig, target: ViTConfig
) -> Mapping[str, np.ndarray]:
    """A ViT's arrays with position embeddings interpolated to the table of `target`."""
    if config.rope:
        return arrays
    positions, (placed, rows, columns) = arrays["embeddings.positions"], config.positions
    wanted = target.positions[1:]
    if (rows, columns) == wanted or positions.shape[1] != placed + rows * columns:
        return arrays
    grid = positions[0, placed:].reshape(rows, columns, -1)
    grid = layers.resize_grid(grid, wanted, antialias=config.antialias)
    together = np.concatenate([positions[:, :placed], grid.reshape(1, -1, grid.shape[2])], axis=1)
    return {**arrays, "embeddings.positions": together}


FAMILY = Family(
    "vit",
    ViT,
    ViTConfig,
    formats=(HUGGINGFACE, DINOV2, DINOV3, CLIP, SIGLIP, TIMM, TORCHVISION, AUGREG),
    named={"vit-{ti,s,b,l}/{4,7,8,14,16,32}": _named},
    options=vision.options,
    fit=resized,
    repeats=("depth",),
    zeros=r"blocks\.\d+\.attention\.(query|key|value)\.bias",  # checkpoints with qkv_bias off
)
"""Vision transformers."""
