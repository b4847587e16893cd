"""Two frozen layers with an adapter on each (theory §4)."""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.factors import Factors, check_finite


class TwoLayerFactors(NamedTuple):
    """Factors of the adapters on both layers of `TwoLayer`.

    Attributes:
      first: adapter of W1, shapes (h, r) and (r, q).
      second: adapter of W2, shapes (p, r) and (r, h).
    """

    first: Factors
    second: Factors


class TwoLayer(eqx.Module):
    """Two frozen layers with an adapter on each: `½‖E − …‖²` for `Y_ft − (W2 + ΔW2)(W1 + ΔW1)`.

    Attributes:
      w1: first frozen layer W1, shape (h, q).
      w2: second frozen layer W2, shape (p, h).
      shift: `E = Y_ft − W2 W1`, what fine-tuning has to add, shape (p, q).

    Source: Xu et al. 2025 (arXiv:2503.06982), stated. The form of the gradient, in which every
    product is a constant matrix times a thin one, is derived (theory section 1).
    """

    # Axis names of their own: that they chain is checked below, with a sentence.
    w1: Float[Array, "h q"]
    w2: Float[Array, "p j"]
    shift: Float[Array, "i k"]

    def __check_init__(self) -> None:
        """Raises ValueError where the shapes do not chain."""
        w1, w2, shift = (getattr(x, "shape", None) for x in (self.w1, self.w2, self.shift))
        if w1 is None or w2 is None or shift is None:
            return
        if w2[-1] != w1[-2] or shift[-2:] != (w2[-2], w1[-1]):
            raise ValueError(
                f"w2, w1 and shift have shapes {w2}, {w1} and {shift}; they must be (p, h), (h, q) "
                "and (p, q)."
            )
        check_finite(w1=self.w1, w2=self.w2, shift=self.shift)

    @property
    def shape(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the two updates, ΔW1's first."""
        return (self.w1.shape[0], self.w1.shape[1]), (self.w2.shape[0], self.w2.shape[1])

    @property
    def dtype(self):
        """Floating dtype of the problem."""
        return self.shift.dtype

    def residual(self, factors: TwoLayerFactors) -> Float[Array, "p q"]:
        """`R = Y_ft − (W2 + A2B2)(W1 + A1B1)`, the full matrix."""
        (a1, b1), (a2, b2) = factors
        v = self.w2 @ a1 + a2 @ (b2 @ a1)
        return self.shift - v @ b1 - a2 @ (b2 @ self.w1)

    def loss(self, factors: TwoLayerFactors) -> Float[Array, ""]:
        """`½‖R‖²`."""
        return 0.5 * jnp.sum(self.residual(factors) ** 2)

    def gradient(self, factors: TwoLayerFactors) -> TwoLayerFactors:
        """Derivative of the loss: eight products of a constant matrix with an r-column one.

        With V = (W2 + A2B2)A1 and C = B2W1 the residual is `E − V B1 − A2 C`, and only R B1ᵀ, VᵀR,
        R Uᵀ and A2ᵀR with U = C + (B2A1)B1 are ever formed.
        """
        (a1, b1), (a2, b2) = factors
        r = a1.shape[-1]
        b2_a1 = b2 @ a1
        c = b2 @ self.w1
        v = self.w2 @ a1 + a2 @ b2_a1
        u = c + b2_a1 @ b1
        # E meets [B1ᵀ Uᵀ] and [V A2] in one product each: half as many passes over the big matrix.
        right = jnp.concatenate([b1, u]).T
        r_right = self.shift @ right - v @ (b1 @ right) - a2 @ (c @ right)
        left = jnp.concatenate([v, a2], axis=1)
        left_r = left.T @ self.shift - (left.T @ v) @ b1 - (left.T @ a2) @ c
        r_b1, r_u = r_right[:, :r], r_right[:, r:]
        vt_r, a2t_r = left_r[:r], left_r[r:]
        return TwoLayerFactors(
            Factors(-(self.w2.T @ r_b1 + b2.T @ (a2.T @ r_b1)), -vt_r),
            Factors(-r_u, -(a2t_r @ self.w1.T + (a2t_r @ b1.T) @ a1.T)),
        )

    def alignment_matrices(self) -> tuple[Float[Array, "h q"], Float[Array, "p h"]]:
        """`W2ᵀE` and `E W1ᵀ`: the negative gradients at zero, whose top singular vectors attract.

        Near zero the stacked factors `Z_i = [A_i; B_iᵀ]` obey `Ż_i = H(M_i) Z_i` with
        H(M) = [[0, M], [Mᵀ, 0]] and M_1, M_2 these two (reconstructed; theory section 4).
        """
        return self.w2.T @ self.shift, self.shift @ self.w1.T
