"""Descent near zero factors, where the gradient with respect to the weight has not moved yet."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lorajax.environment.judging import judged
from lorajax.factors import Factors


@judged
@jax.jit
def early_descent(
    matrix: Float[Array, "m n"],
    start: Factors,
    step: float | Float[Array, ""] | Float[Array, " k"],
    steps: Int[Array, " t"] | Int[np.ndarray, " t"],
) -> Factors:
    """Gradient descent of any loss while the adapter is small: `Z(k) = (I + η H(M))^k Z(0)`.

    Args:
      matrix: `M = −∇_W L` at the start, shape (m, n); `H(M) = [[0, M], [Mᵀ, 0]]`, `Z = [A; Bᵀ]`.
      start: shapes (..., m, r) and (..., r, n).
      step: η, or one for each step: the law is then `Π_j (I + η_j H(M)) Z(0)`, and NaN beyond the
        last one.
      steps: numbers of steps k, shape (t,).

    Returns:
      Factors after k steps, shapes (..., t, m, r) and (..., t, r, n).

    Source: theory section 4 (reconstructed), for one layer. It stops to hold as the gradient moves:
    the error is of the order of `‖AB‖` relative to the weight's own scale.
    """
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    left, right = u.T @ start.a, vt @ jnp.swapaxes(start.b, -1, -2)
    count = jnp.asarray(steps)[:, None]
    rate = jnp.asarray(step, s.dtype)

    def power(sign: int) -> Array:
        if rate.ndim:
            factors = 1 + sign * rate[:, None] * s[None, :]
            grown = jnp.cumprod(jnp.concatenate([jnp.ones_like(s)[None], factors]), axis=0)
            return grown.at[count[:, 0]].get(mode="fill", fill_value=jnp.nan)
        base = 1 + sign * rate * s[None, :]
        # Of integers, with strict dtypes: a large step makes the base negative.
        odd = jnp.where((base < 0) & (count % 2 == 1), -1, 1).astype(s.dtype)
        return odd * jnp.abs(base) ** count.astype(s.dtype)

    grown, faded = power(1), power(-1)
    even = jnp.einsum("tk,...kr->...tkr", grown, (left + right) / 2)
    odd = jnp.einsum("tk,...kr->...tkr", faded, (left - right) / 2)
    # What lies across the singular vectors of M stays as it is.
    a = start.a - u @ left
    b = start.b - jnp.swapaxes(right, -1, -2) @ vt
    return Factors(
        jnp.expand_dims(a, -3) + u @ (even + odd),
        jnp.expand_dims(b, -3) + jnp.swapaxes(even - odd, -1, -2) @ vt,
    )
