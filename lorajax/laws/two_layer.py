"""Two frozen layers near zero: growth rates and what follows from them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.problems import TwoLayer


def growth_rates(problem: TwoLayer) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Growth rates of the two adapters near zero, `g_1 = σ_1(W2ᵀE)` and `g_2 = σ_1(E W1ᵀ)`.

    Source: theory section 4 (reconstructed from Xu et al. 2025, arXiv:2503.06982).
    """
    first, second = problem.alignment_matrices()
    return (
        jnp.linalg.svd(first, compute_uv=False)[0],
        jnp.linalg.svd(second, compute_uv=False)[0],
    )


def escape_slope(problem: TwoLayer) -> Float[Array, ""]:
    """d(escape time)/d(ln 1/α) = 1/max(g_1, g_2), the slope in the scale α of the start.

    Source: theory section 4, item 1 (reconstructed): within 3 % for α ≤ 1e-4.
    """
    return 1 / jnp.maximum(*growth_rates(problem))


def slow_layer_exponent(problem: TwoLayer) -> Float[Array, ""]:
    """Exponent of α in the slow layer's norm at escape, 1 − δ_w with δ_w = slower/faster rate.

    Source: theory section 4, item 2 (reconstructed): ±0.07.
    """
    first, second = growth_rates(problem)
    return 1 - jnp.minimum(first, second) / jnp.maximum(first, second)
