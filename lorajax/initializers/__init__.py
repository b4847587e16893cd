"""Where a flow starts: one function for each published start of LoRA.

**One unit of scale.** `scale` is the root-mean-square norm of a column of A (and, for starts that
fill both factors, of a row of B). It is the unit in which the theory speaks: `AᵀA ≈ scale² I`, so a
start is lazy when `scale²` is far above the target's singular values and rich when it is far below,
whatever the dimensions. Per-entry standard deviation is `scale / √m`. In this unit the defaults of
the libraries are plain numbers, which `SCALES` lists, so any `scale` may also be given by name.

| start | looks at | file |
|---|---|---|
| `lora`, `orthogonal`, `small`, `balanced` | a key alone | `blind` |
| `spectral`, `nystrom`, `lora_one`, `lora_ga`, `eva` | a gradient, a target, inputs | `directed` |
| `pissa`, `milora`, `olora`, `nora` | the pretrained weight | `weights` |
| `tucker`, `hosvd`, `superdiagonal` | a key, a gradient; for tensors | `tensors` |

Starts whose product has to be taken off the weight (`pissa`, `milora`, `olora`, `lora_ga`) return a
`Start`, whose `offset` says what; the weight itself is never touched.
"""

from lorajax.factors import TuckerFactors
from lorajax.initializers.blind import balanced, lora, orthogonal, small
from lorajax.initializers.directed import eva, lora_ga, lora_one, nystrom, spectral
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
    "balanced",
    "eva",
    "hosvd",
    "lora",
    "lora_ga",
    "lora_one",
    "milora",
    "nora",
    "nystrom",
    "olora",
    "orthogonal",
    "pissa",
    "resolve_scale",
    "small",
    "spectral",
    "superdiagonal",
    "tucker",
]
