"""The closed form as a run, and `solve`, which picks the cheapest exact way."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax.environment.judging import POSITIVE, judged
from lorajax.exact import balance, balanced_core, check_balanced, is_balanced, reduce
from lorajax.factors import Factors
from lorajax.flows.gradient import gradient_flow
from lorajax.flows.path import UNBALANCED, Path, drift_of, finite_status
from lorajax.flows.plan import Engine, Plan, plan
from lorajax.problems import MatrixFactorization, Problem, check_flow


@judged
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


@judged(rtol=POSITIVE)
def solve(
    problem: Problem,
    factors: Any,
    times: Float[Array, " t"] | np.ndarray,
    *,
    engine: Engine | None = None,
    rtol: float | None = None,
) -> tuple[Path, Plan]:
    """Gradient flow by the cheapest way that is exact, with the plan that was followed.

    Args:
      problem: anything with `loss` and `gradient`.
      factors: the start.
      times: when to save, shape (t,), increasing, from 0 on.
      engine: "closed form", "reduced ODE" or "full ODE" to insist on one; None chooses.
      rtol: relative tolerance where an ODE is solved.

    Returns:
      The Path and the Plan.

    Raises:
      ValueError: for an unknown engine, or one that the problem or the start does not allow.
    """
    chosen = plan(problem, factors, times)
    if engine is not None and engine != chosen.engine:
        chosen = Plan(engine, "asked for", chosen.flops)
    if chosen.engine == "closed form":
        if not isinstance(problem, MatrixFactorization):
            raise ValueError(
                f"a {type(problem).__name__} has no closed form; leave engine at None."
            )
        return balanced_flow(problem, factors, times), chosen
    if chosen.engine not in ("reduced ODE", "full ODE"):
        raise ValueError(
            f"engine is {engine!r}; it must be 'closed form', 'reduced ODE' or 'full ODE'."
        )
    is_reduced = chosen.engine == "reduced ODE"
    return gradient_flow(problem, factors, times, rtol=rtol, reduced=is_reduced), chosen


__all__ = ["balanced_flow", "solve"]
