"""Two frozen layers with an adapter on each, many flows at once: constants fold all lanes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax.environment.judging import POSITIVE, at_least, judged
from lorajax.factors import Factors, is_traced
from lorajax.flows import stepping
from lorajax.flows.buckets import RTOL, LanePaths, absolute, by_amplitude, turn
from lorajax.problems import TwoLayer, TwoLayerFactors


class Rows(NamedTuple):
    """Both adapters with the rank on the second axis: constants then fold lanes and rank."""

    a1: Array
    b1: Array
    a2: Array
    b2: Array


class Frozen(NamedTuple):
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


def freeze(problem: TwoLayer) -> Frozen:
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
    return jax.tree.map(jnp.asarray, Frozen(scale, w1, factors, output, hidden.T))


def _scaled_to(rows: Array, scale: Array, size: int) -> Array:
    """Rows times the diagonal W2 (or its transpose), with `size` columns."""
    keep = min(rows.shape[-1], size)
    found = rows[..., :keep] * scale[None, None, :keep]
    return jnp.pad(found, ((0, 0), (0, 0), (0, size - keep)))


def _terms(frozen: Frozen, state: Rows):
    """Rows V, A2 of the left and B1, C of the right: the residual is `E − VB1 − A2C`."""
    a1, b1, a2, b2 = state
    inner = b2 @ turn(a1)
    v = _scaled_to(a1, frozen.scale, a2.shape[-1]) + turn(inner) @ a2
    left = jnp.concatenate([v, a2], axis=1)
    right = jnp.concatenate([b1, b2 @ frozen.w1], axis=1)
    return inner, left, right


def slope_of(frozen: Frozen, state: Rows) -> Rows:
    """Minus the gradient: constants times (lanes · rank) rows, and r×r Gram matrices of a lane."""
    a1, b1, a2, b2 = state
    r = a1.shape[1]
    inner, left, right = _terms(frozen, state)
    by_right, by_left = right, left
    for factor in reversed(frozen.shift):
        by_right = by_right @ factor.T
    for factor in frozen.shift:
        by_left = by_left @ factor
    by_right = by_right - (right @ turn(right)) @ left
    by_left = by_left - (left @ turn(left)) @ right
    by_b1, by_c = by_right[:, :r], by_right[:, r:]
    by_v, by_a2 = by_left[:, :r], by_left[:, r:]
    both = by_a2 @ turn(b1)  # A2ᵀ R B1ᵀ
    return Rows(
        _scaled_to(by_b1, frozen.scale, a1.shape[-1]) + turn(both) @ b2,
        by_v,
        by_c + inner @ by_b1,
        by_a2 @ frozen.w1.T + both @ a1,
    )


def _losses(frozen: Frozen, state: Rows) -> Array:
    _, left, right = _terms(frozen, state)
    shift = frozen.shift[0] if len(frozen.shift) == 1 else frozen.shift[0] @ frozen.shift[1]
    return 0.5 * jnp.sum((shift[None] - turn(left) @ right) ** 2, axis=(1, 2))


@judged(rtol=POSITIVE, max_steps=at_least(1), bucket=at_least(1))
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
    frozen = freeze(problem)
    start = Rows(turn(a1) @ frozen.hidden, b1, turn(a2) @ frozen.output, b2 @ frozen.hidden)
    rtol = jnp.asarray(rtol, times.dtype)

    def look(state: Rows) -> dict[str, Any]:
        seen: dict[str, Any] = {"losses": _losses(frozen, state)}
        if observe is not None:
            a1, b1, a2, b2 = state
            a1, a2, b2 = a1 @ frozen.hidden.T, a2 @ frozen.output.T, b2 @ frozen.hidden.T
            full = TwoLayerFactors(Factors(turn(a1), b1), Factors(turn(a2), b2))
            seen |= jax.vmap(observe)(full)
        return seen

    def run(start: Rows, units: Array | None, factors: TwoLayerFactors) -> LanePaths:
        def field(state: Rows) -> Rows:
            slope = slope_of(frozen, state)
            if units is None:
                return slope
            pace = units[:, None, None]
            return jax.tree.map(lambda x: pace * x, slope)

        atol = absolute(rtol, factors)
        found = stepping.integrate(field, start, times, rtol, atol, look, max_steps=max_steps)
        return LanePaths(found.observed, found.status, found.steps)

    return by_amplitude(run, bucket, start, units, factors)
