"""BERT and RoBERTa of transformers, as their safetensors files name things."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from lorajax.models import family
from lorajax.models.bert.model import BertConfig
from lorajax.models.family import Format, Rule, Untold
from lorajax.models.files import Source

_STYLES = {
    "bert": "bert",
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
}
"""The style of each `model_type`; the last two are RoBERTas with other vocabularies."""

_GELU = {
    "gelu": "erf",
    "gelu_python": "erf",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_fast": "tanh",
}
# The heads of masked words, in either style: dense, norm, bias, decoder.
_WORDS = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm")
    + ("cls.predictions.bias", "cls.predictions.decoder"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder"),
}
_POOLED = {"bert": "cls", "roberta": "first"}
"""What the heads of classes read that transformers has."""
_CLASS = {"classes": "ForSequenceClassification", "words": "ForMaskedLM", "none": "Model"}
_FOLLOWS = ("cls.seq_relationship.weight", "cls.seq_relationship.bias")
_POOLER = ("pooler.dense.weight", "pooler.dense.bias")


def _rename(name: str) -> str:
    """Names without the encoder's prefix, and with those that norms have had since 2019."""
    name = re.sub(r"^(bert|roberta)\.", "", name)
    return re.sub(
        r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"Norm\.beta$", "Norm.bias", name)
    )


def _spell(config: BertConfig, name: str) -> str:
    """A file of the encoder alone has no prefix."""
    encoder = name.startswith(("embeddings.", "encoder.", "pooler."))
    return f"{config.style}.{name}" if encoder and config.head != "none" else name


def _check(said: dict[str, Any]) -> None:
    """Refuses what no tensor shows and this model has no place for."""
    if (kind := said.get("model_type", "bert")) not in _STYLES:
        raise ValueError(f"its config.json states model_type = {kind!r}, which is another model")
    if (activation := said.get("hidden_act", "gelu")) not in _GELU:
        raise ValueError(f"its hidden_act is {activation!r}; it must be one of {', '.join(_GELU)}")
    if (positions := said.get("position_embedding_type", "absolute")) != "absolute":
        raise ValueError(
            f"its position_embedding_type is {positions!r}; it must be 'absolute', the only one "
            "that this model has"
        )
    for name in ("is_decoder", "add_cross_attention"):
        if said.get(name, False):
            raise ValueError(f"its {name} is {said[name]!r}; this model is an encoder")


def _style(source: Source, said: dict[str, Any]) -> str | Untold:
    if "model_type" in said:
        return _STYLES[said["model_type"]]
    if source.tensors.keys() & {"classifier.dense.weight", "lm_head.dense.weight"}:
        return "roberta"
    if source.tensors.keys() & {"classifier.weight", "cls.predictions.transform.dense.weight"}:
        return "bert"
    return Untold("it has no config.json, which states it; 'bert' or 'roberta'")


def _pool(source: Source, style: str | Untold, head: str) -> str | Untold:
    """What a head reads: certain where there is one, or where the pooler has been trained."""
    tensors = source.tensors
    if style == "roberta" and head != "none":
        return "first"
    # The pooler is trained together with the guess whether one sentence follows the other.
    trained = {*_FOLLOWS, *_POOLER} <= tensors.keys()
    if style == "bert" and (head == "classes" or trained):
        return "cls"
    if head == "words":
        return "mean"
    return Untold(
        "it is an encoder without a head, of which nothing tells whether its pooler was trained; "
        "'mean' for sentence-transformers, 'cls' for a trained pooler, 'first' for a new one"
    )


def _tied(source: Source, said: dict[str, Any], decoder: str) -> bool:
    tied = bool(said.get("tie_word_embeddings", True))
    table, own = "embeddings.word_embeddings.weight", source.tensors.get(f"{decoder}.weight")
    if tied and own is not None and not np.array_equal(own.read(), source.tensors[table].read()):
        raise ValueError(
            f"its config.json states tie_word_embeddings, and {decoder}.weight is not {table}"
        )
    return tied


def _infer(source: Source) -> dict[str, Any]:
    tensors = source.tensors
    said = {k: v for k, v in source.json("config.json").items() if v is not None}
    _check(said)
    vocabulary, width = tensors["embeddings.word_embeddings.weight"].shape
    style = _style(source, said)
    words = _WORDS["roberta" if "lm_head.dense.weight" in tensors else "bert"]
    last = "classifier.out_proj.weight" if style == "roberta" else "classifier.weight"
    head = "classes" if last in tensors else "words" if f"{words[0]}.weight" in tensors else "none"
    shown = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": family.count(tensors, r"encoder\.layer\.(\d+)\."),
        "intermediate_size": tensors["encoder.layer.0.intermediate.dense.weight"].shape[0],
        "max_position_embeddings": tensors["embeddings.position_embeddings.weight"].shape[0],
        "type_vocab_size": tensors["embeddings.token_type_embeddings.weight"].shape[0],
    }
    family.agree(said, shown)
    silent = Untold("it has no config.json, which states it")
    return {
        "vocabulary": vocabulary,
        "width": width,
        "depth": shown["num_hidden_layers"],
        # What a config.json leaves out has the value that transformers' configurations give it.
        "heads": said.get("num_attention_heads", 12) if said else silent,
        "mlp_width": shown["intermediate_size"],
        "context": shown["max_position_embeddings"],
        "types": shown["type_vocab_size"],
        "style": style,
        "padding": said.get("pad_token_id", 1 if style == "roberta" else 0),
        "head": head,
        "classes": tensors[last].shape[0] if head == "classes" else 2,
        "pool": _pool(source, style, head),
        "tied": _tied(source, said, words[3]) if head == "words" else True,
        "gelu": _GELU[said.get("hidden_act", "gelu")] if said else silent,
        "epsilon": float(said.get("layer_norm_eps", 1e-12)) if said else silent,
    }


def _outline(said: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    if said.get("model_type") not in _STYLES:
        return None
    style = _STYLES[said["model_type"]]
    width, hidden = (family.stated(said, name) for name in ("hidden_size", "intermediate_size"))
    rows = {"word": "vocab_size", "position": "max_position_embeddings"}
    shapes = {
        f"embeddings.{theirs}_embeddings.weight": (family.stated(said, name), width)
        for theirs, name in (rows | {"token_type": "type_vocab_size"}).items()
    }
    for i in range(family.stated(said, "num_hidden_layers", family.DEEPEST)):
        shapes[f"encoder.layer.{i}.attention.self.query.weight"] = (width, width)
    shapes["encoder.layer.0.intermediate.dense.weight"] = (hidden, width)
    (kind, *_) = said.get("architectures") or [""]
    if kind.endswith(_CLASS["classes"]):
        last = "classifier.weight" if style == "bert" else "classifier.out_proj.weight"
        shapes[last] = (len(said.get("id2label") or (0, 1)), width)
    if kind.endswith(_CLASS["words"]):
        shapes[f"{_WORDS[style][0]}.weight"] = (width, width)
    return shapes


def _useless(*theirs: str) -> Iterator[Rule]:
    """Tensors that a file may have, one by one, and that no array comes of."""
    for name in theirs:
        yield Rule((name,), (), lambda x: (), lambda: (), optional=True)


def _rules(config: BertConfig) -> Iterator[Rule]:
    for theirs, ours in (("word", "words"), ("position", "positions"), ("token_type", "types")):
        yield family.one(f"embeddings.{theirs}_embeddings.weight", f"embeddings.{ours}.embedding")
    yield from family.layer_norm("embeddings.LayerNorm", "embeddings.norm")
    for i in range(config.depth):
        theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
        for name in ("query", "key", "value"):
            yield from family.linear(f"{theirs}.attention.self.{name}", f"{ours}.attention.{name}")
        yield from family.linear(f"{theirs}.attention.output.dense", f"{ours}.attention.out")
        yield from family.layer_norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.norm1")
        yield from family.linear(f"{theirs}.intermediate.dense", f"{ours}.mlp.up")
        yield from family.linear(f"{theirs}.output.dense", f"{ours}.mlp.down")
        yield from family.layer_norm(f"{theirs}.output.LayerNorm", f"{ours}.norm2")
    if config.pool == "cls":
        yield from family.linear("pooler.dense", "pooler")
    else:
        yield from _useless(*_POOLER)
    yield from _useless(*_FOLLOWS)
    if config.head == "classes" and config.pool == "first":
        yield from family.linear("classifier.dense", "head.dense")
        yield from family.linear("classifier.out_proj", "head.out")
    elif config.head == "classes":
        yield from family.linear("classifier", "head")
    elif config.head == "words":
        yield from _words(config)


def _words(config: BertConfig) -> Iterator[Rule]:
    dense, norm, bias, decoder = _WORDS[config.style]
    yield from family.linear(dense, "predictions.dense")
    yield from family.layer_norm(norm, "predictions.norm")
    if config.tied:
        yield family.one(bias, "predictions.bias")
        yield from _useless(f"{decoder}.weight", f"{decoder}.bias")  # the same arrays once more
    else:
        kernel = "predictions.decoder.kernel"
        yield family.one(f"{decoder}.weight", kernel, np.transpose, np.transpose)
        yield family.one(f"{decoder}.bias", "predictions.bias")
        yield from _useless(bias)  # transformers ties it to the decoder's, or does not read it


def _modules(config: BertConfig) -> Iterator[Rule]:
    if config.head == "classes" and config.pool != _POOLED[config.style]:
        # No model of transformers has this head: what torch has is the encoder alone.
        config = dataclasses.replace(config, head="none")
    for rule in _rules(config):
        if rule.ours:
            yield rule._replace(theirs=tuple(_spell(config, name) for name in rule.theirs))


def _express(config: BertConfig) -> None:
    if config.head == "classes" and config.pool != _POOLED[config.style]:
        raise ValueError(
            f"layout is 'huggingface', where the head of {config.style} has no pool = "
            f"{config.pool!r}; use 'lorajax'."
        )


def _beside(config: BertConfig) -> dict[str, dict[str, Any]]:
    name = {"bert": "Bert", "roberta": "Roberta"}[config.style]
    told: dict[str, Any] = {
        "architectures": [name + _CLASS[config.head]],
        "model_type": config.style,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.context,
        "type_vocab_size": config.types,
        "pad_token_id": config.padding,
        "hidden_act": "gelu" if config.gelu == "erf" else "gelu_pytorch_tanh",
        "layer_norm_eps": config.epsilon,
        "tie_word_embeddings": config.tied,
    }
    if config.head == "classes":
        told["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.classes)}
        told["label2id"] = {f"LABEL_{i}": i for i in range(config.classes)}
    return {"config.json": told}


HUGGINGFACE = Format(
    "huggingface",
    ("embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"),
    _infer,
    _rules,
    ignored=r"embeddings\.(position_ids|token_type_ids)",
    rename=_rename,
    spell=_spell,
    express=_express,
    beside=_beside,
    modules=_modules,
    outline=_outline,
)
"""Files of transformers' BertModel, RobertaModel, and those with heads, with their config.json."""
