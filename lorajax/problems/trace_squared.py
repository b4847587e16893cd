"""The trace-squared loss, whose LoRA flows have a closed form at every rank (theory §6)."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import judged
from lorajax.factors import Factors, check_finite
from lorajax.problems.checks import check_precision


@judged
class TraceSquared(eqx.Module):
    """`½ (tr W)²` of `W = W0 + A B`, an n×n matrix.

    Only the trace of the pretrained weight enters, so that is what is kept.

    Attributes:
      trace: tr W0, a scalar, floating point.
      size: n.

    Source: Rushka, Klabjan 2026 (arXiv:2602.10212), stated; its formulas are reconstructed.
    """

    trace: Float[Array, ""]
    size: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Raises ValueError for a size below 1 or a trace that is not finite."""
        if self.size < 1:
            raise ValueError(f"size is {self.size}; it must be at least 1.")
        check_precision(trace=self.trace)
        check_finite(trace=self.trace)

    @classmethod
    @judged
    def from_weight(cls, weight: Float[Array, "n m"]) -> "TraceSquared":
        """The problem of a pretrained weight.

        Args:
          weight: W0, square.

        Returns:
          The problem with tr W0.

        Raises:
          ValueError: if the weight is not square or not finite.
        """
        if weight.shape[0] != weight.shape[1]:
            raise ValueError(f"weight has shape {weight.shape}; a trace needs a square matrix.")
        check_finite(weight=weight)
        return cls(jnp.trace(weight), weight.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n) of the update."""
        return self.size, self.size

    @property
    def dtype(self):
        """Floating dtype of the problem."""
        return self.trace.dtype

    def total(self, factors: Factors) -> Float[Array, ""]:
        """`tr W = tr W0 + tr A B`, from the n·r entries of the factors."""
        return self.trace + jnp.sum(factors.a * factors.b.T)

    def loss(self, factors: Factors) -> Float[Array, ""]:
        """`½ (tr W)²`."""
        return 0.5 * self.total(factors) ** 2

    def gradient(self, factors: Factors) -> Factors:
        """Derivative of the loss: `tr W · Bᵀ` and `tr W · Aᵀ`, since `∇_W L = tr W · I`."""
        total = self.total(factors)
        return Factors(total * factors.b.T, total * factors.a.T)

    def full_gradient(self, factors: Factors) -> Float[Array, "n n"]:
        """`∇_W L = tr W · I`."""
        return self.total(factors) * jnp.eye(self.size, dtype=self.dtype)

    def full_update(self) -> Float[Array, "n n"]:
        """Where full fine-tuning ends, `−(tr W0 / n) I`: the nearest zero of the loss."""
        return -self.trace / self.size * jnp.eye(self.size, dtype=self.dtype)
