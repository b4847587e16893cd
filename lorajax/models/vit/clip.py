"""Image towers of CLIP and SigLIP of transformers, as its safetensors files name things.

A file may hold the whole pair; its texts' tower is left out. Without `pool=` the head reads what it
reads in transformers' `…ForImageClassification`: the mean of the patch tokens, which for CLIP are
not normed. `pool="cls"` of CLIP and `pool="attention"` of SigLIP read what the pair compares.
"""

from collections.abc import Iterator
from typing import Any

from lorajax.models import family, vision
from lorajax.models.family import Format, Rule
from lorajax.models.files import Source
from lorajax.models.vit import huggingface
from lorajax.models.vit.model import ViTConfig, patches

_CLIP_LAYOUT, _SIGLIP_LAYOUT = "huggingface-clip", "huggingface-siglip"
_EMBEDDINGS, _HEAD = "vision_model.embeddings", "vision_model.head"
_CLIP_TOWER = huggingface.Tower(
    ("clip_vision_model", "clip"),
    f"{_EMBEDDINGS}.patch_embedding.weight",
    f"{_EMBEDDINGS}.position_embedding.weight",
    "vision_model.encoder.layers.",
    "mlp.fc1.weight",
    epsilon=1e-5,
    activation="quick_gelu",
    mean=vision.CLIP_MEAN,
    std=vision.CLIP_STD,
)
_SIGLIP_TOWER = _CLIP_TOWER._replace(
    kinds=("siglip_vision_model", "siglip"),
    front=0,
    epsilon=1e-6,
    activation="gelu_pytorch_tanh",
    mean=(0.5,),
    std=(0.5,),
)
TEXTS = r"text_model\..*|(vision_model\.)?(visual|text)_projection\..*|logit_(scale|bias)"
"""Tensors of the texts' tower, and of what compares the two."""
_IGNORED = rf"{TEXTS}|.*\.position_ids"


def _described(source: Source, tower: huggingface.Tower) -> dict[str, Any]:
    config = source.json("config.json")
    said = config.get("vision_config", config)
    if not isinstance(said, dict):
        raise ValueError(f"its vision_config is {said!r}; it must be an object")
    if "vision_config" in config:
        kind = config.get("model_type", tower.kinds[1])
        family.agree({"model_type": kind}, {"model_type": tower.kinds[1]})
    return huggingface.described(source, tower, huggingface.told(said))


def _infer_clip(source: Source) -> dict[str, Any]:
    pool = source.told.get("pool", "mean")
    return _described(source, _CLIP_TOWER) | {
        "pool": pool,
        "final_norm": "none" if pool == "mean" else "tokens",
        "norm_before": True,
        "patch_bias": False,
    }


def _infer_siglip(source: Source) -> dict[str, Any]:
    return _described(source, _SIGLIP_TOWER) | {
        "pool": source.told.get("pool", "mean"),
        "final_norm": "tokens",
        "class_token": False,
    }


def _blocks(config: ViTConfig) -> Iterator[Rule]:
    for i in range(config.depth):
        theirs, ours = f"{_CLIP_TOWER.layer}{i}", f"blocks.{i}"
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
            yield from family.linear(f"{theirs}.self_attn.{short}_proj", f"{ours}.attention.{name}")
        yield from family.layer_norm(f"{theirs}.layer_norm1", f"{ours}.norm1")
        yield from family.layer_norm(f"{theirs}.layer_norm2", f"{ours}.norm2")
        yield from family.linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.up")
        yield from family.linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.down")
    after = "vision_model.post_layernorm"
    if config.final_norm == "none":
        yield from (family.unused(f"{after}.{name}") for name in ("weight", "bias"))
    else:
        yield from family.layer_norm(after, "norm")
    yield from family.linear("classifier", "head")


def _positions() -> Rule:
    return family.one(
        _CLIP_TOWER.positions, "embeddings.positions", lambda x: x[None], lambda x: x[0]
    )


def _clip_rules(config: ViTConfig) -> Iterator[Rule]:
    yield family.one(
        f"{_EMBEDDINGS}.class_embedding",
        "embeddings.prefix",
        lambda x: x[None, None],
        lambda x: x[0, 0],
    )
    yield patches(_CLIP_TOWER.projection, config)
    yield _positions()
    yield from family.layer_norm("vision_model.pre_layrnorm", "norm_before")
    yield from _blocks(config)


def _siglip_rules(config: ViTConfig) -> Iterator[Rule]:
    yield patches(_SIGLIP_TOWER.projection, config)
    yield family.one(f"{_EMBEDDINGS}.patch_embedding.bias", "embeddings.patches.bias")
    yield _positions()
    yield from _blocks(config)
    pool = list(_pool())
    if config.pool == "attention":
        yield from pool
    else:
        yield from (family.unused(name) for rule in pool for name in rule.theirs)


def _pool() -> Iterator[Rule]:
    ours = "pool.attention"
    yield family.one(f"{_HEAD}.probe", "pool.probe")
    yield from family.attention_in(f"{_HEAD}.attention", ours)
    yield from family.linear(f"{_HEAD}.attention.out_proj", f"{ours}.out")
    yield from family.layer_norm(f"{_HEAD}.layernorm", "pool.norm")
    yield from family.linear(f"{_HEAD}.mlp.fc1", "pool.mlp.up")
    yield from family.linear(f"{_HEAD}.mlp.fc2", "pool.mlp.down")


def _express_clip(config: ViTConfig) -> None:
    only = {"pool": "mean", "final_norm": "none", "norm_before": True, "patch_bias": False}
    huggingface.refuse(config, _CLIP_LAYOUT, **only)


def _express_siglip(config: ViTConfig) -> None:
    only = {"pool": "mean", "final_norm": "tokens", "class_token": False}
    huggingface.refuse(config, _SIGLIP_LAYOUT, **only)


def _beside(kind: str, config: ViTConfig, **more: Any) -> dict[str, dict[str, Any]]:
    name = kind.lower()
    vision_config = huggingface.sizes(config) | {"model_type": f"{name}_vision_model"} | more
    stated = {
        "architectures": [f"{kind}ForImageClassification"],
        "model_type": name,
        "vision_config": vision_config,
    }
    return {
        "config.json": stated | huggingface.labels(config),
        "preprocessor_config.json": vision.processor_of(config, config.image_size),
    }


CLIP = Format(
    _CLIP_LAYOUT,
    (f"{_EMBEDDINGS}.class_embedding", "vision_model.pre_layrnorm.weight"),
    _infer_clip,
    _clip_rules,
    ignored=_IGNORED,
    prefix="vision_model.",
    bare="embeddings.class_embedding",
    express=_express_clip,
    beside=lambda config: _beside("CLIP", config),
    side=vision.SIDE,
)
"""Files of `CLIPModel`, `CLIPVisionModel` and `CLIPForImageClassification`."""

SIGLIP = Format(
    _SIGLIP_LAYOUT,
    (_SIGLIP_TOWER.positions, f"{_EMBEDDINGS}.patch_embedding.bias"),
    _infer_siglip,
    _siglip_rules,
    ignored=_IGNORED,
    prefix="vision_model.",
    bare="embeddings.position_embedding.weight",
    express=_express_siglip,
    beside=lambda config: _beside("Siglip", config, vision_use_head=False),
    side=vision.SIDE,
)
"""Files of `SiglipModel`, `SiglipVisionModel` and `SiglipForImageClassification`."""
