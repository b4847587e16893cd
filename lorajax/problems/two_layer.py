"""Two frozen layers with an adapter on each (theory §4)."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import judged
from lorajax.factors import Factors, PRNGKey, check_finite
from lorajax.problems.checks import check_precision

Target = Literal["generic", "top", "bottom"]
"""Where the shift lies: along random directions, or a principal component of the weight."""
TARGETS = get_args(Target)
"""The values of `Target`."""


class TwoLayerFactors(NamedTuple):
    """Factors of the adapters on both layers of `TwoLayer`.

    Attributes:
      first: adapter of W1, shapes (h, r) and (r, q).
      second: adapter of W2, shapes (p, r) and (r, h).
    """

    first: Factors
    second: Factors


@judged
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
        check_precision(w1=self.w1, w2=self.w2, shift=self.shift)
        check_finite(w1=self.w1, w2=self.w2, shift=self.shift)

    @classmethod
    @judged
    def pretrained(
        cls, key: PRNGKey, size: int, target: str = "generic", *, strength: float = 5.0
    ) -> "TwoLayer":
        """Two square layers as gradient flow would have pre-trained them, and a new target.

        Args:
          key: draws the frames, and the direction of a generic target.
          size: side of both layers.
          target: what `Y_ft = Y_pre + strength · u vᵀ` adds: along the "top" or the "bottom"
            principal component of `Y_pre = W2 W1`, or along random unit vectors ("generic").
          strength: of the target.

        Returns:
          `W2 = U Σ2 Pᵀ` and `W1 = P Σ1 Vᵀ` with singular values falling evenly from 1 to 0.3 and
          from 2 to 0.6: half as strong, so that the layers grow at different rates (δ_w = 1/2 along
          a principal component; 1 if they were balanced).

        Raises:
          ValueError: for a size below 1 or a target of another name.

        Source: Xu et al. 2025 (arXiv:2503.06982), figures 1, 3 and 4; that they add 5 u vᵀ, and
        where, is stated, sizes and spectra of the layers are not known and chosen here.
        """
        if size < 1:
            raise ValueError(f"size is {size}; it must be at least 1.")
        if target not in TARGETS:
            raise ValueError(f"target is {target!r}; it must be one of {', '.join(TARGETS)}.")
        keys = jax.random.split(key, 5)
        frames = [jnp.linalg.qr(jax.random.normal(key, (size, size)))[0] for key in keys[:3]]
        second, first = jnp.linspace(1.0, 0.3, size), jnp.linspace(2.0, 0.6, size)
        w2 = (frames[0] * second[None, :]) @ frames[1].T
        w1 = (frames[1] * first[None, :]) @ frames[2].T
        if target == "generic":
            u, v = (jax.random.normal(key, (size,)) for key in keys[3:])
            u, v = u / jnp.linalg.norm(u), v / jnp.linalg.norm(v)
        else:
            index = 0 if target == "top" else size - 1
            u, v = frames[0][:, index], frames[2][:, index]
        return cls(w1, w2, strength * jnp.outer(u, v))

    def blind_start(self, initializer: Callable[..., Factors], key: PRNGKey) -> TwoLayerFactors:
        """Both adapters from an initializer `(key, shape) -> Factors` that needs no direction."""
        keys, shapes = jax.random.split(key), self.shape
        return TwoLayerFactors(initializer(keys[0], shapes[0]), initializer(keys[1], shapes[1]))

    def directed_start(self, initializer: Callable[..., Factors]) -> TwoLayerFactors:
        """Both adapters from an initializer `(M) -> Factors` along `W2ᵀE` and `E W1ᵀ`."""
        first, second = self.alignment_matrices()
        return TwoLayerFactors(initializer(first), initializer(second))

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
