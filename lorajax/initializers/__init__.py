"""Where a flow starts: one function for each published start of LoRA.

**One unit of scale.** `scale` is the root-mean-square norm of a column of A (and, for starts that
fill both factors, of a row of B). It is the unit in which the theory speaks: `AᵀA ≈ scale² I`, so a
start is lazy when `scale²` is far above the target's singular values and rich when it is far below,
whatever the dimensions. Per-entry standard deviation is `scale / √m`. In this unit the defaults of
the libraries are plain numbers, which `SCALES` lists, so any `scale` may also be given by name.

| start | looks at | file |
|---|---|---|
| `lora`, `orthogonal`, `small`, `balanced` | a key alone | `blind` |
| `spectral`, `nystrom`, `lora_one`, `lora_ga`, `gora` | a gradient, a target | `directed` |
| `eva` | a layer's inputs | `directed` |
| `pissa`, `milora`, `olora`, `nora` | the pretrained weight | `weights` |
| `tucker`, `hosvd`, `superdiagonal` | a key, a gradient; for tensors | `tensors` |

Starts whose product has to be taken off the weight (`pissa`, `milora`, `olora`, `lora_ga`) return a
`Start`, whose `offset` says what; the weight itself is never touched.

A new start is one function in one of these files, or in a file of its own: `offered` finds it by
what it returns, and `resolve` by its name, wherever a start is asked for. Whether it has a `scale`
or needs a `gradient` is asked of its signature.
"""

from typing import TYPE_CHECKING

from lorajax.factors import TuckerFactors
from lorajax.initializers.blind import balanced, lora, orthogonal, small
from lorajax.initializers.directed import eva, gora, lora_ga, lora_one, nystrom, spectral
from lorajax.initializers.starts import asks_for, call, name_of, offered, resolve
from lorajax.initializers.tensors import hosvd, superdiagonal, tucker
from lorajax.initializers.units import (
    SCALES,
    Distribution,
    Initializer,
    PRNGKey,
    Start,
    resolve_scale,
)
from lorajax.initializers.weights import milora, nora, olora, pissa

__all__ = [
    "SCALES",
    "Distribution",
    "Initializer",
    "PRNGKey",
    "Start",
    "TuckerFactors",
    "asks_for",
    "balanced",
    "call",
    "eva",
    "hosvd",
    "lora",
    "gora",
    "lora_ga",
    "lora_one",
    "milora",
    "name_of",
    "nora",
    "nystrom",
    "offered",
    "olora",
    "orthogonal",
    "pissa",
    "resolve",
    "resolve_scale",
    "small",
    "spectral",
    "superdiagonal",
    "tucker",
]

if not TYPE_CHECKING:

    def __getattr__(name):
        """Starts in files that nothing here imports."""
        if not name.startswith("_") and name in offered():
            return offered()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
