"""`VisionTransformer` of torchvision."""

import re
from collections.abc import Iterator
from typing import Any

from lorajax.models import family, vision
from lorajax.models.family import Format, Rule, Untold
from lorajax.models.files import Source
from lorajax.models.vit import huggingface
from lorajax.models.vit.model import ViTConfig, grid_of, patches

# Heads of torchvision's five networks, which their widths tell apart.
_HEADS = {768: 12, 1024: 16, 1280: 16}
_LAYER = "encoder.layers.encoder_layer_"


def _infer(source: Source) -> dict[str, Any]:
    tensors = source.tensors
    width, channels, patch, _ = tensors["conv_proj.weight"].shape
    why = f"its tensors have the width {width}, which no network of torchvision has"
    return {
        "image_size": grid_of(tensors["encoder.pos_embedding"].shape[1] - 1, patch),
        "patch_size": patch,
        "width": width,
        "depth": family.count(tensors, re.escape(_LAYER) + r"(\d+)\."),
        "heads": _HEADS.get(width, Untold(why)),
        "mlp_width": tensors[f"{_LAYER}0.mlp.0.weight"].shape[0],
        "classes": family.classes(tensors, "heads.head.weight"),
        "channels": channels,
        "gelu": "erf",
        "epsilon": 1e-6,
        "antialias": False,
        **vision.statistics(source, vision.IMAGENET_MEAN, vision.IMAGENET_STD),
    }


def _rules(config: ViTConfig) -> Iterator[Rule]:
    yield family.one("class_token", "embeddings.prefix")
    yield family.one("encoder.pos_embedding", "embeddings.positions")
    yield patches("conv_proj.weight", config)
    yield family.one("conv_proj.bias", "embeddings.patches.bias")
    for i in range(config.depth):
        theirs, ours = f"{_LAYER}{i}", f"blocks.{i}"
        yield from family.layer_norm(f"{theirs}.ln_1", f"{ours}.norm1")
        yield from family.attention_in(f"{theirs}.self_attention", f"{ours}.attention")
        yield from family.linear(f"{theirs}.self_attention.out_proj", f"{ours}.attention.out")
        yield from family.layer_norm(f"{theirs}.ln_2", f"{ours}.norm2")
        yield from family.linear(f"{theirs}.mlp.0", f"{ours}.mlp.up")
        yield from family.linear(f"{theirs}.mlp.3", f"{ours}.mlp.down")
    yield from family.layer_norm("encoder.ln", "norm")
    yield from family.linear("heads.head", "head")


def _express(config: ViTConfig) -> None:
    huggingface.refuse(config, "torchvision")
    for name, value in (("epsilon", 1e-6), ("gelu", "erf")):
        if getattr(config, name) != value:
            raise ValueError(
                f"layout is 'torchvision', which has no {name} = {getattr(config, name)!r}; use "
                "'lorajax'."
            )


TORCHVISION = Format(
    "torchvision",
    ("conv_proj.weight", f"{_LAYER}0.ln_1.weight"),
    _infer,
    _rules,
    # Before 0.12 the layers of an MLP had names.
    rename=lambda name: re.sub(
        r"\.mlp\.linear_([12])\.", lambda m: f".mlp.{3 * (int(m[1]) - 1)}.", name
    ),
    express=_express,
    side=vision.SIDE,
)
"""Files of torchvision's `vit_b_16` and its like, which nothing lies beside."""
