"""The nuclear-norm problem, solved to a certified gap by an accelerated proximal method."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lorajax.environment.judging import NOT_NEGATIVE, POSITIVE, at_least, judged
from lorajax.factors import check_positive
from lorajax.optima.certificate import Certificate, batched, certify
from lorajax.problems import Linearized

CHECK_EVERY = 20
"""Steps between two certificates, each of which costs about one step."""


class Optimum(NamedTuple):
    """A global minimum of `L̂ + w‖·‖_*`, and the proof.

    Attributes:
      update: X, a matrix for each weight.
      certificate: of X; its gap says how close it is, whatever the status.
      steps: proximal steps taken.
      converged: whether the gap reached the tolerance.
    """

    update: Any
    certificate: Certificate
    steps: Int[Array, ""]
    converged: Array


def shrink_singular_values(tree: Any, threshold: Float[Array, ""]) -> Any:
    """The proximal map of the nuclear norm: singular values less `threshold`, none below 0."""

    def one(stack: Array) -> Array:
        u, s, vt = jnp.linalg.svd(stack, full_matrices=False)
        return (u * jnp.maximum(s - threshold, 0)[:, None, :]) @ vt

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, batched(one, leaves))


def _dot(x: Any, y: Any) -> Array:
    return jnp.sum(jnp.stack(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum(a * b), x, y))))


def smoothness(problem: Linearized, steps: int = 30) -> Float[Array, ""]:
    """A lower estimate of the largest curvature of L̂, by power iteration on JᵀcJ.

    Args:
      problem: the problem.
      steps: of the power iteration.

    Returns:
      The loss's curvature bound times the Rayleigh quotient reached, never above the true constant
      β = curvature · ‖JᵀcJ‖₂.
    """
    c = problem.sample_weights[:, None]
    start = problem.jacobian.pull(c * jnp.ones_like(problem.outputs))
    # A start that the data may be blind to gets company that it is not.
    bump = problem.jacobian.pull(c * problem.targets)
    vector = jax.tree.map(jnp.add, start, bump)
    tiny = jnp.finfo(problem.dtype).tiny

    def step(_: Any, carry: Any) -> Any:
        vector, _ = carry
        scale = 1 / jnp.sqrt(jnp.maximum(_dot(vector, vector), tiny))
        unit = jax.tree.map(lambda x: scale * x, vector)
        pushed = problem.jacobian.push(unit)
        return problem.jacobian.pull(c * pushed), jnp.sum(c * pushed**2)

    found = jax.lax.fori_loop(0, steps, step, (vector, jnp.zeros((), problem.dtype)))[1]
    return jnp.maximum(problem.loss_of_outputs.curvature * found, tiny)


class _State(NamedTuple):
    x: Any
    z: Array
    last_x: Any
    last_z: Array
    momentum: Array
    beta: Array
    steps: Array
    certificate: Certificate


@judged(decay=NOT_NEGATIVE, tolerance=POSITIVE, max_steps=at_least(1))
def minimize(
    problem: Linearized,
    decay: float | Float[Array, ""],
    *,
    start: Any = None,
    tolerance: float | Float[Array, ""] = 1e-10,
    max_steps: int = 20_000,
) -> Optimum:
    """Minimizes `L̂(X) + w‖X‖_*` over full matrices, to a certified duality gap.

    Accelerated proximal gradient (FISTA) with two safeguards: momentum restarts whenever it points
    uphill, and the step shrinks wherever it proves too long for the data's curvature. Pure: fit for
    `jit` and `vmap`, where all lanes run until the slowest has its certificate.

    Args:
      problem: a linearized problem; with features written out or not.
      decay: w > 0.
      start: a matrix for each weight; zero if None.
      tolerance: gap to reach, relative to L̂(0).
      max_steps: proximal steps at most, rounded up to a multiple of CHECK_EVERY.

    Returns:
      An Optimum. It never raises from within: look at `converged`, and at the certificate's gap.

    Raises:
      ValueError: for a decay or a tolerance that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, lorajax
      >>> features = jax.random.normal(jax.random.key(0), (12, 1, 6, 5))
      >>> problem = lorajax.Linearized.from_features(features, jnp.ones((12, 1)))
      >>> found = lorajax.optima.minimize(problem, 0.1)
      >>> bool(found.converged), bool(found.certificate.gap < 1e-9)
      (True, True)

    Source: Beck, Teboulle 2009 and O'Donoghue, Candès 2015 (recalled); that the gap bounds the
    error is derived in `optima.certificate`.
    """
    check_positive(decay=decay, tolerance=tolerance)
    dtype = problem.dtype
    start = problem.zero() if start is None else start
    return _minimize(
        problem, jnp.asarray(decay, dtype), start, jnp.asarray(tolerance, dtype), max_steps
    )


@eqx.filter_jit
def _minimize(problem, w, start, tolerance, max_steps: int) -> Optimum:
    problem = problem.hoisted()
    push, pull = problem.jacobian.push, problem.jacobian.pull
    c = problem.sample_weights[:, None]
    curvature = problem.loss_of_outputs.curvature
    goal, tiny = tolerance * problem.loss(problem.zero()), jnp.finfo(w.dtype).tiny

    def step(_: Any, s: _State) -> _State:
        # Outputs are affine in X, so that those of the extrapolated point cost nothing.
        momentum = (1 + jnp.sqrt(1 + 4 * s.momentum**2)) / 2
        ahead = (s.momentum - 1) / momentum
        y = jax.tree.map(lambda x, last: x + ahead * (x - last), s.x, s.last_x)
        z = s.z + ahead * (s.z - s.last_z)
        gradient = pull(problem.residual(z))
        moved = jax.tree.map(lambda a, g: a - g / s.beta, y, gradient)
        x = shrink_singular_values(moved, w / s.beta)
        change = jax.tree.map(jnp.subtract, x, y)
        pushed = push(change)
        # curvature · ‖√c J d‖² ≤ β ‖d‖² is all that the step's proof asks of β.
        needed = curvature * jnp.sum(c * pushed**2)
        short = _dot(change, change)
        accept = needed <= s.beta * short * (1 + 1e-9) + tiny
        uphill = _dot(change, jax.tree.map(jnp.subtract, x, s.x)) < 0
        keep = functools.partial(jnp.where, accept)
        return _State(
            jax.tree.map(keep, x, s.x),
            keep(problem.outputs + push(x), s.z),
            s.x,
            s.z,
            jnp.where(accept & ~uphill, momentum, 1),
            keep(s.beta, jnp.maximum(1.5 * s.beta, 1.05 * needed / jnp.maximum(short, tiny))),
            s.steps + 1,
            s.certificate,
        )

    def several(s: _State) -> _State:
        s = jax.lax.fori_loop(0, CHECK_EVERY, step, s)
        return s._replace(certificate=certify(problem, s.x, w))

    def going(s: _State) -> Array:
        return (s.certificate.gap > goal) & (s.steps < max_steps)

    z = problem.outputs + push(start)
    state = _State(
        start,
        z,
        start,
        z,
        jnp.ones((), w.dtype),
        smoothness(problem),
        jnp.zeros((), jnp.int32),
        certify(problem, start, w),
    )
    end = jax.lax.while_loop(going, several, state)
    return Optimum(end.x, end.certificate, end.steps, end.certificate.gap <= goal)
