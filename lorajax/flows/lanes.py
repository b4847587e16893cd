"""Many flows at once: the engines behind sweeps, each for lanes on the first axis.

| engine | for | how |
|---|---|---|
| `closed_form` | λ-balanced starts of a matrix factorization | `exact.lanes`, no steps at all |
| `reduced_ode` | any start of a matrix factorization | Dopri8 in the frames, `stepping` |
| `two_layer` | two frozen layers, which have no reduction | Dopri8, constants fold all lanes |
| `full_ode` | any problem | Dopri8 on the problem's own gradient |

`plan.choose` says which one a problem and a start allow. All engines are pure functions that may be
traced, so that `sweep(…, batched=True)` can run them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import POSITIVE, at_least, judged
from lorajax.exact import lanes, reduce
from lorajax.exact.jacobi import jacobi
from lorajax.factors import Factors
from lorajax.flows import stepping
from lorajax.flows.buckets import RTOL, LanePaths, absolute, by_amplitude, turn
from lorajax.flows.path import CONVERGED, NON_FINITE
from lorajax.flows.plan import Engine, choose, reduced_shape
from lorajax.flows.two_layer import two_layer
from lorajax.problems import MatrixFactorization, TwoLayer, check_times


def _per_lane(problem: MatrixFactorization, count: int) -> Array:
    s = problem.singular_values
    return s if s.ndim == 2 else jnp.broadcast_to(s, (count, *s.shape))


def _along(frame: Array, factor: Array) -> tuple[Array, Array]:
    """`UᵀA` and `‖A‖²` of every lane."""
    if frame.ndim == 3:
        return jnp.einsum("lmk,lmr->lkr", frame, factor), jnp.sum(factor**2, axis=(1, 2))

    def one(a: Array) -> tuple[Array, Array]:
        return frame.T @ a, jnp.sum(a**2)

    # One product for all lanes would first copy all of A into another layout, and would round
    # otherwise for another number of lanes.
    return jax.lax.map(one, factor)


def _reduce(problem: MatrixFactorization, factors: Factors):
    axis = 0 if problem.singular_values.ndim == 2 else None
    return jax.vmap(reduce, in_axes=(axis, 0))(problem, factors)


@judged
def closed_form(
    problem: MatrixFactorization,
    factors: Factors,
    times: Float[Array, " t"],
    *,
    one_sided: bool,
    observe: tuple[str, ...] = ("singular_values",),
) -> LanePaths:
    """Observables of λ-balanced flows, without an ODE solver.

    Args:
      problem: one for all lanes, or one a lane (every array with a leading axis).
      factors: λ-balanced starts, shapes (lanes, m, r) and (lanes, r, n). That they are balanced is
        not looked at here: `choose` does.
      times: t ≥ 0, shape (t,).
      one_sided: whether B is 0 in all lanes (the columns that never learn are then left out).
      observe: of "singular_values" and "losses".

    Returns:
      LanePaths. Error of the singular values: a few rounding units of s_1.

    Source: theory section 2.1 (derived) and `exact.lanes`.
    """
    check_times(times)
    if one_sided:
        s = _per_lane(problem, factors.a.shape[0])
        along, size = _along(problem.u, factors.a)
        form = lanes.one_sided(s, size / factors.rank, along)
    else:
        size = jnp.sum(factors.a**2, axis=(1, 2)) - jnp.sum(factors.b**2, axis=(1, 2))
        level = size / factors.rank
        reduction = _reduce(problem, factors)
        form = lanes.two_sided(reduction.problem, reduction.factors, level)
    functions = {"singular_values": lanes.singular_values, "losses": lanes.losses}
    observed = {name: functions[name](form, times) for name in observe}
    return _finished(observed, jnp.zeros((factors.a.shape[0],), jnp.int32))


def _finished(observed: dict[str, Array], steps: Array) -> LanePaths:
    finite = jnp.ones(steps.shape, bool)
    for x in observed.values():
        finite &= jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    return LanePaths(observed, jnp.where(finite, CONVERGED, NON_FINITE).astype(jnp.int32), steps)


def _descending_values(y: Array, root: Array) -> Array:
    """Singular values of `[R yᵀ; y yᵀ]` for y (lanes, t, k, r) and R = diag(root), (lanes, r)."""
    flat = jnp.moveaxis(y.reshape(-1, *y.shape[2:]), 0, -1)
    width = jnp.repeat(root, y.shape[1], axis=0).T
    inner = jnp.sum(flat[:, None] * flat[None], axis=2)
    columns = jnp.concatenate([flat * width[None], inner], axis=1)
    return jacobi(columns).T.reshape(*y.shape[:2], -1)


def _lora_field(s: Array, weights: Array, state: Any) -> Any:
    """B = 0 at the start: what A has across the modes follows from `AᵀA − BBᵀ = diag(weights)`."""
    x, y = state
    cross = jnp.sum(x[:, None] * y[None], axis=2)
    inner = jnp.sum(y[:, None] * y[None], axis=2)
    dx = s[:, None] * y - jnp.sum(cross[:, :, None] * y[None], axis=1)
    dy = s[:, None] * x - jnp.sum(inner[:, :, None] * y[None], axis=1) - weights[None] * y
    return dx, dy


@judged(rtol=POSITIVE, max_steps=at_least(1), bucket=at_least(1))
def reduced_ode(
    problem: MatrixFactorization,
    factors: Factors,
    times: Float[Array, " t"],
    *,
    one_sided: bool,
    observe: tuple[str, ...] = ("singular_values",),
    rtol: float | Float[Array, ""] = RTOL,
    max_steps: int = 2**17,
    bucket: int = 16,
) -> LanePaths:
    """Observables of flows from any start, integrated in the reduced frames.

    Args:
      problem: one for all lanes, or one a lane.
      factors: starts, shapes (lanes, m, r) and (lanes, r, n).
      times: shape (t,), increasing, from 0 on.
      one_sided: whether B is 0 in all lanes; conservation of `AᵀA − BBᵀ` then leaves 2kr unknowns
        where no losses are observed, which need what A has across the modes.
      observe: of "singular_values" and "losses".
      rtol: relative tolerance of a step; the absolute one is this times the start's amplitude.
      max_steps: lanes that need more end with status "max steps".
      bucket: lanes that step together.

    Returns:
      LanePaths with what `observe` names.

    Source: theory section 1 (derived). The elimination of A across the modes is derived here.
    """
    check_times(times)
    one_sided = one_sided and "losses" not in observe
    run = _lora_bucket if one_sided else functools.partial(_frames_bucket, observe)
    run = functools.partial(run, times, jnp.asarray(rtol, times.dtype), max_steps)
    count = factors.a.shape[0]
    s = _per_lane(problem, count)
    if one_sided:
        along, _ = _along(problem.u, factors.a)
        turned, weights = jax.lax.map(_turned, (factors.a, along))
        start = Factors(turned, jnp.zeros_like(turn(turned)))
        return by_amplitude(run, bucket, s, weights, start)
    core = _reduce(problem, factors).factors
    return by_amplitude(run, bucket, s, core)


def _turned(lane: tuple[Array, Array]) -> tuple[Array, Array]:
    """What A has along the modes, in the frame in which `AᵀA` is the diagonal that is returned."""
    a, along = lane
    weights, turn = jnp.linalg.eigh(a.T @ a)
    return along @ turn, jnp.maximum(weights, 0)


def _lora_bucket(times, rtol, max_steps, s, weights, start) -> LanePaths:
    x = jnp.moveaxis(start.a, 0, -1)
    found = stepping.integrate(
        functools.partial(_lora_field, s.T, weights.T),
        (x, jnp.zeros_like(x)),
        times,
        rtol,
        absolute(rtol, start),
        lambda state: jnp.moveaxis(state[1], -1, 0),
        axis=-1,
        max_steps=max_steps,
    )
    k, r = start.a.shape[1:]
    values = _descending_values(found.observed, jnp.sqrt(weights))[..., : min(k, r)]
    return LanePaths({"singular_values": values}, found.status, found.steps)


def _frames_field(s: Array, state: Any) -> Any:
    """Gram form with lanes last: A (p, r, lanes) and Bᵀ (q, r, lanes)."""
    a, bt = state
    k = s.shape[0]
    gram_a = jnp.sum(a[:, :, None] * a[:, None], axis=0)
    gram_b = jnp.sum(bt[:, :, None] * bt[:, None], axis=0)
    s_b = jnp.pad(s[:, None] * bt[:k], ((0, a.shape[0] - k), (0, 0), (0, 0)))
    s_a = jnp.pad(s[:, None] * a[:k], ((0, bt.shape[0] - k), (0, 0), (0, 0)))
    return (
        s_b - jnp.sum(a[:, :, None] * gram_b[None], axis=1),
        s_a - jnp.sum(bt[:, :, None] * gram_a[None], axis=1),
    )


def _product_values(a: Array, bt: Array) -> Array:
    """Singular values of `A B` for A (…, p, r) and Bᵀ (…, q, r); NaN where one is not finite."""
    most, lead = max(a.shape[-2], bt.shape[-2], a.shape[-1]), [(0, 0)] * (a.ndim - 2)
    both = jnp.stack([jnp.pad(x, [*lead, (0, most - x.shape[-2]), (0, 0)]) for x in (a, bt)])
    fine = jnp.all(jnp.isfinite(both), axis=(0, -2, -1))
    # One call for both: two that do not depend on each other can block XLA's threads for good.
    upper = jnp.linalg.qr(jnp.where(fine[..., None, None], both, 0), mode="r")
    columns = jnp.moveaxis(upper[0] @ turn(upper[1]), (-1, -2), (0, 1))
    values = jnp.moveaxis(jacobi(columns), 0, -1)
    keep = min(a.shape[-2], bt.shape[-2], a.shape[-1])
    return jnp.where(fine[..., None], values[..., :keep], jnp.nan)


def _frames_losses(s: Array, a: Array, bt: Array) -> Array:
    """`½‖diag(s) − A B‖²` for A (lanes, t, p, r), Bᵀ (lanes, t, q, r) and s (lanes, k)."""
    product, k = a @ turn(bt), s.shape[-1]
    target = jnp.zeros((s.shape[0], 1, *product.shape[-2:]), s.dtype)
    target = target.at[:, 0, jnp.arange(k), jnp.arange(k)].set(s)
    return 0.5 * jnp.sum((target - product) ** 2, axis=(-2, -1))


def _frames_bucket(names, times, rtol, max_steps, s, start) -> LanePaths:
    state = jnp.moveaxis(start.a, 0, -1), jnp.moveaxis(jnp.swapaxes(start.b, 1, 2), 0, -1)

    def observe(state):
        return tuple(jnp.moveaxis(x, -1, 0) for x in state)

    found = stepping.integrate(
        functools.partial(_frames_field, s.T),
        state,
        times,
        rtol,
        absolute(rtol, start),
        observe,
        axis=-1,
        max_steps=max_steps,
    )
    functions = {
        "singular_values": _product_values,
        "losses": functools.partial(_frames_losses, s),
    }
    observed = {name: functions[name](*found.observed) for name in names}
    return LanePaths(observed, found.status, found.steps)


@judged(rtol=POSITIVE, max_steps=at_least(1), bucket=at_least(1))
def full_ode(
    problem: Any,
    factors: Any,
    times: Float[Array, " t"],
    *,
    observe: Callable[[Any], dict[str, Array]] | None = None,
    rtol: float | Float[Array, ""] = RTOL,
    max_steps: int = 2**17,
    bucket: int = 8,
) -> LanePaths:
    """Flows of any problem that all lanes share, on its own gradient.

    Args:
      problem: one for all lanes, with `loss` and `gradient`.
      factors: starts, every array with lanes on the first axis.
      times: shape (t,), increasing, from 0 on.
      observe: what to look at, from the factors of one lane; the losses if None.
      rtol: relative tolerance of a step; the absolute one is this times the start's amplitude.
      max_steps: lanes that need more end with status "max steps".
      bucket: lanes that step together.

    Returns:
      LanePaths with what `observe` returns.
    """
    check_times(times)
    if isinstance(problem, TwoLayer):
        return two_layer(
            problem, factors, times, observe=observe, rtol=rtol, max_steps=max_steps, bucket=bucket
        )
    look = (lambda f: {"losses": problem.loss(f)}) if observe is None else observe
    rtol = jnp.asarray(rtol, times.dtype)

    def field(state: Any) -> Any:
        return jax.tree.map(jnp.negative, jax.vmap(problem.gradient)(state))

    def run(start: Any) -> LanePaths:
        atol = absolute(rtol, start)
        found = stepping.integrate(
            field, start, times, rtol, atol, jax.vmap(look), max_steps=max_steps
        )
        return LanePaths(found.observed, found.status, found.steps)

    return by_amplitude(run, bucket, factors)


@judged(rtol=POSITIVE)
def spectra(
    problem: MatrixFactorization,
    factors: Factors,
    times: Float[Array, " t"],
    *,
    rtol: float = RTOL,
) -> tuple[LanePaths, Engine]:
    """Singular values of many flows, by the cheapest engine that is exact.

    Args:
      problem: one for all lanes.
      factors: concrete starts, shapes (lanes, m, r) and (lanes, r, n).
      times: shape (t,), increasing, from 0 on.
      rtol: relative tolerance of a step where an ODE is solved.

    Returns:
      LanePaths with "singular_values", and the engine that was chosen.

    Raises:
      ValueError: for shapes or times that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp, lorajax
      >>> from lorajax.flows import lanes
      >>> problem = lorajax.MatrixFactorization.from_spectrum(
      ...     jax.random.key(0), shape=(64, 48), singular_values=(4.0, 2.0)
      ... )
      >>> starts = jax.vmap(
      ...     lambda key: lorajax.initializers.orthogonal(key, problem.shape, 4, 1e-3)
      ... )(jax.random.split(jax.random.key(1), 10))
      >>> paths, engine = lanes.spectra(problem, starts, jnp.linspace(0.0, 20.0, 5))
      >>> paths.observed["singular_values"].shape, engine
      ((10, 5, 2), 'closed form')
    """
    check_times(times)
    shape = (factors.a.shape[-2], factors.b.shape[-1])
    if factors.a.ndim != 3 or factors.b.ndim != 3 or shape != problem.shape:
        raise ValueError(
            f"factors have shapes {factors.a.shape} and {factors.b.shape}; they must be "
            f"(lanes, m, r) and (lanes, r, n) with (m, n) = {problem.shape}."
        )
    engine, _ = choose(problem, factors)
    one_sided = not bool(jnp.any(factors.b))
    times = jnp.asarray(times, factors.a.dtype)
    if engine == "closed form":
        return _closed_form(problem, factors, times, one_sided=one_sided), engine
    return _reduced_ode(problem, factors, times, one_sided=one_sided, rtol=rtol), engine


_closed_form = jax.jit(closed_form, static_argnames=("one_sided", "observe"))
_reduced_ode = jax.jit(reduced_ode, static_argnames=("one_sided", "observe", "max_steps", "bucket"))

__all__ = [
    "RTOL",
    "LanePaths",
    "choose",
    "closed_form",
    "full_ode",
    "reduced_ode",
    "reduced_shape",
    "spectra",
    "two_layer",
]
