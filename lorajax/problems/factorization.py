"""Matrix factorization: the quadratic loss against a target of any spectrum."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax.environment.judging import NOT_NEGATIVE, judged
from lorajax.factors import (
    Factors,
    PRNGKey,
    check_finite,
    check_rank,
    orthonormal_frame,
)
from lorajax.problems.checks import check_precision, check_spectrum


@judged
class MatrixFactorization(eqx.Module):
    """Quadratic loss `½‖S − A B‖_F²` of a low-rank update against the oracle update S.

    S = target − W0 is kept as its thin singular value decomposition, so that a 4096×4096 problem of
    rank 4 takes 33 thousand numbers and its gradient never forms a matrix of full size. Make it
    with `from_spectrum` or `from_target`.

    Attributes:
      u: left singular vectors of S, shape (m, k), orthonormal columns.
      singular_values: s_1 ≥ … ≥ s_k > 0, shape (k,), in the unit of S. Under gradient flow time is
        measured in 1/s.
      v: right singular vectors, shape (n, k), orthonormal columns.
    """

    u: Float[Array, "m k"]
    singular_values: Float[Array, " k"]
    v: Float[Array, "n k"]

    def __check_init__(self) -> None:
        """Raises ValueError for a precision that flows do not compute in."""
        check_precision(u=self.u, singular_values=self.singular_values, v=self.v)
        check_spectrum(self.singular_values, (*self.u.shape, *self.v.shape))

    @classmethod
    @judged
    def from_spectrum(
        cls,
        key: PRNGKey,
        shape: tuple[int, int],
        singular_values: Float[Array, " k"] | tuple[float, ...],
        *,
        dtype=None,
    ) -> "MatrixFactorization":
        """A target with a given spectrum and Haar-distributed singular vectors.

        Args:
          key: a PRNG key.
          shape: (m, n) of the update.
          singular_values: positive, in decreasing order, at most min(m, n) of them.
          dtype: floating dtype; JAX's default float if None.

        Returns:
          The problem.

        Raises:
          ValueError: for a spectrum that is empty, too long, unordered, not positive or not finite.

        Example:
          >>> import jax, lorajax
          >>> problem = lorajax.MatrixFactorization.from_spectrum(
          ...     jax.random.key(0), shape=(512, 256), singular_values=(4.0, 2.0, 1.0)
          ... )
          >>> problem.shape, problem.rank
          ((512, 256), 3)
        """
        dtype = jnp.result_type(float if dtype is None else dtype)
        values = jnp.asarray(singular_values, dtype)
        check_spectrum(values, shape)
        key_u, key_v = jax.random.split(key)
        k = values.shape[0]
        return cls(
            orthonormal_frame(key_u, (shape[0], k), dtype),
            values,
            orthonormal_frame(key_v, (shape[1], k), dtype),
        )

    @classmethod
    @judged(tolerance=NOT_NEGATIVE)
    def from_target(
        cls, target: Float[Array, "m n"], *, tolerance: float | None = None
    ) -> "MatrixFactorization":
        """The problem of a given oracle update, by one singular value decomposition.

        Args:
          target: S, shape (m, n), concrete (its rank becomes a shape).
          tolerance: singular values up to `tolerance · s_1` count as 0; if None, max(m, n) times
            the dtype's epsilon, what rounding alone leaves.

        Returns:
          The problem, with k the numerical rank of the target.

        Raises:
          ValueError: if the target is not a matrix, not finite or zero.
        """
        if target.ndim != 2:
            raise ValueError(f"target has shape {target.shape}; it must be a matrix.")
        check_precision(target=target)
        check_finite(target=target)
        u, s, vt = jnp.linalg.svd(target, full_matrices=False)
        if tolerance is None:
            tolerance = max(target.shape) * float(jnp.finfo(target.dtype).eps)
        k = int(jnp.sum(s > tolerance * s[0]))
        if k == 0:
            raise ValueError("target is zero; there is nothing to learn.")
        return cls(u[:, :k], s[:k], vt[:k].T)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the update."""
        return self.u.shape[0], self.v.shape[0]

    @property
    def rank(self) -> int:
        """k, the rank of the oracle update."""
        return self.singular_values.shape[0]

    @property
    def dtype(self):
        """Floating dtype of the problem."""
        return self.singular_values.dtype

    @property
    def target(self) -> Float[Array, "m n"]:
        """The oracle update S as a full matrix."""
        return (self.u * self.singular_values[None, :]) @ self.v.T

    def loss(self, factors: Factors) -> Float[Array, ""]:
        """`½‖S − A B‖²` without the full residual and without cancellation.

        The residual's blocks along and across S's singular spaces are orthogonal, so their squares
        add; each is at most k·(m+n) numbers. Exact down to the square of the rounding unit, where
        the expanded form `‖S‖² − 2⟨S, AB⟩ + ‖AB‖²` stops at the rounding unit itself.
        """
        a, b = factors
        a_along, b_along = self.u.T @ a, b @ self.v
        a_across, b_across = a - self.u @ a_along, b - b_along @ self.v.T
        gram_a, gram_b = a_across.T @ a_across, b_across @ b_across.T
        inner = jnp.diag(self.singular_values) - a_along @ b_along
        return 0.5 * (
            jnp.sum(inner**2)
            + jnp.sum((a_along @ gram_b) * a_along)
            + jnp.sum((gram_a @ b_along) * b_along)
            + jnp.sum(gram_a * gram_b)
        )

    def gradient(self, factors: Factors) -> Factors:
        """Derivative of the loss in Gram form: `A(BBᵀ) − S Bᵀ` and `(AᵀA)B − AᵀS`."""
        a, b = factors
        s = self.singular_values
        s_bt = self.u @ (s[:, None] * (self.v.T @ b.T))
        at_s = ((a.T @ self.u) * s[None, :]) @ self.v.T
        return Factors(a @ (b @ b.T) - s_bt, (a.T @ a) @ b - at_s)

    def full_gradient(self, factors: Factors) -> Float[Array, "m n"]:
        """`G = ∇_W L = A B − S`, the gradient with respect to the full matrix."""
        return factors.product - self.target

    def oracle(self, rank: int) -> Factors:
        """Balanced factors of the best approximation of rank `rank` (Eckart–Young).

        Args:
          rank: at least 1; beyond k the remaining columns are 0.

        Returns:
          Factors with `AᵀA = BBᵀ`.

        Raises:
          ValueError: for a bad rank.
        """
        check_rank(rank, self.shape)
        keep = min(rank, self.rank)
        root = jnp.sqrt(self.singular_values[:keep])
        pad = rank - keep
        a = jnp.pad(self.u[:, :keep] * root[None, :], ((0, 0), (0, pad)))
        return Factors(a, jnp.pad((self.v[:, :keep] * root[None, :]).T, ((0, pad), (0, 0))))

    def oracle_loss(self, rank: int) -> Float[Array, ""]:
        """The least loss at a rank, `½ Σ_{i>r} s_i²`."""
        beyond = np.arange(self.rank) >= rank  # one program for all ranks
        return 0.5 * jnp.sum(jnp.where(beyond, self.singular_values, 0) ** 2)

    def recentered(self, offset: Factors) -> "MatrixFactorization":
        """The same problem for a start with an offset: S grows by what the offset takes off W0.

        Args:
          offset: `initializers.Start.offset`, concrete.

        Returns:
          The problem with oracle update `S + offset.product`.
        """
        return MatrixFactorization.from_target(self.target + offset.product)


@judged
class DiagonalFactorization(eqx.Module):
    """`½‖diag(s, 0) − A B‖²`: what `MatrixFactorization` becomes in its own singular frame.

    Attributes:
      singular_values: s, shape (k,).
      shape: (p, q) of the update, p, q ≥ k.
    """

    singular_values: Float[Array, " k"]
    shape: tuple[int, int] = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Raises ValueError for a precision that flows do not compute in."""
        check_precision(singular_values=self.singular_values)
        check_spectrum(self.singular_values, self.shape)

    @property
    def rank(self) -> int:
        """k, the rank of the target."""
        return self.singular_values.shape[0]

    @property
    def dtype(self):
        """Floating dtype of the problem."""
        return self.singular_values.dtype

    @property
    def target(self) -> Float[Array, "p q"]:
        """diag(s, 0) as a full matrix."""
        k = self.rank
        return (
            jnp.zeros(self.shape, self.dtype)
            .at[jnp.arange(k), jnp.arange(k)]
            .set(self.singular_values)
        )

    def loss(self, factors: Factors) -> Float[Array, ""]:
        """`½‖diag(s, 0) − A B‖²`."""
        return 0.5 * jnp.sum((self.target - factors.product) ** 2)

    def gradient(self, factors: Factors) -> Factors:
        """Derivative of the loss in Gram form; the target costs k·r multiplications."""
        a, b = factors
        k, s = self.rank, self.singular_values
        s_bt = jnp.pad(s[:, None] * b[:, :k].T, ((0, self.shape[0] - k), (0, 0)))
        at_s = jnp.pad(a[:k].T * s[None, :], ((0, 0), (0, self.shape[1] - k)))
        return Factors(a @ (b @ b.T) - s_bt, (a.T @ a) @ b - at_s)


@judged
class SymmetricFactorization(eqx.Module):
    """`¼‖X Xᵀ − S‖_F²` of one factor against a positive semidefinite target.

    Attributes:
      target: S, shape (n, n), symmetric positive semidefinite.
    """

    target: Float[Array, "n n"]

    def __check_init__(self) -> None:
        """Raises ValueError for a precision that flows do not compute in."""
        check_precision(target=self.target)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n) of the product."""
        n = self.target.shape[0]
        return n, n

    def loss(self, factor: Float[Array, "n r"]) -> Float[Array, ""]:
        """`¼‖X Xᵀ − S‖²`."""
        return 0.25 * jnp.sum((factor @ factor.T - self.target) ** 2)

    def gradient(self, factor: Float[Array, "n r"]) -> Float[Array, "n r"]:
        """`X(XᵀX) − S X`."""
        return factor @ (factor.T @ factor) - self.target @ factor
