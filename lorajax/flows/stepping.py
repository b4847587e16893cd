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
      rtol: relative tolerance of a step.
      atol: absolute tolerance of each lane.
      observe: of the state of all lanes; returns arrays with lanes on the first axis.
      axis: of the lanes in the state, 0 (the first) or −1 (the last).
      max_steps: a lane that needs more ends with status "max steps".

    Returns:
      A Stepped, with NaN from the time on at which a lane failed.
    """
    leaves = jax.tree.leaves(start)
    lanes, dtype = leaves[0].shape[axis], times.dtype
    size = sum(x.size for x in leaves) // lanes
    rtol = jnp.asarray(rtol, dtype)

    def spread(vector: Array, like: Array) -> Array:
        around = (1,) * (like.ndim - 1)
        return vector.reshape((-1, *around) if axis == 0 else (*around, -1))

    def norm(tree: Any, scale: Any) -> Array:
        squares = [
            jnp.sum((x / s) ** 2, axis=tuple(i for i in range(x.ndim) if i != axis % x.ndim))
            for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(scale), strict=True)
        ]
        return jnp.sqrt(sum(squares[1:], squares[0]) / size)

    def tolerance(*trees: Any) -> Any:
        def of(*xs):
            most = xs[0] if len(xs) == 1 else jnp.maximum(jnp.abs(xs[0]), jnp.abs(xs[1]))
            return spread(atol, xs[0]) + rtol * jnp.abs(most)

        return jax.tree.map(of, *trees)

    def combine(weights: Any, slopes: list[Any]) -> Any:
        used = [(w, k) for w, k in zip(weights, slopes, strict=False) if not _is_zero(w)]

        def of(*xs):
            terms = [_weight(w, x, spread) * x for (w, _), x in zip(used, xs, strict=True)]
            return sum(terms[1:], terms[0])

        return jax.tree.map(of, *[k for _, k in used])

    def add(state: Any, step: Array, slope: Any) -> Any:
        return jax.tree.map(lambda y, k: y + spread(step, y) * k, state, slope)

    def record(carry, old, step, slopes, ahead):
        """Observes every lane at the times that its step has passed, one time of each in a go."""

        def due(at):
            return ahead & (at < times.shape[0]) & (times[jnp.minimum(at, last)] <= reach)

        def one(inner):
            at, observed = inner
            now = due(at)
            share = jnp.where(now, (times[jnp.minimum(at, last)] - carry.time) / step, 0)
            powers = jnp.stack([share**p for p in range(6, 0, -1)])
            weights = jnp.sum(_DENSE.astype(dtype)[:, :, None] * powers[None], axis=1)
            seen = observe(add(old, step, combine(list(weights), slopes)))
            row = jnp.where(now, at, times.shape[0])
            lane = jnp.arange(lanes)
            observed = jax.tree.map(
                lambda out, x: out.at[lane, row].set(x, mode="drop"), observed, seen
            )
            return at + now.astype(at.dtype), observed

        last, reach = times.shape[0] - 1, carry.time + step
        return lax.while_loop(lambda i: jnp.any(due(i[0])), one, (carry.next, carry.observed))

    def running(carry: _State) -> Array:
        return (carry.next < times.shape[0]) & (carry.status == CONVERGED)

    def advance(carry: _State) -> _State:
        active = running(carry)
        slopes = [carry.slope]
        for row in _TABLEAU.a_lower:
            inner = add(carry.state, carry.step, combine(row, slopes))
            slopes.append(field(inner))
        # The last stage is the end of the step, and its slope the first of the next.
        end = inner  # type: ignore[possibly-undefined]
        wrong = combine(_TABLEAU.b_error, slopes)
        wrong = jax.tree.map(lambda x: spread(carry.step, x) * x, wrong)
        error = norm(wrong, tolerance(carry.state, end))
        finite = jnp.isfinite(error)
        good = finite & (error <= 1)
        ahead = good & active
        at, observed = record(carry, carry.state, carry.step, slopes, ahead)
        factor = _SAFETY * jnp.where(error > 0, error, 1e-12) ** (-1 / _ORDER)
        factor = jnp.where(finite, jnp.clip(factor, _SHRINK, _GROW), _SHRINK)
        factor = jnp.where(good, factor, jnp.minimum(factor, 1))
        step = jnp.where(active, carry.step * factor, carry.step)
        steps = carry.steps + active.astype(jnp.int32)
        stuck = active & (step < 16 * jnp.finfo(dtype).eps * jnp.maximum(carry.time, times[-1]))
        status = jnp.where(stuck, jnp.where(finite, FAILED, NON_FINITE), carry.status)
        status = jnp.where(active & ~stuck & (steps >= max_steps), MAX_STEPS, status)

        def take(new, old):
            return jax.tree.map(lambda n, o: jnp.where(spread(ahead, n), n, o), new, old)

        return _State(
            jnp.where(ahead, carry.time + carry.step, carry.time),
            step,
            take(end, carry.state),
            take(slopes[-1], carry.slope),
            at,
            observed,
            status.astype(jnp.int32),
            steps,
        )

    slope = field(start)
    scale = tolerance(start)
    pace, speed = norm(start, scale), norm(slope, scale)
    first = jnp.where(speed > 0, 0.01 * pace / jnp.where(speed > 0, speed, 1), times[-1])
    seen = jax.eval_shape(observe, start)
    observed = jax.tree.map(
        lambda x: jnp.full((lanes, times.shape[0], *x.shape[1:]), jnp.nan, x.dtype), seen
    )
    zeros = jnp.zeros((lanes,), jnp.int32)
    carry = _State(
        jnp.zeros((lanes,), dtype), first, start, slope, zeros, observed, zeros + CONVERGED, zeros
    )
    done = lax.while_loop(lambda c: jnp.any(running(c)), advance, carry)
    return Stepped(done.observed, done.status, done.steps)


def _is_zero(weight: Any) -> bool:
    return isinstance(weight, float) and bool(weight == 0.0)


def _weight(weight: Any, like: Array, spread) -> Any:
    if isinstance(weight, jax.Array):
        return spread(weight, like)
    return jnp.asarray(weight, like.dtype)
