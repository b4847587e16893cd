"""Flows without an ODE solver, and the reduction that makes any size cost the same.

Both are exact. `reduce` turns a flow on m×n matrices with a target of rank k into the same flow on
(k+r)×(k+r) ones; `balanced_flow` propagates a λ-balanced start in closed form.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lorajax.factors import Factors, check_factors, is_traced
from lorajax.problems import DiagonalFactorization, MatrixFactorization


class Frames(NamedTuple):
    """Orthonormal frames in which a flow stays: the target's singular vectors and the start's rest.

    Attributes:
      u: left singular vectors of the target, shape (m, k).
      u_rest: frame of what the start's A has across them, shape (m, p - k).
      v: right singular vectors of the target, shape (n, k).
      v_rest: frame of what the start's B has across them, shape (n, q - k).
    """

    u: Float[Array, "m k"]
    u_rest: Float[Array, "m j"]
    v: Float[Array, "n k"]
    v_rest: Float[Array, "n l"]

    def lift(self, core: Factors) -> Factors:
        """Factors of full size from those in the frames; leading axes pass through."""
        k = self.u.shape[1]
        return Factors(
            self.u @ core.a[..., :k, :] + self.u_rest @ core.a[..., k:, :],
            core.b[..., :k] @ self.v.T + core.b[..., k:] @ self.v_rest.T,
        )


class Reduction(NamedTuple):
    """A problem and a start in the frames in which the flow stays.

    Attributes:
      problem: the diagonal problem, of shape (p, q) with p = k + min(r, m - k), q likewise.
      factors: the start in the frames, shapes (p, r) and (r, q).
      frames: what lifts a point of the reduced flow back.
    """

    problem: DiagonalFactorization
    factors: Factors
    frames: Frames


def _split(frame: Array, factor: Array) -> tuple[Array, Array, Array]:
    """Splits a factor into coordinates along a frame, and a frame and coordinates of the rest."""
    (m, k), r = frame.shape, factor.shape[1]
    along = frame.T @ factor
    if m - k <= r:
        # The complement is no larger than the rest could be: a frame of all of it is exact and,
        # unlike a QR of the rest, well defined when the rest vanishes.
        rest_frame = jnp.linalg.qr(frame, mode="complete")[0][:, k:]
        return along, rest_frame, rest_frame.T @ factor
    rest = factor - frame @ along
    rest_frame, rest_coordinates = jnp.linalg.qr(rest)
    return along, rest_frame, rest_coordinates


def reduce(problem: MatrixFactorization, factors: Factors) -> Reduction:
    """The same flow on the smallest matrices that hold it.

    Args:
      problem: matrix factorization with a target of rank k and shape (m, n).
      factors: the start, of rank r.

    Returns:
      A Reduction whose flow, lifted, is the flow of `problem` from `factors`, exactly: what A has
      across the target's left singular vectors keeps its column space, since Ȧ there is −A(BBᵀ).

    Example:
      >>> import jax, lorajax
      >>> problem = lorajax.MatrixFactorization.from_spectrum(
      ...     jax.random.key(0), shape=(4096, 4096), singular_values=(4.0, 3.0, 2.0, 1.0)
      ... )
      >>> factors = lorajax.initializers.lora(jax.random.key(1), problem.shape, rank=8)
      >>> lorajax.exact.reduce(problem, factors).problem.shape
      (12, 12)

    Source: theory section 1 (derived). It holds for gradient flow and for every descent that
    commutes with rotations of the rows and columns (GD, momentum, LoRA+, ScaledGD, spectral
    descent, weight decay); it fails for Adam, whose step depends on the entries.
    """
    a_along, u_rest, a_rest = _split(problem.u, factors.a)
    b_along, v_rest, b_rest = _split(problem.v, factors.b.T)
    core = Factors(jnp.concatenate([a_along, a_rest]), jnp.concatenate([b_along, b_rest]).T)
    return Reduction(
        DiagonalFactorization(problem.singular_values, core.shape),
        core,
        Frames(problem.u, u_rest, problem.v, v_rest),
    )


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
        raise ValueError(f"times start at {values[0]}; they must be finite and start at 0 or later.")
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


def check_balanced(factors: Factors) -> None:
    """Raises ValueError unless a start is λ-balanced to the rounding of its dtype."""
    if is_traced(factors):
        return
    _, deviation = balance(factors)
    # Orthonormal frames come out of a QR with errors of a few times m·eps in their Gram matrix.
    allowed = 100 * max(factors.shape) ** 0.5 * float(jnp.finfo(factors.a.dtype).eps)
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
            f"factors have dtype {factors.a.dtype} and the problem {problem.dtype}; they must agree."
        )
    check_times(times)
