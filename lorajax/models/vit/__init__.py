"""The vision transformer, and its checkpoints by transformers, timm and Google."""

from collections.abc import Mapping

import numpy as np

from lorajax.models import layers, vision
from lorajax.models.family import Family
from lorajax.models.vit.augreg import AUGREG
from lorajax.models.vit.huggingface import HUGGINGFACE
from lorajax.models.vit.model import SIZES, ViT, ViTConfig
from lorajax.models.vit.timm import TIMM

__all__ = ["FAMILY", "ViT", "ViTConfig"]


def _named(size: str, patch: str) -> ViTConfig:
    width, depth, heads = SIZES[size]
    return ViTConfig(patch_size=int(patch), width=width, depth=depth, heads=heads)


def resized(
    arrays: Mapping[str, np.ndarray], config: ViTConfig, target: ViTConfig
) -> Mapping[str, np.ndarray]:
    """A ViT's arrays with position embeddings interpolated to the grid of `target`."""
    positions, prefix = arrays["embeddings.positions"], config.prefix
    rows, columns = config.grid
    if config.grid == target.grid or positions.shape[1] != prefix + rows * columns:
        return arrays
    grid = positions[0, prefix:].reshape(rows, columns, -1)
    grid = layers.resize_grid(grid, target.grid).reshape(1, -1, positions.shape[2])
    together = np.concatenate([positions[:, :prefix], grid], axis=1)
    return {**arrays, "embeddings.positions": together}


FAMILY = Family(
    "vit",
    ViT,
    ViTConfig,
    formats=(HUGGINGFACE, TIMM, AUGREG),
    named={"vit-{ti,s,b,l}/{4,7,8,14,16,32}": _named},
    options=vision.options,
    fit=resized,
    repeats=("depth",),
    zeros=r"blocks\.\d+\.attention\.(query|key|value)\.bias",  # checkpoints with qkv_bias off
)
"""Vision transformers."""
