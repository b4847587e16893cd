"""What a sweep of flows looks at: observables by name, or a function of the factors."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lorajax import spectra
from lorajax.factors import Factors
from lorajax.flows.plan import Plan
from lorajax.problems import MatrixFactorization, TwoLayer, TwoLayerFactors

Observe = str | Sequence[str] | Callable[..., Any]

NAMES = {
    "losses": "the loss over time",
    "singular_values": "singular values of A B over time",
    "effective_rank": "exponential of the entropy of the singular values over time",
    "half_times": "when each singular value of the target is half learned; NaN where it is not",
    "misalignment": "1 − cos between the top singular vectors of [A; Bᵀ] and of the target",
    "factor_norm": "spectral norm of [A; Bᵀ] over time",
}
"""Observables by name, with what they are. Of two layers the last two are the first adapter's."""

_FROM_VALUES = ("singular_values", "effective_rank", "half_times")
_SPECTRAL = ("losses", *_FROM_VALUES)


def wanted(observe: Observe) -> "Wanted":
    """What is to be observed.

    Args:
      observe: a name, several, or a function of the factors of one flow at one time.

    Returns:
      A Wanted.

    Raises:
      ValueError: for an unknown name, or none at all.
    """
    if callable(observe):
        return Wanted((), observe)
    names = (observe,) if isinstance(observe, str) else tuple(observe)
    for name in names:
        if name not in NAMES:
            raise ValueError(
                f"observe names {name!r}; it must be among {', '.join(NAMES)}, or a function of "
                "the factors."
            )
    if not names:
        raise ValueError(f"observe is empty; name some of {', '.join(NAMES)}.")
    return Wanted(names, None)


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """What is observed of flows.

    Attributes:
      names: among `NAMES`.
      function: of the factors, in their place.
      modes: singular values that are kept; those of smaller ranks are filled up with 0.
      targets: singular values of the target.
      shapes: of what the function returns, by name.
    """

    names: tuple[str, ...]
    function: Callable[..., Any] | None
    modes: int = 0
    targets: int = 0
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def is_spectral(self) -> bool:
        """Whether singular values and losses are enough."""
        return self.function is None and set(self.names) <= set(_SPECTRAL)

    @property
    def spectral(self) -> tuple[str, ...]:
        """What an engine in the frames has to return."""
        values = ("singular_values",) if set(self.names) & set(_FROM_VALUES) else ()
        return (*values, *(("losses",) if "losses" in self.names else ()))

    def plan(self, problem: Any, factors: Any, times: Any, planner: Callable[..., Plan]) -> Plan:
        """The plan for these observables, from the one for the flow."""
        chosen = planner(problem, factors, times)
        if self.is_spectral or chosen.engine not in ("closed form", "reduced ODE"):
            return chosen
        what = "a function" if self.function else ", ".join(set(self.names) - set(_SPECTRAL))
        return Plan("full ODE", f"{what} looks at factors at full size", chosen.flops)

    def sized(self, modes: int, problem: Any, factors: Any) -> "Wanted":
        """With the sizes of its outputs, from a problem and a start.

        Raises:
          ValueError: for what such a problem or such factors do not have.
        """
        pair = isinstance(factors, Factors)
        for name in self.names:
            aligned = name != "misalignment" or isinstance(problem, MatrixFactorization)
            spectrum = name != "half_times" or hasattr(problem, "singular_values")
            ok = name == "losses" or (pair and aligned and spectrum)
            if isinstance(factors, TwoLayerFactors) and name in ("misalignment", "factor_norm"):
                ok = True
            if not ok:
                raise ValueError(
                    f"observe names {name!r}, which flows of a {type(problem).__name__} from "
                    f"{type(factors).__name__} do not have; give a function of the factors."
                )
        targets = problem.singular_values.shape[-1] if "half_times" in self.names else 0
        shapes = {}
        if self.function is not None:
            seen = jax.eval_shape(lambda f: _named(self.function, f), factors)
            shapes = {name: tuple(leaf.shape) for name, leaf in seen.items()}
        return dataclasses.replace(self, modes=modes, targets=targets, shapes=shapes)

    def look(self, problem: Any) -> Callable[[Any], dict[str, Array]]:
        """The function of the factors of a flow that an engine at full size calls."""
        if self.function is not None:
            return lambda factors: _named(self.function, factors)
        two = isinstance(problem, TwoLayer)
        matrix = problem.alignment_matrices()[0] if two else problem.target
        direction = spectra.top_direction(matrix) if "misalignment" in self.names else matrix

        def look(factors: Any) -> dict[str, Array]:
            first = factors.first if two else factors
            functions: dict[str, Callable[[], Array]] = {
                "losses": lambda: problem.loss(factors),
                "misalignment": lambda: spectra.top_misalignment(first, direction),
                "factor_norm": lambda: spectra.factor_norm(first),
            }
            seen = {n: functions[n]() for n in self.names if n in functions}
            if set(self.names) & set(_FROM_VALUES):
                seen["singular_values"] = spectra.singular_values(first)
            return seen

        return look

    def finish(
        self, observed: Mapping[str, Array], problem: Any, times: Array, shared: bool
    ) -> dict[str, Array]:
        """Adds what follows from singular values, and fills those up to the same number."""
        if self.function is not None:
            return {n: x for n, x in observed.items() if n in self.shapes}
        found = dict(observed)
        values = found.pop("singular_values", jnp.zeros((0, 0, 0)))
        if "effective_rank" in self.names:
            found["effective_rank"] = spectra.effective_rank(values)
        if "half_times" in self.names:
            missing = max(0, self.targets - values.shape[-1])
            known = jnp.pad(values, ((0, 0), (0, 0), (0, missing)))[..., : self.targets]
            half = problem.singular_values / 2
            half = jnp.broadcast_to(half, (values.shape[0], self.targets)) if shared else half
            found["half_times"] = jax.vmap(lambda v, h: spectra.hitting_times(times, v, h))(
                known, half
            )
        if "singular_values" in self.names:
            missing = max(0, self.modes - values.shape[-1])
            kept = jnp.pad(values, ((0, 0), (0, 0), (0, missing)))[..., : self.modes]
            found["singular_values"] = kept
        return {name: found[name] for name in self.names}

    def dims(self) -> dict[str, tuple[str, ...]]:
        """Names of the dimensions of the outputs."""
        own = {"singular_values": ("time", "mode"), "half_times": ("target_mode",)}
        found = {name: own.get(name, ("time",)) for name in self.names}
        for name, shape in self.shapes.items():
            found[name] = ("time", *(f"{name}_{i}" for i in range(len(shape))))
        return found

    def coords(self, times: np.ndarray) -> dict[str, np.ndarray]:
        """Coordinates of these dimensions."""
        known = {
            "time": times,
            "mode": np.arange(1, self.modes + 1),
            "target_mode": np.arange(1, self.targets + 1),
        }
        used = {dim for dims in self.dims().values() for dim in dims}
        return {dim: values for dim, values in known.items() if dim in used}


def _named(function: Callable[..., Any] | None, factors: Any) -> dict[str, Any]:
    assert function is not None
    seen = function(factors)
    if isinstance(seen, Mapping):
        return dict(seen)
    name = getattr(function, "__name__", "value")
    return {name if name.isidentifier() else "value": seen}
