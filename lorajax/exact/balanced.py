"""The λ-balanced propagator: one flow in steps that make no discretization error."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lorajax.factors import Factors, check_factors, is_traced
from lorajax.problems import DiagonalFactorization


def balance(factors: Factors) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How close a start is to `AᵀA − BBᵀ = λ I`.

    Args:
      factors: any start.

    Returns:
      λ, the mean of the diagonal of `Λ = AᵀA − BBᵀ`, and the relative deviation
      `‖Λ − λI‖_F / (‖A‖_F² + ‖B‖_F²)`, 0 for a start that `balanced_flow` solves exactly.
    """
    gram_a, gram_b = factors.a.T @ factors.a, factors.b @ factors.b.T
    imbalance = gram_a - gram_b
    level = jnp.trace(imbalance) / factors.rank
    deviation = jnp.linalg.norm(imbalance - level * jnp.eye(factors.rank, dtype=imbalance.dtype))
    return level, deviation / (jnp.trace(gram_a) + jnp.trace(gram_b))


def check_times(times: Array | np.ndarray) -> None:
    """Raises ValueError unless `times` is a vector, increasing, finite and starts at 0 or later."""
    shape = np.shape(times)
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"times have shape {shape}; they must be a vector of at least one time.")
    if is_traced(times):
        return
    values = np.asarray(times)
    if not np.all(np.isfinite(values)) or values[0] < 0:
        raise ValueError(
            f"times start at {values[0]}; they must be finite and start at 0 or later."
        )
    if np.any(np.diff(values) <= 0):
        i = int(np.argmax(np.diff(values) <= 0))
        raise ValueError(
            f"times go from {values[i]} to {values[i + 1]} at position {i + 1}; they must increase."
        )


class BalancedPath(NamedTuple):
    """A λ-balanced flow in the frames, and the steps it took.

    Attributes:
      core: factors in the frames at the times, shapes (t, p, r) and (t, r, q), each exact up to a
        rotation of the r columns that is the same for both (the product is exact).
      steps: propagator steps in all, int32.
    """

    core: Factors
    steps: Int[Array, ""]


def _propagate(problem: DiagonalFactorization, core: Factors, level, dt) -> Factors:
    """One step `Q ← e^{Fδ} Q C^{−1/2}` in the blocks of F; exact for any δ."""
    s, k = problem.singular_values, problem.rank
    half = level / 2
    kappa = jnp.sqrt(s**2 + half**2)
    x, x_rest = core.a[:k], core.a[k:]
    y, y_rest = core.b[:, :k].T, core.b[:, k:].T
    cosh, sinh = jnp.cosh(kappa * dt)[:, None], (jnp.sinh(kappa * dt) / kappa)[:, None]
    # ∫₀^δ e^{2Fs} ds = even·I + odd·F on each mode; (cosh 2κδ − 1)/2κ² = (sinh κδ / κ)².
    even, odd = cosh * sinh, sinh**2
    f_x, f_y = half * x + s[:, None] * y, s[:, None] * x - half * y
    safe = jnp.where(level == 0, 1, level)
    grow = jnp.where(level == 0, dt, jnp.expm1(level * dt) / safe)
    decay = jnp.where(level == 0, dt, -jnp.expm1(-level * dt) / safe)
    gram = (
        x.T @ (even * x + odd * f_x)
        + y.T @ (even * y + odd * f_y)
        + grow * (x_rest.T @ x_rest)
        + decay * (y_rest.T @ y_rest)
    )
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    root = jnp.linalg.cholesky(identity + gram, symmetrize_input=True)
    half_step = jnp.exp(half * dt)
    stacked = jnp.concatenate(
        [cosh * x + sinh * f_x, half_step * x_rest, cosh * y + sinh * f_y, y_rest / half_step]
    )
    stacked = jax.scipy.linalg.solve_triangular(root, stacked.T, lower=True).T
    p = core.a.shape[0]
    return Factors(stacked[:p], stacked[p:].T)


@eqx.filter_jit
def balanced_core(
    problem: DiagonalFactorization, core: Factors, times: Float[Array, " t"], level=None
) -> BalancedPath:
    """`balanced_flow` of a reduced problem, staying in the frames.

    Args:
      problem: a diagonal problem, as `reduce` returns it.
      core: a λ-balanced start of it, shapes (p, r) and (r, q).
      times: increasing, from 0 on, in units of 1/s; same dtype.
      level: λ; the mean of the diagonal of `AᵀA − BBᵀ` if None.

    Returns:
      A BalancedPath.
    """
    level = balance(core)[0] if level is None else jnp.asarray(level, core.a.dtype)
    # Steps of κ₁δ ≤ 1 keep C near I: with one long step the top mode swamps all others.
    rate = jnp.sqrt(problem.singular_values[0] ** 2 + (level / 2) ** 2)

    def interval(carry, until):
        core, now, steps = carry
        count = jnp.maximum(jnp.ceil((until - now) * rate), 1).astype(jnp.int32)
        dt = (until - now) / count.astype(times.dtype)
        core = jax.lax.fori_loop(0, count, lambda _, c: _propagate(problem, c, level, dt), core)
        return (core, until, steps + count), core

    begin = (core, jnp.zeros((), times.dtype), jnp.zeros((), jnp.int32))
    (_, _, steps), path = jax.lax.scan(interval, begin, times)
    return BalancedPath(path, steps)


def _allowed(factors: Factors) -> float:
    # Orthonormal frames come out of a QR with errors of a few times m·eps in their Gram matrix.
    return 100 * max(factors.shape) ** 0.5 * float(jnp.finfo(factors.a.dtype).eps)


def is_balanced(factors: Factors) -> Bool[Array, "*lanes"]:
    """Whether starts are λ-balanced to the rounding of their dtype.

    Args:
      factors: shapes (..., m, r) and (..., r, n).

    Returns:
      One boolean a lane.
    """
    test = balance
    for _ in range(factors.a.ndim - 2):
        test = jax.vmap(test)
    return test(factors)[1] <= _allowed(factors)


def check_balanced(factors: Factors) -> None:
    """Raises ValueError unless a start is λ-balanced to the rounding of its dtype."""
    if is_traced(factors):
        return
    # A concrete start may meet a trace, where its balance would be staged instead of known.
    with jax.ensure_compile_time_eval():
        _, deviation = balance(factors)
    allowed = _allowed(factors)
    if float(deviation) > allowed:
        raise ValueError(
            f"factors have AᵀA − BBᵀ off a multiple of the identity by {float(deviation):.1e} "
            f"(relative); the closed form needs at most {allowed:.0e}: start from "
            "initializers.orthogonal, spectral or balanced, or use gradient_flow."
        )


def check_flow(problem, factors: Factors, times) -> None:
    """Raises ValueError unless problem, start and times fit one another."""
    check_factors(factors, problem.shape)
    if factors.a.dtype != problem.dtype:
        raise ValueError(
            f"factors have dtype {factors.a.dtype} and the problem {problem.dtype}; they must "
            "agree."
        )
    check_times(times)
