"""The reduction: the same flow on the smallest matrices that hold it, and the way back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import judged
from lorajax.factors import Factors
from lorajax.problems import DiagonalFactorization, MatrixFactorization


class Frames(NamedTuple):
    """Orthonormal frames in which a flow stays: the target's singular vectors and the start's rest.

    Attributes:
      u: left singular vectors of the target, shape (m, k).
      u_rest: frame of what the start's A has across them, shape (m, p - k).
      v: right singular vectors of the target, shape (n, k).
      v_rest: frame of what the start's B has across them, shape (n, q - k).
      beyond: what the start has outside all frames: zeros, that carry the derivatives in the
        directions which leave the frames. `Path.factors` takes them along; `lift` alone does not.
    """

    u: Float[Array, "m k"]
    u_rest: Float[Array, "m j"]
    v: Float[Array, "n k"]
    v_rest: Float[Array, "n l"]
    beyond: Factors

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
    """One factor: along the target's frame, a frame and coordinates of the rest, and beyond."""

    along: Array
    frame: Array
    coordinates: Array
    beyond: Array


def _deriving(value: Array, source: Array) -> Array:
    """`value` to the last bit, with the derivative of `source`."""
    return value + (source - jax.lax.stop_gradient(source))


def _side(along: Array, rest: Array, frame: Array, coordinates: Array) -> _Side:
    """Fills in the derivatives, the frame of the rest held still.

    A QR has none where the rest is 0 or of less than full rank, as LoRA's B is. None is needed: the
    flow knows the rest E by `EᵀE = RᵀR` alone, and `E = Q R` makes `dR = Qᵀ dE` right to first
    order. What of dE leaves the frame is kept beside it.
    """
    inside = frame.T @ rest
    beyond = _deriving(jnp.zeros_like(rest), rest - frame @ inside)
    return _Side(along, frame, _deriving(coordinates, inside), beyond)


def _sides(frames: tuple[Array, Array], factors: tuple[Array, Array]) -> tuple[_Side, _Side]:
    """Splits A and Bᵀ, both (rows, r), into what lies along the target's frames and the rest."""
    along = [frame.T @ factor for frame, factor in zip(frames, factors, strict=True)]
    rests = [factor - frame @ x for frame, factor, x in zip(frames, factors, along, strict=True)]
    most = max(x.shape[0] for x in rests)
    padded = jnp.stack([jnp.pad(x, ((0, most - x.shape[0]), (0, 0))) for x in rests])
    # One call for both: two that do not depend on each other can block XLA's threads for good.
    q, upper = jnp.linalg.qr(jax.lax.stop_gradient(padded))
    sides = []
    for i, frame in enumerate(frames):
        (rows, k), r = frame.shape, factors[i].shape[1]
        still, factor = jax.lax.stop_gradient((frame, factors[i]))
        if rows - k <= r:
            # The complement is no larger than the rest could be: a frame of all of it is exact and,
            # unlike a QR of the rest, well defined when the rest vanishes.
            complement = jnp.linalg.qr(still, mode="complete")[0][:, k:]
            sides.append(_side(along[i], rests[i], complement, complement.T @ factor))
        else:
            sides.append(_side(along[i], rests[i], q[i, :rows], upper[i]))
    return sides[0], sides[1]


@judged
def reduce(problem: MatrixFactorization, factors: Factors) -> Reduction:
    """The same flow on the smallest matrices that hold it.

    Args:
      problem: matrix factorization with a target of rank k and shape (m, n).
      factors: the start, of rank r.

    Returns:
      A Reduction whose flow, lifted, is the flow of `problem` from `factors`, exactly: what A has
      across the target's left singular vectors keeps its column space, since Ȧ there is −A(BBᵀ).
      First derivatives, by the start and by the target (whose frames stay orthonormal), are right
      for any start; second ones are not: take them from the flow at full size.

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
        Frames(
            problem.u,
            left.frame,
            problem.v,
            right.frame,
            Factors(left.beyond, right.beyond.T),
        ),
    )
