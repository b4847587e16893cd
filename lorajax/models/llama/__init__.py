"""Llama, and its checkpoints by transformers."""

from lorajax.models.family import Family
from lorajax.models.llama.huggingface import HUGGINGFACE
from lorajax.models.llama.model import Cache, Llama, LlamaConfig, places

__all__ = ["FAMILY", "Cache", "Llama", "LlamaConfig", "places"]

# Width, depth, heads, groups, MLP.
_LLAMA2 = {"7": (4096, 32, 32, 32, 11008), "13": (5120, 40, 40, 40, 13824)}
_LLAMA32 = {"1": (2048, 16, 32, 8, 8192), "3": (3072, 28, 24, 8, 8192)}
_SMOL = {"135m": (576, 30, 9, 3, 1536), "360m": (960, 32, 15, 5, 2560)}


def _config(vocabulary: int, sizes: tuple[int, ...], **fields) -> LlamaConfig:
    width, depth, heads, groups, mlp = sizes
    return LlamaConfig(vocabulary, width, depth, heads, groups, mlp_width=mlp, **fields)


def _llama2(size: str) -> LlamaConfig:
    return _config(32000, _LLAMA2[size], context=4096, epsilon=1e-5)


def _llama3(version: str) -> LlamaConfig:
    scaled = {"rope": "llama3", "factor": 8.0, "context": 131072} if version else {"context": 8192}
    sizes = (4096, 32, 32, 8, 14336)
    tokens = {"start": 128000, "ends": (128001,)}
    return _config(128256, sizes, theta=5e5, epsilon=1e-5, **tokens, **scaled)


def _llama32(size: str) -> LlamaConfig:
    scaled = {"rope": "llama3", "factor": 32.0, "context": 131072, "tied": True}
    tokens = {"start": 128000, "ends": (128001,)}
    return _config(128256, _LLAMA32[size], theta=5e5, epsilon=1e-5, **tokens, **scaled)


def _smol(size: str) -> LlamaConfig:
    tokens = {"start": 0, "ends": (0,)}
    sizes = _SMOL[size]
    return _config(49152, sizes, context=8192, theta=1e5, epsilon=1e-5, tied=True, **tokens)


FAMILY = Family(
    "llama",
    Llama,
    LlamaConfig,
    formats=(HUGGINGFACE,),
    named={
        "llama-2-{7,13}b": _llama2,
        "llama-3{,.1}-8b": _llama3,
        "llama-3.2-{1,3}b": _llama32,
        "smollm2-{135m,360m}": _smol,
    },
    repeats=("depth",),
)
"""Causal language models."""
