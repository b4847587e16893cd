"""DINOv2 of transformers, with and without registers, as its safetensors files name things."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from lorajax.models import family, vision
from lorajax.models.family import Format, Rule
from lorajax.models.files import Source
from lorajax.models.vit import huggingface
from lorajax.models.vit.model import ViTConfig, patches

LAYOUT = "huggingface-dinov2"
_EMBEDDINGS = "dinov2.embeddings"
_TOWER = huggingface.Tower(
    ("dinov2", "dinov2_with_registers"),
    f"{_EMBEDDINGS}.patch_embeddings.projection.weight",
    f"{_EMBEDDINGS}.position_embeddings",
    "dinov2.encoder.layer.",
    "mlp.fc1.weight",
    epsilon=1e-6,
    mean=vision.IMAGENET_MEAN,
    std=vision.IMAGENET_STD,
)
_KIND = {False: "Dinov2", True: "Dinov2WithRegisters"}


def _infer(source: Source) -> dict[str, Any]:
    tensors = source.tensors
    gated = f"{_TOWER.layer}0.mlp.weights_in.weight" in tensors
    tower = _TOWER._replace(up="mlp.weights_in.weight", hidden=2) if gated else _TOWER
    said = huggingface.told(source.json("config.json"))
    registers = tensors.get(f"{_EMBEDDINGS}.register_tokens")
    count = 0 if registers is None else registers.shape[1]
    if (kind := said.get("model_type")) is not None:
        family.agree({"model_type": kind}, {"model_type": tower.kinds[registers is not None]})
    family.agree(said, {"num_register_tokens": count, "use_swiglu_ffn": gated})
    fields = huggingface.described(source, tower, said)
    size, patch = fields["image_size"], fields["patch_size"]
    if isinstance(size, tuple):
        # The released tables are those of 518 pixels, the prepared images have 224, and
        # transformers interpolates in each call, so that the table itself may train on.
        fields["table"] = (size[0] // patch, size[1] // patch)
        fields["image_size"] = vision.processed_size(source) or size
    return fields | {
        "pool": source.told.get("pool", "cls+mean"),
        "final_norm": "tokens",
        "registers": count,
        "placed": 1,
        "layer_scale": True,
        "mlp": "swiglu" if gated else "gelu",
        # Only with registers transformers interpolates as timm does.
        "antialias": registers is not None,
    }


def _prefix(config: ViTConfig) -> Rule:
    if not config.registers:
        return family.one(f"{_EMBEDDINGS}.cls_token", "embeddings.prefix")
    return Rule(
        (f"{_EMBEDDINGS}.cls_token", f"{_EMBEDDINGS}.register_tokens"),
        ("embeddings.prefix",),
        lambda first, others: (np.concatenate([first, others], axis=1),),
        lambda x: (x[:, :1], x[:, 1:]),
    )


def _rules(config: ViTConfig) -> Iterator[Rule]:
    yield _prefix(config)
    yield family.unused(f"{_EMBEDDINGS}.mask_token", 1, config.width)
    yield family.one(f"{_EMBEDDINGS}.position_embeddings", "embeddings.positions")
    yield patches(_TOWER.projection, config)
    projection = _TOWER.projection.removesuffix(".weight")
    yield family.one(f"{projection}.bias", "embeddings.patches.bias")
    for i in range(config.depth):
        theirs, ours = f"{_TOWER.layer}{i}", f"blocks.{i}"
        for name in ("query", "key", "value"):
            yield from family.linear(
                f"{theirs}.attention.attention.{name}", f"{ours}.attention.{name}", True
            )
        yield from family.linear(f"{theirs}.attention.output.dense", f"{ours}.attention.out")
        if config.mlp == "swiglu":
            gates = (f"{ours}.mlp.gate", f"{ours}.mlp.up")
            yield from family.stacked(f"{theirs}.mlp.weights_in", gates)
            yield from family.linear(f"{theirs}.mlp.weights_out", f"{ours}.mlp.down")
        else:
            yield from family.linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.up")
            yield from family.linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.down")
        for number in "12":
            yield from family.layer_norm(f"{theirs}.norm{number}", f"{ours}.norm{number}")
            yield family.one(f"{theirs}.layer_scale{number}.lambda1", f"{ours}.scale{number}")
    yield from family.layer_norm("dinov2.layernorm", "norm")
    yield from family.linear("classifier", "head")


def _spell(config: ViTConfig, name: str) -> str:
    return re.sub(r"^dinov2\.", "dinov2_with_registers.", name) if config.registers else name


_VERSION_5 = (
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
)
"""From the names in files, which are those of the modules before version 5, to the modules'."""


def _named(config: ViTConfig) -> Iterator[Rule]:
    """Rules by the names of the modules before version 5, and of the files."""
    for rule in _rules(config):
        yield rule._replace(theirs=tuple(_spell(config, name) for name in rule.theirs))


def _modules(config: ViTConfig) -> Iterator[Rule]:
    for rule in _named(config):
        names = list(rule.theirs)
        for old, new in _VERSION_5:
            names = [re.sub(old, new, name) for name in names]
        gated = re.fullmatch(r"(.*\.mlp\.)weights_in\.(weight|bias)", names[0])
        if gated is None:
            names = [name.replace(".mlp.weights_out.", ".mlp.down_proj.") for name in names]
            yield rule._replace(theirs=tuple(names))
        elif gated[2] == "weight":
            for part in ("gate", "up"):
                ours = f"{rule.ours[0].removesuffix('gate.kernel')}{part}"
                yield from family.linear(f"{gated[1]}{part}_proj", ours)


def _express(config: ViTConfig) -> None:
    only = {"final_norm": "tokens", "placed": 1, "layer_scale": True, "pool": "cls+mean"}
    huggingface.refuse(config, LAYOUT, ("table", "mlp", "registers"), **only)
    if _ratio(config) is None:
        raise ValueError(
            f"layout is {LAYOUT!r}, in which no mlp_ratio makes a {config.mlp!r} of width "
            f"{config.width} with mlp_width = {config.mlp_width}; use 'lorajax'."
        )


def _ratio(config: ViTConfig) -> int | None:
    """The whole number that transformers takes the MLP's hidden features from."""
    for ratio in range(1, 65):
        hidden = ratio * config.width
        if config.mlp == "swiglu":
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        if hidden == config.mlp_width:
            return ratio
    return None


def _beside(config: ViTConfig) -> dict[str, dict[str, Any]]:
    kind = _KIND[bool(config.registers)]
    stated = huggingface.sizes(config) | huggingface.labels(config)
    del stated["intermediate_size"]
    stated |= {
        "architectures": [f"{kind}ForImageClassification"],
        "model_type": _TOWER.kinds[bool(config.registers)],
        "mlp_ratio": _ratio(config),
        "use_swiglu_ffn": config.mlp == "swiglu",
        "qkv_bias": True,
    }
    if config.registers:
        stated["num_register_tokens"] = config.registers
    return {
        "config.json": stated,
        "preprocessor_config.json": vision.processor_of(config, config.image_size),
    }


DINOV2 = Format(
    LAYOUT,
    (_TOWER.projection, f"{_TOWER.layer}0.layer_scale1.lambda1"),
    _infer,
    _rules,
    ignored=r"dinov2\.embeddings\.mask_token",
    prefix="dinov2.",
    bare="embeddings.patch_embeddings.projection.weight",
    rename=lambda name: re.sub(r"^dinov2_with_registers\.", "dinov2.", name),
    spell=_spell,
    express=_express,
    beside=_beside,
    side=vision.SIDE,
    modules=_modules,
)
"""Files of `Dinov2Model`, `Dinov2WithRegistersModel` and of their classifiers."""
