"""What one step of a preconditioned descent leaves."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import judged


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
