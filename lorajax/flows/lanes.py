"""Many flows at once: the engines behind sweeps, each for lanes on the first axis.

| engine | for | how |
|---|---|---|
| `closed_form` | λ-balanced starts of a matrix factorization | `exact.lanes`, no steps at all |
| `reduced_ode` | any start of a matrix factorization | Dopri8 in the frames, `stepping` |
| `two_layer` | two frozen layers, which have no reduction | Dopri8, constants folding all lanes |
| `full_ode` | any problem | Dopri8 on the problem's own gradient |

`choose` says which one a problem and a start allow. All engines are pure functions that may be
traced, so that `sweep(…, batched=True)` can run them.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lorajax.exact import is_balanced, lanes, reduce
from lorajax.factors import Factors, is_traced
from lorajax.flows import gradient, stepping
from lorajax.flows.path import CONVERGED, NON_FINITE
from lorajax.problems import MatrixFactorization, TwoLayer, TwoLayerFactors, check_times

Engine = Literal["closed form", "reduced ODE", "full ODE"]

RTOL = 3e-10
"""Relative tolerance of a step that keeps singular values within 1e-8 of s_1 over whole flows."""


class LanePaths(NamedTuple):
    """Observables of many flows.

    Attributes:
      observed: arrays of shape (lanes, times, …), or pytrees of them, by name.
      status: int32 code of each lane; see `flows.STATUS`.
      steps: int32, steps of each lane; 0 for the closed form, which takes none.
    """

    observed: dict[str, Any]
    status: Int[Array, " lanes"]
    steps: Int[Array, " lanes"]


def choose(problem: Any, factors: Any) -> tuple[Engine, str]:
    """The cheapest engine that is exact for a start, and why.

    Args:
      problem: any problem.
      factors: one concrete start, or a batch of them with lanes on the first axis.

    Returns:
      The engine's name and the reason in a sentence.
    """
    if not isinstance(problem, MatrixFactorization):
        return "full ODE", f"a {type(problem).__name__} has neither a closed form nor a reduction"
    if is_traced(factors):
        return "reduced ODE", "the start is traced, so that whether it is balanced is unknown"
    if not bool(jnp.all(is_balanced(factors))):
        p, q = reduced_shape(problem, factors.rank)
        (m, n) = problem.shape
        return "reduced ODE", f"the start is not balanced; frames of {p}×{q} hold the {m}×{n} flow"
    return "closed form", "the start is balanced, AᵀA − BBᵀ = λI"


def reduced_shape(problem: MatrixFactorization, rank: int) -> tuple[int, int]:
    """Size of the frames in which flows of a rank stay: k and at most r more on each side."""
    (m, n), k = problem.shape, problem.rank
    return k + min(rank, m - k), k + min(rank, n - k)


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


def _amplitude(factors: Any) -> Array:
    return jax.vmap(gradient.amplitude)(factors)


def _by_amplitude(run: Callable[..., LanePaths], bucket: int, *trees: Any) -> LanePaths:
    """Runs lanes in buckets of like amplitude: a bucket is done when its slowest lane is.

    The last bucket is filled up, however few its lanes: the program of a bucket is then the same
    for any number of lanes. Where stability limits the steps, their sizes follow rounding errors,
    and programs of other shapes round otherwise: lanes would differ within the tolerance.
    """
    count = jax.tree.leaves(trees[-1])[0].shape[0]
    order = jnp.argsort(_amplitude(trees[-1]))
    buckets = -(-count // bucket)
    index = jnp.concatenate([order, jnp.repeat(order[-1:], buckets * bucket - count)])
    split = jax.tree.map(lambda x: x[index].reshape(buckets, bucket, *x.shape[1:]), trees)
    found = jax.lax.map(lambda part: run(*part), split)
    back = jnp.argsort(order)
    return jax.tree.map(lambda x: x.reshape(buckets * bucket, *x.shape[2:])[:count][back], found)


def _descending_values(y: Array, root: Array) -> Array:
    """Singular values of `[R yᵀ; y yᵀ]` for y (lanes, t, k, r) and R = diag(root), (lanes, r)."""
    flat = jnp.moveaxis(y.reshape(-1, *y.shape[2:]), 0, -1)
    width = jnp.repeat(root, y.shape[1], axis=0).T
    inner = jnp.sum(flat[:, None] * flat[None], axis=2)
    columns = jnp.concatenate([flat * width[None], inner], axis=1)
    return lanes.jacobi(columns).T.reshape(*y.shape[:2], -1)


def _lora_field(s: Array, weights: Array, state: Any) -> Any:
    """B = 0 at the start: what A has across the modes follows from `AᵀA − BBᵀ = diag(weights)`."""
    x, y = state
    cross = jnp.sum(x[:, None] * y[None], axis=2)
    inner = jnp.sum(y[:, None] * y[None], axis=2)
    dx = s[:, None] * y - jnp.sum(cross[:, :, None] * y[None], axis=1)
    dy = s[:, None] * x - jnp.sum(inner[:, :, None] * y[None], axis=1) - weights[None] * y
    return dx, dy


def reduced_ode(
    problem: MatrixFactorization,
    factors: Factors,
    times: Float[Array, " t"],
    *,
    one_sided: bool,
    rtol: float | Float[Array, ""] = RTOL,
    max_steps: int = 2**17,
    bucket: int = 16,
) -> LanePaths:
    """Singular values of flows from any start, integrated in the reduced frames.

    Args:
      problem: one for all lanes, or one a lane.
      factors: starts, shapes (lanes, m, r) and (lanes, r, n).
      times: shape (t,), increasing, from 0 on.
      one_sided: whether B is 0 in all lanes; conservation of `AᵀA − BBᵀ` then leaves 2kr unknowns.
      rtol: relative tolerance of a step; the absolute one is this times the start's amplitude.
      max_steps: lanes that need more end with status "max steps".
      bucket: lanes that step together.

    Returns:
      LanePaths with "singular_values".

    Source: theory section 1 (derived). The elimination of A across the modes is derived here.
    """
    run = _lora_bucket if one_sided else _frames_bucket
    run = functools.partial(run, times, jnp.asarray(rtol, times.dtype), max_steps)
    count = factors.a.shape[0]
    s = _per_lane(problem, count)
    if one_sided:
        along, _ = _along(problem.u, factors.a)
        turned, weights = jax.lax.map(_turned, (factors.a, along))
        start = Factors(turned, jnp.zeros_like(_turn(turned)))
        return _by_amplitude(run, bucket, s, weights, start)
    core = _reduce(problem, factors).factors
    return _by_amplitude(run, bucket, s, core)


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
        _absolute(rtol, start),
        lambda state: jnp.moveaxis(state[1], -1, 0),
        axis=-1,
        max_steps=max_steps,
    )
    k, r = start.a.shape[1:]
    values = _descending_values(found.observed, jnp.sqrt(weights))[..., : min(k, r)]
    return LanePaths({"singular_values": values}, found.status, found.steps)


def _absolute(rtol: Array, start: Any) -> Array:
    amplitude = _amplitude(start)
    return jnp.maximum(rtol * amplitude, jnp.finfo(amplitude.dtype).tiny)


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
    columns = jnp.moveaxis(upper[0] @ _turn(upper[1]), (-1, -2), (0, 1))
    values = jnp.moveaxis(lanes.jacobi(columns), 0, -1)
    keep = min(a.shape[-2], bt.shape[-2], a.shape[-1])
    return jnp.where(fine[..., None], values[..., :keep], jnp.nan)


def _frames_bucket(times, rtol, max_steps, s, start) -> LanePaths:
    state = jnp.moveaxis(start.a, 0, -1), jnp.moveaxis(jnp.swapaxes(start.b, 1, 2), 0, -1)

    def observe(state):
        return tuple(jnp.moveaxis(x, -1, 0) for x in state)

    found = stepping.integrate(
        functools.partial(_frames_field, s.T),
        state,
        times,
        rtol,
        _absolute(rtol, start),
        observe,
        axis=-1,
        max_steps=max_steps,
    )
    values = _product_values(*found.observed)
    return LanePaths({"singular_values": values}, found.status, found.steps)


class _Rows(NamedTuple):
    """Both adapters with the rank on the second axis: constants then fold lanes and rank."""

    a1: Array
    b1: Array
    a2: Array
    b2: Array


def _turn(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


class _Frozen(NamedTuple):
    """Two frozen layers in the singular frames of W2, where it is a diagonal.

    Attributes:
      scale: singular values of W2, padded to the larger of its sides.
      w1: W1 in the frame of the hidden layer.
      shift: E in the frame of the output; its two thin factors where its rank is low.
      output, hidden: the frames, one vector a column.
    """

    scale: Array
    w1: Array
    shift: tuple[Array, ...]
    output: Array
    hidden: Array


def _freeze(problem: TwoLayer) -> _Frozen:
    """Frames that turn the two products with W2 into scalings, and thin factors of a thin E."""
    xp: Any = jnp if is_traced(problem) else np  # concrete even while a caller is being traced
    w1, w2, shift = (xp.asarray(x) for x in (problem.w1, problem.w2, problem.shift))
    output, scale, hidden = xp.linalg.svd(w2)
    scale = xp.pad(scale, (0, max(w2.shape) - scale.shape[0]))
    w1, shift = hidden @ w1, output.T @ shift
    factors: tuple[Any, ...] = (shift,)
    if not is_traced(problem):
        u, s, vt = np.linalg.svd(shift, full_matrices=False)
        rank = int(np.sum(s > max(shift.shape) * np.finfo(s.dtype).eps * s[0]))
        if 3 * rank <= min(shift.shape):
            factors = (u[:, :rank] * s[:rank], vt[:rank])
    return jax.tree.map(jnp.asarray, _Frozen(scale, w1, factors, output, hidden.T))


def _scaled_to(rows: Array, scale: Array, size: int) -> Array:
    """Rows times the diagonal W2 (or its transpose), with `size` columns."""
    keep = min(rows.shape[-1], size)
    found = rows[..., :keep] * scale[None, None, :keep]
    return jnp.pad(found, ((0, 0), (0, 0), (0, size - keep)))


def _two_layer_terms(frozen: _Frozen, state: _Rows):
    """Rows V, A2 of the left and B1, C of the right: the residual is `E − VB1 − A2C`."""
    a1, b1, a2, b2 = state
    inner = b2 @ _turn(a1)
    v = _scaled_to(a1, frozen.scale, a2.shape[-1]) + _turn(inner) @ a2
    left = jnp.concatenate([v, a2], axis=1)
    right = jnp.concatenate([b1, b2 @ frozen.w1], axis=1)
    return inner, left, right


def _two_layer_field(frozen: _Frozen, state: _Rows) -> _Rows:
    """Minus the gradient: constants times (lanes · rank) rows, and r×r Gram matrices of a lane."""
    a1, b1, a2, b2 = state
    r = a1.shape[1]
    inner, left, right = _two_layer_terms(frozen, state)
    by_right, by_left = right, left
    for factor in reversed(frozen.shift):
        by_right = by_right @ factor.T
    for factor in frozen.shift:
        by_left = by_left @ factor
    by_right = by_right - (right @ _turn(right)) @ left
    by_left = by_left - (left @ _turn(left)) @ right
    by_b1, by_c = by_right[:, :r], by_right[:, r:]
    by_v, by_a2 = by_left[:, :r], by_left[:, r:]
    both = by_a2 @ _turn(b1)  # A2ᵀ R B1ᵀ
    return _Rows(
        _scaled_to(by_b1, frozen.scale, a1.shape[-1]) + _turn(both) @ b2,
        by_v,
        by_c + inner @ by_b1,
        by_a2 @ frozen.w1.T + both @ a1,
    )


def _two_layer_losses(frozen: _Frozen, state: _Rows) -> Array:
    _, left, right = _two_layer_terms(frozen, state)
    shift = frozen.shift[0] if len(frozen.shift) == 1 else frozen.shift[0] @ frozen.shift[1]
    return 0.5 * jnp.sum((shift[None] - _turn(left) @ right) ** 2, axis=(1, 2))


def two_layer(
    problem: TwoLayer,
    factors: TwoLayerFactors,
    times: Float[Array, " t"],
    *,
    observe: Callable[[TwoLayerFactors], dict[str, Any]] | None = None,
    units: Float[Array, " lanes"] | None = None,
    rtol: float | Float[Array, ""] = RTOL,
    max_steps: int = 2**17,
    bucket: int = 8,
) -> LanePaths:
    """Flows of two frozen layers that all lanes share.

    Args:
      problem: one for all lanes.
      factors: starts with lanes on the first axis.
      times: shape (t,), increasing, from 0 on.
      observe: what to look at besides the losses, from the factors of one lane.
      units: unit of time of each lane, shape (lanes,), so that lanes with different horizons share
        `times`; 1 if None.
      rtol: relative tolerance of a step; the absolute one is this times the start's amplitude.
      max_steps: lanes that need more end with status "max steps".
      bucket: lanes that step together.

    Returns:
      LanePaths with "losses" and what `observe` returns.

    Source: theory section 1: every product is a constant matrix times a thin one, or smaller. In
    the singular frames of W2 its products are scalings, and those of a concrete E of low rank are
    thin; neither changes the flow.
    """
    (a1, b1), (a2, b2) = factors
    frozen = _freeze(problem)
    start = _Rows(_turn(a1) @ frozen.hidden, b1, _turn(a2) @ frozen.output, b2 @ frozen.hidden)
    rtol = jnp.asarray(rtol, times.dtype)

    def look(state: _Rows) -> dict[str, Any]:
        seen: dict[str, Any] = {"losses": _two_layer_losses(frozen, state)}
        if observe is not None:
            a1, b1, a2, b2 = state
            a1, a2, b2 = a1 @ frozen.hidden.T, a2 @ frozen.output.T, b2 @ frozen.hidden.T
            full = TwoLayerFactors(Factors(_turn(a1), b1), Factors(_turn(a2), b2))
            seen |= jax.vmap(observe)(full)
        return seen

    def run(start: _Rows, units: Array | None, factors: TwoLayerFactors) -> LanePaths:
        def field(state: _Rows) -> _Rows:
            slope = _two_layer_field(frozen, state)
            if units is None:
                return slope
            pace = units[:, None, None]
            return jax.tree.map(lambda x: pace * x, slope)

        atol = _absolute(rtol, factors)
        found = stepping.integrate(field, start, times, rtol, atol, look, max_steps=max_steps)
        return LanePaths(found.observed, found.status, found.steps)

    return _by_amplitude(run, bucket, start, units, factors)


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
    if isinstance(problem, TwoLayer):
        return two_layer(
            problem, factors, times, observe=observe, rtol=rtol, max_steps=max_steps, bucket=bucket
        )
    look = (lambda f: {"losses": problem.loss(f)}) if observe is None else observe
    rtol = jnp.asarray(rtol, times.dtype)

    def field(state: Any) -> Any:
        return jax.tree.map(jnp.negative, jax.vmap(problem.gradient)(state))

    def run(start: Any) -> LanePaths:
        atol = _absolute(rtol, start)
        found = stepping.integrate(
            field, start, times, rtol, atol, jax.vmap(look), max_steps=max_steps
        )
        return LanePaths(found.observed, found.status, found.steps)

    return _by_amplitude(run, bucket, factors)


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
_reduced_ode = jax.jit(reduced_ode, static_argnames=("one_sided", "max_steps", "bucket"))
