"""The closed form as a run, and `solve`, which picks the cheapest exact way."""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax.exact import balance, balanced_core, check_balanced, is_balanced, reduce
from lorajax.factors import Factors, is_traced
from lorajax.flows.gradient import gradient_flow
from lorajax.flows.path import UNBALANCED, Path, drift_of, finite_status
from lorajax.problems import MatrixFactorization, Problem, check_flow, check_times

Method = Literal["closed form", "reduced ODE", "full ODE"]


def balanced_flow(
    problem: MatrixFactorization, factors: Factors, times: Float[Array, " t"] | np.ndarray
) -> Path:
    """Gradient flow of a λ-balanced start in closed form: no ODE solver, no discretization error.

    Args:
      problem: matrix factorization, any target.
      factors: a start with `AᵀA − BBᵀ = λ I`: `initializers.orthogonal`, `spectral`, `balanced`.
      times: when to save, shape (t,), increasing, from 0 on.

    Returns:
      A Path whose products are exact; the factors are those of the flow up to a rotation of the r
      columns, the same for both.

    Raises:
      ValueError: before any tracing, if the start is not λ-balanced or does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, lorajax
      >>> problem = lorajax.MatrixFactorization.from_spectrum(
      ...     jax.random.key(0), shape=(64, 48), singular_values=(4.0, 2.0)
      ... )
      >>> factors = lorajax.initializers.orthogonal(jax.random.key(1), problem.shape, 4, 1e-3)
      >>> path = lorajax.balanced_flow(problem, factors, jnp.linspace(0.0, 20.0, 5))
      >>> bool(jnp.allclose(lorajax.spectra.singular_values(path)[-1, :2], jnp.array([4.0, 2.0])))
      True

    Source: theory section 2.1 (derived; literature: Fukumizu 1998, Braun et al. 2022, Dominé et al.
    2024).
    """
    check_flow(problem, factors, times)
    check_balanced(factors)
    times = jnp.asarray(times, factors.a.dtype)
    return _balanced(problem, factors, times)


class _ClosedForm(eqx.Module):
    """Runs the closed form at given times and λ."""

    times: Float[Array, " t"]
    level: Float[Array, ""]

    def __call__(self, problem: Any, start: Factors) -> Factors:
        return balanced_core(problem, start, self.times, self.level).core


@eqx.filter_jit
def _balanced(problem: MatrixFactorization, factors: Factors, times: Array) -> Path:
    run = _ClosedForm(times, balance(factors)[0])
    reduced, start, frames = reduce(problem, factors)
    found = balanced_core(reduced, start, times, run.level)
    # A traced start may turn out not to be balanced; then there is no answer to give.
    fine = is_balanced(jax.lax.stop_gradient(factors))
    core = jax.tree.map(lambda x: jnp.where(fine, x, jnp.nan), found.core)
    status = jnp.where(fine, finite_status(core), UNBALANCED).astype(jnp.int32)
    drift = drift_of(core, start, times)
    return Path(times, core, reduced, frames, status, found.steps, drift, start, run)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How `solve` will run a problem, and at what predicted cost.

    Attributes:
      method: "closed form", "reduced ODE" or "full ODE".
      reason: why, in a sentence.
      flops: predicted floating point operations, an order of magnitude.
    """

    method: Method
    reason: str
    flops: float

    def __str__(self) -> str:
        """One line for a terminal."""
        return f"{self.method} (about {self.flops:.1e} flop): {self.reason}"


def _ode_flops(matrix_entries: float, gram: float, horizon: float) -> float:
    # Dopri8 takes 13 field evaluations a step; at rtol 1e-8 a step covers about one e-folding.
    return 13.0 * (50.0 + horizon) * 2.0 * (matrix_entries + gram)


def plan(problem: Problem, factors: Any, times: Float[Array, " t"] | np.ndarray) -> Plan:
    """Says how `solve` would run, without running.

    Args:
      problem: anything with `loss` and `gradient`.
      factors: the start; concrete, since whether it is balanced is looked at.
      times: when to save, shape (t,).

    Returns:
      A Plan.

    Raises:
      ValueError: for times that do not increase.
    """
    check_times(times)
    span = 1.0 if is_traced(times) else float(np.asarray(times)[-1])
    if not isinstance(problem, MatrixFactorization):
        entries = float(sum(x.size for x in _leaves(problem)))
        columns = 8.0 * float(max(min(x.shape) for x in _leaves(factors)))
        reason = f"a {type(problem).__name__} has neither a closed form nor a reduction"
        return Plan("full ODE", reason, _ode_flops(entries * columns, 0.0, span))
    check_flow(problem, factors, times)
    (m, n), k, r = problem.shape, problem.rank, factors.rank
    p, q = k + min(r, m - k), k + min(r, n - k)
    top = 1.0 if is_traced(problem) else float(np.asarray(problem.singular_values)[0])
    horizon = span * top
    setup = 4.0 * (m + n) * r * (k + r)
    if not is_traced(factors):
        with jax.ensure_compile_time_eval():  # a concrete start may meet a trace
            balanced, level = bool(is_balanced(factors)), float(balance(factors)[0])
        if balanced:
            step = 8.0 * (p + q) * r**2
            reason = f"the start is balanced, AᵀA − BBᵀ = {level:.3g} I"
            return Plan("closed form", reason, setup + step * np.shape(times)[0])
    reason = (
        f"the start is not balanced, but the flow stays in frames of {p}×{q} instead of {m}×{n}"
    )
    return Plan(
        "reduced ODE", reason, setup + _ode_flops(2.0 * (p + q) * r**2, 2.0 * k * r, horizon)
    )


def _leaves(tree: Any) -> list[Array]:
    return [x for x in jax.tree.leaves(tree) if getattr(x, "ndim", 0) == 2]


def solve(
    problem: Problem,
    factors: Any,
    times: Float[Array, " t"] | np.ndarray,
    *,
    method: Method | None = None,
    rtol: float | None = None,
) -> tuple[Path, Plan]:
    """Gradient flow by the cheapest way that is exact, with the plan that was followed.

    Args:
      problem: anything with `loss` and `gradient`.
      factors: the start.
      times: when to save, shape (t,), increasing, from 0 on.
      method: "closed form", "reduced ODE" or "full ODE" to insist on one; None chooses.
      rtol: relative tolerance where an ODE is solved.

    Returns:
      The Path and the Plan.

    Raises:
      ValueError: for an unknown method, or one that the problem or the start does not allow.
    """
    chosen = plan(problem, factors, times)
    if method is not None and method != chosen.method:
        chosen = Plan(method, "asked for", chosen.flops)
    if chosen.method == "closed form":
        if not isinstance(problem, MatrixFactorization):
            raise ValueError(
                f"a {type(problem).__name__} has no closed form; leave method at None."
            )
        return balanced_flow(problem, factors, times), chosen
    if chosen.method not in ("reduced ODE", "full ODE"):
        raise ValueError(
            f"method is {method!r}; it must be 'closed form', 'reduced ODE' or 'full ODE'."
        )
    is_reduced = chosen.method == "reduced ODE"
    return gradient_flow(problem, factors, times, rtol=rtol, reduced=is_reduced), chosen


__all__ = ["Method", "Plan", "balanced_flow", "plan", "solve"]
