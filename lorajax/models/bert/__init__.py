"""BERT and RoBERTa, and their checkpoints by transformers."""

from collections.abc import Mapping
from typing import Any

from lorajax.models.bert.huggingface import HUGGINGFACE
from lorajax.models.bert.model import Bert, BertConfig
from lorajax.models.family import Family

__all__ = ["FAMILY", "Bert", "BertConfig"]

_SIZES = {"base": (768, 12, 12), "large": (1024, 24, 16)}


def _bert(size: str, vocabulary: str) -> BertConfig:
    tokens = 30522 if vocabulary == "uncased" else 28996
    return BertConfig(tokens, *_SIZES[size])


def _roberta(size: str) -> BertConfig:
    return BertConfig(
        50265,
        *_SIZES[size],
        context=514,
        types=1,
        style="roberta",
        padding=1,
        pool="first",
        epsilon=1e-5,
    )


def _options(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Who asks for classes wants the head that tells them apart."""
    asked = {"head": "classes"} if "classes" in changes else {}
    return {**asked, **changes}


FAMILY = Family(
    "bert",
    Bert,
    BertConfig,
    formats=(HUGGINGFACE,),
    named={"bert-{base,large}-{uncased,cased}": _bert, "roberta-{base,large}": _roberta},
    options=_options,
    repeats=("depth",),
)
"""Encoders of text."""
