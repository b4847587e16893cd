"""Tucker factorization: the quadratic loss of a Tucker update of a tensor (theory §3)."""

import math
from collections.abc import Iterable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import NOT_NEGATIVE, judged
from lorajax.factors import PRNGKey, TuckerFactors, check_finite, orthonormal_frame, unfold
from lorajax.problems.checks import check_precision, check_spectrum


def _contract(
    tensor: Array, matrices: Sequence[Array], modes: Iterable[int] | None = None
) -> Array:
    """`tensor ×_j M_j` over some modes (all of them if None), with M_j of shape (new, old)."""
    for mode in range(tensor.ndim) if modes is None else modes:
        moved = jnp.tensordot(matrices[mode], tensor, axes=(1, mode))
        tensor = jnp.moveaxis(moved, 0, mode)
    return tensor


def _all_but_one(tensor: Array, matrices: Sequence[Array]) -> list[Array]:
    """`tensor ×_{j≠i} M_j` for each mode i, by halves: p log p products instead of p²."""

    def halve(part: Array, modes: range) -> list[Array]:
        if len(modes) == 1:
            return [part]
        left, right = modes[: len(modes) // 2], modes[len(modes) // 2 :]
        return [
            *halve(_contract(part, matrices, right), left),
            *halve(_contract(part, matrices, left), right),
        ]

    return halve(tensor, range(tensor.ndim))


def _pair(first: Array, second: Array, mode: int) -> Array:
    """`first_(mode) second_(mode)ᵀ`."""
    others = [j for j in range(first.ndim) if j != mode]
    return jnp.tensordot(first, second, axes=(others, others))


@judged
class TuckerFactorization(eqx.Module):
    """Quadratic loss `½‖T − G ×₁ U_1 ×₂ U_2 …‖²` of a Tucker update of a tensor of any order.

    The target is kept in its own Tucker form, so that neither loss nor gradient forms a tensor of
    full size. Make it with `from_spectrum` or `from_target`.

    Attributes:
      core: C of the target `C ×₁ V_1 ×₂ V_2 …`, shape (k_1, …, k_p).
      frames: V_i, shapes (n_i, k_i), orthonormal columns.

    Source: theory section 3 (derived). For two modes and a core fixed at I it is
    `MatrixFactorization`.
    """

    core: Float[Array, "..."]
    frames: tuple[Float[Array, "_ _"], ...]

    def __check_init__(self) -> None:
        """Raises ValueError for a precision that flows do not compute in."""
        check_precision(core=self.core, frames=self.frames)

    @classmethod
    @judged
    def from_spectrum(
        cls,
        key: PRNGKey,
        shape: tuple[int, ...],
        singular_values: Float[Array, " k"] | tuple[float, ...],
        *,
        dtype=None,
    ) -> "TuckerFactorization":
        """A target `Σ λ_i u_i ⊗ v_i ⊗ …` with orthonormal directions in every mode.

        Args:
          key: a PRNG key.
          shape: (n_1, …, n_p) of the update, p at least 2.
          singular_values: λ, positive, in decreasing order, at most min(shape) of them.
          dtype: floating dtype; JAX's default float if None.

        Returns:
          The problem; every unfolding of its target has the singular values λ.

        Raises:
          ValueError: for fewer than two modes, or a spectrum that is empty, too long, unordered,
            not positive or not finite.

        Example:
          >>> import jax, lorajax
          >>> problem = lorajax.TuckerFactorization.from_spectrum(
          ...     jax.random.key(0), shape=(32, 16, 9), singular_values=(4.0, 2.0)
          ... )
          >>> problem.shape, problem.ranks
          ((32, 16, 9), (2, 2, 2))
        """
        if len(shape) < 2:
            raise ValueError(f"shape is {shape}; a Tucker update has at least two modes.")
        dtype = jnp.result_type(float if dtype is None else dtype)
        values = jnp.asarray(singular_values, dtype)
        check_spectrum(values, (min(shape), min(shape)))
        k = values.shape[0]
        keys = jax.random.split(key, len(shape))
        frames = tuple(
            orthonormal_frame(each, (n, k), dtype) for each, n in zip(keys, shape, strict=True)
        )
        index = (jnp.arange(k),) * len(shape)
        return cls(jnp.zeros((k,) * len(shape), dtype).at[index].set(values), frames)

    @classmethod
    @judged(tolerance=NOT_NEGATIVE)
    def from_target(
        cls, target: Float[Array, "..."], *, tolerance: float | None = None
    ) -> "TuckerFactorization":
        """The problem of a given tensor, by a higher-order singular value decomposition.

        Args:
          target: T, concrete (its multilinear ranks become shapes), at least two modes.
          tolerance: singular values of an unfolding up to `tolerance` times its largest count as 0;
            if None, the number of its columns times the dtype's epsilon.

        Returns:
          The problem; its loss leaves out what the tolerance cuts off.

        Raises:
          ValueError: if the target has fewer than two modes, is not finite or is zero.
        """
        if target.ndim < 2:
            raise ValueError(f"target has shape {target.shape}; it must have at least two modes.")
        check_precision(target=target)
        check_finite(target=target)
        frames = []
        for mode in range(target.ndim):
            matrix = unfold(target, mode)
            u, s, _ = jnp.linalg.svd(matrix, full_matrices=False)
            limit = tolerance
            if limit is None:
                limit = max(matrix.shape) * float(jnp.finfo(target.dtype).eps)
            k = int(jnp.sum(s > limit * s[0]))
            if k == 0:
                raise ValueError("target is zero; there is nothing to learn.")
            frames.append(u[:, :k])
        return cls(_contract(target, tuple(v.T for v in frames)), tuple(frames))

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_1, …, n_p) of the update."""
        return tuple(frame.shape[0] for frame in self.frames)

    @property
    def ranks(self) -> tuple[int, ...]:
        """(k_1, …, k_p), the multilinear ranks of the target."""
        return self.core.shape

    @property
    def dtype(self):
        """Floating dtype of the problem."""
        return self.core.dtype

    @property
    def target(self) -> Float[Array, "..."]:
        """T as a full tensor."""
        return _contract(self.core, self.frames)

    def _check(self, factors: TuckerFactors) -> None:
        shapes = [factor.shape for factor in factors.factors]
        if tuple(s[0] for s in shapes) != self.shape or factors.core.shape != tuple(
            s[1] for s in shapes
        ):
            raise ValueError(
                f"factors have a core of shape {factors.core.shape} and factors of shapes "
                f"{shapes}; for a tensor of shape {self.shape} they must be (r_1, …) and "
                "(n_i, r_i)."
            )

    def loss(self, factors: TuckerFactors) -> Float[Array, ""]:
        """`½‖T − G ×₁ U_1 …‖²` without the full residual and without cancellation.

        What the factors have across the target's frames is split off mode by mode; the pieces are
        orthogonal, so their squares add (derived, as in `MatrixFactorization.loss`).
        """
        self._check(factors)
        core, us = factors
        along = tuple(v.T @ u for v, u in zip(self.frames, us, strict=True))
        across = [u - v @ y for v, u, y in zip(self.frames, us, along, strict=True)]
        total = jnp.sum((self.core - _contract(core, along)) ** 2)
        grams = [y.T @ y for y in along]
        for mode, rest in enumerate(across):
            gram = rest.T @ rest
            piece = tuple([*grams[:mode], gram, *(u.T @ u for u in us[mode + 1 :])])
            total = total + jnp.sum(core * _contract(core, piece))
        return 0.5 * total

    def gradient(self, factors: TuckerFactors) -> TuckerFactors:
        """Derivative of the loss in Gram form: only products of the size of the two cores.

        With M_j = U_jᵀU_j and K_j = U_jᵀV_j: `∂G = G ×_j M_j − C ×_j K_j` and
        `∂U_i = U_i (G ×_{j≠i} M_j)_(i) G_(i)ᵀ − V_i (C ×_{j≠i} K_j)_(i) G_(i)ᵀ`.
        """
        self._check(factors)
        core, us = factors
        grams = tuple(u.T @ u for u in us)
        crosses = tuple(u.T @ v for u, v in zip(us, self.frames, strict=True))
        own, other = _all_but_one(core, grams), _all_but_one(self.core, crosses)
        d_core = _contract(own[0], grams, (0,)) - _contract(other[0], crosses, (0,))
        d_us = tuple(
            u @ _pair(own[i], core, i) - v @ _pair(other[i], core, i)
            for i, (u, v) in enumerate(zip(us, self.frames, strict=True))
        )
        return TuckerFactors(d_core, d_us)

    def modes(self, factors: TuckerFactors) -> Float[Array, " k"]:
        """The update along the target's own directions, ⟨ΔT, v_1i ⊗ v_2i ⊗ …⟩.

        Args:
          factors: any Tucker update of this shape.

        Returns:
          Shape (min(k_1, …, k_p),): for a target `from_spectrum`, what has been learned of each λ.
        """
        self._check(factors)
        pairs = zip(self.frames, factors.factors, strict=True)
        along = _contract(factors.core, tuple(v.T @ u for v, u in pairs))
        return along[(jnp.arange(min(self.ranks)),) * len(self.shape)]

    def parameters(self, ranks: tuple[int, ...]) -> int:
        """Number of parameters of a Tucker update of these ranks, `∏ r_i + Σ n_i r_i`."""
        return math.prod(ranks) + sum(n * r for n, r in zip(self.shape, ranks, strict=True))
