"""Adaptive Runge–Kutta steps for many lanes, each with a step size of its own.

`vmap` of an adaptive solver copies its save buffers in every step and works on matrices that are
too small. Here all lanes take their steps side by side in one loop, a field may fold them into a
single large product, and only what is observed is kept. The method is that of `diffrax.Dopri8`: its
tableau and its interpolation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from lorajax.flows.path import CONVERGED, FAILED, MAX_STEPS, NON_FINITE

_TABLEAU = diffrax.Dopri8.tableau
_DENSE = np.asarray(diffrax.Dopri8.interpolation_cls.eval_coeffs)  # type: ignore[attr-defined]
_ORDER, _SAFETY, _SHRINK, _GROW = 8, 0.9, 0.2, 10.0


class Stepped(NamedTuple):
    """What was seen along the flows.

    Attributes:
      observed: what `observe` returned, leaves of shape (lanes, times, …).
      status: int32 code of each lane, as in `flows.STATUS`.
      steps: int32, steps that each lane tried.
    """

    observed: Any
    status: Int[Array, " lanes"]
    steps: Int[Array, " lanes"]


class _State(NamedTuple):
    time: Array
    step: Array
    state: Any
    slope: Any
    next: Array
    observed: Any
    status: Array
    steps: Array


class _Lanes(NamedTuple):
    """What depends on where the lanes are: their axis, their number, and their tolerances."""

    axis: int
    count: int
    size: int
    rtol: Array
    atol: Array

    def spread(self, vector: Array, like: Array) -> Array:
        """One number a lane, in the shape of a leaf of the state."""
        around = (1,) * (like.ndim - 1)
        return vector.reshape((-1, *around) if self.axis == 0 else (*around, -1))

    def norm(self, tree: Any, scale: Any) -> Array:
        """Root mean square of each lane's entries, in units of their scale."""
        squares = [
            jnp.sum((x / s) ** 2, axis=tuple(i for i in range(x.ndim) if i != self.axis % x.ndim))
            for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(scale), strict=True)
        ]
        return jnp.sqrt(sum(squares[1:], squares[0]) / self.size)

    def tolerance(self, *trees: Any) -> Any:
        """What an entry may be off by, from one state or from both ends of a step."""

        def of(*xs):
            most = xs[0] if len(xs) == 1 else jnp.maximum(jnp.abs(xs[0]), jnp.abs(xs[1]))
            return self.spread(self.atol, xs[0]) + self.rtol * jnp.abs(most)

        return jax.tree.map(of, *trees)

    def combine(self, weights: Any, slopes: list[Any]) -> Any:
        """Weighted sum of slopes, each weight a number or one number a lane."""
        used = [(w, k) for w, k in zip(weights, slopes, strict=False) if not _is_zero(w)]

        def of(*xs):
            terms = [_weight(w, x, self.spread) * x for (w, _), x in zip(used, xs, strict=True)]
            return sum(terms[1:], terms[0])

        return jax.tree.map(of, *[k for _, k in used])

    def add(self, state: Any, step: Array, slope: Any) -> Any:
        """`state + step · slope`."""
        return jax.tree.map(lambda y, k: y + self.spread(step, y) * k, state, slope)

    def choose(self, ahead: Array, new: Any, old: Any) -> Any:
        """The new state for the lanes that went ahead, the old one for the others."""
        return jax.tree.map(lambda n, o: jnp.where(self.spread(ahead, n), n, o), new, old)


def _record(lanes: _Lanes, times: Array, observe, carry: _State, slopes: list[Any], ahead: Array):
    """Observes every lane at the times that its step has passed, one time of each in a go."""
    last, reach = times.shape[0] - 1, carry.time + carry.step

    def due(at: Array) -> Array:
        return ahead & (at < times.shape[0]) & (times[jnp.minimum(at, last)] <= reach)

    def one(inner):
        at, observed = inner
        now = due(at)
        share = jnp.where(now, (times[jnp.minimum(at, last)] - carry.time) / carry.step, 0)
        powers = jnp.stack([share**p for p in range(6, 0, -1)])
        weights = jnp.sum(_DENSE.astype(times.dtype)[:, :, None] * powers[None], axis=1)
        seen = observe(lanes.add(carry.state, carry.step, lanes.combine(list(weights), slopes)))
        row = jnp.where(now, at, times.shape[0])
        lane = jnp.arange(lanes.count)
        observed = jax.tree.map(
            lambda out, x: out.at[lane, row].set(x, mode="drop"), observed, seen
        )
        return at + now.astype(at.dtype), observed

    return lax.while_loop(lambda i: jnp.any(due(i[0])), one, (carry.next, carry.observed))


def _advance(
    lanes: _Lanes, times: Array, field, observe, max_steps: int, active: Array, carry: _State
) -> _State:
    """One step of every active lane: taken where its error allows, shorter next time elsewhere."""
    slopes, end = [carry.slope], carry.state
    for row in _TABLEAU.a_lower:
        # The last stage is the end of the step, and its slope the first of the next.
        end = lanes.add(carry.state, carry.step, lanes.combine(row, slopes))
        slopes.append(field(end))
    wrong = lanes.combine(_TABLEAU.b_error, slopes)
    wrong = jax.tree.map(lambda x: lanes.spread(carry.step, x) * x, wrong)
    error = lanes.norm(wrong, lanes.tolerance(carry.state, end))
    finite = jnp.isfinite(error)
    good = finite & (error <= 1)
    ahead = good & active
    at, observed = _record(lanes, times, observe, carry, slopes, ahead)
    factor = _SAFETY * jnp.where(error > 0, error, 1e-12) ** (-1 / _ORDER)
    factor = jnp.where(finite, jnp.clip(factor, _SHRINK, _GROW), _SHRINK)
    factor = jnp.where(good, factor, jnp.minimum(factor, 1))
    step = jnp.where(active, carry.step * factor, carry.step)
    time = jnp.where(ahead, carry.time + carry.step, carry.time)
    steps = carry.steps + active.astype(jnp.int32)
    # A lane is stuck where a step no longer moves its own time, wherever the last time may be.
    stuck = active & ~(time + step > time)
    status = jnp.where(stuck, jnp.where(finite, FAILED, NON_FINITE), carry.status)
    status = jnp.where(active & ~stuck & (steps >= max_steps), MAX_STEPS, status)
    return _State(
        time,
        step,
        lanes.choose(ahead, end, carry.state),
        lanes.choose(ahead, slopes[-1], carry.slope),
        at,
        observed,
        status.astype(jnp.int32),
        steps,
    )


def integrate(
    field: Callable[[Any], Any],
    start: Any,
    times: Float[Array, " t"],
    rtol: float | Float[Array, ""],
    atol: Float[Array, " lanes"],
    observe: Callable[[Any], Any],
    *,
    axis: int = 0,
    max_steps: int = 2**17,
) -> Stepped:
    """Integrates `ẏ = field(y)` for all lanes from time 0.

    Args:
      field: of the state of all lanes.
      start: arrays with lanes on one axis.
      times: when to observe, shape (t,), increasing, from 0 on.
      rtol: relative tolerance of a step; at least 8 rounding units of the dtype are allowed, and
        `atol` is raised by as much as that raises it.
      atol: absolute tolerance of each lane.
      observe: of the state of all lanes; returns arrays with lanes on the first axis.
      axis: of the lanes in the state, 0 (the first) or −1 (the last).
      max_steps: a lane that needs more ends with status "max steps".

    Returns:
      A Stepped, with NaN from the time on at which a lane failed: its field was not finite, or no
      step that still moves its time was short enough.
    """
    leaves = jax.tree.leaves(start)
    count, dtype = leaves[0].shape[axis], times.dtype
    asked = jnp.asarray(rtol, dtype)
    rtol = jnp.maximum(asked, 8 * jnp.finfo(dtype).eps)
    atol = atol * (rtol / asked)
    lanes = _Lanes(axis, count, sum(x.size for x in leaves) // count, rtol, atol)

    def running(carry: _State) -> Array:
        return (carry.next < times.shape[0]) & (carry.status == CONVERGED)

    def advance(carry: _State) -> _State:
        return _advance(lanes, times, field, observe, max_steps, running(carry), carry)

    slope = field(start)
    scale = lanes.tolerance(start)
    pace, speed = lanes.norm(start, scale), lanes.norm(slope, scale)
    first = jnp.where(speed > 0, 0.01 * pace / jnp.where(speed > 0, speed, 1), times[-1])
    seen = jax.eval_shape(observe, start)
    observed = jax.tree.map(
        lambda x: jnp.full((count, times.shape[0], *x.shape[1:]), jnp.nan, x.dtype), seen
    )
    zeros = jnp.zeros((count,), jnp.int32)
    carry = _State(
        jnp.zeros((count,), dtype), first, start, slope, zeros, observed, zeros + CONVERGED, zeros
    )
    done = lax.while_loop(lambda c: jnp.any(running(c)), advance, carry)
    return Stepped(done.observed, done.status, done.steps)


def _is_zero(weight: Any) -> bool:
    return isinstance(weight, float) and bool(weight == 0.0)


def _weight(weight: Any, like: Array, spread) -> Any:
    if isinstance(weight, jax.Array):
        return spread(weight, like)
    return jnp.asarray(weight, like.dtype)
