"""Starts of a Tucker update `core ×₁ U₁ ×₂ U₂ …` of a tensor of any order."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax.environment.judging import at_least, judged
from lorajax.factors import (
    TuckerFactors,
    any_nonzero,
    check_finite,
    is_traced,
    orthonormal_frame,
    unfold,
)
from lorajax.initializers.units import PRNGKey, resolve_scale


def check_ranks(ranks: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `ranks` are multilinear ranks that a tensor of `shape` can have."""
    if len(ranks) != len(shape):
        raise ValueError(
            f"ranks are {tuple(ranks)}; a tensor of shape {tuple(shape)} has {len(shape)} modes."
        )
    for mode, (rank, size) in enumerate(zip(ranks, shape, strict=True)):
        if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
            raise ValueError(f"ranks[{mode}] is {rank!r}; it must be an integer.")
        if not 1 <= rank <= size:
            raise ValueError(
                f"ranks[{mode}] is {rank}; for a mode of size {size} it must lie in 1 … {size}."
            )
        if rank * rank > math.prod(ranks):
            others = math.prod(ranks) // rank
            raise ValueError(
                f"ranks[{mode}] is {rank}; it must be at most {others}, the product of the others, "
                "since no tensor has a larger one."
            )


@judged
def tucker(
    key: PRNGKey,
    shape: tuple[int, ...],
    ranks: tuple[int, ...],
    scale: float | str | Float[Array, ""] = 1.0,
    *,
    dtype=None,
) -> TuckerFactors:
    """Orthonormal factors times `scale`, core 0: LoRA's default start for tensors.

    Args:
      key: a PRNG key.
      shape: (n_1, …, n_p) of the update.
      ranks: (r_1, …, r_p), each at most n_i and at most the product of the others.
      scale: norm of each column of each factor. May be traced.
      dtype: floating dtype; JAX's default float if None.

    Returns:
      TuckerFactors whose product is 0 and whose conserved quantities `U_iᵀU_i − G_(i)G_(i)ᵀ` are
      all scale² I, as `AᵀA − BBᵀ` is at the start `orthogonal` of a matrix.

    Raises:
      ValueError: for bad ranks or a bad scale.

    Source: theory section 3 (derived).
    """
    check_ranks(ranks, shape)
    dtype = jnp.result_type(float if dtype is None else dtype)
    norm = jnp.asarray(resolve_scale(scale), dtype)
    keys = jax.random.split(key, len(shape))
    frames = (
        norm * orthonormal_frame(k, (n, r), dtype)
        for k, n, r in zip(keys, shape, ranks, strict=True)
    )
    return TuckerFactors(jnp.zeros(ranks, dtype), tuple(frames))


@judged
def hosvd(
    tensor: Float[Array, "..."],
    ranks: tuple[int, ...],
    scale: float | str | Float[Array, ""] = 1.0,
) -> TuckerFactors:
    """Factors along the top singular vectors of each unfolding of a tensor, core 0.

    Args:
      tensor: whose directions to start along: a gradient, shape (n_1, …, n_p).
      ranks: (r_1, …, r_p).
      scale: norm of each column of each factor. May be traced.

    Returns:
      TuckerFactors with the factors of the truncated higher-order SVD times `scale`, and core 0.

    Raises:
      ValueError: for bad ranks or a bad scale, or a tensor that is not finite.

    Source: De Lathauwer et al. 2000, recalled; as a start of Tucker-LoRA, this toolkit's.
    """
    check_finite(tensor=tensor)
    check_ranks(ranks, tensor.shape)
    norm = jnp.asarray(resolve_scale(scale), tensor.dtype)
    factors = []
    for mode, rank in enumerate(ranks):
        u, _, _ = jnp.linalg.svd(unfold(tensor, mode), full_matrices=False)
        factors.append(norm * u[:, :rank])
    return TuckerFactors(jnp.zeros(ranks, tensor.dtype), tuple(factors))


@judged(rank=at_least(1))
def superdiagonal(
    tensor: Float[Array, "..."],
    rank: int,
    scale: float | str | Float[Array, ""] = 1e-3,
) -> TuckerFactors:
    """A balanced start along the top directions of a tensor, one small weight for each.

    Args:
      tensor: whose directions to start along: the negative gradient, or the target itself, shape
        (n_1, …, n_p).
      rank: number of directions r, at most min(n_i).
      scale: norm of each column of each factor, and size of each entry on the core's diagonal.

    Returns:
      TuckerFactors of ranks (r, …, r): factors `scale · [u_1 … u_r]` of each unfolding, and a core
      that is ±scale on its diagonal, signed as the tensor is along those directions, and 0 off it.
      All conserved quantities `U_iᵀU_i − G_(i)G_(i)ᵀ` are 0.

    Raises:
      ValueError: for a bad rank or scale, or a tensor that is zero or not finite.

    Source: theory section 3 (derived): for an orthogonally decomposable target with distinct
    singular values the modes then grow independently, by `laws.tucker_mode`.
    """
    start = hosvd(tensor, (rank,) * tensor.ndim, scale)
    if not is_traced(tensor) and not any_nonzero(tensor):
        raise ValueError("tensor is zero everywhere, so it has no direction to start along.")
    along = tensor
    for factor in start.factors:
        along = jnp.tensordot(along, factor, axes=(0, 0))
    index = (jnp.arange(rank),) * tensor.ndim
    signs = jnp.where(along[index] < 0, -1, 1).astype(tensor.dtype)
    norm = jnp.asarray(resolve_scale(scale), tensor.dtype)
    return start._replace(core=start.core.at[index].set(norm * signs))
