"""Running a problem from a start: gradient flow, discrete descent, and `solve`, which chooses.

* `gradient_flow` integrates by diffrax, in the reduced frames wherever the problem has them.
* `descend` runs any optax transformation; `lora_plus`, `allora`, `scaled_gradient` and
  `spectral_descent` are the descents of the LoRA literature in that form.
* `balanced_flow` is the closed form, `solve` picks the cheapest of all that is exact and says
which.
"""

from lorajax.flows.descent import (
    accelerated,
    allora,
    descend,
    lora_plus,
    scaled_gradient,
    sequential_descent,
    spectral_descent,
)
from lorajax.flows.gradient import gradient_flow
from lorajax.flows.path import (
    CONVERGED,
    FAILED,
    MAX_STEPS,
    NON_FINITE,
    STATUS,
    UNBALANCED,
    Path,
    drift_of,
)
from lorajax.flows.solve import Plan, balanced_flow, plan, solve

__all__ = [
    "CONVERGED",
    "FAILED",
    "MAX_STEPS",
    "NON_FINITE",
    "STATUS",
    "UNBALANCED",
    "Path",
    "Plan",
    "accelerated",
    "allora",
    "balanced_flow",
    "descend",
    "drift_of",
    "gradient_flow",
    "lora_plus",
    "plan",
    "scaled_gradient",
    "sequential_descent",
    "solve",
    "spectral_descent",
]
