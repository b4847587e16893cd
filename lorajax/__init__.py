"""lorajax: the theory of low-rank adaptation (LoRA), made executable in JAX.

An experiment on LoRA is a problem, an initialization, a flow, what is observed, and a law that
predicts it; a claim holds the last two against each other; a sweep does so over axes; an adapter
carries the same initializations and ranks into a real model. Each of these words is a module.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Modules and names load on first use, so that `lorajax --help` costs no import of jax and
# `import lorajax` none of flax, matplotlib or xarray. Modules are found in the folder; the lists
# for type checkers below are held against both by tests/test_house.py.
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
    from lorajax import adapters as adapters
    from lorajax import claims as claims
    from lorajax import data as data
    from lorajax import downloads as downloads
    from lorajax import environment as environment
    from lorajax import exact as exact
    from lorajax import factors as factors
    from lorajax import finetune as finetune
    from lorajax import flows as flows
    from lorajax import initializers as initializers
    from lorajax import laws as laws
    from lorajax import models as models
    from lorajax import optima as optima
    from lorajax import plots as plots
    from lorajax import problems as problems
    from lorajax import ranks as ranks
    from lorajax import report as report
    from lorajax import spectra as spectra
    from lorajax import studies as studies
    from lorajax import sweeps as sweeps
    from lorajax import tasks as tasks
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


def _modules() -> list[str]:
    found = (info.name for info in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if name not in ("cli", "__main__"))


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"lorajax.{_NAMES[name]}"), name)
    if not name.startswith("_") and name in _modules():
        return importlib.import_module(f"lorajax.{name}")
    raise AttributeError(f"module 'lorajax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_modules(), *_NAMES})
