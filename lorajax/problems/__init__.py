"""What is learned: losses of low-rank factors, with their gradients and their oracles.

A problem is a frozen pytree with

* `shape`, the shape of the update,
* `loss(factors)`, a scalar,
* `gradient(factors)`, the exact derivative of `loss` with respect to the factors, in the cheapest
  form that is known (a flow's field is minus this), and
* an oracle: what the best factors of a rank reach.

Anything with `loss` and `gradient` can be handed to `flows.gradient_flow` and `flows.descend`.
"""

from lorajax.problems.attention import AttentionHeads, LinearAttention
from lorajax.problems.base import Problem, ProductLoss
from lorajax.problems.checks import (
    PRECISIONS,
    check_flow,
    check_precision,
    check_spectrum,
    check_start,
    check_times,
)
from lorajax.problems.factorization import (
    DiagonalFactorization,
    MatrixFactorization,
    SymmetricFactorization,
)
from lorajax.problems.linearized import Decayed, Features, Linearized, Tangents, updates
from lorajax.problems.trace_squared import TraceSquared
from lorajax.problems.tucker import TuckerFactorization
from lorajax.problems.two_layer import TARGETS, Target, TwoLayer, TwoLayerFactors

__all__ = [
    "PRECISIONS",
    "TARGETS",
    "AttentionHeads",
    "Decayed",
    "DiagonalFactorization",
    "Features",
    "LinearAttention",
    "Linearized",
    "MatrixFactorization",
    "Problem",
    "ProductLoss",
    "SymmetricFactorization",
    "Tangents",
    "Target",
    "TraceSquared",
    "TuckerFactorization",
    "TwoLayer",
    "TwoLayerFactors",
    "check_flow",
    "check_precision",
    "check_spectrum",
    "check_start",
    "check_times",
    "updates",
]
