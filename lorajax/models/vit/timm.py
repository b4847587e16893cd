"""`VisionTransformer` and the distilled DeiT of timm."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from lorajax.models import family, vision
from lorajax.models.family import Format, Rule, Untold
from lorajax.models.files import Source
from lorajax.models.vit.model import ViTConfig, grid_of, patches

# Width and heads of the architectures whose function this model has (timm 1.0, its own source).
_SIZES = {
    "tiny": (192, 3),
    "small": (384, 6),
    "base": (768, 12),
    "large": (1024, 16),
    "huge": (1280, 16),
    "giant": (1408, 16),
    "gigantic": (1664, 16),
    "test": (64, 2),
}
_KNOWN = re.compile(
    r"vit_(tiny|small|base|large|huge|giant|gigantic)_patch\d+_\d+(?:_in21k|_miil|_dino)*"
    r"|deit_(tiny|small|base)(?:_distilled)?_patch\d+_\d+"
    r"|(test)_vit"
)
# A file without configuration: the widths that have the same heads in every architecture there.
_BY_WIDTH = {width: heads for width, heads in list(_SIZES.values())[:4]}
_GELU = {"gelu": "erf", "gelu_tanh": "tanh"}

_FREE = (
    *("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio"),
    *("num_heads", "global_pool", "fc_norm", "act_layer", "qkv_bias", "weight_init", "fix_init"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "pretrained", "strict_img_size"),
)
_PLAIN = {
    "class_token": True,
    "no_embed_class": False,
    "reg_tokens": 0,
    "pos_embed": "learn",
    "pre_norm": False,
    "qk_norm": False,
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "proj_bias": True,
    "final_norm": True,
    "pool_include_prefix": False,
    "dynamic_img_size": False,
    "dynamic_img_pad": False,
    "norm_layer": "layernorm",
}


# Tensors of what this model has no place for, in words.
_ODD = {
    "reg_token": "register tokens",
    "norm_pre.weight": "a norm before the blocks",
    "blocks.0.ls1.gamma": "layer scale",
    "blocks.0.attn.q_norm.weight": "norms of queries and keys",
    "attn_pool.latent": "pooling by attention",
}


def _infer(source: Source) -> dict[str, Any]:
    tensors = source.tensors
    for name in _ODD.keys() & tensors.keys():
        raise ValueError(f"it has {_ODD[name]} ({name}), which this model has no place for")
    if "cls_token" not in tensors:
        raise ValueError("it has no class token, which this model has no place for")
    architecture, said = vision.timm_arguments(source, _FREE, _PLAIN)
    match = _KNOWN.fullmatch(architecture)
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    distilled = "dist_token" in tensors
    patch_tokens = tensors["pos_embed"].shape[1] - (2 if distilled else 1)
    mlp = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    depth = family.count(tensors, r"blocks\.(\d+)\.")
    classes = family.classes(tensors, "head.weight")
    shown = {"embed_dim": width, "depth": depth, "in_chans": channels, "num_classes": classes}
    if int(width * said.get("mlp_ratio", mlp / width)) != mlp:
        shown["mlp_ratio"] = mlp / width
    shown["patch_size"] = (patch, patch) if isinstance(said.get("patch_size"), list) else patch
    family.agree(said, shown)
    if match:
        family.agree({"distilled": "distilled" in architecture}, {"distilled": distilled})
    silent = Untold(f"its architecture is {architecture!r}, of which this package does not know it")
    standard = not architecture or match
    pooled = standard or "global_pool" in said
    # The DeiT releases were trained on ImageNet's own statistics, timm's other ViTs on 0.5.
    deit = distilled or "deit" in (architecture or source.path.name)
    default = (vision.IMAGENET_MEAN, vision.IMAGENET_STD) if deit else ((0.5,), (0.5,))
    details = source.json("config.json").get("pretrained_cfg") or {}
    known = details.get("input_size")
    return {
        "image_size": grid_of(
            patch_tokens,
            patch,
            vision.pair(said["img_size"]) if "img_size" in said else None,
            known=vision.pair(known[1:]) if isinstance(known, list) else None,
        ),
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": _heads(width, architecture, said),
        "mlp_width": mlp,
        "classes": classes,
        "channels": channels,
        "pool": _pool(said, "fc_norm.weight" in tensors) if pooled else silent,
        "distilled": distilled,
        "gelu": _gelu(said["act_layer"]) if "act_layer" in said else "erf" if standard else silent,
        "epsilon": 1e-6 if standard else silent,
        **vision.statistics(source, *default),
    }


def _heads(width: int, architecture: str, said: dict[str, Any]) -> int | Untold:
    if "num_heads" in said:
        return said["num_heads"]
    if not architecture:
        why = f"its tensors have the width {width}, for which there is no standard number of heads"
        return _BY_WIDTH.get(width, Untold(why))
    if not (match := _KNOWN.fullmatch(architecture)):
        return Untold(f"its architecture is {architecture!r}, which this package does not know")
    expected, heads = _SIZES[next(group for group in match.groups() if group)]
    if width in (expected, said.get("embed_dim")):
        return heads
    return Untold(f"its width is {width}, and that of {architecture} is {expected}")


def _pool(said: dict[str, Any], after: bool) -> str:
    """What the head reads; `after` says that the norm comes after pooling (timm's fc_norm)."""
    pool = said.get("global_pool", "avg" if after else "token")
    if (pool, after) not in (("token", False), ("avg", True)):
        norm = "with" if after else "without"
        raise ValueError(
            f"its global_pool is {pool!r} {norm} fc_norm, which this model has no place for"
        )
    return "mean" if after else "cls"


def _gelu(activation: Any) -> str:
    if activation not in _GELU:
        raise ValueError(f"its act_layer is {activation!r}; it must be one of {', '.join(_GELU)}")
    return _GELU[activation]


def _rules(config: ViTConfig) -> Iterator[Rule]:
    width = config.width
    if config.distilled:
        yield Rule(
            ("cls_token", "dist_token"),
            ("embeddings.prefix",),
            lambda first, second: (np.concatenate([first, second], axis=1),),
            lambda x: (x[:, :1], x[:, 1:]),
        )
    else:
        yield family.one("cls_token", "embeddings.prefix")
    yield family.one("pos_embed", "embeddings.positions")
    yield patches("patch_embed.proj.weight", config)
    yield family.one("patch_embed.proj.bias", "embeddings.patches.bias")
    for i in range(config.depth):
        theirs, ours = f"blocks.{i}", f"blocks.{i}"
        names = [f"{ours}.attention.{n}" for n in ("query", "key", "value")]
        yield Rule(
            (f"{theirs}.attn.qkv.weight",),
            tuple(f"{n}.kernel" for n in names),
            lambda x: tuple(x.reshape(3, width, width).transpose(0, 2, 1)),
            lambda *x: (np.concatenate([kernel.T for kernel in x]),),
        )
        yield Rule(
            (f"{theirs}.attn.qkv.bias",),
            tuple(f"{n}.bias" for n in names),
            lambda x: tuple(x.reshape(3, width)),
            lambda *x: (np.concatenate(x),),
            True,
        )
        yield from family.linear(f"{theirs}.attn.proj", f"{ours}.attention.out")
        yield from family.linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.up")
        yield from family.linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.down")
        yield from family.layer_norm(f"{theirs}.norm1", f"{ours}.norm1")
        yield from family.layer_norm(f"{theirs}.norm2", f"{ours}.norm2")
    yield from family.layer_norm("fc_norm" if config.pool == "mean" else "norm", "norm")
    yield from family.linear("head", "head")
    if config.distilled:
        yield from family.linear("head_dist", "distilled_head")


def _express(config: ViTConfig) -> None:
    if config.epsilon != 1e-6:
        raise ValueError(
            f"layout is 'timm', whose layer norms have epsilon = 1e-06, and not {config.epsilon}; "
            "use 'lorajax'."
        )


def _beside(config: ViTConfig) -> dict[str, dict[str, Any]]:
    distilled = config.distilled
    pool = "avg" if config.pool == "mean" else "token"
    size = list(config.image_size)
    return {
        "config.json": {
            "architecture": f"{'deit_base_distilled' if distilled else 'vit_base'}_patch16_224",
            "num_classes": config.classes,
            "num_features": config.width,
            "global_pool": pool,
            "model_args": {
                "img_size": size,
                "patch_size": config.patch_size,
                "in_chans": config.channels,
                "num_classes": config.classes,
                "embed_dim": config.width,
                "depth": config.depth,
                "num_heads": config.heads,
                "mlp_ratio": config.mlp_width / config.width,
                "act_layer": "gelu" if config.gelu == "erf" else "gelu_tanh",
                "global_pool": pool,
            },
            "pretrained_cfg": {
                "num_classes": config.classes,
                "input_size": [config.channels, *size],
                "mean": list(config.mean) * (config.channels if len(config.mean) == 1 else 1),
                "std": list(config.std) * (config.channels if len(config.std) == 1 else 1),
            },
        }
    }


TIMM = Format(
    "timm",
    ("patch_embed.proj.weight",),
    _infer,
    _rules,
    express=_express,
    beside=_beside,
    side=vision.SIDE,
)
"""Files of timm, with their config.json; without one, timm's defaults but for the heads."""
