"""Which engine runs a flow, or many of them, and why: the cheapest one that is exact."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax.environment.judging import at_least, judged
from lorajax.exact import balance, is_balanced
from lorajax.factors import Factors, is_traced
from lorajax.problems import MatrixFactorization, Problem, TwoLayer, check_flow, check_times

Engine = Literal["closed form", "reduced ODE", "two-layer ODE", "full ODE"]
"""Ways to run a flow. Two layers have an engine of their own where many flows run at once."""


@judged
@dataclasses.dataclass(frozen=True)
class Plan:
    """How a flow, or each of many, will run.

    Attributes:
      engine: its name.
      reason: why, in a sentence.
      flops: predicted floating point operations, an order of magnitude.
    """

    engine: Engine
    reason: str
    flops: float

    def __str__(self) -> str:
        """One line for a terminal."""
        return f"{self.engine} (about {self.flops:.1e} flop): {self.reason}"


@judged(rank=at_least(1))
def reduced_shape(problem: MatrixFactorization, rank: int) -> tuple[int, int]:
    """Size of the frames in which flows of a rank stay: k and at most r more on each side."""
    (m, n), k = problem.shape, problem.singular_values.shape[-1]
    return k + min(rank, m - k), k + min(rank, n - k)


@jax.jit
def _levels(factors: Factors) -> tuple[Array, Array]:
    """Whether all starts are balanced, and the λ of each."""
    lanes = factors.a.ndim > 2
    level = (jax.vmap(balance) if lanes else balance)(factors)[0]
    return jnp.all(is_balanced(factors)), level


def _are_lanes(factors: Any) -> bool:
    return any(getattr(x, "ndim", 0) == 3 for x in jax.tree.leaves(factors))


@judged
def choose(problem: Any, factors: Any) -> tuple[Engine, str]:
    """The cheapest engine that is exact for a start, or for all of a batch, and why.

    Args:
      problem: any problem.
      factors: one concrete start, or a batch of them with lanes on the first axis.

    Returns:
      The engine's name and the reason in a sentence.
    """
    if isinstance(problem, TwoLayer) and _are_lanes(factors):
        return "two-layer ODE", "two frozen layers have no reduction; their products fold all lanes"
    if not isinstance(problem, MatrixFactorization):
        return "full ODE", f"a {type(problem).__name__} has neither a closed form nor a reduction"
    if is_traced(factors):
        return "reduced ODE", "the start is traced, so that whether it is balanced is unknown"
    # A concrete start may meet a trace, where its balance would be staged instead of known.
    with jax.ensure_compile_time_eval():
        balanced, level = _levels(factors)
    if not balanced:
        (p, q), (m, n) = reduced_shape(problem, factors.rank), problem.shape
        return "reduced ODE", f"the start is not balanced; frames of {p}×{q} hold the {m}×{n} flow"
    shown = "λI" if level.ndim else f"{float(level):.3g} I"
    return "closed form", f"the start is balanced, AᵀA − BBᵀ = {shown}"


def _ode_flops(matrix_entries: float, gram: float, horizon: float) -> float:
    # Dopri8 takes 13 field evaluations a step; at rtol 1e-8 a step covers about one e-folding.
    return 13.0 * (50.0 + horizon) * 2.0 * (matrix_entries + gram)


def _matrices(tree: Any) -> list[Array]:
    return [x for x in jax.tree.leaves(tree) if getattr(x, "ndim", 0) >= 2]


@judged
def plan(problem: Problem, factors: Any, times: Float[Array, " t"] | np.ndarray) -> Plan:
    """Says how a flow would run, or many of them, without running.

    Args:
      problem: anything with `loss` and `gradient`.
      factors: the start; concrete, since whether it is balanced is looked at. Of a matrix
        factorization or of two layers also a batch, with lanes on the first axis of every array.
      times: when to save, shape (t,).

    Returns:
      A Plan, with the operations of one flow.

    Raises:
      ValueError: for times that do not increase, or a start that does not fit.
    """
    check_times(times)
    span = 1.0 if is_traced(times) else float(np.asarray(times)[-1])
    if not isinstance(problem, MatrixFactorization):
        engine, reason = choose(problem, factors)
        entries = float(sum(x.size for x in _matrices(problem)))
        columns = 8.0 * float(max(min(x.shape[-2:]) for x in _matrices(factors)))
        return Plan(engine, reason, _ode_flops(entries * columns, 0.0, span))
    one = Factors(factors.a[0], factors.b[0]) if factors.a.ndim > 2 else factors
    check_flow(problem, one, times)
    engine, reason = choose(problem, factors)
    (m, n), k, r = problem.shape, problem.rank, factors.rank
    p, q = reduced_shape(problem, r)
    horizon = 1.0 if is_traced(problem) else span * float(np.asarray(problem.singular_values).max())
    setup = 4.0 * (m + n) * r * (k + r)
    if engine == "closed form":
        step = 8.0 * (p + q) * r**2
        return Plan(engine, reason, setup + step * np.shape(times)[0])
    return Plan(engine, reason, setup + _ode_flops(2.0 * (p + q) * r**2, 2.0 * k * r, horizon))


__all__ = ["Engine", "Plan", "choose", "plan", "reduced_shape"]
