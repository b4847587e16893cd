"""`VisionTransformer` of timm: ViT, DeiT, DeiT III, DINOv2, and the towers of CLIP and SigLIP."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lorajax.models import family, vision
from lorajax.models.family import Format, Rule, Untold
from lorajax.models.files import Source
from lorajax.models.vit.huggingface import refuse
from lorajax.models.vit.model import ViTConfig, grid_of, patches

# Width and heads of the architectures whose function this model has (timm 1.0, its own source).
_SIZES = {
    "tiny": (192, 3),
    "xsmall": (256, 4),
    "small": (384, 6),
    "medium": (512, 8),
    "betwixt": (640, 10),
    "base": (768, 12),
    "large": (1024, 16),
    "so400m": (1152, 16),
    "huge": (1280, 16),
    "giant": (1408, 16),
    "gigantic": (1664, 16),
    "giantopt": (1536, 16),
    "test": (64, 2),
}
# A file without configuration: the widths that have the same heads in every architecture there.
_BY_WIDTH = {_SIZES[name][0]: _SIZES[name][1] for name in ("tiny", "small", "base", "large")}
_HALF = ((0.5,), (0.5,))
_IMAGENET = (vision.IMAGENET_MEAN, vision.IMAGENET_STD)
_OPENAI = (vision.CLIP_MEAN, vision.CLIP_STD)


class _Known(NamedTuple):
    """What the name of an architecture tells that its tensors do not (timm 1.0, its own source).

    Attributes:
      pattern: of names; its group is the size.
      gelu: the activation.
      epsilon: of the norms.
      placed: whether the tokens in front have positions.
      tokens: whether the last norm comes before the mean.
      statistics: mean and standard deviation of the images.
      sizes: width and heads where they are others than `_SIZES` has.
    """

    pattern: str
    gelu: str = "erf"
    epsilon: float = 1e-6
    placed: bool = True
    tokens: bool = False
    statistics: tuple[tuple[float, ...], tuple[float, ...]] = _HALF
    sizes: Mapping[str, tuple[int, int]] = {}


_ANY = "tiny|small|base|large|huge|giant|gigantic"
_DINO = {"giant": (1536, 24)}
_ARCHITECTURES = (
    _Known(rf"vit_({_ANY})_patch\d+_\d+(?:_in21k|_miil|_dino)*"),
    _Known(r"(test)_vit"),
    _Known(rf"vit_({_ANY})_patch\d+_gap_\d+", tokens=True),
    _Known(r"deit_(tiny|small|base)(?:_distilled)?_patch\d+_\d+", statistics=_IMAGENET),
    _Known(
        r"deit3_(small|medium|base|large|huge)_patch\d+_\d+", placed=False, statistics=_IMAGENET
    ),
    _Known(r"vit_(small|base|large|giant)_patch14_dinov2", sizes=_DINO, statistics=_IMAGENET),
    _Known(
        r"vit_(small|base|large|giant)_patch14_reg4_dinov2",
        placed=False,
        sizes=_DINO,
        statistics=_IMAGENET,
    ),
    _Known(
        rf"vit_({_ANY}|xsmall|medium|betwixt)_patch\d+_clip_\d+", epsilon=1e-5, statistics=_OPENAI
    ),
    _Known(rf"vit_({_ANY})_patch\d+_clip_quickgelu_\d+", "quick", epsilon=1e-5, statistics=_OPENAI),
    _Known(
        r"vit_(?:(base)_patch32|(large)_patch16|(so400m|giantopt)_patch16)_siglip_(?:gap_)?"
        r"(?(2)512|\d+)",
        "tanh",
        tokens=True,
    ),
    _Known(r"vit_(base|large|so400m)_patch1[46]_siglip_(?:gap_)?\d+", tokens=True),
)
_GELU = {"gelu": "erf", "gelu_tanh": "tanh", "quick_gelu": "quick"}

_FREE = (
    *("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio"),
    *("num_heads", "global_pool", "fc_norm", "act_layer", "qkv_bias", "weight_init", "fix_init"),
    *("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "pretrained", "strict_img_size"),
    *("class_token", "no_embed_class", "reg_tokens", "pre_norm", "init_values"),
)
_PLAIN = {
    "pos_embed": "learn",
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


def _infer(source: Source) -> dict[str, Any]:
    tensors = source.tensors
    if (name := "blocks.0.attn.q_norm.weight") in tensors:
        raise ValueError(
            f"it has norms of queries and keys ({name}), which this model has no place for"
        )
    architecture, said = vision.timm_arguments(source, _FREE, _PLAIN)
    known, size = _known(architecture)
    shown = _shown(source, said, known if architecture else None)
    if known and "deit_" in architecture:
        distilled = "distilled" in architecture
        family.agree({"distilled": distilled}, {"distilled": shown["distilled"]})
    silent = Untold(f"its architecture is {architecture!r}, which this package does not know")
    if not architecture:
        silent = Untold("it has no config.json, which states it")
    # Without a configuration, a file counts as one with timm's own defaults where these are usual.
    usual = known or (_ARCHITECTURES[0] if not architecture and _is_usual(shown) else None)
    gelu = _gelu(said["act_layer"]) if "act_layer" in said else usual.gelu if usual else silent
    named = _named(source.path.name) if not architecture else None
    statistics = known or named or _ARCHITECTURES[0]
    if not architecture and shown["distilled"]:
        statistics = _ARCHITECTURES[3]
    return shown | {
        "heads": _heads(shown["width"], architecture, said, size),
        "gelu": "erf" if shown["mlp"] == "swiglu" else gelu,
        "mlp": _mlp(shown["mlp"], known, source),
        "epsilon": usual.epsilon if usual else silent,
        **_pool(source, said, known, bool(architecture) and known is None),
        **vision.statistics(source, *statistics.statistics),
    }


def _known(architecture: str) -> tuple[_Known | None, tuple[int, int] | None]:
    """What is known of an architecture, with its width and heads."""
    for known in _ARCHITECTURES:
        if match := re.fullmatch(known.pattern, architecture):
            size = next(group for group in match.groups() if group)
            return known, known.sizes.get(size, _SIZES[size])
    return None, None


def _named(file: str) -> _Known | None:
    """The architecture that the name of a bare file speaks of."""
    return _ARCHITECTURES[3] if re.search("deit|dino", file) else None


def _is_usual(shown: dict[str, Any]) -> bool:
    """Whether everything like it in timm has one activation and one epsilon."""
    return shown["class_token"] and not shown["norm_before"] and shown["mlp"] == "gelu"


def _shown(source: Source, said: dict[str, Any], known: _Known | None) -> dict[str, Any]:
    """The fields that the tensors show, checked against what is stated."""
    tensors = source.tensors
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    front = [name for name in ("cls_token", "dist_token") if name in tensors]
    wide = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    mlp = tensors["blocks.0.mlp.fc2.weight"].shape[1]
    if mlp not in (wide, wide // 2):
        raise ValueError(f"its MLP has {wide} features behind fc1 and {mlp} in front of fc2")
    depth = family.count(tensors, r"blocks\.(\d+)\.")
    classes = family.classes(tensors, "head.weight")
    stated = {"embed_dim": width, "depth": depth, "in_chans": channels, "num_classes": classes}
    if int(width * said.get("mlp_ratio", wide / width)) != wide:
        stated["mlp_ratio"] = wide / width
    stated["patch_size"] = (patch, patch) if isinstance(said.get("patch_size"), list) else patch
    stated |= {
        "class_token": "cls_token" in tensors,
        "reg_tokens": registers,
        "pre_norm": "norm_pre.weight" in tensors,
    }
    scaled = "blocks.0.ls1.gamma" in tensors
    if bool(said.get("init_values")) and not scaled:
        stated["init_values"] = "no layer scale"
    # A model without classes, as its publisher has it, says so with a zero.
    family.agree({k: v for k, v in said.items() if (k, v) != ("num_classes", 0)}, stated)
    placed, image_size = _grid(source, said, known, len(front) + registers, patch)
    return {
        "image_size": image_size,
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "mlp_width": mlp,
        "classes": classes,
        "channels": channels,
        "class_token": stated["class_token"],
        "distilled": "dist_token" in tensors,
        "registers": registers,
        "placed": placed,
        "norm_before": stated["pre_norm"],
        "patch_bias": "patch_embed.proj.bias" in tensors,
        "layer_scale": scaled,
        "mlp": "gelu" if mlp == wide else "swiglu",
    }


def _grid(
    source: Source, said: dict[str, Any], known: _Known | None, front: int, patch: int
) -> tuple[int | Untold, tuple[int, int] | Untold]:
    """How many tokens in front have positions, and the image size."""
    count = source.tensors["pos_embed"].shape[1]
    details = source.json("config.json").get("pretrained_cfg") or {}
    given = details.get("input_size")
    size = vision.pair(given[1:]) if isinstance(given, list) else None
    stated = vision.pair(said["img_size"]) if "img_size" in said else None
    if "no_embed_class" in said:
        placed = 0 if said["no_embed_class"] else front
    elif known is not None:
        placed = front if known.placed else 0
    else:
        # A bare file: of the two, that which leaves a square grid.
        square = [n for n in {0, front} if round((count - n) ** 0.5) ** 2 == count - n]
        placed = square[0] if len(square) == 1 else front
    return placed, grid_of(count - placed, patch, stated, known=size)


def _heads(
    width: int, architecture: str, said: dict[str, Any], size: tuple[int, int] | None
) -> int | Untold:
    if "num_heads" in said:
        return said["num_heads"]
    if not architecture:
        why = f"its tensors have the width {width}, for which there is no standard number of heads"
        return _BY_WIDTH.get(width, Untold(why))
    if size is None:
        return Untold(f"its architecture is {architecture!r}, which this package does not know")
    expected, heads = size
    if width in (expected, said.get("embed_dim")):
        return heads
    return Untold(f"its width is {width}, and that of {architecture} is {expected}")


def _mlp(shown: str, known: _Known | None, source: Source) -> str | Untold:
    """Of three layers, which function the gate goes through is known of DINOv2 alone."""
    if shown == "gelu" or (known is not None and "dinov2" in known.pattern):
        return shown
    return Untold("its MLP has a gate, of which nothing tells the activation; 'swiglu' for a SiLU")


def _pool(
    source: Source, said: dict[str, Any], known: _Known | None, unknown: bool
) -> dict[str, Any]:
    """What the head reads, and where the last norm is."""
    tensors = source.tensors
    after, asks = "fc_norm.weight" in tensors, "attn_pool.latent" in tensors
    usual = "map" if asks else "avg" if after or "cls_token" not in tensors else "token"
    pool = said.get("global_pool", usual)
    before = said.get("fc_norm") is False or (known is not None and known.tokens)
    # A mean of normed tokens is what a bare file without a class token cannot be told from.
    before = before or (known is None and not unknown and "cls_token" not in tensors)
    if unknown and "global_pool" not in said and not asks:
        return {"pool": Untold("its architecture is not known here, and it states no global_pool")}
    found = {
        ("token", False): ("cls", "pooled"),
        ("avg", True): ("mean", "pooled"),
        ("map", False): ("attention", "tokens"),
    } | ({("avg", False): ("mean", "tokens")} if before else {})
    if (pool, after) not in found or asks != (pool == "map"):
        norm = "with" if after else "without"
        raise ValueError(
            f"its global_pool is {pool!r} {norm} fc_norm, which this model has no place for"
        )
    name, norm = found[pool, after]
    return {"pool": name, "final_norm": norm}


def _gelu(activation: Any) -> str:
    if activation not in _GELU:
        raise ValueError(f"its act_layer is {activation!r}; it must be one of {', '.join(_GELU)}")
    return _GELU[activation]


def _front(config: ViTConfig) -> Iterator[Rule]:
    """The rule of the tokens in front, which have a tensor each in files."""
    counts = {
        "cls_token": int(config.class_token),
        "dist_token": int(config.distilled),
        "reg_token": config.registers,
    }
    names = tuple(name for name, count in counts.items() if count)
    ends = list(np.cumsum([counts[name] for name in names]))[:-1]
    if names:
        yield Rule(
            names,
            ("embeddings.prefix",),
            lambda *x: (np.concatenate(x, axis=1),),
            lambda x: tuple(np.split(x, ends, axis=1)),
        )


def _rules(config: ViTConfig) -> Iterator[Rule]:
    yield from _front(config)
    yield family.one("pos_embed", "embeddings.positions")
    yield patches("patch_embed.proj.weight", config)
    if config.patch_bias:
        yield family.one("patch_embed.proj.bias", "embeddings.patches.bias")
    if config.norm_before:
        yield from family.layer_norm("norm_pre", "norm_before")
    for i in range(config.depth):
        at = f"blocks.{i}"
        names = [f"{at}.attention.{n}" for n in ("query", "key", "value")]
        yield from family.stacked(f"{at}.attn.qkv", names, True)
        yield from family.linear(f"{at}.attn.proj", f"{at}.attention.out")
        if config.mlp == "swiglu":
            yield from family.stacked(f"{at}.mlp.fc1", (f"{at}.mlp.gate", f"{at}.mlp.up"))
        else:
            yield from family.linear(f"{at}.mlp.fc1", f"{at}.mlp.up")
        yield from family.linear(f"{at}.mlp.fc2", f"{at}.mlp.down")
        for number in "12":
            yield from family.layer_norm(f"{at}.norm{number}", f"{at}.norm{number}")
            if config.layer_scale:
                yield family.one(f"{at}.ls{number}.gamma", f"{at}.scale{number}")
    after = config.pool == "mean" and config.final_norm == "pooled"
    yield from family.layer_norm("fc_norm" if after else "norm", "norm")
    if config.pool == "attention":
        yield from _attention_pool()
    yield from family.linear("head", "head")
    if config.distilled:
        yield from family.linear("head_dist", "distilled_head")


def _attention_pool() -> Iterator[Rule]:
    ours = "pool.attention"
    yield family.one("attn_pool.latent", "pool.probe")
    yield from family.linear("attn_pool.q", f"{ours}.query")
    yield from family.stacked("attn_pool.kv", (f"{ours}.key", f"{ours}.value"))
    yield from family.linear("attn_pool.proj", f"{ours}.out")
    yield from family.layer_norm("attn_pool.norm", "pool.norm")
    yield from family.linear("attn_pool.mlp.fc1", "pool.mlp.up")
    yield from family.linear("attn_pool.mlp.fc2", "pool.mlp.down")


def _express(config: ViTConfig) -> None:
    free = ("pool", "class_token", "distilled", "registers", "norm_before", "layer_scale", "mlp")
    only: dict[str, Any] = {"patch_bias": not config.norm_before}
    if config.placed == 0:
        only["placed"] = 0
    only["final_norm"] = "tokens" if config.pool == "attention" else config.final_norm
    refuse(config, "timm", free, **only)
    if config.pool == "cls+mean" or config.final_norm == "none":
        name = "pool" if config.pool == "cls+mean" else "final_norm"
        raise ValueError(
            f"layout is 'timm', which has no {name} = {getattr(config, name)!r}; use 'lorajax'."
        )
    if config.epsilon not in (1e-5, 1e-6) or (config.epsilon == 1e-5 and config.mlp == "swiglu"):
        raise ValueError(
            f"layout is 'timm', whose layer norms have epsilon = 1e-06, and not {config.epsilon}; "
            "use 'lorajax'."
        )


def _architecture(config: ViTConfig) -> str:
    """The one that has what no argument tells, for the arguments to change."""
    if config.mlp == "swiglu":
        return "vit_giant_patch14_dinov2"
    if config.epsilon == 1e-5:
        return "vit_base_patch16_clip_224"
    return f"{'deit_base_distilled' if config.distilled else 'vit_base'}_patch16_224"


def _beside(config: ViTConfig) -> dict[str, dict[str, Any]]:
    pool = {"cls": "token", "mean": "avg", "attention": "map"}[config.pool]
    size = list(config.image_size)
    gated = config.mlp == "swiglu"
    arguments = {
        "img_size": size,
        "patch_size": config.patch_size,
        "in_chans": config.channels,
        "num_classes": config.classes,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_width * (2 if gated else 1) / config.width,
        "global_pool": pool,
        "class_token": config.class_token,
        "reg_tokens": config.registers,
        "no_embed_class": config.placed == 0,
        "pre_norm": config.norm_before,
        "init_values": 1e-5 if config.layer_scale else None,
    }
    if config.pool == "mean":
        arguments["fc_norm"] = config.final_norm == "pooled"
    if not gated:
        arguments["act_layer"] = {v: k for k, v in _GELU.items()}[config.gelu]
    if config.distilled:  # whose class has no such arguments
        for name in ("class_token", "reg_tokens", "no_embed_class", "pre_norm", "init_values"):
            del arguments[name]
    return {
        "config.json": {
            "architecture": _architecture(config),
            "num_classes": config.classes,
            "num_features": config.width,
            "global_pool": pool,
            "model_args": arguments,
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
