"""Starts that look at nothing but a key: LoRA's default and the ones theory is written for."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import at_least, judged
from lorajax.factors import Factors, check_rank, orthonormal_frame
from lorajax.initializers.units import (
    Distribution,
    PRNGKey,
    random_matrix,
    resolve_scale,
)


@judged(rank=at_least(1))
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
    a = random_matrix(key, (shape[0], rank), norm, distribution, dtype, axis=0)
    return Factors(a, jnp.zeros((rank, shape[1]), dtype))


@judged(rank=at_least(1))
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
    frame = orthonormal_frame(key, (shape[0], rank), dtype)
    return Factors(norm * frame, jnp.zeros((rank, shape[1]), dtype))


@judged(rank=at_least(1))
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
        random_matrix(key_a, (shape[0], rank), norm, distribution, dtype, axis=0),
        random_matrix(key_b, (rank, shape[1]), norm, distribution, dtype, axis=1),
    )


@judged(rank=at_least(1))
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
        norm * orthonormal_frame(key_a, (shape[0], rank), dtype),
        norm * orthonormal_frame(key_b, (shape[1], rank), dtype).T,
    )
