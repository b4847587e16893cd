"""Models by the names of the literature, and the scaling of images that they expect."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from lorajax.models.layouts import Config
from lorajax.models.resnet import SIZES as RESNETS
from lorajax.models.resnet import ResNet, ResNetConfig
from lorajax.models.vgg import SIZES as VGGS
from lorajax.models.vgg import VGG, VGGConfig
from lorajax.models.vit import SIZES as VITS
from lorajax.models.vit import ViT, ViTConfig

Model = ViT | ResNet | VGG
FAMILIES: dict[str, tuple[type, type]] = {
    "vit": (ViT, ViTConfig),
    "resnet": (ResNet, ResNetConfig),
    "vgg": (VGG, VGGConfig),
}
"""Model and configuration class of each family."""

PATTERNS = (
    "vit-{ti,s,b,l}/{4,7,8,14,16,32}",
    "resnet{18,34,50,101,152}",
    "cifar-resnet{20,32,44,56,110}",
    "vgg{11,13,16,19}[-bn]",
)
"""The names that `config` knows."""


def config(name: str, **changes: Any) -> Config:
    """The configuration of a published network.

    Args:
      name: as in `PATTERNS`, for example "vit-b/16", "resnet50", "cifar-resnet20", "vgg16-bn".
      **changes: fields of the configuration to set, for example `classes=10`.

    Returns:
      A ViTConfig, ResNetConfig or VGGConfig.

    Raises:
      ValueError: for an unknown name or field.

    Example:
      >>> from lorajax import models
      >>> models.config("vit-ti/4", image_size=(32, 32), classes=10).width
      192
    """
    found: Config | None = None
    if match := re.fullmatch(r"vit-(ti|s|b|l)/(\d+)", name):
        width, depth, heads = VITS[match[1]]
        found = ViTConfig(
            image_size=changes.pop("image_size", (224, 224)),
            patch_size=int(match[2]),
            width=width,
            depth=depth,
            heads=heads,
        )
    elif (match := re.fullmatch(r"resnet(\d+)", name)) and int(match[1]) in RESNETS:
        block, depths = RESNETS[int(match[1])]
        found = ResNetConfig(block=block, depths=depths)
    elif (match := re.fullmatch(r"cifar-resnet(\d+)", name)) and int(match[1]) % 6 == 2:
        found = ResNetConfig(
            block="basic",
            depths=((int(match[1]) - 2) // 6,) * 3,
            widths=(16, 32, 64),
            stem="cifar",
            shortcut="pad",
            classes=10,
        )
    elif (match := re.fullmatch(r"vgg(\d+)(-bn)?", name)) and int(match[1]) in VGGS:
        found = VGGConfig(depths=VGGS[int(match[1])], batch_norm=bool(match[2]))
    if found is None:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(PATTERNS)}.")
    return replace(found, **changes)


def replace(config: Config, **changes: Any) -> Config:
    """A configuration with some fields changed; ValueError names a field that does not exist."""
    fields = [field.name for field in dataclasses.fields(config)]
    for name in changes:
        if name not in fields:
            raise ValueError(
                f"{name} is not a field of {type(config).__name__}; it has {', '.join(fields)}."
            )
    return dataclasses.replace(config, **changes)


def build(config: Config, *, rngs: nnx.Rngs, dtype: Any = None, param_dtype: Any = jnp.float32):
    """A randomly initialized model of any family.

    Args:
      config: of the model; its type decides the family.
      rngs: for the weights and for dropout.
      dtype: of the computation; that of the weights and the images if None.
      param_dtype: of the weights.

    Returns:
      A ViT, ResNet or VGG in training mode.
    """
    for model, kind in FAMILIES.values():
        if isinstance(config, kind):
            return model(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
    raise ValueError(
        f"config is a {type(config).__name__}; it must be a ViTConfig, ResNetConfig or VGGConfig."
    )


def normalize(
    images: Num[Array | np.ndarray, "b h w _"],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    channels: int = 3,
    dtype: Any = jnp.float32,
) -> Float[Array, "b h w {channels}"]:
    """Scales bytes to what a model was trained on: `(x/255 − mean)/std`.

    Args:
      images: bytes, shape (batch, height, width, 1 or channels); gray ones are repeated.
      mean: per channel, or one number for all, in units of [0, 1].
      std: likewise.
      channels: that the model takes.
      dtype: of the result.

    Returns:
      Shape (batch, height, width, channels).

    Raises:
      ValueError: if the images have neither 1 nor `channels` channels, or are not bytes.
    """
    if images.dtype != jnp.uint8:
        raise ValueError(f"images have dtype {images.dtype}; normalize takes bytes, uint8.")
    if images.shape[-1] not in (1, channels):
        raise ValueError(
            f"images have {images.shape[-1]} channels; the model takes {channels} (or 1, repeated)."
        )
    # One multiplication and one addition a pixel instead of two divisions.
    center, spread = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    scale = jnp.broadcast_to(1 / (255 * spread), (1, 1, 1, channels))
    shift = jnp.broadcast_to(-center / spread, (1, 1, 1, channels))
    return (jnp.asarray(images, jnp.float32) * scale + shift).astype(dtype)
