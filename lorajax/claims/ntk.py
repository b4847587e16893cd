"""Instances of the NTK regime, and LoRA runs on them until they rest.

Gaussian features and targets, one output, squared loss; the decay is a share of ‖∇L̂(0)‖₂, the
least decay at which nothing is learned. Ranks and sample counts are masks, so that a whole map over
both is one program: zero columns of A beside zero rows of B stay zero, and a sample of weight 0
does not count.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lorajax import optima
from lorajax.factors import Factors
from lorajax.flows import accelerated, descend
from lorajax.optima.proximal import smoothness
from lorajax.problems import Decayed, Linearized

SIZE, SAMPLES, MOST_RANK = 8, 20, 7
SHARE = 0.1
"""Decay over ‖∇L̂(0)‖₂."""
SCALE = 0.5
"""Standard deviation of the entries of both factors at the start."""
STEP = 1.2
CERTIFIED = 1e-8
"""Gap relative to L̂(0) up to which a run counts as global."""


Lanes = Float[Array, "*lanes"] | Float[np.ndarray, "*lanes"]


class Rest(NamedTuple):
    """Where a run has come to rest; every field may lead with lanes.

    Attributes:
      factors: the end.
      certificate: of the end, by LoRA's objective.
      scale: L̂(0), the unit of objectives and gaps.
      decay: w.
      residual: norm of the objective's gradient in the factors over w: 0 at a stationary point.
    """

    factors: Factors
    certificate: optima.Certificate
    scale: Lanes
    decay: Lanes
    residual: Lanes

    @property
    def gap(self) -> Lanes:
        """The certified gap over L̂(0)."""
        return self.certificate.gap / self.scale

    @property
    def objective(self) -> Lanes:
        """LoRA's objective over L̂(0)."""
        return self.certificate.objective / self.scale


def masked_problem(
    features: Float[Array, "N 1 m n"], targets: Float[Array, "N 1"], samples: Any
) -> Linearized:
    """The squared loss on the first `samples` data, a number that may be traced."""
    problem = Linearized.from_features(features, targets)
    count = jnp.asarray(samples).astype(features.dtype)
    weights = (jnp.arange(len(features)) < jnp.asarray(samples)).astype(features.dtype) / count
    return eqx.tree_at(lambda p: p.sample_weights, problem, weights)


def masked_factors(factors: Factors, rank: Any) -> Factors:
    """Factors of which the first `rank` directions are kept, a number that may be traced."""
    keep = (jnp.arange(factors.rank) < jnp.asarray(rank)).astype(factors.a.dtype)
    return Factors(factors.a * keep[None, :], factors.b * keep[:, None])


def normals(key: Any, *shapes: tuple[int, ...]) -> list[Array]:
    """Standard normal arrays of several shapes by one draw: each draw compiles for a second."""
    sizes = [math.prod(shape) for shape in shapes]
    values = jax.random.normal(key, (sum(sizes),))
    parts = jnp.split(values, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def decay_of(problem: Linearized, share: Any = SHARE) -> Array:
    """`share · ‖∇L̂(0)‖₂`."""
    return share * jnp.linalg.norm(problem.full_gradient(problem.zero()), 2)


def come_to_rest(
    problem: Linearized,
    decay: Any,
    start: Factors,
    steps: int,
    perturbation: Any = None,
    *,
    step: Any = STEP,
) -> Rest:
    """Accelerated gradient descent on LoRA's objective, from a start to where it rests.

    The step is `step` over the curvature of L̂; gradients of more than thrice ‖∇L̂(0)‖₂ are shortened
    to that, so that large starts do not blow up.

    Args:
      problem: a linearized problem of one weight.
      decay: w > 0.
      start: factors.
      steps: of the descent.
      perturbation: P as in `Decayed`; zero if None.
      step: in units of 1/curvature.

    Returns:
      A Rest. Whether it rests is to be read off its `residual`.
    """
    m, n = problem.shape
    if perturbation is None:
        perturbation = jnp.zeros((m + n, m + n), problem.dtype)
    penalized = Decayed(problem, jnp.asarray(decay, problem.dtype), perturbation)
    largest = 3 * jnp.linalg.norm(problem.full_gradient(problem.zero()), 2)
    rate = step / smoothness(problem)
    optimizer = optax.chain(
        optax.clip_by_global_norm(largest),  # pyright: ignore[reportArgumentType]
        accelerated(rate),
    )
    path = descend(penalized, start, optimizer, steps, every=steps)
    end = jax.tree.map(lambda x: x[-1], path.core)
    slope = penalized.gradient(end)
    residual = jnp.sqrt(jnp.sum(slope.a**2) + jnp.sum(slope.b**2)) / decay
    certificate = optima.certify(problem, end, decay, perturbation=perturbation)
    return Rest(end, certificate, problem.loss(problem.zero()), jnp.asarray(decay), residual)
