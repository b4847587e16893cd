"""`LlamaForCausalLM` of transformers, as its safetensors files name things."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lorajax.models import family
from lorajax.models.family import Format, Rule, Untold
from lorajax.models.files import Source
from lorajax.models.llama.model import ROPES, LlamaConfig

_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FIRST = "model.layers.0"
_LAYERS = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.out",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}


def _check(said: dict[str, Any]) -> None:
    """Refuses what no tensor shows and this model has no place for."""
    if (kind := said.get("model_type", "llama")) != "llama":
        raise ValueError(f"its config.json states model_type = {kind!r}, which is another model")
    if (activation := said.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"its hidden_act is {activation!r}; it must be 'silu'")
    if (share := said.get("partial_rotary_factor", 1.0)) != 1:
        raise ValueError(f"its partial_rotary_factor is {share}; this model turns all features")


def _rope(said: dict[str, Any]) -> dict[str, Any]:
    """The rotary fields, as `rope_parameters` or `rope_theta` and `rope_scaling` spell them."""
    found = {**(said.get("rope_scaling") or {}), **(said.get("rope_parameters") or {})}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROPES:
        raise ValueError(f"its rope_type is {kind!r}; it must be one of {', '.join(ROPES)}")
    if (share := found.get("partial_rotary_factor", 1.0)) != 1:
        raise ValueError(f"its partial_rotary_factor is {share}; this model turns all features")
    theta = found.get("rope_theta", said.get("rope_theta", 10000.0))
    fields: dict[str, Any] = {"theta": float(theta), "rope": kind}
    if kind != "default":
        fields["factor"] = float(found["factor"])
    if kind == "llama3":
        fields["low"] = float(found["low_freq_factor"])
        fields["high"] = float(found["high_freq_factor"])
        fields["original"] = found["original_max_position_embeddings"]
    return fields


def _tied(source: Source, said: dict[str, Any]) -> bool:
    if (own := source.tensors.get(_HEAD)) is None:
        if said.get("tie_word_embeddings", False) or not said:
            return True
        raise ValueError(f"there is no {_HEAD}, and its config.json does not tie it to {_TABLE}")
    tied = bool(said.get("tie_word_embeddings", False))
    if tied and not np.array_equal(own.read(), source.tensors[_TABLE].read()):
        raise ValueError(f"its config.json states tie_word_embeddings, and {_HEAD} is not {_TABLE}")
    return tied


def _ends(source: Source, said: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text; what generation_config.json says comes first."""
    told = source.json("generation_config.json").get("eos_token_id")
    told = said.get("eos_token_id", 2) if told is None else told
    return tuple(told) if isinstance(told, list) else (told,)


def _infer(source: Source) -> dict[str, Any]:
    tensors, written = source.tensors, source.json("config.json")
    said = {key: value for key, value in written.items() if value is not None}
    _check(said)
    rope = _rope(said)
    vocabulary, width = tensors[_TABLE].shape
    silent = Untold("it has no config.json, which states it")
    # What a config.json leaves out has the value that transformers' LlamaConfig gives it.
    heads = said.get("num_attention_heads", 32) if said else silent
    inner = tensors[f"{_FIRST}.self_attn.q_proj.weight"].shape[0]
    shared = tensors[f"{_FIRST}.self_attn.k_proj.weight"].shape[0]
    features = inner // heads if isinstance(heads, int) and heads > 0 else silent
    shown = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": family.count(tensors, r"model\.layers\.(\d+)\."),
        "intermediate_size": tensors[f"{_FIRST}.mlp.up_proj.weight"].shape[0],
        "head_dim": features,
        "attention_bias": f"{_FIRST}.self_attn.q_proj.bias" in tensors,
        "mlp_bias": f"{_FIRST}.mlp.up_proj.bias" in tensors,
    }
    groups = shared // features if isinstance(features, int) and features > 0 else silent
    shown["num_key_value_heads"] = groups
    family.agree(said, shown)
    return {
        "vocabulary": vocabulary,
        "width": width,
        "depth": shown["num_hidden_layers"],
        "heads": heads,
        "groups": groups,
        "head_width": features,
        "mlp_width": shown["intermediate_size"],
        "context": said.get("max_position_embeddings", 2048),
        **(rope if said else dict.fromkeys(("theta", "rope"), silent)),
        "epsilon": float(said.get("rms_norm_eps", 1e-6)) if said else silent,
        "tied": _tied(source, said),
        "attention_bias": shown["attention_bias"],
        "mlp_bias": shown["mlp_bias"],
        "start": said.get("bos_token_id", -1 if "bos_token_id" in written else 1),
        "ends": _ends(source, said),
        "padding": said.get("pad_token_id", -1),
    }


def _outline(said: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    if said.get("model_type") != "llama":
        return None
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    vocabulary, width, hidden, heads = (family.stated(said, name) for name in names)
    features = said.get("head_dim") or width // heads
    groups = said.get("num_key_value_heads") or heads
    shapes: dict[str, tuple[int, ...]] = {_TABLE: (vocabulary, width)}
    for i in range(family.stated(said, "num_hidden_layers", family.DEEPEST)):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (heads * features, width)
    shapes[f"{_FIRST}.self_attn.k_proj.weight"] = (groups * features, width)
    shapes |= {f"{_FIRST}.mlp.{name}.weight": (hidden, width) for name in ("gate_proj", "up_proj")}
    if said.get("attention_bias"):
        shapes[f"{_FIRST}.self_attn.q_proj.bias"] = (heads * features,)
    if said.get("mlp_bias"):
        shapes[f"{_FIRST}.mlp.up_proj.bias"] = (hidden,)
    if not said.get("tie_word_embeddings", False):
        shapes[_HEAD] = (vocabulary, width)
    return shapes


def _rules(config: LlamaConfig) -> Iterator[Rule]:
    yield family.one(_TABLE, "embeddings.embedding")
    for i in range(config.depth):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        for name, path in _LAYERS.items():
            has = config.attention_bias if name.startswith("self_attn") else config.mlp_bias
            weight, *bias = family.linear(f"{theirs}.{name}", f"{ours}.{path}")
            yield from (weight, *(bias if has else ()))
        yield family.one(f"{theirs}.input_layernorm.weight", f"{ours}.norm1.scale")
        yield family.one(f"{theirs}.post_attention_layernorm.weight", f"{ours}.norm2.scale")
    yield family.one("model.norm.weight", "norm.scale")
    if config.tied:
        yield Rule((_HEAD,), (), lambda x: (), lambda: (), optional=True)
    else:
        yield family.one(_HEAD, "head.kernel", np.transpose, np.transpose)


def _modules(config: LlamaConfig) -> Iterator[Rule]:
    yield from (rule for rule in _rules(config) if rule.ours)


def _beside(config: LlamaConfig) -> dict[str, dict[str, Any]]:
    rope: dict[str, Any] = {"rope_type": config.rope}
    if config.rope != "default":
        rope["factor"] = config.factor
    if config.rope == "llama3":
        rope["low_freq_factor"] = config.low
        rope["high_freq_factor"] = config.high
        rope["original_max_position_embeddings"] = config.original
    ends = list(config.ends) if len(config.ends) != 1 else config.ends[0]
    tokens = {
        "bos_token_id": None if config.start < 0 else config.start,
        "eos_token_id": ends,
        "pad_token_id": None if config.padding < 0 else config.padding,
    }
    told = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": config.epsilon,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        # Either spelling, so that transformers before and after version 5 understand.
        "rope_theta": config.theta,
        "rope_scaling": rope if config.rope != "default" else None,
        "rope_parameters": rope | {"rope_theta": config.theta},
        **tokens,
    }
    return {"config.json": told, "generation_config.json": tokens}


HUGGINGFACE = Format(
    "huggingface",
    (_TABLE, f"{_FIRST}.self_attn.q_proj.weight", f"{_FIRST}.mlp.gate_proj.weight"),
    _infer,
    _rules,
    ignored=r".*rotary_emb\.inv_freq",
    prefix="model.",
    bare="embed_tokens.weight",
    beside=_beside,
    side=("config.json", "generation_config.json"),
    modules=_modules,
    outline=_outline,
)
"""Files of `LlamaForCausalLM`, in one piece or in shards, with their config.json."""
