"""In-context linear regression by linear attention with rank-one heads (theory §7)."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax.environment.judging import judged
from lorajax.factors import check_finite, is_traced
from lorajax.problems.checks import check_precision


class AttentionHeads(NamedTuple):
    """Rank-one heads of linear attention, `M = Σ_h v_h k_h q_hᵀ`.

    Attributes:
      value: v, shape (h,).
      key: rows k_h, shape (h, d).
      query: rows q_h, shape (h, d).
    """

    value: Float[Array, "*lanes h"]
    key: Float[Array, "*lanes h d"]
    query: Float[Array, "*lanes h d"]

    @property
    def product(self) -> Float[Array, "*lanes d d"]:
        """M itself, shape (..., d, d)."""
        return jnp.swapaxes(self.value[..., None] * self.key, -1, -2) @ self.query


@judged
class LinearAttention(eqx.Module):
    """Population loss of in-context linear regression by linear attention, `E(y_q − β̂ᵀM x_q)²`.

    A context holds N pairs (x_n, y_n = wᵀx_n) with x ~ N(0, Λ) and w ~ N(0, I) drawn anew for each
    context; `β̂ = (1/N) Σ y_n x_n`. In the eigenbasis of Λ the expectation is

        tr Λ − 2 Σ_i λ_i² M_ii + Σ_ij c_i λ_j M_ij²,   c_i = λ_i² (1 + (1 + tr Λ/λ_i)/N).

    Attributes:
      eigenvalues: λ of the inputs' covariance, positive, in decreasing order, shape (d,).
      context: N, the number of examples in a context, a scalar, floating point.

    Source: Zhang et al. 2025 (arXiv:2501.16265), recalled; the expectation is derived and checked
    against sampled contexts in the tests.
    """

    eigenvalues: Float[Array, " d"]
    context: Float[Array, ""]

    def __check_init__(self) -> None:
        """Raises ValueError for eigenvalues or a context length out of range."""
        check_precision(eigenvalues=self.eigenvalues, context=self.context)
        check_finite(eigenvalues=self.eigenvalues, context=self.context)
        if is_traced(self.eigenvalues, self.context):
            return
        values = np.asarray(self.eigenvalues)
        if values.ndim != 1 or not np.all(values > 0) or np.any(np.diff(values) > 0):
            raise ValueError(
                f"eigenvalues are {values}; give positive ones in decreasing order, in a vector."
            )
        if not np.all(np.asarray(self.context) >= 1):
            raise ValueError(f"context is {self.context}; it must be at least 1.")

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d) of M."""
        return self.eigenvalues.shape[0], self.eigenvalues.shape[0]

    @property
    def dtype(self):
        """Floating dtype of the problem."""
        return self.eigenvalues.dtype

    @property
    def second_moments(self) -> Float[Array, " d"]:
        """c, the eigenvalues of E[Λ̂²] with Λ̂ the covariance of one context."""
        total = jnp.sum(self.eigenvalues)
        return self.eigenvalues**2 + self.eigenvalues * (self.eigenvalues + total) / self.context

    @property
    def optimum(self) -> Float[Array, " d"]:
        """The diagonal of the best M, `λ_i / c_i`; off it the best M is 0."""
        return self.eigenvalues / self.second_moments

    def loss(self, heads: AttentionHeads) -> Float[Array, ""]:
        """The expected squared error of a query."""
        values, m = self.eigenvalues, heads.product
        weights = self.second_moments[:, None] * values[None, :]
        return jnp.sum(values) - 2 * jnp.sum(values**2 * jnp.diagonal(m)) + jnp.sum(weights * m**2)

    def full_gradient(self, heads: AttentionHeads) -> Float[Array, "d d"]:
        """`G = ∇_M L`."""
        values = self.eigenvalues
        weights = self.second_moments[:, None] * values[None, :]
        return 2 * weights * heads.product - 2 * jnp.diag(values**2)

    def gradient(self, heads: AttentionHeads) -> AttentionHeads:
        """`k_hᵀG q_h`, `v_h G q_h` and `v_h Gᵀk_h`."""
        full = self.full_gradient(heads)
        pulled = heads.query @ full.T
        return AttentionHeads(
            jnp.sum(heads.key * pulled, axis=1),
            heads.value[:, None] * pulled,
            heads.value[:, None] * (heads.key @ full),
        )

    def start(self, key: Array, heads: int, scale: float | Float[Array, ""]) -> AttentionHeads:
        """Gaussian heads: each of v, ‖k‖ and ‖q‖ has root-mean-square `scale`.

        Args:
          key: a PRNG key.
          heads: their number, at least 1.
          scale: may be traced.

        Returns:
          The start.

        Raises:
          ValueError: if there are no heads.
        """
        if heads < 1:
            raise ValueError(f"heads is {heads}; it must be at least 1.")
        d, dtype = self.shape[0], self.dtype
        keys = jax.random.split(key, 3)
        norm = jnp.asarray(scale, dtype)
        width = norm / jnp.sqrt(jnp.asarray(d, dtype))
        return AttentionHeads(
            norm * jax.random.normal(keys[0], (heads,), dtype),
            width * jax.random.normal(keys[1], (heads, d), dtype),
            width * jax.random.normal(keys[2], (heads, d), dtype),
        )
