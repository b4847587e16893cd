"""What preconditioned descents do: errors of a step, modes of a flow, what a factoring changes."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import judged
from lorajax.laws.base import Real, broadcast


@judged
def scaled_gd_error(
    error: Float[Array, "*steps r r"], gram: Float[Array, "*steps r r"], *, constant: float = 0.25
) -> Float[Array, "*steps r r"]:
    """Error after one step ½ of symmetric ScaledGD: `E' = −¼ E P^{-1} E`, quadratic convergence.

    Args:
      error: `E = S − XXᵀ` in an orthonormal frame of the column space that S and X share.
      gram: `P = XXᵀ` in that frame, positive definite.
      constant: the law's factor ¼.

    Returns:
      The next error; the same unit.

    Source: derived here (theory section 2.5): the step is `X ← ½(X + S X^{-T})`, whose square is
    `¼(P + 2S + S P^{-1} S)` with S = P + E.
    """
    return -constant * error @ jnp.linalg.solve(gram, error)


@judged
def riemannian_mode(times: Real, s: Real, start: Real, *, rate: float = 2.0) -> Float[Array, "..."]:
    """An aligned mode under Riemannian (scaled) gradient flow: `s + (σ0 − s) e^{−2t}`.

    Args:
      times: t ≥ 0, without a unit: the metric takes the size of the factors out.
      s: the target's singular value.
      start: σ0 > 0.
      rate: the law's constant 2, one rate for all modes: a half comes from each factor.

    Returns:
      σ(t); NaN from a start that is not above 0, where the metric is not defined. Plain gradient
      flow learns a mode at a rate of 2s instead.

    Source: theory section 9 (derived): aligned, Ȧ = (s − σ)/σ A and likewise for B.
    """
    times, s, start = broadcast(times, s, start)
    return jnp.where(start > 0, s + (start - s) * jnp.exp(-rate * times), jnp.nan)


@judged
def adam_first_step(factor: Real, *, exponent: float = 1.0) -> tuple[Array, Array]:
    """What rescaling a start (sA, B/s) does to Adam's first change of the product.

    Args:
      factor: s > 0.
      exponent: the law's constant 1.

    Returns:
      Factors of the change through A, `ΔA B`, and of that through B, `A ΔB`: 1/s and s, because the
      step of an entry has a size that does not depend on the gradient's. NaN unless s > 0.

    Source: theory section 9 (derived).
    """
    factor = jnp.asarray(factor)
    factor = jnp.where(factor > 0, factor, jnp.nan)
    return factor**-exponent, factor**exponent


@judged
def frame_gain(gram: Float[Array, "r r"], inputs: int, *, constant: float = 1.0) -> Array:
    """How much of a quadratic loss the best first step of B takes away, the gradient unknown.

    Args:
      gram: `K = AᵀA`, shape (r, r).
      inputs: m, the rows of A.
      constant: the law's factor 1.

    Returns:
      `(tr K)²/(m tr K²)`, the mean over gradients of every direction at the best common rate; at
      most r/m, which K ∝ I alone attains: orthonormal columns times any number, a tight frame.

    Source: tight frames, theory section 9 (abstract); this form is derived here: the step takes
    `η ‖AᵀG‖² − ½ η² ‖AAᵀG‖²`, with means η tr K and η² tr K² times ‖G‖²/m.
    """
    return constant * jnp.trace(gram) ** 2 / (inputs * jnp.sum(gram**2))
