"""Running a problem from a start: gradient flow, discrete descent, and `solve`, which chooses.

* `gradient_flow` integrates by diffrax, in the reduced frames wherever the problem has them,
  plainly or in a metric (Riemannian LoRA, RefLoRA).
* `descend` runs any optax transformation; `lora_plus`, `allora`, `scaled_gradient`,
  `spectral_descent`, `reflora_descent` and `lora_rite` are the descents of the LoRA literature in
  that form.
* `balanced_flow` is the closed form, `reflora_flow` that of RefLoRA, `solve` picks the cheapest of
  all that is exact and says which; `plan` says it without running.
* `sweeping.sweep_flows` (`lorajax.sweep_flows`) runs many of them over named axes by the engines of
`lanes`.
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
from lorajax.flows.gradient import METRICS, Metric, gradient_flow
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
from lorajax.flows.plan import Engine, Plan, plan
from lorajax.flows.preconditioned import lora_rite, reflora_descent, reflora_flow
from lorajax.flows.solve import balanced_flow, solve
from lorajax.flows.starts import start_of

__all__ = [
    "CONVERGED",
    "Engine",
    "FAILED",
    "MAX_STEPS",
    "METRICS",
    "Metric",
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
    "lora_rite",
    "plan",
    "reflora_descent",
    "reflora_flow",
    "scaled_gradient",
    "sequential_descent",
    "solve",
    "spectral_descent",
    "start_of",
]
