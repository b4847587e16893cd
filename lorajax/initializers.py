"""Where a flow starts: one function for each published start of LoRA.

**One unit of scale.** `scale` is the root-mean-square norm of a column of A (and, for starts that
fill both factors, of a row of B). It is the unit in which the theory speaks: `AᵀA ≈ scale² I`, so a
start is lazy when `scale²` is far above the target's singular values and rich when it is far below,
whatever the dimensions. Per-entry standard deviation is `scale / √m`. In this unit the defaults of
the libraries are plain numbers, which `SCALES` lists, so any `scale` may also be given by name.

Starts that are made of a pretrained weight (`pissa`, `milora`, `olora`) return a `Start`, whose
`offset` has to be subtracted from that weight; the weight itself is never touched.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from lorajax.factors import Factors, check_finite, check_positive, check_rank

PRNGKey = Key[Array, ""] | UInt32[Array, "2"]
Distribution = Literal["normal", "uniform"]

SCALES: dict[str, float] = {
    # PEFT: kaiming_uniform(a=√5), U(±1/√in), so a column's mean square norm is in · 1/(3 in).
    "peft": 3**-0.5,
    # Flax NNX, Qwix, Keras: he_uniform, U(±√(6/in)), so it is in · 2/in; √6 times PEFT's.
    "flax": 2**0.5,
    # Gaussian with variance 1/in, the start of the LoRA paper's theory.
    "lecun": 1.0,
}
"""Default scales of the libraries in this module's unit (recalled; checked in the tests)."""


class Start(NamedTuple):
    """A start that is made of a weight, with what has to be taken off that weight.

    With W the pretrained weight and s the adapter's scaling, the adapted weight is
    `W - s · offset.product + s · factors.product`, which is W itself at the start. For the problem
    of a flow: `problem.recentered(start.offset)`.

    Attributes:
      factors: the trainable factors.
      offset: the frozen factors that keep the adapted weight at W when the flow begins.
    """

    factors: Factors
    offset: Factors


def resolve_scale(scale: float | str | Float[Array, ""]) -> float | Float[Array, ""]:
    """Returns `scale` as a number, looking names up in `SCALES`.

    Args:
      scale: a positive number (it may be traced) or the name of a library.

    Returns:
      The root-mean-square norm of a column of A.

    Raises:
      ValueError: for an unknown name, or a number that is not positive and finite.

    Example:
      >>> from lorajax import initializers
      >>> round(initializers.resolve_scale("flax") / initializers.resolve_scale("peft"), 4)
      2.4495
    """
    if isinstance(scale, str):
        if scale not in SCALES:
            raise ValueError(
                f"scale is {scale!r}; a named scale must be one of {', '.join(sorted(SCALES))}."
            )
        return SCALES[scale]
    check_positive(scale=scale)
    return scale


def _random(
    key: PRNGKey, shape: tuple[int, int], norm: float | Array, distribution: str, dtype, axis: int
) -> Array:
    """Independent entries; vectors along `axis` have root-mean-square norm `norm`."""
    std = jnp.asarray(norm, dtype) / jnp.sqrt(jnp.asarray(shape[axis], dtype))
    if distribution == "normal":
        return std * jax.random.normal(key, shape, dtype)
    if distribution == "uniform":
        bound = jnp.sqrt(jnp.asarray(3.0, dtype))
        return std * jax.random.uniform(key, shape, dtype, -bound, bound)
    raise ValueError(f"distribution is {distribution!r}; it must be 'normal' or 'uniform'.")


def _orthonormal(key: PRNGKey, shape: tuple[int, int], dtype) -> Array:
    """A Haar-distributed frame: orthonormal columns, shape (m, r) with m ≥ r."""
    q, upper = jnp.linalg.qr(jax.random.normal(key, shape, dtype))
    # Without the signs of R's diagonal the frame depends on the QR's sign convention.
    return q * jnp.where(jnp.diagonal(upper) < 0, -1, 1).astype(dtype)[None, :]


def lora(
    key: PRNGKey,
    shape: tuple[int, int],
    rank: int,
    scale: float | str | Float[Array, ""] = "peft",
    *,
    distribution: Distribution = "normal",
    dtype=None,
) -> Factors:
    """LoRA's default start: A random, B = 0.

    Args:
      key: a PRNG key.
      shape: (m, n) of the update; in Flax's layout (in, out).
      rank: r, at least 1 and at most min(m, n).
      scale: root-mean-square norm of a column of A, or a name in `SCALES`. May be traced.
      distribution: "normal", or "uniform" as PEFT and Flax draw it; the unit is the same.
      dtype: floating dtype of both factors; JAX's default float if None.

    Returns:
      Factors with A of shape (m, r), entries of standard deviation `scale/√m`, and B = 0.

    Raises:
      ValueError: for a bad rank, scale or distribution.

    Example:
      >>> import jax
      >>> from lorajax import initializers
      >>> a, b = initializers.lora(jax.random.key(0), (512, 256), rank=8, scale=1e-3)
      >>> a.shape, b.shape
      ((512, 8), (8, 256))

    Source: Hu et al. 2021 (arXiv:2106.09685), recalled. `AᵀA = scale² I` holds up to a relative
    fluctuation of √(r/m); use `orthogonal` where it has to be exact.
    """
    check_rank(rank, shape)
    norm = resolve_scale(scale)
    dtype = jnp.result_type(float if dtype is None else dtype)
    a = _random(key, (shape[0], rank), norm, distribution, dtype, axis=0)
    return Factors(a, jnp.zeros((rank, shape[1]), dtype))


def orthogonal(
    key: PRNGKey,
    shape: tuple[int, int],
    rank: int,
    scale: float | str | Float[Array, ""] = "peft",
    *,
    dtype=None,
) -> Factors:
    """A with orthonormal columns times `scale`, B = 0: the λ-balanced form of LoRA's default.

    Args:
      key: a PRNG key.
      shape: (m, n) of the update.
      rank: r, at least 1 and at most min(m, n).
      scale: norm of each column of A, or a name in `SCALES`. May be traced.
      dtype: floating dtype of both factors; JAX's default float if None.

    Returns:
      Factors with `AᵀA = scale² I` to rounding and B = 0, so that `AᵀA - BBᵀ = λ I` with λ =
      scale², the case that `exact.balanced_flow` solves in closed form.

    Raises:
      ValueError: for a bad rank or scale.

    Source: theory section 2.1 (derived).
    """
    check_rank(rank, shape)
    dtype = jnp.result_type(float if dtype is None else dtype)
    norm = jnp.asarray(resolve_scale(scale), dtype)
    frame = _orthonormal(key, (shape[0], rank), dtype)
    return Factors(norm * frame, jnp.zeros((rank, shape[1]), dtype))


def small(
    key: PRNGKey,
    shape: tuple[int, int],
    rank: int,
    scale: float | str | Float[Array, ""] = 1e-3,
    *,
    distribution: Distribution = "normal",
    dtype=None,
) -> Factors:
    """Both factors random and small, the start of the theory of small initialization.

    Args:
      key: a PRNG key.
      shape: (m, n) of the update.
      rank: r, at least 1 and at most min(m, n).
      scale: root-mean-square norm of A's columns and of B's rows. May be traced.
      distribution: "normal" or "uniform".
      dtype: floating dtype of both factors; JAX's default float if None.

    Returns:
      Factors of shapes (m, r) and (r, n); `A B` has entries of order `scale²`.

    Raises:
      ValueError: for a bad rank, scale or distribution.

    Source: Xu et al. 2025 (arXiv:2503.06982); which of the factors are filled is reconstructed.
    """
    check_rank(rank, shape)
    norm = resolve_scale(scale)
    dtype = jnp.result_type(float if dtype is None else dtype)
    key_a, key_b = jax.random.split(key)
    return Factors(
        _random(key_a, (shape[0], rank), norm, distribution, dtype, axis=0),
        _random(key_b, (rank, shape[1]), norm, distribution, dtype, axis=1),
    )


def balanced(
    key: PRNGKey,
    shape: tuple[int, int],
    rank: int,
    scale: float | str | Float[Array, ""] = 1e-3,
    *,
    dtype=None,
) -> Factors:
    """Both factors random with `AᵀA = BBᵀ` exactly: random singular directions, equal weights.

    Args:
      key: a PRNG key.
      shape: (m, n) of the update.
      rank: r, at least 1 and at most min(m, n).
      scale: norm of A's columns and of B's rows. May be traced.
      dtype: floating dtype of both factors; JAX's default float if None.

    Returns:
      `A = scale · P`, `B = scale · Qᵀ` with Haar-distributed frames P and Q, so that λ = 0.

    Raises:
      ValueError: for a bad rank or scale.

    Source: theory section 2.1 (derived).
    """
    check_rank(rank, shape)
    dtype = jnp.result_type(float if dtype is None else dtype)
    norm = jnp.asarray(resolve_scale(scale), dtype)
    key_a, key_b = jax.random.split(key)
    return Factors(
        norm * _orthonormal(key_a, (shape[0], rank), dtype),
        norm * _orthonormal(key_b, (shape[1], rank), dtype).T,
    )


def spectral(
    matrix: Float[Array, "m n"],
    rank: int,
    scale: float | str | Float[Array, ""] = 1e-3,
    *,
    directions: int | None = None,
) -> Factors:
    """Factors along the top singular vectors of a matrix, all with the same small weight.

    Args:
      matrix: whose singular vectors to start along, shape (m, n): the negative gradient at the
        start, or in matrix factorization the oracle update itself.
      rank: r, at least 1 and at most min(m, n).
      scale: norm of each column of A that is filled, and of each row of B. May be traced.
      directions: how many columns are filled, the others staying 0; `rank` if None.

    Returns:
      `A = scale · [u_1 … u_d 0 …]`, `B = scale · [v_1 … v_d 0 …]ᵀ`: balanced, λ = 0.

    Raises:
      ValueError: for a bad rank, scale or number of directions, or a matrix that is not finite.

    Source: Xu et al. 2025 (arXiv:2503.06982), stated; the exact form is reconstructed.
    """
    check_finite(matrix=matrix)
    check_rank(rank, matrix.shape)
    directions = rank if directions is None else directions
    if not 1 <= directions <= rank:
        raise ValueError(f"directions is {directions}; it must lie in 1 … rank = {rank}.")
    norm = jnp.asarray(resolve_scale(scale), matrix.dtype)
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    mask = (jnp.arange(rank) < directions).astype(matrix.dtype)
    return Factors(norm * u[:, :rank] * mask[None, :], norm * vt[:rank] * mask[:, None])


def nystrom(
    key: PRNGKey,
    target: Float[Array, "m n"],
    rank: int,
    scale: float | str | Float[Array, ""] = 1.0,
) -> Factors:
    """Nyström start: A is a random sketch of the target's columns, B = 0.

    Args:
      key: a PRNG key.
      target: the matrix to be approximated, shape (m, n).
      rank: r, at least 1 and at most min(m, n).
      scale: A is `scale · target Ω / √n` with Ω standard Gaussian, so that a column of A has mean
        square norm `scale² ‖target‖_F² / n`. May be traced.

    Returns:
      Factors whose A lies in the target's column space and whose B is 0.

    Raises:
      ValueError: for a bad rank or scale, or a target that is not finite.

    Source: theory section 2.5 (derived): with ScaledGD of step 1 one step is exact if r ≥ rank of
    the target.
    """
    check_finite(target=target)
    check_rank(rank, target.shape)
    m, n = target.shape
    norm = jnp.asarray(resolve_scale(scale), target.dtype)
    sketch = jax.random.normal(key, (n, rank), target.dtype) / jnp.sqrt(
        jnp.asarray(n, target.dtype)
    )
    return Factors(norm * (target @ sketch), jnp.zeros((rank, n), target.dtype))


def _from_singular(u: Array, s: Array, vt: Array, scaling: float | Array) -> Start:
    root = jnp.sqrt(s / jnp.asarray(scaling, s.dtype))
    factors = Factors(u * root[None, :], root[:, None] * vt)
    return Start(factors, factors)


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
            f"weight has rank {int(jnp.sum(s > 0))}, so its bottom {rank} singular values are 0 and "
            "both factors would be zero; use another start or a larger rank."
        )
    return _from_singular(u[:, k - rank :], s[k - rank :], vt[k - rank :], scaling)


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


Initializer = Callable[..., Factors | Start]
