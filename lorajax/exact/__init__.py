"""Flows without an ODE solver, and the reduction that makes any size cost the same.

All are exact. `reduce` turns a flow on m×n matrices with a target of rank k into the same flow on
(k+r)×(k+r) ones; `balanced_core` propagates one λ-balanced start in closed form, and `lanes` many
at once.
"""

from lorajax.exact.balanced import (
    BalancedPath,
    balance,
    balanced_core,
    check_balanced,
    is_balanced,
)
from lorajax.exact.reduction import Frames, Reduction, reduce

__all__ = [
    "BalancedPath",
    "Frames",
    "Reduction",
    "balance",
    "balanced_core",
    "check_balanced",
    "is_balanced",
    "reduce",
]
