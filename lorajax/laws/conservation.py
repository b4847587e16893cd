"""What becomes of the imbalance Λ = AᵀA − BBᵀ that every LoRA flow conserves."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import NOT_NEGATIVE, POSITIVE, at_least, judged
from lorajax.factors import Factors, TuckerFactors, unfold
from lorajax.laws.base import Real, broadcast


@judged(weight_decay=NOT_NEGATIVE)
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


@judged(ratio=POSITIVE)
def lora_plus_level(
    factors: Factors, ratio: float, *, constant: Real = 1.0
) -> Float[Array, "*lanes r r"]:
    """What LoRA+ conserves, `ρ AᵀA − BBᵀ`, with Ḃ multiplied by ρ.

    Args:
      factors: with any leading axes.
      ratio: ρ.
      constant: the law's factor 1 of ρ.

    Returns:
      The level of each; the same along a flow of any differentiable loss of the product.

    Source: theory section 1 (derived).
    """
    a, b = factors
    left = jnp.swapaxes(a, -1, -2) @ a * (constant * ratio)
    return left - b @ jnp.swapaxes(b, -1, -2)


@judged(mode=at_least(0))
def tucker_level(factors: TuckerFactors, mode: int, *, constant: Real = 1.0) -> Float[Array, "r r"]:
    """What a Tucker update's flow conserves of a mode, `U_iᵀU_i − G_(i)G_(i)ᵀ`.

    Args:
      factors: core G and one factor U_i for each mode.
      mode: i, from 0.
      constant: the law's factor 1 of the core's term.

    Returns:
      The level, for any differentiable loss of the product.

    Source: theory section 3 (derived).
    """
    u, core = factors.factors[mode], unfold(factors.core, mode)
    return u.T @ u - constant * (core @ core.T)
