"""What becomes of the imbalance Λ = AᵀA − BBᵀ that every LoRA flow conserves."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.laws.base import Real, broadcast


def imbalance_decay(times: Real, weight_decay: Real, *, rate: Real = 2.0) -> Float[Array, "..."]:
    """Λ(t) in units of Λ(0) under weight decay w on both factors: `e^{−2wt}`.

    Args:
      times: t ≥ 0.
      weight_decay: w, in 1/time.
      rate: the law's constant 2.

    Returns:
      The share that is left, for any differentiable loss of the product.

    Source: theory section 1 (derived).
    """
    times, weight_decay = broadcast(times, weight_decay)
    return jnp.exp(-rate * weight_decay * times)
