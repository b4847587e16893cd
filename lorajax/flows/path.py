"""What every run returns: the factors over time, how they were found, and a status."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lorajax.environment.judging import NOT_NEGATIVE, POSITIVE, judged
from lorajax.exact import Frames
from lorajax.factors import Factors, TuckerFactors, is_adapter, is_traced, unfold
from lorajax.problems import DiagonalFactorization

CONVERGED, MAX_STEPS, NON_FINITE, FAILED, UNBALANCED = 0, 1, 2, 3, 4
STATUS = ("converged", "max steps", "non-finite", "failed", "unbalanced")
"""Names of the codes in `Path.status`; the last one is a start that has no closed form."""

Rerun = Callable[[Any, Any], Any]
"""From a problem and a start to the factors at the times of a path."""


def _unknown() -> Float[np.ndarray, ""]:
    return np.asarray(np.nan, np.float32)


@judged
class Path(eqx.Module):
    """Factors at the times asked for.

    The factors are kept in the frames of the reduction where there is one (`core`): singular
    values, losses and norms are the same there, at a cost that does not depend on the size.
    `factors` lifts them to full size.

    Attributes:
      times: shape (t,), in the problem's unit (steps times learning rate for a descent).
      core: the factors at the times, in the frames if there are any; leaves have a leading axis t.
      problem: the problem of `core`: the reduced one where there are frames, else the original.
      frames: what lifts `core` to full size; None where nothing was reduced.
      status: int32 code; see `STATUS`. Anything but 0 has NaN from the failure on.
      steps: int32, steps taken by the solver, the propagator or the descent.
      drift: largest change of the law `AᵀA − BBᵀ` over the size of its terms (see `drift_of`), a
        free error estimate of a flow; NaN where no such law is known. Descents drift by O(step),
        Adam, momentum and ALLoRA by more.
      start: the start in the frames; None where nothing was reduced.
      rerun: runs the flow in frames once more; it serves derivatives of `factors` alone.
    """

    times: Float[Array, " t"]
    core: Any
    problem: Any
    frames: Frames | None
    status: Int[Array, ""]
    steps: Int[Array, ""]
    drift: Float[Array, ""] | Float[np.ndarray, ""] = eqx.field(default_factory=_unknown)
    start: Factors | None = None
    rerun: Rerun | None = None

    @property
    def factors(self) -> Any:
        """The factors at full size, leaves with a leading axis t."""
        if self.frames is None:
            return self.core
        if self.rerun is None:
            return self.frames.lift(self.core)
        return _lifted(self.frames, self.core, self.problem, self.start, self.rerun)

    @property
    def losses(self) -> Float[Array, " t"]:
        """The loss at the times, shape (t,)."""
        return _losses(self.problem, self.core)

    @property
    def converged(self) -> bool:
        """Whether the run ended well (for a single, concrete run)."""
        return int(self.status) == CONVERGED

    @property
    def keeps_law(self) -> bool:
        """Whether `drift` is at most √ε of the dtype, or unknown (for a single, concrete run)."""
        return not float(self.drift) > float(jnp.finfo(self.times.dtype).eps) ** 0.5

    def describe(self) -> str:
        """One line: how the run ended, what it took, and whether it kept the conserved law."""
        name = STATUS[int(self.status)]
        size = "full size" if self.frames is None else "reduced frames"
        line = f"{name} after {int(self.steps)} steps in {size}"
        if not np.isnan(float(self.drift)):
            line += f"; AᵀA − BBᵀ drifted by {float(self.drift):.1e}"
        if not self.keeps_law:
            line += f", beyond the precision of {self.times.dtype}"
        return line


@eqx.filter_custom_jvp
def _lifted(frames: Frames, core: Factors, problem: Any, start: Any, rerun: Any) -> Factors:
    del problem, start, rerun
    return frames.lift(core)


@_lifted.def_jvp
def _lifted_jvp(primals: Any, tangents: Any) -> tuple[Factors, Factors]:
    """Adds what leaves the frames: A's rest at t is its rest at 0 times an r×r matrix Φ(t)."""
    frames, core, problem, start, rerun = primals
    moved_frames, moved_core, *_ = tangents
    lifted, moved = eqx.filter_jvp(
        lambda frames, core: frames.lift(core), (frames, core), (moved_frames, moved_core)
    )
    beyond = moved_frames.beyond
    if beyond.a is None and beyond.b is None:
        return lifted, moved
    right, left = _spread(problem, start, rerun)
    a = moved.a if beyond.a is None else moved.a + beyond.a @ right
    b = moved.b if beyond.b is None else moved.b + left @ beyond.b
    return lifted, Factors(a, b)


def _spread(problem: DiagonalFactorization, start: Factors, rerun: Rerun) -> tuple[Array, Array]:
    """Φ(t) with `A_⊥(t) = A_⊥(0) Φ(t)`, and `B_⊥(t) = Ψ(t) B_⊥(0)`, from the flow's own derivative.

    Rows that a start has across its frames change nothing else to first order, so that the flow's
    derivative along unit rows of that kind is Φ.
    """
    (p, q), r = start.shape, start.rank
    wide = DiagonalFactorization(problem.singular_values, (p + r, q + r))
    pads = ((0, r), (0, 0)), ((0, 0), (0, r))
    padded = Factors(*(jnp.pad(x, pad) for x, pad in zip(start, pads, strict=True)))
    unit = jnp.eye(r, dtype=start.a.dtype)
    rows = jnp.zeros_like(padded.a).at[p:].set(unit), jnp.zeros_like(padded.b).at[:, q:].set(unit)
    _, moved = jax.jvp(lambda start: rerun(wide, start), (padded,), (Factors(*rows),))
    return moved.a[:, p:], moved.b[:, :, q:]


def _laws(node: Any, rate: Any) -> list[tuple[Array, Array]]:
    """What a flow of one update conserves, and the size of the terms of each."""

    def difference(plus: Array, minus: Array) -> tuple[Array, Array]:
        return plus - minus, jnp.trace(plus, axis1=-2, axis2=-1) + jnp.trace(
            minus, axis1=-2, axis2=-1
        )

    if isinstance(node, Factors):
        return [difference(rate * (node.a.mT @ node.a), node.b @ node.b.mT)]
    found = []
    for mode, factor in enumerate(node.factors):
        core = unfold(node.core, mode)
        found.append(difference(factor.T @ factor, core @ core.T))
    return found


@judged(weight_decay=NOT_NEGATIVE, b_rate=POSITIVE)
@eqx.filter_jit
def drift_of(
    core: Any,
    start: Any,
    times: Float[Array, " t"],
    weight_decay: float | Float[Array, ""] = 0.0,
    b_rate: float | Float[Array, ""] = 1.0,
) -> Float[Array, ""]:
    """How far a run leaves the law of its flow.

    Args:
      core: factors at the times, leaves with a leading axis t.
      start: at time 0.
      times: shape (t,).
      weight_decay: w on all factors.
      b_rate: ρ of LoRA+.

    Returns:
      `max_t ‖Λ(t) − e^{−2wt} Λ(0)‖_F / max_t (ρ‖A‖² + ‖B‖²)` with `Λ = ρAᵀA − BBᵀ`, the largest
      over all pairs of factors (over all modes of a Tucker update, where `Λ = UᵀU − G Gᵀ`); NaN
      without any, and for w ≠ 0 with ρ ≠ 1, which has no such law. It carries no derivative.

    Raises:
      ValueError: for other numbers of times than of states.

    Source: theory sections 1 and 3 (derived).
    """
    if any(leaf.shape[:1] != times.shape for leaf in jax.tree.leaves(core)):
        shapes = [leaf.shape for leaf in jax.tree.leaves(core)]
        raise ValueError(f"times have shape {times.shape}; core has as many states: {shapes}.")
    core, start = jax.lax.stop_gradient((core, start))
    nodes = jax.tree.leaves(core, is_leaf=is_adapter)
    first = jax.tree.leaves(start, is_leaf=is_adapter)
    if not all(isinstance(node, (Factors, TuckerFactors)) for node in nodes):
        return jnp.asarray(jnp.nan, times.dtype)
    fade = jnp.exp(-2 * jnp.asarray(weight_decay, times.dtype) * times)[:, None, None]
    rate, drifts = jnp.asarray(b_rate, times.dtype), []
    for node, at_start in zip(nodes, first, strict=True):
        along = jax.vmap(lambda node: _laws(node, rate))(node)
        for (law, size), (begin, at_zero) in zip(along, _laws(at_start, rate), strict=True):
            change = jnp.sqrt(jnp.sum((law - fade * begin[None]) ** 2, axis=(1, 2)))
            largest = jnp.maximum(jnp.nanmax(size), at_zero)
            drifts.append(jnp.max(jnp.where(jnp.isnan(change), 0, change)) / largest)
    lawless = (rate != 1) & (jnp.asarray(weight_decay) != 0)
    return jnp.where(lawless, jnp.nan, jnp.max(jnp.stack(drifts)))


def finite_status(core: Any) -> Int[Array, ""]:
    """CONVERGED where every entry is finite, NON_FINITE elsewhere."""
    xp: Any = jnp if is_traced(core) else np
    finite = xp.all(xp.stack([xp.all(xp.isfinite(x)) for x in jax.tree.leaves(core)]))
    return jnp.asarray(xp.where(finite, CONVERGED, NON_FINITE), jnp.int32)


@eqx.filter_jit
def _losses(problem: Any, core: Any) -> Float[Array, " t"]:
    return jax.vmap(problem.loss)(core)
