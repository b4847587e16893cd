"""lorajax: the theory of low-rank adaptation (LoRA), made executable in JAX.

An experiment on LoRA is a problem, an initialization, a flow, what is observed, and a law that
predicts it; a claim holds the last two against each other; a sweep does so over axes; an adapter
carries the same initializations and ranks into a real model. Each of these words is a module.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded on first use, so that `lorajax --help` costs no import of jax and `import lorajax` none of
# flax, matplotlib or xarray.
_MODULES = (
    "adapters",
    "claims",
    "exact",
    "factors",
    "flows",
    "initializers",
    "laws",
    "models",
    "optima",
    "plots",
    "problems",
    "ranks",
    "report",
    "spectra",
    "studies",
    "sweeps",
)
_NAMES = {
    "Factors": "factors",
    "MatrixFactorization": "problems",
    "Decayed": "problems",
    "DiagonalFactorization": "problems",
    "Linearized": "problems",
    "LinearAttention": "problems",
    "ProductLoss": "problems",
    "SymmetricFactorization": "problems",
    "TraceSquared": "problems",
    "TuckerFactorization": "problems",
    "TuckerFactors": "factors",
    "TwoLayer": "problems",
    "TwoLayerFactors": "problems",
    "Path": "flows",
    "balanced_flow": "flows",
    "descend": "flows",
    "gradient_flow": "flows",
    "plan": "flows",
    "solve": "flows",
    "sweep_flows": "flows.sweeping",
}

if TYPE_CHECKING:
    from lorajax import exact as exact
    from lorajax import factors as factors
    from lorajax import flows as flows
    from lorajax import initializers as initializers
    from lorajax import laws as laws
    from lorajax import optima as optima
    from lorajax import problems as problems
    from lorajax import ranks as ranks
    from lorajax import spectra as spectra
    from lorajax.factors import Factors as Factors
    from lorajax.factors import TuckerFactors as TuckerFactors
    from lorajax.flows import Path as Path
    from lorajax.flows import balanced_flow as balanced_flow
    from lorajax.flows import descend as descend
    from lorajax.flows import gradient_flow as gradient_flow
    from lorajax.flows import plan as plan
    from lorajax.flows import solve as solve
    from lorajax.flows.sweeping import sweep_flows as sweep_flows
    from lorajax.problems import Decayed as Decayed
    from lorajax.problems import DiagonalFactorization as DiagonalFactorization
    from lorajax.problems import LinearAttention as LinearAttention
    from lorajax.problems import Linearized as Linearized
    from lorajax.problems import MatrixFactorization as MatrixFactorization
    from lorajax.problems import ProductLoss as ProductLoss
    from lorajax.problems import SymmetricFactorization as SymmetricFactorization
    from lorajax.problems import TraceSquared as TraceSquared
    from lorajax.problems import TuckerFactorization as TuckerFactorization
    from lorajax.problems import TwoLayer as TwoLayer
    from lorajax.problems import TwoLayerFactors as TwoLayerFactors


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"lorajax.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"lorajax.{name}")
    raise AttributeError(f"module 'lorajax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, *_NAMES])
