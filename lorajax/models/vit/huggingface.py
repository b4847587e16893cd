"""`ViTForImageClassification` of transformers, as its safetensors files name things."""

import re
from collections.abc import Iterator
from typing import Any

from lorajax.models import family, vision
from lorajax.models.family import Format, Rule, Untold
from lorajax.models.files import Source
from lorajax.models.vit.model import ViTConfig, grid_of, patches

_PROJECTION = "embeddings.patch_embeddings.projection"
_GELU = {
    "gelu": "erf",
    "gelu_python": "erf",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_fast": "tanh",
}


def _infer(source: Source) -> dict[str, Any]:
    tensors, config = source.tensors, source.json("config.json")
    width, channels, patch, _ = tensors[f"vit.{_PROJECTION}.weight"].shape
    tokens = tensors["vit.embeddings.position_embeddings"].shape[1]
    kind = config.get("model_type", "vit")
    if kind != "vit":
        raise ValueError(f"its config.json states model_type = {kind!r}, which is another model")
    said = {key: value for key, value in config.items() if value is not None}
    activation = said.get("hidden_act", "gelu")
    if activation not in _GELU:
        raise ValueError(f"its hidden_act is {activation!r}; it must be one of {', '.join(_GELU)}")
    stated = vision.pair(said["image_size"]) if "image_size" in said else None
    size = grid_of(tokens - 1, patch, stated, known=vision.processed_size(source))
    classes = family.classes(tensors, "classifier.weight")
    mlp = tensors["vit.encoder.layer.0.intermediate.dense.weight"].shape[0]
    shown = {
        "hidden_size": width,
        "num_hidden_layers": family.count(tensors, r"vit\.encoder\.layer\.(\d+)\."),
        "intermediate_size": mlp,
        "num_channels": channels,
        "patch_size": (patch, patch) if isinstance(said.get("patch_size"), list) else patch,
    }
    shown["num_labels"] = classes
    family.agree(said, shown)
    if isinstance(labels := said.get("id2label"), dict):
        family.agree({"id2label": len(labels)}, {"id2label": classes})
    family.agree({"size": vision.processed_size(source)}, {"size": size})
    silent = Untold("it has no config.json, which states it")
    return {
        "image_size": size,
        "patch_size": patch,
        "width": width,
        "depth": shown["num_hidden_layers"],
        # What a config.json leaves out has the value that transformers' ViTConfig gives it.
        "heads": said.get("num_attention_heads", 12) if config else silent,
        "mlp_width": mlp,
        "classes": classes,
        "channels": channels,
        "gelu": _GELU[activation] if config else silent,
        "epsilon": float(said.get("layer_norm_eps", 1e-12)) if config else silent,
        **vision.statistics(source),
    }


def _rules(config: ViTConfig) -> Iterator[Rule]:
    yield family.one("vit.embeddings.cls_token", "embeddings.prefix")
    yield family.one("vit.embeddings.position_embeddings", "embeddings.positions")
    yield patches(f"vit.{_PROJECTION}.weight", config)
    yield family.one(f"vit.{_PROJECTION}.bias", "embeddings.patches.bias")
    for i in range(config.depth):
        theirs, ours = f"vit.encoder.layer.{i}", f"blocks.{i}"
        for name in ("query", "key", "value"):
            yield from family.linear(
                f"{theirs}.attention.attention.{name}", f"{ours}.attention.{name}", True
            )
        yield from family.linear(f"{theirs}.attention.output.dense", f"{ours}.attention.out")
        yield from family.linear(f"{theirs}.intermediate.dense", f"{ours}.mlp.up")
        yield from family.linear(f"{theirs}.output.dense", f"{ours}.mlp.down")
        yield from family.layer_norm(f"{theirs}.layernorm_before", f"{ours}.norm1")
        yield from family.layer_norm(f"{theirs}.layernorm_after", f"{ours}.norm2")
    yield from family.layer_norm("vit.layernorm", "norm")
    yield from family.linear("classifier", "head")


_VERSION_5 = (
    (r"^vit\.encoder\.layer\.", "vit.layers."),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
"""From the names in files, which are those of the modules before version 5, to the modules'."""


def _modules(config: ViTConfig) -> Iterator[Rule]:
    for rule in _rules(config):
        names = list(rule.theirs)
        for old, new in _VERSION_5:
            names = [re.sub(old, new, name) for name in names]
        yield rule._replace(theirs=tuple(names))


def _express(config: ViTConfig) -> None:
    for name, odd in (("pool", config.pool == "mean"), ("distilled", config.distilled)):
        if odd:
            raise ValueError(
                f"layout is 'huggingface', which has no {name} = {getattr(config, name)!r}; use "
                "'timm' or 'lorajax'."
            )


def _beside(config: ViTConfig) -> dict[str, dict[str, Any]]:
    height, width = config.image_size
    return {
        "config.json": {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            "hidden_size": config.width,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "intermediate_size": config.mlp_width,
            "hidden_act": "gelu" if config.gelu == "erf" else "gelu_pytorch_tanh",
            "layer_norm_eps": config.epsilon,
            "image_size": height if height == width else [height, width],
            "patch_size": config.patch_size,
            "num_channels": config.channels,
            "qkv_bias": True,
            "id2label": {str(i): f"LABEL_{i}" for i in range(config.classes)},
            "label2id": {f"LABEL_{i}": i for i in range(config.classes)},
        },
        "preprocessor_config.json": vision.processor_of(config, config.image_size),
    }


HUGGINGFACE = Format(
    "huggingface",
    (f"vit.{_PROJECTION}.weight",),
    _infer,
    _rules,
    ignored=r"vit\.pooler\..*",
    prefix="vit.",
    bare=f"{_PROJECTION}.weight",
    express=_express,
    beside=_beside,
    side=vision.SIDE,
    modules=_modules,
)
"""Files of `ViTForImageClassification` and `ViTModel`, with their config.json."""
