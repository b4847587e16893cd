"""Starts that are made of the pretrained weight itself."""

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import POSITIVE, at_least, judged
from lorajax.factors import (
    Factors,
    any_nonzero,
    check_finite,
    check_positive,
    check_rank,
    is_traced,
)
from lorajax.initializers.units import PRNGKey, Start, resolve_scale


def _from_singular(u: Array, s: Array, vt: Array, scaling: float | Array) -> Start:
    root = jnp.sqrt(s / jnp.asarray(scaling, s.dtype))
    factors = Factors(u * root[None, :], root[:, None] * vt)
    return Start(factors, factors)


@judged(rank=at_least(1), scaling=POSITIVE)
def pissa(
    weight: Float[Array, "m n"], rank: int, *, scaling: float | Float[Array, ""] = 1.0
) -> Start:
    """PiSSA: the factors are the top singular parts of the weight, which is left with the rest.

    Args:
      weight: the pretrained weight W, shape (m, n) = (in, out).
      rank: r, at least 1 and at most min(m, n).
      scaling: the adapter's factor s (alpha/r, or alpha/√r for rsLoRA).

    Returns:
      A Start with `s · A B` the best rank-r approximation of W, A and B balanced.

    Raises:
      ValueError: for a bad rank or scaling, or a weight that is not finite.

    Source: Meng et al. 2024 (arXiv:2404.02948), recalled.
    """
    check_finite(weight=weight)
    check_rank(rank, weight.shape)
    check_positive(scaling=scaling)
    u, s, vt = jnp.linalg.svd(weight, full_matrices=False)
    return _from_singular(u[:, :rank], s[:rank], vt[:rank], scaling)


@judged(rank=at_least(1), scaling=POSITIVE)
def milora(
    weight: Float[Array, "m n"], rank: int, *, scaling: float | Float[Array, ""] = 1.0
) -> Start:
    """MiLoRA: as `pissa`, with the bottom singular parts of the weight.

    Args:
      weight: the pretrained weight W, shape (m, n) = (in, out).
      rank: r, at least 1 and at most min(m, n).
      scaling: the adapter's factor s (alpha/r, or alpha/√r for rsLoRA).

    Returns:
      A Start with `s · A B` the bottom r singular parts of W, A and B balanced.

    Raises:
      ValueError: for a bad rank or scaling, a weight that is not finite, or one whose bottom r
        singular values are all 0, since both factors would be zero and never move.

    Source: Wang et al. 2024 (arXiv:2406.09044), recalled.
    """
    check_finite(weight=weight)
    check_rank(rank, weight.shape)
    check_positive(scaling=scaling)
    u, s, vt = jnp.linalg.svd(weight, full_matrices=False)
    k = s.shape[0]
    if not isinstance(s, jax.core.Tracer) and not bool(jnp.any(s[k - rank :] > 0)):
        raise ValueError(
            f"weight has rank {int(jnp.sum(s > 0))}, so its bottom {rank} singular values are 0 "
            "and both factors would be zero; use another start or a larger rank."
        )
    return _from_singular(u[:, k - rank :], s[k - rank :], vt[k - rank :], scaling)


@judged(rank=at_least(1), scaling=POSITIVE)
def olora(
    weight: Float[Array, "m n"], rank: int, *, scaling: float | Float[Array, ""] = 1.0
) -> Start:
    """OLoRA: the factors are the leading part of the weight's QR decomposition.

    Args:
      weight: the pretrained weight W, shape (m, n) = (in, out).
      rank: r, at least 1 and at most min(m, n).
      scaling: the adapter's factor s; the factors do not depend on it, as in PEFT.

    Returns:
      A Start with A the first r columns of Q (orthonormal) and B the first r rows of R.

    Raises:
      ValueError: for a bad rank or scaling, or a weight that is not finite.

    Source: Büyükakyüz 2024 (arXiv:2406.01775), recalled. In the (in, out) layout the QR is that of
    W; PEFT's is that of its transpose, so that there B has the orthonormal rows.
    """
    check_finite(weight=weight)
    check_rank(rank, weight.shape)
    check_positive(scaling=scaling)
    q, upper = jnp.linalg.qr(weight)
    factors = Factors(q[:, :rank], upper[:rank])
    return Start(factors, factors)


@judged(rank=at_least(1))
def nora(
    key: PRNGKey,
    weight: Float[Array, "m n"],
    rank: int,
    scale: float | str | Float[Array, ""] = 1.0,
) -> Factors:
    """NoRA: A is a random sketch of the weight's columns, B = 0.

    Args:
      key: a PRNG key.
      weight: the pretrained weight W, shape (m, n) = (in, out).
      rank: r, at least 1 and at most min(m, n).
      scale: A is `scale · W Ω / √n` with Ω standard Gaussian, so that a column of A has mean square
        norm `scale² ‖W‖_F² / n`. May be traced.

    Returns:
      Factors whose A lies in the weight's column space and whose B is 0.

    Raises:
      ValueError: for a bad rank or scale, or a weight that is zero or not finite.

    Source: theory section 7 (`A0 = W0 Ω`, recalled); the normalization is this toolkit's.
    """
    check_finite(weight=weight)
    check_rank(rank, weight.shape)
    norm = jnp.asarray(resolve_scale(scale), weight.dtype)
    if not is_traced(weight) and not any_nonzero(weight):
        raise ValueError("weight is zero everywhere, so its sketch is zero and would never move.")
    n = weight.shape[1]
    sketch = jax.random.normal(key, (n, rank), weight.dtype) / jnp.sqrt(
        jnp.asarray(n, weight.dtype)
    )
    return Factors(norm * (weight @ sketch), jnp.zeros((rank, n), weight.dtype))
