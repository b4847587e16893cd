"""The low-rank factors that every room passes around, and the checks they share."""

import functools
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

from lorajax import environment
from lorajax.environment.judging import POSITIVE, at_least, judged

# Nearly every module that imports jax imports this one.
environment.warn()

PRNGKey = Key[Array, ""] | UInt32[Array, "2"]
"""A key of JAX, of the new kind or the old."""


class Factors(NamedTuple):
    """The two factors of a low-rank update, `A B`.

    In Flax's kernel layout a weight is (in, out), so `a` is (in, r) and `b` is (r, out). PEFT
    stores the transposes: `lora_A` is `a.T`, `lora_B` is `b.T`. Leading axes, if any, are lanes of
    a batch (times, seeds, scales) and are the same for both.

    Attributes:
      a: left factor, shape (..., m, r), floating point.
      b: right factor, shape (..., r, n), same dtype.
    """

    a: Float[Array, "*lanes m r"]
    b: Float[Array, "*lanes r n"]

    @property
    def product(self) -> Float[Array, "*lanes m n"]:
        """The update `A B` itself, shape (..., m, n)."""
        return self.a @ self.b

    @property
    def rank(self) -> int:
        """The inner dimension r (an upper bound of the matrix rank of `A B`)."""
        return self.a.shape[-1]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (m, n) of the update."""
        return self.a.shape[-2], self.b.shape[-1]


class TuckerFactors(NamedTuple):
    """A core and one factor for each mode of a tensor.

    Attributes:
      core: shape (r_1, …, r_p), floating point.
      factors: p arrays, the i-th of shape (n_i, r_i), same dtype.
    """

    core: Float[Array, "..."]
    factors: tuple[Float[Array, "n r"], ...]

    @property
    def product(self) -> Float[Array, "..."]:
        """The update itself, shape (n_1, …, n_p)."""
        update = self.core
        for factor in self.factors:
            # Contracting the front axis and appending the result rotates every mode through once.
            update = jnp.tensordot(update, factor, axes=(0, 1))
        return update

    @property
    def parameters(self) -> int:
        """Number of entries, `∏ r_i + Σ n_i r_i`."""
        return self.core.size + sum(factor.size for factor in self.factors)


@judged(mode=at_least(0))
def unfold(tensor: Float[Array, "..."], mode: int) -> Float[Array, "n rest"]:
    """The unfolding of a tensor along a mode: that mode's fibers as columns.

    Args:
      tensor: shape (n_1, …, n_p).
      mode: counted from 0.

    Returns:
      Shape (n_mode, product of the others), the other modes in their order.

    Raises:
      ValueError: for a mode that the tensor does not have.
    """
    if not 0 <= mode < tensor.ndim:
        raise ValueError(
            f"mode is {mode}; a tensor of {tensor.ndim} modes has 0 … {tensor.ndim - 1}."
        )
    return jnp.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


@judged
def is_factors(node: Any) -> bool:
    """Whether a node of a tree is a pair of factors."""
    return isinstance(node, Factors)


@judged
def is_adapter(node: Any) -> bool:
    """Whether a node of a tree is one whole update: a pair of factors, or a core with factors."""
    return isinstance(node, (Factors, TuckerFactors))


@judged
def column_norms(factors: Factors) -> Float[Array, "*lanes n"]:
    """Norms of the columns of `A B`, without the m×n product.

    Args:
      factors: any pair.

    Returns:
      Shape (..., n): `‖(A B)_j‖`, from `bᵀ(AᵀA)b`.
    """
    a, b = factors
    squares = jnp.sum(((a.mT @ a) @ b) * b, axis=-2)
    return jnp.sqrt(jnp.maximum(squares, 0))


@judged(eta=POSITIVE)
def column_rates(factors: Factors, eta: float | int) -> Float[Array, "*lanes n"]:
    """ALLoRA's rates: how fast each column of B learns, from the size of its update.

    Args:
      factors: any pair.
      eta: η > 0, the rate of a column whose update is zero.

    Returns:
      `1 / √(‖(A B)_j‖ + 1/η²)`, shape (..., n).

    Source: Huang, Balestriero 2024 (arXiv:2410.09692), recalled, in the form of theory section 7.
    """
    return 1 / jnp.sqrt(column_norms(factors) + eta**-2)


@judged
@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def orthonormal_frame(key: PRNGKey, shape: tuple[int, int], dtype: Any) -> Array:
    """A Haar-distributed frame: orthonormal columns, shape (m, r) with m ≥ r."""
    q, upper = jnp.linalg.qr(jax.random.normal(key, shape, dtype))
    # Without the signs of R's diagonal the frame depends on the QR's sign convention.
    return q * jnp.where(jnp.diagonal(upper) < 0, -1, 1).astype(dtype)[None, :]


@judged
def is_traced(*trees: Any) -> bool:
    """Whether any leaf is a tracer, so that its values cannot be looked at."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


@judged(rank=at_least(1))
def check_rank(rank: int, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `rank` is an integer in 1 … min(shape)."""
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)):
        raise ValueError(f"rank is {rank!r}; it must be an integer of at least 1.")
    if not 1 <= rank <= min(shape):
        raise ValueError(
            f"rank is {rank}; for a matrix of shape {tuple(shape)} it must lie in 1 … {min(shape)}."
        )


@judged
def check_finite(**arrays: Any) -> None:
    """Raises ValueError naming the first argument that holds a NaN or an infinity.

    Tracers pass: inside `jit` and `vmap` values are unknown and the caller's status speaks.
    """
    for name, array in arrays.items():
        for leaf in jax.tree.leaves(array):
            if is_traced(leaf):
                continue
            bad = int(np.sum(~np.isfinite(np.asarray(leaf))))
            if bad:
                raise ValueError(
                    f"{name} has {bad} entries that are NaN or infinite; every entry "
                    f"must be finite."
                )


@judged
def any_nonzero(tree: Any) -> bool:
    """Whether any entry of any leaf of a concrete pytree differs from 0."""
    return any(bool(np.any(np.asarray(leaf))) for leaf in jax.tree.leaves(tree))


@judged
def can_move(node: Any) -> bool:
    """Whether a concrete update is away from the critical point that all losses share.

    A product of q factors has a derivative with respect to one of them only where all the others
    are away from 0 (derived): two zeros among them and nothing moves.
    """
    if isinstance(node, TuckerFactors):
        return sum(not any_nonzero(part) for part in (node.core, *node.factors)) < 2
    return any_nonzero(node)


@judged
def check_positive(**scalars: Any) -> None:
    """Raises ValueError naming the first argument that is not positive and finite."""
    for name, value in scalars.items():
        if not is_traced(value) and not (
            np.all(np.asarray(value) > 0) and np.all(np.isfinite(value))
        ):
            raise ValueError(f"{name} is {value}; it must be positive and finite.")


@judged
def check_factors(factors: Factors, shape: tuple[int, int], name: str = "factors") -> None:
    """Raises ValueError unless `factors` fit a matrix of `shape`, are finite and can move.

    Both factors zero is a critical point of every LoRA loss: the gradient of either factor has the
    other one as a factor, so such a start never moves (derived; theory section 1).
    """
    a, b = factors
    if min(a.ndim, b.ndim) < 2 or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(
            f"{name} have shapes {a.shape} and {b.shape}; they must be matrices, with the same "
            "lanes before them."
        )
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"{name} have shapes {a.shape} and {b.shape}; the last axis of a ({a.shape[-1]}) must "
            f"equal the next-to-last axis of b ({b.shape[-2]})."
        )
    if a.shape[-1] < 1:
        raise ValueError(f"{name} have rank 0; the rank must be at least 1.")
    if factors.shape != tuple(shape):
        raise ValueError(
            f"{name} multiply to a matrix of shape {factors.shape}; the problem has "
            f"shape {tuple(shape)}."
        )
    if a.dtype != b.dtype or not jnp.issubdtype(a.dtype, jnp.floating):
        raise ValueError(
            f"{name} have dtypes {a.dtype} and {b.dtype}; both must be the same "
            f"floating-point dtype."
        )
    check_finite(**{name: factors})
    if not is_traced(factors) and not any_nonzero(factors):
        raise ValueError(
            f"{name} are both zero, a critical point that no flow leaves; start at "
            f"least one of them "
            "away from zero."
        )
