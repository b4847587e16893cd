"""Linear regression with inputs of any covariance: what a rank leaves, and the gradient's noise."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import POSITIVE, at_least, judged
from lorajax.laws.base import Real


@judged(rank=at_least(0))
def whitened_risk(
    singular_values: Float[Array, "*batch k"], rank: int, *, constant: float = 0.5
) -> Float[Array, "*batch"]:
    """The least excess risk of a rank: `½ Σ_{i>r} σ_i²`.

    Args:
      singular_values: of `C^{½} Δ`, the whitened oracle update, in decreasing order.
      rank: r; 0 leaves all of it.
      constant: the law's factor ½.

    Returns:
      `min ½ E‖(Δ − AB)ᵀx‖²` over A B of rank r, C = E x xᵀ.

    Source: Lin 2026, theory section 9 (report read): Eckart–Young in the norm of C.
    """
    return constant * jnp.sum(singular_values[..., rank:] ** 2, axis=-1)


@judged(samples=at_least(1), noise=POSITIVE)
def whitened_noise(
    shape: tuple[int, int], noise: Real, samples: int, *, constant: float = 1.0
) -> Float[Array, ""]:
    """Mean of `‖C^{−½} N‖_F²` of the gradient's noise: `σ² m n_out / n`, whatever C is.

    Args:
      shape: (m, n_out) of the gradient.
      noise: standard deviation σ of the labels' noise.
      samples: n ≥ m, of which C is the second moment as well.
      constant: the law's factor 1.

    Returns:
      The mean over labels, exact at any n: N = Xᵀξ/n, and the columns of `X C^{−½}/√n` are
      orthonormal.

    Source: derived here (theory section 9).
    """
    return jnp.asarray(constant * noise**2 * shape[0] * shape[1] / samples)
