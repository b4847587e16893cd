"""The best there is: global minima of linearized problems, certified, and where runs rest instead.

* `certify` bounds how far any LoRA solution is from the global minimum of its objective,
* `minimize` solves the nuclear-norm problem behind LoRA with decay to a certified gap,
* `structure`, `lowest_curvature` look at a stationary point, `reduce_rank` at the set of minima,
* `sufficient_rank`, `existing_rank`, `manifold_rank` are the counts of the theorems.
"""

from lorajax.optima.certificate import Certificate, certify
from lorajax.optima.proximal import Optimum, minimize
from lorajax.optima.stationary import (
    Structure,
    existing_rank,
    lowest_curvature,
    manifold_rank,
    reduce_rank,
    structure,
    sufficient_rank,
)

__all__ = [
    "Certificate",
    "Optimum",
    "Structure",
    "certify",
    "existing_rank",
    "lowest_curvature",
    "manifold_rank",
    "minimize",
    "reduce_rank",
    "structure",
    "sufficient_rank",
]
