"""`ViTForImageClassification` of transformers, as its safetensors files name things."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

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
    "quick_gelu": "quick",
}


class Tower(NamedTuple):
    """Where a file of transformers has the sizes of an image tower, and what it leaves out.

    Attributes:
      kinds: values of `model_type`; the first is that of a file that states none.
      projection: name of the patch embedding's kernel.
      positions: name of the table of positions; "" for none.
      layer: of a block, in front of its number.
      up: name of the first kernel of the MLP, behind the block's number.
      hidden: outputs of that kernel over the MLP's hidden features.
      front: tokens that have positions in front of the patches.
      heads: what transformers takes where `num_attention_heads` is left out.
      epsilon: likewise for `layer_norm_eps`.
      activation: likewise for `hidden_act`.
      mean: of the images, where nothing tells it.
      std: likewise.
    """

    kinds: tuple[str, ...]
    projection: str
    positions: str
    layer: str
    up: str
    hidden: int = 1
    front: int = 1
    heads: int = 12
    epsilon: float = 1e-12
    activation: str = "gelu"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)


def described(source: Source, tower: Tower, said: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that all towers of transformers have.

    Args:
      source: the checkpoint.
      tower: where they are.
      said: the part of its config.json that is about the tower; empty for none.

    Returns:
      Fields of a ViTConfig; the size is that of the table of positions.

    Raises:
      ValueError: for another model, and where the configuration contradicts the tensors.
    """
    tensors = source.tensors
    width, channels, patch, _ = tensors[tower.projection].shape
    kind = said.get("model_type", tower.kinds[0])
    if kind not in tower.kinds:
        raise ValueError(f"its config.json states model_type = {kind!r}, which is another model")
    activation = said.get("hidden_act", tower.activation)
    if activation not in _GELU:
        raise ValueError(f"its hidden_act is {activation!r}; it must be one of {', '.join(_GELU)}")
    mlp = tensors[f"{tower.layer}0.{tower.up}"].shape[0] // tower.hidden
    depth = family.count(tensors, re.escape(tower.layer) + r"(\d+)\.")
    classes = family.classes(tensors, "classifier.weight")
    stated = said.get("image_size")
    shown = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "intermediate_size": mlp,
        "num_channels": channels,
        "patch_size": (patch, patch) if isinstance(said.get("patch_size"), list) else patch,
    }
    family.agree(said, shown)
    config = source.json("config.json")
    family.agree(config, {"num_labels": classes})
    # The towers of CLIP and SigLIP have labels of no meaning beside a file without a head.
    if isinstance(labels := config.get("id2label"), dict):
        family.agree({"id2label": len(labels)}, {"id2label": classes})
    silent = Untold("it has no config.json, which states it")
    known, stated = vision.processed_size(source), stated and vision.pair(stated)
    if tower.positions:
        count = tensors[tower.positions].shape[-2] - tower.front
        size = grid_of(count, patch, stated, known=known)
    else:
        size = known or stated or Untold("no tensor shows it, and no file beside them states it")
    return {
        "image_size": size,
        "patch_size": patch,
        "width": width,
        "depth": depth,
        # What a config.json leaves out has the value that transformers gives it.
        "heads": said.get("num_attention_heads", tower.heads) if config else silent,
        "mlp_width": mlp,
        "classes": classes,
        "channels": channels,
        "gelu": _GELU[activation] if config else silent,
        "epsilon": float(said.get("layer_norm_eps", tower.epsilon)) if config else silent,
        "antialias": False,
        **vision.statistics(source, tower.mean, tower.std),
    }


def told(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what is null."""
    return {key: value for key, value in config.items() if value is not None}


_VIT = Tower(
    ("vit",),
    f"vit.{_PROJECTION}.weight",
    "vit.embeddings.position_embeddings",
    "vit.encoder.layer.",
    "intermediate.dense.weight",
)


def _infer(source: Source) -> dict[str, Any]:
    fields = described(source, _VIT, told(source.json("config.json")))
    family.agree({"size": vision.processed_size(source)}, {"size": fields["image_size"]})
    return fields


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


_PLAIN = ViTConfig()


def refuse(config: ViTConfig, layout: str, told: Collection[str] = (), **only: Any) -> None:
    """Raises ValueError for a configuration with a switch that a layout cannot tell.

    Args:
      config: of the model.
      layout: the name of the layout.
      told: switches that it tells.
      **only: the values that others must have there; of the rest, that of the plain ViT.
    """
    switches = ("pool", "final_norm", "class_token", "distilled", "registers", "table")
    switches += ("norm_before", "patch_bias", "layer_scale", "mlp", "rope")
    wanted = {name: getattr(_PLAIN, name) for name in switches} | {"placed": config.prefix} | only
    if config.pool == "cls" and config.final_norm != "none":
        wanted["final_norm"] = config.final_norm  # on the class token both are the same
    for name, value in wanted.items():
        stated = config.positions[0] if name == "placed" else getattr(config, name)
        if name not in told and stated != value:
            raise ValueError(
                f"layout is {layout!r}, which has no {name} = {getattr(config, name)!r}; use "
                "another, such as 'lorajax'."
            )


def _express(config: ViTConfig) -> None:
    refuse(config, "huggingface")


def sizes(config: ViTConfig) -> dict[str, Any]:
    """What the `config.json` of every tower states; of the size, that of the table."""
    _, rows, columns = config.positions
    height, width = rows * config.patch_size, columns * config.patch_size
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": {"erf": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}[
            config.gelu
        ],
        "layer_norm_eps": config.epsilon,
        "image_size": height if height == width else [height, width],
        "patch_size": config.patch_size,
        "num_channels": config.channels,
    }


def labels(config: ViTConfig) -> dict[str, Any]:
    """Names of the classes as `config.json` has them: numbers."""
    return {
        "id2label": {str(i): f"LABEL_{i}" for i in range(config.classes)},
        "label2id": {f"LABEL_{i}": i for i in range(config.classes)},
    }


def _beside(config: ViTConfig) -> dict[str, dict[str, Any]]:
    kind = {"architectures": ["ViTForImageClassification"], "model_type": "vit", "qkv_bias": True}
    return {
        "config.json": kind | sizes(config) | labels(config),
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
