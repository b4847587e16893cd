"""Steps and learning rates of LoRA across width and rank, for a multiplier `s = α r^{−γ}`.

A is n×r with entries of variance σ², by default 1/n; B = 0; a layer computes `(W + s A B)ᵀ x` of
inputs whose entries are of order one. γ = 1 is LoRA's alpha/r, γ = ½ rsLoRA's alpha/√r, γ = 0 a
fixed scaling.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import POSITIVE, judged
from lorajax.laws.base import Real, broadcast


@judged(rank=POSITIVE, variance=POSITIVE)
def gradient_step_gain(
    rank: Real, gamma: Real, variance: Real = 1.0, *, exponent: float = 2.0
) -> Float[Array, "..."]:
    """How much of a gradient step's effect on the loss goes through LoRA at B = 0: `r σ² s²`.

    Args:
      rank: r.
      gamma: γ of the multiplier `s = r^{−γ}`.
      variance: σ² of A's entries.
      exponent: the law's constant 2 of s.

    Returns:
      The mean over A of `s² ‖AᵀG‖²/‖G‖²`, the first step's decrease of the loss over that of full
      fine-tuning at the same rate: `σ² r^{1 − 2γ}`, independent of the rank for γ = ½ alone.

    Source: Kalajdzievski 2023 (arXiv:2312.03732) for the exponent, recalled; the constant is
    derived here: E AAᵀ = r σ² I.
    """
    rank, gamma, variance = broadcast(rank, gamma, variance)
    return variance * rank ** (1 - exponent * gamma)


@judged(multiplier=POSITIVE)
def multiplied_equivalent(
    times: Real, a: Float[Array, "..."], multiplier: Real, *, exponent: float = 0.5
) -> tuple[Array, Array]:
    """The plain flow that a multiplier amounts to, from B = 0: the times c t, the start √c A.

    Args:
      times: t ≥ 0 of gradient flow with the update `c A B`.
      a: A, of any shape.
      multiplier: c > 0, LoRA's scaling.
      exponent: the law's constant ½ of c beside A.

    Returns:
      Times and A from which the update A B of the flow without a multiplier is the same. A mode's
      half-time is therefore ln 2/(c² a²) in the lazy limit c a² ≫ s, and ln(4s/(c a²))/(2 c s) in
      the rich one, with a = |Aᵀu|.

    Source: derived here: the flow of (√c A, √c B) is that without a multiplier, c times as fast.
    """
    multiplier = jnp.asarray(multiplier)
    return multiplier * jnp.asarray(times), multiplier**exponent * a


@judged(steps=POSITIVE, rank=POSITIVE)
def sign_change(
    steps: Real,
    rate_a: Real,
    rate_b: Real,
    inputs: Real,
    start: Real,
    rank: Real,
    multiplier: Real = 1.0,
    *,
    constant: float = 1.0,
) -> tuple[Array, Array]:
    """What k sign-like steps (Adam, sign descent) on one sample change in a layer's outputs.

    Args:
      steps: k, while no sign of the gradient of the outputs turns.
      rate_a: η_A.
      rate_b: η_B.
      inputs: ‖x‖₁.
      start: ‖Aᵀx‖₁ at the start.
      rank: r.
      multiplier: s.
      constant: the law's factor 1 of the part of A.

    Returns:
      The size of every output's change, through B alone, `s η_B k ‖Aᵀx‖₁`, and through A's change
      as well, `s η_A η_B r ‖x‖₁ k (k − 1)`; they have one sign, minus that of the gradient.

    Source: derived here, exact for any network above the layer: B's entry (k, j) moves by
    −η_B sign(z_k) sign(g_j) and z = Aᵀx by η_A ‖x‖₁ sign(z) from the second step on.
    """
    k, rate_a, rate_b, inputs, start, rank, multiplier = broadcast(
        steps, rate_a, rate_b, inputs, start, rank, multiplier
    )
    through_b = multiplier * rate_b * k * start
    return through_b, constant * multiplier * rate_a * rate_b * rank * inputs * k * (k - 1)


@judged
def factor_balance(
    rate_a: Real, width: Real, *, exponent: float = 1.0, constant: float = 1.0
) -> Float[Array, "..."]:
    """What A's first sign-like step changes over what B's next one does: `η_A n`.

    Args:
      rate_a: η_A.
      width: n.
      exponent: the law's constant 1 of n.
      constant: its factor 1.

    Returns:
      The ratio of the means over x and A, x Gaussian of entries of variance 1 and A of variance
      1/n; whatever the rank, the multiplier and η_B. Both factors change the outputs alike where
      η_A = 1/n, so that with steps of B of order one η_B/η_A grows as n: LoRA+.

    Source: Hayou et al. 2024 (arXiv:2402.12354) for the exponent, recalled; the constant is derived
    here from `sign_change`: E‖x‖₁ = n √(2/π), E‖Aᵀx‖₁ = r √(2/π) up to order 1/n.
    """
    rate_a, width = broadcast(rate_a, width)
    return constant * rate_a * width**exponent


@judged(width=POSITIVE, rank=POSITIVE)
def carried_rate(
    width: Real, rank: Real, gamma: Real = 0.0, *, exponent: float = -0.5
) -> Float[Array, "..."]:
    """By what a learning rate of Adam changes with width and rank: `(n r^{1−γ})^{−½}`.

    Args:
      width: n, or the ratio of two.
      rank: r, or the ratio of two.
      gamma: γ of the multiplier r^{−γ}: 1 for alpha/r, ½ for alpha/√r, 0 for a fixed one.
      exponent: the law's constant −½.

    Returns:
      The factor, for one rate of both factors, A of variance 1/n and B = 0: the same number of
      steps then changes the outputs by as much.

    Source: μA (arXiv:2602.06204), recalled; derived here as the limit η_A n ≫ 1 of `sign_change`,
    whose second part is `s η² r n`. It stops being true where the part of B alone counts, steps of
    a relative size 1/(η n) (a short training, a narrow layer), and with rates of their own (LoRA+).
    """
    width, rank, gamma = broadcast(width, rank, gamma)
    return (width * rank ** (1 - gamma)) ** exponent
