"""Counts and bounds of LoRA's landscape: where its minima are global, and how far others lie."""

import numpy as np
from jaxtyping import Float

from lorajax.environment.judging import NOT_NEGATIVE, POSITIVE, at_least, judged

Numbers = float | Float[np.ndarray, "..."]


@judged(rank=at_least(1))
def rank_count(rank: Numbers, *, constant: float = 0.5) -> Numbers:
    """`r(r + 1)/2`, which a global minimizer of some rank keeps at or below KN.

    Args:
      rank: r.
      constant: the law's factor ½.

    Returns:
      The count.

    Source: Jang, Lee, Ryu 2024 (arXiv:2402.11867), stated; theory section 5.
    """
    return constant * rank * (rank + 1)


@judged(decay=NOT_NEGATIVE)
def outer_bound(decay: Numbers, beta: Numbers, last: Numbers, *, constant: float = 1.0) -> Numbers:
    """Bound of the gradient across X's singular spaces at a point of second order, `w + β σ_r`.

    Args:
      decay: w.
      beta: β, the restricted smoothness.
      last: σ_r(X).
      constant: the law's factor 1 of β.

    Returns:
      The largest ‖T‖₂ of `∇f(X) = −w L Rᵀ + T`.

    Source: Kim, Kim, Ryu 2025 (arXiv:2502.09376), stated; theory section 5.
    """
    return decay + constant * beta * last


@judged(alpha=POSITIVE)
def spurious_share(alpha: Numbers, beta: Numbers, *, constant: float = 2.0) -> Numbers:
    """Least `σ_r(X)/σ_{r*}(X)` of a point of second order that is not global, `2α/β`.

    Args:
      alpha: α, the restricted strong convexity.
      beta: β, the restricted smoothness; more than 2α.
      constant: the law's factor 2.

    Returns:
      The share. Both singular values are the spurious point's own, so that it is empty for r = r*.

    Source: Kim, Kim, Ryu 2025 (arXiv:2502.09376), Theorem 1, stated; theory section 5.
    """
    return constant * alpha / beta


@judged(alpha=POSITIVE, best_rank=at_least(1))
def spurious_away(
    alpha: Numbers,
    beta: Numbers,
    values: Float[np.ndarray, "*lanes r"],
    best_rank: int,
    *,
    constant: float = 2.0,
) -> Float[np.ndarray, "*lanes"]:
    """Least ‖X − X*‖_F² of a point of second order that is not global.

    `‖X − Π_{r*}(X)‖_F² / (1 − 2ασ_{r*}(X)/(βσ_r(X)))`.

    Args:
      alpha: α, the restricted strong convexity.
      beta: β, the restricted smoothness; more than 2α.
      values: singular values of X, of its rank r, in decreasing order.
      best_rank: r*, the rank of the global minimizer; less than r.
      constant: the law's factor 2.

    Returns:
      The least squared distance; infinite where σ_r is at `spurious_share` or below, where there is
      no such point.

    Raises:
      ValueError: if r* is not from 1 to r − 1, where the statement is empty.

    Source: Kim, Kim, Ryu 2025 (arXiv:2502.09376), Theorem 1, stated; theory section 5.
    """
    if not 1 <= best_rank < values.shape[-1]:
        raise ValueError(
            f"best_rank is {best_rank}; it must be from 1 to {values.shape[-1] - 1}, below r."
        )
    tail = np.sum(values[..., best_rank:] ** 2, axis=-1)
    least = spurious_share(alpha, beta, constant=constant) * values[..., best_rank - 1]
    left = 1 - least / values[..., -1]
    return np.where(left > 0, tail / np.where(left > 0, left, 1), np.inf)


@judged(alpha=POSITIVE)
def spurious_distance(
    alpha: Numbers, beta: Numbers, last: Numbers, nuclear: Numbers, *, constant: float = 1.0
) -> Numbers:
    """Bound of ‖X − X*‖_F² at a point of second order, `(β/α) σ_r(X) ‖X*‖_*`.

    Args:
      alpha: α, the strong convexity between X and X*.
      beta: β.
      last: σ_r(X).
      nuclear: ‖X*‖_*.
      constant: the law's factor 1 of β.

    Returns:
      The bound: σ_r cannot be small where X is far from X*.

    Source: derived here from theory section 5: strong convexity between X and X*, ‖∇f(X*)‖₂ ≤ w
    and ‖∇f(X)‖₂ ≤ w + β σ_r.
    """
    return constant * beta * last * nuclear / alpha
