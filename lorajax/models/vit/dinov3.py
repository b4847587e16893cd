"""DINOv3 of transformers (`DINOv3ViTModel`), as its safetensors files name things."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from lorajax.models import family, vision
from lorajax.models.family import Format, Rule, Untold
from lorajax.models.files import Source
from lorajax.models.vit import huggingface
from lorajax.models.vit.model import ViTConfig, patches

LAYOUT = "huggingface-dinov3"
_TOWER = huggingface.Tower(
    ("dinov3_vit",),
    "embeddings.patch_embeddings.weight",
    "",
    "layer.",
    "mlp.up_proj.weight",
    heads=6,
    epsilon=1e-5,
    mean=vision.IMAGENET_MEAN,
    std=vision.IMAGENET_STD,
)


def _infer(source: Source) -> dict[str, Any]:
    said = huggingface.told(source.json("config.json"))
    gated = f"{_TOWER.layer}0.mlp.gate_proj.weight" in source.tensors
    registers = source.tensors["embeddings.register_tokens"].shape[1]
    family.agree(said, {"use_gated_mlp": gated, "num_register_tokens": registers})
    activation = said.get("hidden_act", "silu" if gated else "gelu")
    if gated and activation != "silu":
        raise ValueError(f"its hidden_act is {activation!r}; with a gated MLP it must be 'silu'")
    for name in ("proj_bias", "mlp_bias"):
        family.agree(said, {name: True})
    if gated:
        said = {key: value for key, value in said.items() if key != "hidden_act"}
    fields = huggingface.described(source, _TOWER, said)
    silent = Untold("it has no config.json, which states it")
    return fields | {
        "pool": source.told.get("pool", "cls"),
        "final_norm": "tokens",
        "registers": registers,
        "rope": float(said.get("rope_theta", 100.0)) if said else silent,
        "layer_scale": True,
        "mlp": "swiglu" if gated else "gelu",
        "gelu": "erf" if gated else fields["gelu"],
    }


def _rules(config: ViTConfig) -> Iterator[Rule]:
    yield Rule(
        ("embeddings.cls_token", "embeddings.register_tokens"),
        ("embeddings.prefix",),
        lambda first, others: (np.concatenate([first, others], axis=1),),
        lambda x: (x[:, :1], x[:, 1:]),
    )
    yield family.unused("embeddings.mask_token", 1, 1, config.width)
    yield patches(_TOWER.projection, config)
    yield family.one("embeddings.patch_embeddings.bias", "embeddings.patches.bias")
    for i in range(config.depth):
        theirs, ours = f"{_TOWER.layer}{i}", f"blocks.{i}"
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
            optional = name != "out"
            yield from family.linear(
                f"{theirs}.attention.{short}_proj", f"{ours}.attention.{name}", optional
            )
        gated = ("gate",) if config.mlp == "swiglu" else ()
        for name in (*gated, "up", "down"):
            yield from family.linear(f"{theirs}.mlp.{name}_proj", f"{ours}.mlp.{name}")
        for number in "12":
            yield from family.layer_norm(f"{theirs}.norm{number}", f"{ours}.norm{number}")
            yield family.one(f"{theirs}.layer_scale{number}.lambda1", f"{ours}.scale{number}")
    yield from family.layer_norm("norm", "norm")


def _modules(config: ViTConfig) -> Iterator[Rule]:
    """By the names of the modules, whose encoder is one of its own since version 5."""
    for rule in _rules(config):
        yield rule._replace(
            theirs=tuple(re.sub(r"^layer\.", "model.layer.", n) for n in rule.theirs)
        )


def _express(config: ViTConfig) -> None:
    del config
    raise ValueError(
        f"layout is {LAYOUT!r}, in which transformers has no classifier; use 'lorajax'."
    )


DINOV3 = Format(
    LAYOUT,
    (_TOWER.projection, "embeddings.register_tokens", f"{_TOWER.layer}0.layer_scale1.lambda1"),
    _infer,
    _rules,
    ignored=r"embeddings\.mask_token|rope_embeddings\..*",
    rename=lambda name: re.sub(r"^model\.layer\.", "layer.", name),
    express=_express,
    side=vision.SIDE,
    modules=_modules,
)
"""Files of `DINOv3ViTModel`, which has no head; the class token is read, or what `pool` says."""
