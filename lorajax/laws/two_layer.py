"""Two frozen layers near zero: growth rates and what follows from them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import judged
from lorajax.problems import TwoLayer, TwoLayerFactors


@judged
def growth_rates(problem: TwoLayer) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Growth rates of the two adapters near zero, `g_1 = σ_1(W2ᵀE)` and `g_2 = σ_1(E W1ᵀ)`.

    Source: theory section 4 (reconstructed from Xu et al. 2025, arXiv:2503.06982).
    """
    first, second = problem.alignment_matrices()
    return (
        jnp.linalg.svd(first, compute_uv=False)[0],
        jnp.linalg.svd(second, compute_uv=False)[0],
    )


@judged
def escape_slope(problem: TwoLayer, *, constant: float = 1.0) -> Float[Array, ""]:
    """d(escape time)/d(ln 1/α) = 1/max(g_1, g_2), the slope in the scale α of the start.

    Args:
      problem: two frozen layers.
      constant: the law's factor 1.

    Returns:
      The slope, in 1/s.

    Source: theory section 4, item 1 (reconstructed): within 3 % for α ≤ 1e-4.
    """
    return constant / jnp.maximum(*growth_rates(problem))


@judged
def slow_layer_exponent(problem: TwoLayer, *, constant: float = 1.0) -> Float[Array, ""]:
    """Exponent of α in the slow layer's norm at escape, 1 − δ_w with δ_w = slower/faster rate.

    Args:
      problem: two frozen layers.
      constant: the law's factor 1.

    Returns:
      The exponent, in [0, 1).

    Source: theory section 4, item 2 (reconstructed): ±0.07.
    """
    first, second = growth_rates(problem)
    return constant * (1 - jnp.minimum(first, second) / jnp.maximum(first, second))


@judged
def alignment_exponent(problem: TwoLayer, *, constant: float = 2.0) -> Float[Array, ""]:
    """Exponent of α in the slow layer's misalignment at escape, `1 − cos ∝ α^{2 δ_w}`.

    Args:
      problem: two frozen layers whose shift lies along a principal component of their product.
      constant: the law's factor 2.

    Returns:
      The exponent, in (0, 2].

    Source: derived here from theory section 4: one direction has grown to α^{1 − δ_w}, the others
    stayed at α. It does not hold for a generic shift, whose growth turns the slow layer's own.
    """
    first, second = growth_rates(problem)
    return constant * jnp.minimum(first, second) / jnp.maximum(first, second)


@judged
def loss_decay(
    problem: TwoLayer, end: TwoLayerFactors, *, constant: float = 2.0
) -> Float[Array, ""]:
    """Rate of the loss near convergence, twice the residual's `⟨R, JJᵀR⟩/‖R‖²` along the shift R.

    Args:
      problem: two frozen layers, shift R.
      end: converged adapters of both.
      constant: the law's factor 2.

    Returns:
      The rate, in 1/time.

    Source: derived here: with the factors frozen at their end the residual obeys Ṙ = −JJᵀR, J the
    derivative of the product with respect to the factors, and this is its Rayleigh quotient.
    """
    unit = problem.shift / jnp.linalg.norm(problem.shift)
    layer1 = problem.w1 + end.first.product
    layer2 = problem.w2 + end.second.product
    pulled1, pulled2 = layer2.T @ unit, unit @ layer1.T
    squares = [
        jnp.sum((pulled1 @ end.first.b.T) ** 2),
        jnp.sum((end.first.a.T @ pulled1) ** 2),
        jnp.sum((pulled2 @ end.second.b.T) ** 2),
        jnp.sum((end.second.a.T @ pulled2) ** 2),
    ]
    return constant * sum(squares[1:], squares[0])
