"""Residual networks (He et al. 2015, arXiv:1512.03385) in Flax NNX."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lorajax.environment.judging import at_least, judged
from lorajax.models import family, layers, vision
from lorajax.models.family import Family, Format, Model, Rule
from lorajax.models.files import Source
from lorajax.models.vision import IMAGENET_MEAN, IMAGENET_STD

SIZES: dict[int, tuple[str, tuple[int, ...]]] = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
"""Block kind and blocks a stage of the ImageNet networks."""


@judged(classes=at_least(1), channels=at_least(1))
@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Everything that fixes a residual network's function, apart from its weights.

    Attributes:
      block: "basic" (two 3×3 convolutions) or "bottleneck" (1×1, 3×3 with the stride, 1×1 ×4).
      depths: blocks in each stage.
      widths: channels in each stage, before a bottleneck's expansion.
      stem: "imagenet" (7×7 stride 2 and max pooling) or "cifar" (3×3).
      stem_width: channels after the stem; 0 means those of the first stage.
      shortcut: where the shape changes: "projection" (1×1 convolution) or "pad" (every second
        pixel, zero channels on both sides: option A of the CIFAR networks).
      classes: outputs of the head.
      channels: of the images.
      mean: per-channel mean of the images in units of [0, 1]; one number stands for all channels.
      std: per-channel standard deviation, likewise.
    """

    block: str = "bottleneck"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: str = "imagenet"
    stem_width: int = 0
    shortcut: str = "projection"
    classes: int = 1000
    channels: int = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        for name, choices in (
            ("block", ("basic", "bottleneck")),
            ("stem", ("imagenet", "cifar")),
            ("shortcut", ("projection", "pad")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}."
                )
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ValueError(
                f"widths is {self.widths}; it needs one entry a stage, as depths = {self.depths}."
            )
        vision.check_positive(self, "depths", "widths", "classes", "channels")
        if self.shortcut == "pad" and self.block == "bottleneck":
            raise ValueError("shortcut is 'pad'; only basic blocks have such shortcuts.")
        vision.check_statistics(self)
        if not self.stem_width:
            object.__setattr__(self, "stem_width", self.widths[0])


def _conv(inputs: int, outputs: int, size: int, stride: int, *, rngs: nnx.Rngs, **dtypes: Any):
    # Padding as in torch: the same on both sides. "SAME" is shifted by a pixel at stride 2.
    pad = (size - 1) // 2
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        kernel_init=nnx.initializers.he_normal(),
        rngs=rngs,
        **dtypes,
    )


class Block(nnx.Module):
    """A residual block of either kind, with its shortcut."""

    def __init__(
        self, config: ResNetConfig, inputs: int, width: int, stride: int, *, rngs, **dtypes: Any
    ):
        sizes, expansion = ((3, 3), 1) if config.block == "basic" else ((1, 3, 1), 4)
        strides = (stride, 1) if config.block == "basic" else (1, stride, 1)
        self.stride = stride
        self.outputs = width * expansion
        widths = [inputs] + [width] * (len(sizes) - 1) + [self.outputs]
        self.convs = nnx.List(
            [
                _conv(i, o, size, step, rngs=rngs, **dtypes)
                for i, o, size, step in zip(widths, widths[1:], sizes, strides, strict=False)
            ]
        )
        self.norms = nnx.List([layers.BatchNorm(o, rngs=rngs, **dtypes) for o in widths[1:]])
        changes = stride != 1 or inputs != self.outputs
        projects = changes and config.shortcut == "projection"
        self.projection = (
            _conv(inputs, self.outputs, 1, stride, rngs=rngs, **dtypes) if projects else None
        )
        self.projection_norm = (
            layers.BatchNorm(self.outputs, rngs=rngs, **dtypes) if projects else None
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        """The block's convolutions added to its shortcut."""
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = jax.nn.relu(y) if i + 1 < len(self.convs) else y
        if self.projection is not None and self.projection_norm is not None:
            x = self.projection_norm(self.projection(x))
        elif x.shape != y.shape:
            x = x[:, :: self.stride, :: self.stride]
            extra = self.outputs - x.shape[-1]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
        return jax.nn.relu(x + y)


class ResNet(Model):
    """A residual network in torchvision's form (the stride of a bottleneck on its 3×3).

    Args:
      config: its shape.
      rngs: for the initial weights.
      dtype: of the computation; that of the weights and the images if None.
      param_dtype: of the weights.

    `model.train()` normalizes by the batch and updates the running averages, `model.eval()` uses
    them; a new model is in training mode, a loaded one in evaluation mode. Flax averages the biased
    variance where torch takes the unbiased one, a factor (n − 1)/n with n values a channel.

    Layers that an adapter may replace, by path: `stem`, `stages.S.I.convs.J`,
    `stages.S.I.projection`, `head`.
    """

    @judged
    def __init__(
        self,
        config: ResNetConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        super().__init__(config, rngs=rngs, **dtypes)
        size, stride = (7, 2) if config.stem == "imagenet" else (3, 1)
        self.stem = _conv(config.channels, config.stem_width, size, stride, rngs=rngs, **dtypes)
        self.stem_norm = layers.BatchNorm(config.stem_width, rngs=rngs, **dtypes)
        stages, features = [], config.stem_width
        for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            blocks = []
            for i in range(depth):
                stride = 2 if stage and not i else 1
                blocks.append(Block(config, features, width, stride, rngs=rngs, **dtypes))
                features = blocks[-1].outputs
            stages.append(nnx.List(blocks))
        self.stages = nnx.List(stages)
        self.head = nnx.Linear(features, config.classes, rngs=rngs, **dtypes)

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """Class logits of normalized images of any size.

        Raises:
          ValueError: if the images have another number of channels than the configuration.
        """
        if images.ndim != 4 or images.shape[-1] != self.config.channels:
            raise ValueError(
                f"images have shape {images.shape}; this ResNet takes (batch, height, width, "
                f"{self.config.channels})."
            )
        x = jax.nn.relu(self.stem_norm(self.stem(images)))
        if self.config.stem == "imagenet":
            # Flax annotates the padding as a string, and documents pairs of integers.
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        return self.head(x.mean(axis=(1, 2)))


# timm's architectures that are torchvision's; the others have layers of which no tensor tells.
_PLAIN = re.compile(r"(?:tv_|gluon_|ssl_|swsl_)?resnet(?:18|26|34|50|101|152|200)(?:_v1b)?")
_FREE = (
    *("in_chans", "num_classes", "layers", "channels", "zero_init_last", "pretrained"),
    *("drop_rate", "drop_path_rate", "drop_block_rate"),
)
_ARGUMENTS = {
    "global_pool": "avg",
    "output_stride": 32,
    "act_layer": "relu",
    "norm_layer": "batchnorm2d",
    "stem_type": "",
    "stem_width": 64,
    "cardinality": 1,
    "base_width": 64,
    "replace_stem_pool": False,
    "block_reduce_first": 1,
    "down_kernel_size": 1,
    "avg_down": False,
}


def _infer(source: Source) -> dict[str, Any]:
    tensors = source.tensors
    architecture, said = vision.timm_arguments(source, _FREE, _ARGUMENTS)
    if architecture and not _PLAIN.fullmatch(architecture):
        raise ValueError(
            f"its architecture is {architecture!r}, which has layers that no tensor shows; known "
            "are resnet18, 26, 34, 50, 101, 152 and 200"
        )
    stages = family.count(tensors, r"layer([1-9]\d*)\.", first=1)
    stem = tensors["conv1.weight"]
    cifar = "linear.weight" in tensors
    classes = family.classes(tensors, "linear.weight" if cifar else "fc.weight")
    family.agree(said, {"in_chans": stem.shape[1], "num_classes": classes})
    return {
        "block": "bottleneck" if "layer1.0.conv3.weight" in tensors else "basic",
        "depths": tuple(family.count(tensors, rf"layer{s + 1}\.(\d+)\.") for s in range(stages)),
        "widths": tuple(tensors[f"layer{s + 1}.0.conv1.weight"].shape[0] for s in range(stages)),
        "stem": "cifar" if cifar else "imagenet",
        "stem_width": stem.shape[0],
        "shortcut": "pad" if cifar else "projection",
        "classes": classes,
        "channels": stem.shape[1],
        **vision.statistics(source, IMAGENET_MEAN, IMAGENET_STD),
    }


def _rules(config: ResNetConfig) -> Iterator[Rule]:
    yield family.conv("conv1.weight", "stem.kernel")
    yield from family.batch_norm("bn1", "stem_norm")
    convs = 2 if config.block == "basic" else 3
    expansion = 1 if config.block == "basic" else 4
    features = config.stem_width
    for stage, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
        for i in range(depth):
            theirs, ours = f"layer{stage + 1}.{i}", f"stages.{stage}.{i}"
            for j in range(convs):
                yield family.conv(f"{theirs}.conv{j + 1}.weight", f"{ours}.convs.{j}.kernel")
                yield from family.batch_norm(f"{theirs}.bn{j + 1}", f"{ours}.norms.{j}")
            changes = (stage and not i) or features != width * expansion
            if changes and config.shortcut == "projection":
                yield family.conv(f"{theirs}.downsample.0.weight", f"{ours}.projection.kernel")
                yield from family.batch_norm(f"{theirs}.downsample.1", f"{ours}.projection_norm")
            features = width * expansion
    yield from family.linear("linear" if config.stem == "cifar" else "fc", "head")


TORCHVISION = Format(
    "torchvision", ("conv1.weight", "layer1.0.conv1.weight"), _infer, _rules, side=vision.SIDE
)
"""Files of torchvision and of timm's plain ResNets, and akamaster's CIFAR networks."""


def _named(size: str) -> ResNetConfig:
    block, depths = SIZES[int(size)]
    return ResNetConfig(block=block, depths=depths)


def _cifar(size: str) -> ResNetConfig:
    depth = (int(size) - 2) // 6
    return ResNetConfig("basic", (depth,) * 3, (16, 32, 64), "cifar", shortcut="pad", classes=10)


FAMILY = Family(
    "resnet",
    ResNet,
    ResNetConfig,
    formats=(TORCHVISION,),
    named={"resnet{18,34,50,101,152}": _named, "cifar-resnet{20,32,44,56,110}": _cifar},
    repeats=("depths",),
)
"""Residual networks, for ImageNet and for CIFAR."""
