"""What a public checkpoint is: its format by its tensors' names, its shape by their shapes."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorajax.models import layers, layouts
from lorajax.models.layouts import Rule
from lorajax.models.resnet import ResNetConfig
from lorajax.models.vgg import VGGConfig
from lorajax.models.vit import ViTConfig


class Source(NamedTuple):
    """What a checkpoint says: its tensors, its side files, and its own metadata."""

    path: Path
    tensors: dict[str, np.ndarray]
    config: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    metadata: Mapping[str, str]


def _count(tensors: Mapping[str, np.ndarray], pattern: str) -> int:
    """1 + the largest number that the pattern's group matches, 0 if it never does."""
    found = [int(match[1]) for name in tensors if (match := re.match(pattern, name))]
    return 1 + max(found, default=-1)


def _square(tokens: int, prefix: int, patch: int, path: Path) -> tuple[int, int]:
    side = round((tokens - prefix) ** 0.5)
    if side**2 != tokens - prefix:
        raise ValueError(
            f"{path} has positions for {tokens - prefix} patches, which is no square grid; give "
            "image_size."
        )
    return side * patch, side * patch


def pair(size: Any) -> tuple[int, int]:
    """(height, width) from a side or a pair."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def _infer_huggingface(source: Source) -> ViTConfig:
    tensors, config = source.tensors, source.config
    projection = tensors["vit.embeddings.patch_embeddings.projection.weight"]
    width, channels, patch, _ = projection.shape
    tokens = tensors["vit.embeddings.position_embeddings"].shape[1]
    activation = config.get("hidden_act", "gelu")
    forms: dict[str, str] = {
        "gelu": "erf",
        "gelu_python": "erf",
        "gelu_new": "tanh",
        "gelu_pytorch_tanh": "tanh",
        "gelu_fast": "tanh",
    }
    if activation not in forms:
        raise ValueError(
            f"{source.path} has hidden_act {activation!r}; it must be one of {', '.join(forms)}."
        )
    size = config.get("image_size")
    hidden = tensors["vit.encoder.layer.0.intermediate.dense.weight"].shape[0]
    return ViTConfig(
        image_size=pair(size) if size else _square(tokens, 1, patch, source.path),
        patch_size=patch,
        width=width,
        depth=_count(tensors, r"vit\.encoder\.layer\.(\d+)\."),
        heads=config.get("num_attention_heads") or max(width // 64, 1),
        mlp_width=hidden,
        classes=_classes(tensors, "classifier.weight", 0),
        channels=channels,
        gelu=forms[activation],
        epsilon=config.get("layer_norm_eps", 1e-12),
        mean=tuple(source.preprocessing.get("image_mean", (0.5,))),
        std=tuple(source.preprocessing.get("image_std", (0.5,))),
    )


def _infer_timm(source: Source) -> ViTConfig:
    tensors = source.tensors
    details = source.config.get("pretrained_cfg", {})
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    distilled = "dist_token" in tensors
    tokens, prefix = tensors["pos_embed"].shape[1], 2 if distilled else 1
    # The DeiT releases were trained on ImageNet's own statistics, timm's other ViTs on 0.5.
    deit = distilled or "deit" in str(source.config.get("architecture", source.path.name))
    default = (layers.IMAGENET_MEAN, layers.IMAGENET_STD) if deit else ((0.5,), (0.5,))
    return ViTConfig(
        image_size=_square(tokens, prefix, patch, source.path),
        patch_size=patch,
        width=width,
        depth=_count(tensors, r"blocks\.(\d+)\."),
        heads=max(width // 64, 1),
        mlp_width=tensors["blocks.0.mlp.fc1.weight"].shape[0],
        classes=_classes(tensors, "head.weight", 0),
        channels=channels,
        pool="mean" if "fc_norm.weight" in tensors else "cls",
        distilled=distilled,
        mean=tuple(details.get("mean", default[0])),
        std=tuple(details.get("std", default[1])),
    )


def _infer_augreg(source: Source) -> ViTConfig:
    tensors = source.tensors
    patch, _, channels, width = tensors["embedding/kernel"].shape
    tokens = tensors["Transformer/posembed_input/pos_embedding"].shape[1]
    block = "Transformer/encoderblock_0"
    query = tensors[f"{block}/MultiHeadDotProductAttention_1/query/kernel"]
    return ViTConfig(
        image_size=_square(tokens, 1, patch, source.path),
        patch_size=patch,
        width=width,
        depth=_count(tensors, r"Transformer/encoderblock_(\d+)/"),
        heads=query.shape[1],
        mlp_width=tensors[f"{block}/MlpBlock_3/Dense_0/kernel"].shape[1],
        classes=_classes(tensors, "head/kernel", 1),
        channels=channels,
        gelu="tanh",
    )


def _infer_resnet(source: Source) -> ResNetConfig:
    tensors = source.tensors
    stages = _count(tensors, r"layer(\d+)\.") - 1
    stem = tensors["conv1.weight"]
    cifar = "linear.weight" in tensors
    head = "linear.weight" if cifar else "fc.weight"
    return ResNetConfig(
        block="bottleneck" if "layer1.0.conv3.weight" in tensors else "basic",
        depths=tuple(_count(tensors, rf"layer{s + 1}\.(\d+)\.") for s in range(stages)),
        widths=tuple(tensors[f"layer{s + 1}.0.conv1.weight"].shape[0] for s in range(stages)),
        stem="cifar" if cifar else "imagenet",
        stem_width=stem.shape[0],
        shortcut="pad" if cifar else "projection",
        classes=_classes(tensors, head, 0),
        channels=stem.shape[1],
    )


def _infer_vgg(source: Source) -> VGGConfig:
    tensors = source.tensors
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
    return VGGConfig(
        depths=tuple(depths),
        widths=tuple(widths),
        batch_norm=batch_norm,
        hidden=hidden,
        grid=round((flat / widths[-1]) ** 0.5),
        classes=_classes(tensors, "classifier.6.weight", 0),
        channels=tensors["features.0.weight"].shape[1],
    )


def _classes(tensors: Mapping[str, np.ndarray], name: str, axis: int) -> int:
    # A checkpoint without a head counts as one with a head of one class, replaced on loading.
    return tensors[name].shape[axis] if name in tensors else 1


class Format(NamedTuple):
    """A family of checkpoints.

    Attributes:
      layout: its name.
      config: class of the configuration.
      signature: tensors that give it away.
      infer: reads the configuration off a source.
      rules: the rules of `layouts` for a configuration.
    """

    layout: str
    config: type
    signature: tuple[str, ...]
    infer: Callable[[Source], Any]
    rules: Callable[[Any], Iterator[Rule]]


FORMATS = (
    Format(
        "huggingface",
        ViTConfig,
        ("vit.embeddings.patch_embeddings.projection.weight",),
        _infer_huggingface,
        layouts.huggingface_vit,
    ),
    Format("timm", ViTConfig, ("patch_embed.proj.weight",), _infer_timm, layouts.timm_vit),
    Format("augreg", ViTConfig, ("embedding/kernel", "cls"), _infer_augreg, layouts.augreg_vit),
    Format(
        "torchvision",
        ResNetConfig,
        ("conv1.weight", "layer1.0.conv1.weight"),
        _infer_resnet,
        layouts.torch_resnet,
    ),
    Format(
        "torchvision",
        VGGConfig,
        ("features.0.weight", "classifier.0.weight"),
        _infer_vgg,
        layouts.torchvision_vgg,
    ),
)
"""Every known format; the first whose signature is there is the one."""
