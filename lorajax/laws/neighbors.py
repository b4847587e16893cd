"""Laws of the neighbors: LoRA-One, linear attention, fine-tuning beyond kernels, ALLoRA."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import POSITIVE, at_least, judged
from lorajax.factors import check_positive
from lorajax.laws.base import Real, broadcast
from lorajax.problems import LinearAttention


@judged(dimension=at_least(1), samples=at_least(1))
def one_step_error(dimension: int, samples: int, *, constant: float = 1.0) -> float:
    """How far LoRA-One's start is from the oracle update: `√((d + 1)/n)` of its norm.

    Args:
      dimension: d of the inputs.
      samples: n that the gradient is averaged over.
      constant: the law's factor 1.

    Returns:
      Root mean square of `‖A0B0 − S‖_F / ‖S‖_F` over data sets, for Gaussian inputs of covariance
      I, labels without noise, γ = 1 and a rank of at least the oracle's.

    Raises:
      ValueError: if dimension or samples are not positive.

    Source: derived here: A0B0 = Σ̂S and `E(Σ̂ − I)² = (d + 1)/n I`. Zhang et al. 2025
    (arXiv:2502.01235) state the bound ε‖S‖.
    """
    check_positive(dimension=dimension, samples=samples)
    return constant * math.sqrt((dimension + 1) / samples)


@judged
def attention_plateaus(
    problem: LinearAttention, *, trace: float = 1.0
) -> Float[Array, " plateaus"]:
    """Losses at which linear attention with rank-one heads rests on its way, d + 1 of them.

    Args:
      problem: in-context linear regression.
      trace: the law's factor 1 of tr Λ within the brackets.

    Returns:
      `tr Λ − Σ_{i≤m} λ_i [1 + (1 + tr Λ/λ_i)/N]^{−1}` for m = 0 … d, shape (d + 1,): one principal
      component of the inputs is learned between one plateau and the next.

    Source: theory section 7; Zhang et al. 2025 (arXiv:2501.16265), recalled.
    """
    values = problem.eigenvalues
    total = jnp.sum(values)
    gains = values / (1 + (1 + trace * total / values) / problem.context)
    return total - jnp.concatenate([jnp.zeros((1,), values.dtype), jnp.cumsum(gains)])


@judged
def relu_overlap_rate(
    overlap: Float[Array, " m"],
    weights: Float[Array, "k d"],
    outputs: Float[Array, " k"],
    directions: Float[Array, " k"],
) -> Float[Array, " m"]:
    """`h(m)` of the overlap equation `ṁ = h(m)(1 − m²)` for a two-layer ReLU network.

    The network is `f(x) = Σ_i a_i relu(⟨w_i + c_i û, x⟩)`, the teacher the same with u in place of
    û; inputs are standard Gaussian, and û moves on the unit sphere across the span of W.

    Args:
      overlap: m = ⟨u, û⟩, in [−1, 1].
      weights: W, the frozen first layer, rows w_i.
      outputs: a, the frozen second layer.
      directions: c, the known factor of the rank-one update c ûᵀ.

    Returns:
      `h(m) = Σ_ij a_i a_j c_i c_j (π − arccos ρ_ij)/(2π)` with ρ_ij the correlation of
      ⟨w_i + c_i û, x⟩ and ⟨w_j + c_j u, x⟩.

    Source: Dayi, Chen 2025 (arXiv:2411.15385) for the form, recalled (theory section 7); h for the
    ReLU is derived here: Price's theorem, and P(g > 0, g' > 0) of two Gaussians.
    """
    gram = weights @ weights.T
    scale = jnp.sqrt(jnp.diagonal(gram) + directions**2)
    moved = jnp.multiply.outer(overlap, jnp.multiply.outer(directions, directions))
    correlation = (gram[None] + moved) / jnp.multiply.outer(scale, scale)[None]
    share = (jnp.pi - jnp.arccos(jnp.clip(correlation, -1, 1))) / (2 * jnp.pi)
    both = outputs * directions
    return jnp.sum(jnp.multiply.outer(both, both)[None] * share, axis=(1, 2))


@judged
def relu_overlap_velocity(
    overlap: Float[Array, " m"],
    weights: Float[Array, "k d"],
    outputs: Float[Array, " k"],
    directions: Float[Array, " k"],
    *,
    constant: float = 1.0,
) -> Float[Array, " m"]:
    """The overlap equation's right-hand side, `ṁ = h(m)(1 − m²)`, with `relu_overlap_rate` as h.

    Args:
      overlap: m, in [−1, 1].
      weights: as in `relu_overlap_rate`.
      outputs: likewise.
      directions: likewise.
      constant: the law's factor 1 of h.

    Returns:
      ṁ on the population loss, one for each overlap.

    Source: as of `relu_overlap_rate`.
    """
    rate = relu_overlap_rate(overlap, weights, outputs, directions)
    return constant * rate * (1 - overlap**2)


@judged(eta=POSITIVE)
def allora_time(
    value: Real, s: Real, a: Real, eta: Real, *, square: Real = 1.0
) -> Float[Array, "..."]:
    """Time at which a column of the update reaches a size under ALLoRA with A frozen.

    Args:
      value: ω = ‖(A B)_j‖ in [0, s).
      s: size of the oracle update's column within A's span.
      a: scale of A, whose columns are orthonormal times a.
      eta: η.
      square: the law's factor 1 under the root, `√(square (ω + 1/η²))`.

    Returns:
      t of the flow `ω̇ = a² (s − ω)/√(ω + 1/η²)` from 0. Plain descent of B would take
      `−ln(1 − ω/s)/a²`.

    Source: derived here from the rule of Huang, Balestriero 2024 (arXiv:2410.09692): with
    y = √(ω + 1/η²) and c = √(s + 1/η²), `a² t = [c ln((c + y)/(c − y)) − 2y]` between its ends.
    """
    value, s, a, eta = broadcast(value, s, a, eta)
    top = jnp.sqrt(s + eta**-2)
    y, first = jnp.sqrt(value + eta**-2), 1 / eta

    def primitive(x: Array) -> Array:
        return 2 * top * jnp.arctanh(x / top) - 2 * x

    return jnp.sqrt(square) * (primitive(y) - primitive(first)) / a**2
