"""VGG networks (Simonyan and Zisserman 2014, arXiv:1409.1556) in Flax NNX."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lorajax.environment.judging import SHARE, at_least, judged
from lorajax.models import family, layers, vision
from lorajax.models.family import Family, Format, Model, Rule
from lorajax.models.files import Source
from lorajax.models.vision import IMAGENET_MEAN, IMAGENET_STD

SIZES: dict[int, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Convolutions a stage of the published networks."""


@judged(classes=at_least(1), channels=at_least(1), dropout=SHARE)
@dataclasses.dataclass(frozen=True)
class VGGConfig:
    """Everything that fixes a VGG's function, apart from its weights.

    Attributes:
      depths: 3×3 convolutions in each stage; each stage ends in 2×2 max pooling.
      widths: channels in each stage.
      batch_norm: whether a batch norm follows each convolution.
      hidden: features of the two hidden layers of the classifier.
      grid: rows and columns that the last feature map is averaged into.
      classes: outputs of the head.
      channels: of the images.
      dropout: rate in the classifier, in training mode.
      mean: per-channel mean of the images in units of [0, 1]; one number stands for all channels.
      std: per-channel standard deviation, likewise.
    """

    depths: tuple[int, ...] = SIZES[16]
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    batch_norm: bool = False
    hidden: int = 4096
    grid: int = 7
    classes: int = 1000
    channels: int = 3
    dropout: float = 0.5
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ValueError(
                f"widths is {self.widths}; it needs one entry a stage, as depths = {self.depths}."
            )
        vision.check_positive(self, "depths", "widths", "hidden", "grid", "classes", "channels")
        vision.check_statistics(self)


class VGG(Model):
    """A VGG network in torchvision's form.

    Args:
      config: its shape.
      rngs: for the initial weights and for dropout.
      dtype: of the computation; that of the weights and the images if None.
      param_dtype: of the weights.

    `model.train()` turns dropout and batch statistics on, `model.eval()` off; a new model is in
    training mode, a loaded one in evaluation mode.

    Layers that an adapter may replace, by path: `convs.I`, `hidden.0`, `hidden.1`, `head`.
    """

    @judged
    def __init__(
        self,
        config: VGGConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(config, rngs=rngs, **dtypes)
        widths = [w for d, w in zip(config.depths, config.widths, strict=True) for _ in range(d)]
        self.convs = nnx.List(
            [
                nnx.Conv(
                    inputs,
                    outputs,
                    (3, 3),
                    padding=((1, 1), (1, 1)),
                    kernel_init=nnx.initializers.he_normal(),
                    rngs=rngs,
                    **dtypes,
                )
                for inputs, outputs in zip([config.channels, *widths], widths, strict=False)
            ]
        )
        self.norms = nnx.List(
            [
                layers.BatchNorm(width, rngs=rngs, **dtypes)
                for width in (widths if config.batch_norm else [])
            ]
        )
        features = widths[-1] * config.grid**2
        self.hidden = nnx.List(
            [
                nnx.Linear(features, config.hidden, rngs=rngs, **dtypes),
                nnx.Linear(config.hidden, config.hidden, rngs=rngs, **dtypes),
            ]
        )
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.head = nnx.Linear(config.hidden, config.classes, rngs=rngs, **dtypes)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """Class logits of normalized images.

        Args:
          images: shape (batch, height, width, channels), each side at least 2 to the number of
            stages.

        Raises:
          ValueError: for another number of channels, or images that are too small.
        """
        config, smallest = self.config, 2 ** len(self.config.depths)
        if images.ndim != 4 or images.shape[-1] != config.channels:
            raise ValueError(
                f"images have shape {images.shape}; this VGG takes (batch, height, width, "
                f"{config.channels})."
            )
        if min(images.shape[1:3]) < smallest:
            raise ValueError(
                f"images have shape {images.shape}; each side must be at least {smallest} pixels."
            )
        x, i = images, 0
        for depth in config.depths:
            for _ in range(depth):
                x = self.convs[i](x)
                x = self.norms[i](x) if config.batch_norm else x
                x = jax.nn.relu(x)
                i += 1
            x = nnx.max_pool(x, (2, 2), (2, 2))
        x = layers.adaptive_average_pool(x, (config.grid, config.grid))
        x = x.reshape(x.shape[0], -1)
        for layer in self.hidden:
            x = self.dropout(jax.nn.relu(layer(x)))
        return self.head(x)


def _infer(source: Source) -> dict[str, Any]:
    tensors = source.tensors
    architecture, _ = vision.timm_arguments(source, ("num_classes", "in_chans", "pretrained"), {})
    if architecture and not re.fullmatch(r"(?:tv_)?vgg\d+(?:_bn)?", architecture):
        raise ValueError(f"its architecture is {architecture!r}, which is another network")
    convs = sorted(
        int(match[1])
        for name, value in tensors.items()
        if (match := re.fullmatch(r"features\.(\d+)\.weight", name)) and value.ndim == 4
    )
    batch_norm = "features.1.running_mean" in tensors
    within = 3 if batch_norm else 2
    depths, widths = [1], [tensors[f"features.{convs[0]}.weight"].shape[0]]
    for previous, place in zip(convs, convs[1:], strict=False):
        if place - previous == within:
            depths[-1] += 1
        else:
            depths.append(1)
            widths.append(tensors[f"features.{place}.weight"].shape[0])
    hidden, flat = tensors["classifier.0.weight"].shape
    return {
        "depths": tuple(depths),
        "widths": tuple(widths),
        "batch_norm": batch_norm,
        "hidden": hidden,
        "grid": round((flat / widths[-1]) ** 0.5),
        "classes": family.classes(tensors, "classifier.6.weight"),
        "channels": tensors["features.0.weight"].shape[1],
        **vision.statistics(source, IMAGENET_MEAN, IMAGENET_STD),
    }


def _rules(config: VGGConfig) -> Iterator[Rule]:
    grid, last = config.grid, config.widths[-1]
    size = last * grid**2
    place = i = 0
    for depth in config.depths:
        for _ in range(depth):
            yield family.conv(f"features.{place}.weight", f"convs.{i}.kernel")
            yield family.one(f"features.{place}.bias", f"convs.{i}.bias")
            if config.batch_norm:
                yield from family.batch_norm(f"features.{place + 1}", f"norms.{i}")
            place += 3 if config.batch_norm else 2
            i += 1
        place += 1
    # torch flattens (channel, row, column), Flax (row, column, channel).
    yield family.one(
        "classifier.0.weight",
        "hidden.0.kernel",
        lambda x: x.reshape(-1, last, grid, grid).transpose(2, 3, 1, 0).reshape(size, -1),
        lambda x: x.reshape(grid, grid, last, -1).transpose(3, 2, 0, 1).reshape(-1, size),
    )
    yield family.one("classifier.0.bias", "hidden.0.bias")
    yield from family.linear("classifier.3", "hidden.1")
    yield from family.linear("classifier.6", "head")


TORCHVISION = Format(
    "torchvision", ("features.0.weight", "classifier.0.weight"), _infer, _rules, side=vision.SIDE
)
"""Files of torchvision."""


def _named(size: str, norm: str) -> VGGConfig:
    return VGGConfig(SIZES[int(size)], batch_norm=bool(norm))


FAMILY = Family(
    "vgg",
    VGG,
    VGGConfig,
    formats=(TORCHVISION,),
    named={"vgg{11,13,16,19}{,-bn}": _named},
    repeats=("depths",),
)
"""VGG networks."""
