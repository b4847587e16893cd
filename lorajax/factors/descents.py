"""The directions of LoRA's own descents, on one pair of factors.

Each takes the gradient of a pair, `∂A = G Bᵀ` and `∂B = Aᵀ G` with G that of the update A B, and
says along what the pair descends instead. Problems (`flows`) and models (`adapters`) descend by the
same functions. Leading axes are lanes.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lorajax.factors import Factors
from lorajax.factors.derivatives import (
    balanced_pair,
    balancing,
    decomposed,
    inverse_power,
    inverse_root,
    polar_factor,
)


def widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """An array in at least float32, the least in which decompositions exist."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def riemannian(
    gradient: Factors,
    factors: Factors,
    *,
    damping: float | int | Array = 0.0,
    exponent: float | int = 1.0,
) -> Factors:
    """Scaled gradients: `∂A (BBᵀ + εI)⁻¹` and `(AᵀA + εI)⁻¹ ∂B`.

    Args:
      gradient: ∂A and ∂B, shapes (..., m, r) and (..., r, n).
      factors: A and B.
      damping: ε ≥ 0, in the square of the factors' unit. At 0 the inverse is a pseudo-inverse, so
        that a factor that is 0 or rank-deficient does no harm.
      exponent: the rule's constant 1, of the inverse Gram matrices.

    Returns:
      The pair to descend along. At ε = 0 the flow of A B does not depend on how A B is factored,
      and aligned modes follow `laws.riemannian_mode`.

    Source: Zhang, Pilanci 2024 (arXiv:2402.02347), recalled; Tong, Ma, Chi 2021
    (arXiv:2005.08898); theory section 9 (derived).
    """
    a, b = factors
    numbers = jnp.asarray(damping, a.dtype), jnp.asarray(exponent, a.dtype)
    return Factors(
        gradient.a @ inverse_power(b @ b.mT, *numbers),
        inverse_power(a.mT @ a, *numbers) @ gradient.b,
    )


def rebalanced(factors: Factors) -> Factors:
    """Balanced factors of the same product: `AᵀA = BBᵀ`, the singular values of A B.

    Args:
      factors: shapes (..., m, r) and (..., r, n).

    Returns:
      Factors of the same shapes and dtype. Where A B has a rank below r, columns of 0.

    Source: theory section 9; Zhang et al. 2025 (arXiv:2505.18877).
    """
    return balanced_pair(factors)


def reflora(gradient: Factors, factors: Factors, *, exponent: float | int = 1.0) -> Factors:
    """RefLoRA's directions: `∂A S` and `S⁻¹ ∂B`, with S the matrix for which `S BBᵀ S = AᵀA`.

    With `A = Qa Ra`, `Bᵀ = Qb Rb` and `Ra Rbᵀ = U Σ Vᵀ` it is `S = Raᵀ U Σ⁻¹ Uᵀ Ra`, and its
    inverse `Rbᵀ V Σ⁻¹ Vᵀ Rb` (derived here): no square root of a Gram matrix, which would square
    what the factors lose to rounding. Where A B has a rank below r, Σ⁻¹ is a pseudo-inverse.

    Args:
      gradient: ∂A and ∂B, shapes (..., m, r) and (..., r, n).
      factors: A and B.
      exponent: the rule's constant 1, of Σ⁻¹.

    Returns:
      The pair to descend along. Its flow of A B is that of plain descent from `rebalanced(factors)`
      and depends on the product alone: `Ṁ = −(MMᵀ)^½ G − G (MᵀM)^½`. At A B = 0 the directions are
      0 and nothing moves, hence RefLoRA's warm-up by plain descent.

    Source: RefLoRA: Zhang et al. 2025 (arXiv:2505.18877), its published code; theory section 9
    (derived).
    """
    if isinstance(exponent, float | int) and exponent == 1:
        s, s_inverse = balancing(factors)
    else:  # The rule altered, which has no derivative of its own.
        found = decomposed(factors)
        inverse = found.values[..., None, :] ** -exponent
        s, s_inverse = ((x * inverse) @ x.mT for x in (found.left, found.right))
    return Factors(gradient.a @ s, s_inverse @ gradient.b)


def vanishes(factors: Factors) -> Bool[Array, "*lanes"]:
    """Whether A B is 0 to the rounding of its factors.

    Args:
      factors: shapes (..., m, r) and (..., r, n).

    Returns:
      One boolean a lane.
    """
    norm_a, norm_b = (jnp.linalg.norm(x, axis=(-2, -1)) for x in factors)
    size = jnp.linalg.norm(factors.product, axis=(-2, -1))
    return size <= float(jnp.finfo(factors.a.dtype).eps) * norm_a * norm_b


def polar(matrix: Float[Array, "... m n"]) -> Float[Array, "... m n"]:
    """`U Vᵀ` of a matrix `U Σ Vᵀ`, the direction of spectral descent.

    Args:
      matrix: shape (..., m, n).

    Returns:
      Same shape and dtype. Singular values below the rounding of the largest one are left out:
      their directions are noise.

    Source: Jordan et al. 2024 (Muon), recalled.
    """
    return polar_factor(matrix)


class RiteState(NamedTuple):
    """What LoRA-RITE keeps of one pair.

    Attributes:
      count: steps taken, int32.
      first: first moments of A's and Bᵀ's directions, shapes (..., m, r) and (..., n, r), in the
        bases of the other factor.
      second: second moments, shape (..., r, r) each, in the same bases.
      escaped: what the second moments lost by turning, shape (...,) each; 0 unless asked for.
      bases: Q of `A = Q R` and of `Bᵀ = Q R` at the last step, shapes as `first`.
    """

    count: Int[Array, ""]
    first: tuple[Array, Array]
    second: tuple[Array, Array]
    escaped: tuple[Array, Array]
    bases: tuple[Array, Array]


def rite_state(factors: Factors) -> RiteState:
    """LoRA-RITE's state before the first step."""
    a, b = (jnp.zeros_like(x) for x in (factors.a, factors.b.mT))
    none = jnp.zeros(a.shape[:-2], a.dtype)
    square = jnp.zeros((*none.shape, factors.rank, factors.rank), a.dtype)
    count = jnp.zeros((), jnp.int32)
    return RiteState(count, (a, b), (square, square), (none, none), (a, b))


class Unmagnified(NamedTuple):
    """Gradients that do not depend on how the product is factored.

    Attributes:
      gradients: `G Q` of Bᵀ's basis and `Gᵀ Q` of A's, shapes (..., m, r) and (..., n, r).
      inverses: `R⁺` of Bᵀ and of A, which lead back.
      bases: Q of A and of Bᵀ.
    """

    gradients: tuple[Array, Array]
    inverses: tuple[Array, Array]
    bases: tuple[Array, Array]


def unmagnified(gradient: Factors, factors: Factors) -> Unmagnified:
    """Takes the other factor's size out of each gradient: `∂A R_B⁻¹` and `∂Bᵀ R_A⁻¹`."""
    (qa, inverse_a), (qb, inverse_b) = _based(factors.a), _based(factors.b.mT)
    gradients = (gradient.a @ inverse_b, gradient.b.mT @ inverse_a)
    return Unmagnified(gradients, (inverse_b, inverse_a), (qa, qb))


def _based(x: Array) -> tuple[Array, Array]:
    """Q and R⁺ of `x = Q R`; of 0, whose Q has no derivative, the first unit vectors and 0."""
    nothing = jnp.all(x == 0, axis=(-2, -1), keepdims=True)
    q, r = jnp.linalg.qr(jnp.where(nothing, jnp.eye(*x.shape[-2:], dtype=x.dtype), x))
    return q, jnp.where(nothing, 0, jnp.linalg.pinv(r))


def _corrected(count: Array, decay: float | int, dtype: Any) -> Array:
    """A decay with Adam's correction of the bias inside: 0 at the first step."""
    decay_to = jnp.asarray(decay, dtype) ** count.astype(dtype)
    return decay * (1 - decay_to) / (1 - decay * decay_to)


def _half_rite(
    gradient: Array,
    turn: Array,
    state: tuple[Array, Array, Array],
    decays: tuple[Array, Array],
    eps: float | int,
    escape: bool,
) -> tuple[Array, Array, Array]:
    first, second, escaped = state
    turned = turn @ second @ turn.mT
    turned = (turned + turned.mT) / 2
    if escape:
        lost = jnp.linalg.eigvalsh(second) - jnp.linalg.eigvalsh(turned)
        trace = jnp.trace(second - turned, axis1=-2, axis2=-1)
        lost = jnp.minimum(jnp.max(lost, axis=-1), trace)
        escaped = decays[1] * (escaped + jnp.maximum(lost, 0))
    now = gradient.mT @ gradient / gradient.shape[-2]
    second = decays[1] * turned + (1 - decays[1]) * (now + now.mT) / 2
    direction = gradient @ inverse_root(second, escaped, jnp.asarray(eps, second.dtype))
    first = decays[0] * (first @ turn.mT) + (1 - decays[0]) * direction
    return first, second, escaped


def rite(
    found: Unmagnified,
    state: RiteState,
    *,
    decays: tuple[float, float] = (0.9, 0.999),
    eps: float | int = 1e-6,
    escape: bool = False,
) -> tuple[Factors, RiteState]:
    """One step of LoRA-RITE on one pair: Adam in the bases of the other factor.

    Args:
      found: `unmagnified` gradients, clipped or not.
      state: what was kept.
      decays: of first and second moments.
      eps: added to the root of the second moments, in the gradient's unit.
      escape: whether what second moments lose by turning is added to them, as in the paper; the
        published code leaves it out unless asked.

    Returns:
      The pair to descend along, and the state after it. The path of A B does not depend on how A B
      is factored.

    Source: Yen et al. 2024 (arXiv:2410.20625), by its published code; theory section 9. Eigenvalues
    of the second moments below 0, which are rounding, count as 0 here.
    """
    dtype = found.gradients[0].dtype
    both = (
        _corrected(state.count, decays[0], dtype),
        _corrected(state.count, decays[1], dtype),
    )
    # The gradient of A lives in the basis of Bᵀ, and that of B in A's.
    now, last = found.bases[::-1], state.bases[::-1]
    halves = [
        _half_rite(
            gradient,
            basis.mT @ before,
            (first, second, escaped),
            both,
            eps,
            escape,
        )
        for gradient, basis, before, first, second, escaped in zip(
            found.gradients, now, last, state.first, state.second, state.escaped, strict=True
        )
    ]
    first, second, escaped = zip(*halves, strict=True)
    a, b = (m @ back.mT for m, back in zip(first, found.inverses, strict=True))
    return Factors(a, b.mT), RiteState(state.count + 1, first, second, escaped, found.bases)
