"""The reduction: the same flow on the smallest matrices that hold it, and the way back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.factors import Factors
from lorajax.problems import DiagonalFactorization, MatrixFactorization


class Frames(NamedTuple):
    """Orthonormal frames in which a flow stays: the target's singular vectors and the start's rest.

    Attributes:
      u: left singular vectors of the target, shape (m, k).
      u_rest: frame of what the start's A has across them, shape (m, p - k).
      v: right singular vectors of the target, shape (n, k).
      v_rest: frame of what the start's B has across them, shape (n, q - k).
    """

    u: Float[Array, "m k"]
    u_rest: Float[Array, "m j"]
    v: Float[Array, "n k"]
    v_rest: Float[Array, "n l"]

    def lift(self, core: Factors) -> Factors:
        """Factors of full size from those in the frames; leading axes pass through."""
        k = self.u.shape[1]
        return Factors(
            self.u @ core.a[..., :k, :] + self.u_rest @ core.a[..., k:, :],
            core.b[..., :k] @ self.v.T + core.b[..., k:] @ self.v_rest.T,
        )


class Reduction(NamedTuple):
    """A problem and a start in the frames in which the flow stays.

    Attributes:
      problem: the diagonal problem, of shape (p, q) with p = k + min(r, m - k), q likewise.
      factors: the start in the frames, shapes (p, r) and (r, q).
      frames: what lifts a point of the reduced flow back.
    """

    problem: DiagonalFactorization
    factors: Factors
    frames: Frames


class _Side(NamedTuple):
    """One factor: coordinates along the target's frame, and a frame and coordinates of the rest."""

    along: Array
    frame: Array
    coordinates: Array


def _sides(frames: tuple[Array, Array], factors: tuple[Array, Array]) -> tuple[_Side, _Side]:
    """Splits A and Bᵀ, both (rows, r), into what lies along the target's frames and the rest."""
    along = [frame.T @ factor for frame, factor in zip(frames, factors, strict=True)]
    rests = [factor - frame @ x for frame, factor, x in zip(frames, factors, along, strict=True)]
    most = max(x.shape[0] for x in rests)
    padded = jnp.stack([jnp.pad(x, ((0, most - x.shape[0]), (0, 0))) for x in rests])
    # One call for both: two that do not depend on each other can block XLA's threads for good.
    q, upper = jnp.linalg.qr(padded)
    sides = []
    for i, frame in enumerate(frames):
        (rows, k), r = frame.shape, factors[i].shape[1]
        if rows - k <= r:
            # The complement is no larger than the rest could be: a frame of all of it is exact and,
            # unlike a QR of the rest, well defined when the rest vanishes.
            complement = jnp.linalg.qr(frame, mode="complete")[0][:, k:]
            sides.append(_Side(along[i], complement, complement.T @ factors[i]))
        else:
            sides.append(_Side(along[i], q[i, :rows], upper[i]))
    return sides[0], sides[1]


def reduce(problem: MatrixFactorization, factors: Factors) -> Reduction:
    """The same flow on the smallest matrices that hold it.

    Args:
      problem: matrix factorization with a target of rank k and shape (m, n).
      factors: the start, of rank r.

    Returns:
      A Reduction whose flow, lifted, is the flow of `problem` from `factors`, exactly: what A has
      across the target's left singular vectors keeps its column space, since Ȧ there is −A(BBᵀ).

    Example:
      >>> import jax, lorajax
      >>> problem = lorajax.MatrixFactorization.from_spectrum(
      ...     jax.random.key(0), shape=(4096, 4096), singular_values=(4.0, 3.0, 2.0, 1.0)
      ... )
      >>> factors = lorajax.initializers.lora(jax.random.key(1), problem.shape, rank=8)
      >>> lorajax.exact.reduce(problem, factors).problem.shape
      (12, 12)

    Source: theory section 1 (derived). It holds for gradient flow and for every descent that
    commutes with rotations of the rows and columns (GD, momentum, LoRA+, ScaledGD, spectral
    descent, weight decay); it fails for Adam, whose step depends on the entries.
    """
    return _reduce(problem, factors)


@jax.jit
def _reduce(problem: MatrixFactorization, factors: Factors) -> Reduction:
    left, right = _sides((problem.u, problem.v), (factors.a, factors.b.T))
    core = Factors(
        jnp.concatenate([left.along, left.coordinates]),
        jnp.concatenate([right.along, right.coordinates]).T,
    )
    return Reduction(
        DiagonalFactorization(problem.singular_values, core.shape),
        core,
        Frames(problem.u, left.frame, problem.v, right.frame),
    )
