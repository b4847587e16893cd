"""The trace-squared loss in closed form: where a LoRA flow is at any time, and where it ends."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lorajax.environment.judging import at_least, judged
from lorajax.factors import Factors
from lorajax.laws.base import Real
from lorajax.problems import TraceSquared


@judged
def trace_squared_angle(
    problem: TraceSquared,
    factors: Factors,
    times: Float[Array, " t"] | Float[np.ndarray, " t"],
    *,
    drag: float = 1.0,
) -> Float[Array, " t"]:
    """The hyperbolic angle θ(t) that the factors have turned by, `θ̇ = tr W`.

    Args:
      problem: the loss `½ (tr W)²`.
      factors: any start.
      times: t ≥ 0, shape (t,), in 1/(the trace's unit); infinity is allowed.
      drag: the law's factor 1 of β, at least 1.

    Returns:
      θ(t) = artanh x, where `ẋ = α − βx − γx²` with α = tr W0 + tr A0B0, β = ‖A0‖² + ‖B0‖² and
      γ = tr W0 − tr A0B0. For B0 = 0 that is `θ̇ = tr W0 − (‖A0‖²/2) sinh 2θ`.

    Source: theory section 6 (reconstructed for B0 = 0); the solution in time and any B0 are derived
    here: A ± Bᵀ are only scaled by e^{∓θ}, so that x = tanh θ obeys a Riccati equation.
    """
    inner = jnp.sum(factors.a * factors.b.T)
    beta = drag * (jnp.sum(factors.a**2) + jnp.sum(factors.b**2))
    alpha, gamma = problem.trace + inner, problem.trace - inner
    # β ≥ 2 |tr A0B0|, so the root is real.
    kappa = jnp.sqrt(beta**2 + 4 * alpha * gamma) / 2
    times = jnp.asarray(times, problem.dtype)
    turn = jnp.tanh(kappa * times)
    safe = jnp.where(kappa == 0, 1, kappa + beta / 2 * turn)
    # A = ±Bᵀ of a trace 0: the limit of tanh(κt)/κ is t.
    still = alpha * times / (1 + beta / 2 * times)
    return jnp.arctanh(jnp.where(kappa == 0, still, alpha * turn / safe))


@judged
def trace_squared_flow(
    problem: TraceSquared,
    factors: Factors,
    times: Float[Array, " t"] | Float[np.ndarray, " t"],
    *,
    drag: float = 1.0,
) -> Factors:
    """The factors of the flow at any time: `A0 cosh θ − B0ᵀ sinh θ`, `B0 cosh θ − A0ᵀ sinh θ`.

    Args:
      problem: the loss `½ (tr W)²`.
      factors: any start of rank r.
      times: t ≥ 0, shape (t,); infinity gives the limit.
      drag: as in `trace_squared_angle`.

    Returns:
      Factors with a leading axis t. For B0 = 0 the limit's product is `−(tr W0/‖A0‖²) A0A0ᵀ`.

    Source: theory section 6 (reconstructed for B0 = 0, derived otherwise).
    """
    angle = trace_squared_angle(problem, factors, times, drag=drag)[:, None, None]
    cosh, sinh = jnp.cosh(angle), jnp.sinh(angle)
    a, b = factors.a[None], factors.b[None]
    return Factors(cosh * a - sinh * jnp.swapaxes(b, 1, 2), cosh * b - sinh * jnp.swapaxes(a, 1, 2))


@judged
def trace_squared_error(a: Float[Array, "n r"], *, size: float = 1.0) -> Float[Array, ""]:
    """How far LoRA ends from full fine-tuning, relative to the latter: `√(n‖AᵀA‖²/‖A‖⁴ − 1)`.

    Args:
      a: the start's A0 (B0 = 0), shape (n, r).
      size: the law's factor 1 of n.

    Returns:
      The relative error in the Frobenius norm: `√(n/r − 1)` for orthonormal columns of any scale,
      about √((n + 1)/r) for Gaussian entries.

    Source: theory section 6 (reconstructed; Rushka, Klabjan 2026 state its order r^{−1/2}).
    """
    gram = a.T @ a
    # A rounding below 0 at r = n would become NaN.
    excess = size * a.shape[0] * jnp.sum(gram**2) / jnp.trace(gram) ** 2 - 1
    return jnp.sqrt(jnp.maximum(excess, 0))


@judged(n=at_least(1), rank=at_least(1))
def orthonormal_error(n: int, rank: Int[np.ndarray, "..."] | int, *, size: float = 1.0) -> Real:
    """`trace_squared_error` of an A0 with orthonormal columns of any scale: `√(n/r − 1)`.

    Args:
      n: side of the weight.
      rank: r in 1 … n.
      size: the law's factor 1 of n.

    Returns:
      The relative error, exactly 0 at r = n where the general form leaves the root of a rounding.

    Source: theory section 6 (reconstructed).
    """
    return np.sqrt(size * n / np.asarray(rank) - 1)
