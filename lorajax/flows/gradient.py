"""Gradient flow by diffrax."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax.environment.judging import NOT_NEGATIVE, POSITIVE, at_least, judged
from lorajax.exact import reduce
from lorajax.factors import Factors, check_positive, is_adapter, is_traced
from lorajax.factors.descents import reflora, riemannian, vanishes
from lorajax.flows.path import CONVERGED, FAILED, MAX_STEPS, NON_FINITE, Path, drift_of
from lorajax.problems import MatrixFactorization, Problem, check_start

DEFAULT_RTOL = {"float64": 1e-8, "float32": 1e-5}
DEFAULT_MAX_STEPS = 2**17

Metric = Callable[[Factors, Factors], Factors]
"""From the gradient of a pair and the pair to what it descends along instead."""

METRICS: dict[str, Metric] = {"riemannian": riemannian, "reflora": reflora}
"""Metrics of the literature by name; see `lorajax.factors.descents`."""


def amplitude(start: Any) -> Float[Array, ""]:
    """The scale a solver has to resolve: the smallest adapter's largest entry.

    An adapter's factors drive each other, so the largest one sets its scale; two adapters may
    start at different scales, and the smaller one must not drown in the other's tolerance.
    """
    # Concrete starts are looked at by numpy: each jnp call here would be a program of its own.
    xp: Any = jnp if is_traced(start) else np
    parts = [
        xp.max(xp.stack([xp.max(xp.abs(leaf)) for leaf in jax.tree.leaves(node)]))
        for node in jax.tree.leaves(start, is_leaf=is_adapter)
    ]
    return jnp.asarray(xp.min(xp.stack(parts)))


def _absolute(rtol: float | Array, start: Any) -> Array:
    """`rtol` times the start's amplitude: where a solver may step is not what is differentiated."""
    scale = amplitude(jax.lax.stop_gradient(start))
    return jnp.maximum(jnp.asarray(rtol, scale.dtype) * scale, jnp.finfo(scale.dtype).tiny)


def field(
    problem: Problem, state: Any, weight_decay: Array, b_rate: Array, metric: Metric | None = None
) -> Any:
    """Right-hand side of the flow: minus the gradient, with B's part times `b_rate`, and decay.

    A metric turns the gradient of every pair before that.
    """

    def one(gradient: Any, value: Any) -> Any:
        if metric is not None and isinstance(gradient, Factors):
            gradient = metric(gradient, value)
        flow = jax.tree.map(lambda g, x: -(g + weight_decay * x), gradient, value)
        return Factors(flow.a, b_rate * flow.b) if isinstance(flow, Factors) else flow

    return jax.tree.map(one, problem.gradient(state), state, is_leaf=is_adapter)


class _Run(eqx.Module):
    """One flow in all but its problem and its start: calling it integrates."""

    times: Float[Array, " t"]
    rtol: Array
    atol: Array
    decay: Array
    rate: Array
    solver: diffrax.AbstractSolver
    adjoint: diffrax.AbstractAdjoint
    max_steps: int = eqx.field(static=True)
    interpolate: bool = eqx.field(static=True, default=True)
    metric: Metric | None = eqx.field(static=True, default=None)

    def solve(self, problem: Problem, start: Any) -> diffrax.Solution:
        controller: Any = diffrax.PIDController(rtol=self.rtol, atol=self.atol)
        if not self.interpolate:
            controller = diffrax.ClipStepSizeController(controller, step_ts=self.times)
        term = diffrax.ODETerm(lambda t, y, args: field(args[0], y, args[1], args[2], self.metric))
        return diffrax.diffeqsolve(
            term,
            self.solver,
            t0=jnp.zeros((), self.times.dtype),
            t1=self.times[-1],
            dt0=None,
            y0=start,
            args=(problem, self.decay, self.rate),
            saveat=diffrax.SaveAt(ts=self.times),
            stepsize_controller=controller,
            max_steps=self.max_steps,
            adjoint=self.adjoint,
            throw=False,
        )

    def __call__(self, problem: Problem, start: Any) -> Any:
        """The factors at the times, in forward mode."""
        run = eqx.tree_at(lambda run: run.adjoint, self, diffrax.ForwardMode())
        return run.solve(problem, start).ys


@eqx.filter_jit
def _integrate(
    run: _Run, problem: Problem, start: Any, stands: Array
) -> tuple[Any, Array, Array, Array]:
    solution = run.solve(problem, start)
    # diffrax leaves inf where it never got to; NaN cannot be mistaken for a value. A lane that
    # stands still for want of a metric has none either.
    core = jax.tree.map(lambda x: jnp.where(jnp.isinf(x) | stands, jnp.nan, x), solution.ys)
    finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(core)]))
    result = solution.result
    status = jnp.where(
        result == diffrax.RESULTS.successful,
        jnp.where(finite, CONVERGED, NON_FINITE),
        jnp.where(
            result == diffrax.RESULTS.max_steps_reached,
            MAX_STEPS,
            jnp.where(finite, FAILED, NON_FINITE),
        ),
    )
    steps = jnp.asarray(solution.stats["num_steps"], jnp.int32)
    drift = drift_of(core, start, run.times, run.decay, run.rate)
    # No metric but the plain one is known to conserve anything.
    drift = drift if run.metric is None else jnp.full_like(drift, jnp.nan)
    return core, status.astype(jnp.int32), steps, drift


def _framed(problem: Problem, factors: Any, reduced: bool | None) -> tuple[Any, Any, Any]:
    """A flow's problem and start in the frames of the reduction, if it has them and may."""
    can_reduce = isinstance(problem, MatrixFactorization)
    if reduced and not can_reduce:
        raise ValueError(
            f"reduced is True, but a {type(problem).__name__} has no reduction; leave it at None."
        )
    if can_reduce and reduced is not False:
        return reduce(problem, factors)
    return problem, factors, None


def check_product(start: Any, remedy: str) -> Array:
    """Whether a pair of the start multiplies to 0, where RefLoRA's metric is not defined.

    Raises:
      ValueError: for one that does, unless it is traced.
    """
    pairs = [x for x in jax.tree.leaves(start, is_leaf=is_adapter) if isinstance(x, Factors)]
    lost = jnp.any(jnp.stack([jnp.any(vanishes(pair)) for pair in pairs] or [jnp.asarray(False)]))
    if not is_traced(lost) and bool(lost):
        raise ValueError(
            f"factors multiply to 0, where RefLoRA's matrix S is not defined; {remedy}."
        )
    return lost


def _stands(metric: Metric | None, start: Any) -> Array:
    if metric is not reflora:
        return jnp.asarray(False)
    return check_product(start, "move them a little first, or see reflora_flow's warmup")


def _metric_of(metric: str | Metric | None) -> Metric | None:
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ValueError(f"metric is {metric!r}; it must be one of {', '.join(METRICS)}.")
        return METRICS[metric]
    return metric


@judged(
    rtol=POSITIVE, atol=POSITIVE, weight_decay=NOT_NEGATIVE, b_rate=POSITIVE, max_steps=at_least(1)
)
def gradient_flow(
    problem: Problem,
    factors: Any,
    times: Float[Array, " t"] | np.ndarray,
    *,
    rtol: float | Float[Array, ""] | None = None,
    atol: float | Float[Array, ""] | None = None,
    weight_decay: float | Float[Array, ""] = 0.0,
    b_rate: float | Float[Array, ""] = 1.0,
    metric: str | Metric | None = None,
    interpolate: bool = True,
    reduced: bool | None = None,
    solver: diffrax.AbstractSolver | None = None,
    max_steps: int = DEFAULT_MAX_STEPS,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Path:
    """Integrates `Ȧ = −∂L/∂A, Ḃ = −∂L/∂B` adaptively, from any scale of start.

    Jit- and vmap-safe; all numbers are traced, so that changing a tolerance, a time or a scale
    compiles nothing anew. Under `vmap` each lane keeps its own tolerance and status.

    Args:
      problem: anything with `loss` and `gradient`.
      factors: the start, a pytree that `problem.gradient` takes; its dtype is the flow's.
      times: when to save, shape (t,), increasing, from 0 on (the flow starts at 0).
      rtol: relative tolerance of a step; 1e-8 in float64 and 1e-5 in float32 if None.
      atol: absolute tolerance; if None `rtol` times the start's amplitude, because a fixed one lets
        the solver skip over the growth of a small start (an escape time off by 2 to 3 at 1e-20).
      weight_decay: w ≥ 0 on all factors, in units of 1/time.
      b_rate: ρ of LoRA+: Ḃ is multiplied by it.
      metric: "riemannian", "reflora", or a function of a pair's gradient and the pair (it commutes
        with rotations of A from the left, B from the right if `reduced`); plain if None.
      interpolate: whether times may lie within a step; False ends a step at each of them. Dopri8
        interpolates to fewer digits than it integrates: 1e-9 where a step is good to 1e-12.
      reduced: whether to flow in the frames of `exact.reduce`; None does wherever there are any.
      solver: a diffrax solver; Dopri8 if None.
      max_steps: the flow ends with status "max steps" beyond so many.
      adjoint: how to differentiate through the flow; diffrax.ForwardMode if None, the cheapest to
        run. Give diffrax.RecursiveCheckpointAdjoint() for reverse mode.

    Returns:
      A Path. It never raises from within: look at `status`.

    Raises:
      ValueError: before any tracing, for shapes, dtypes or times that do not fit, entries that are
        not finite, or a start that cannot move (a traced one ends "non-finite" under "reflora").

    Example:
      >>> import jax, jax.numpy as jnp, lorajax
      >>> problem = lorajax.MatrixFactorization.from_spectrum(
      ...     jax.random.key(0), shape=(64, 48), singular_values=(4.0, 2.0)
      ... )
      >>> factors = lorajax.initializers.lora(jax.random.key(1), problem.shape, 4, scale=1e-3)
      >>> path = lorajax.gradient_flow(problem, factors, jnp.linspace(0.0, 10.0, 5))
      >>> path.factors.a.shape, path.converged
      ((5, 64, 4), True)

    Source: theory sections 0, 1 and 8 (derived); metrics: theory section 9.
    """
    check_start(problem, factors, times)
    dtype = jnp.result_type(*jax.tree.leaves(factors))
    rtol = DEFAULT_RTOL[str(dtype)] if rtol is None else rtol
    check_positive(rtol=rtol, b_rate=b_rate)
    problem, factors, frames = _framed(problem, factors, reduced)
    run = _Run(
        times=jnp.asarray(times, dtype),
        rtol=jnp.asarray(rtol, dtype),
        atol=jnp.asarray(_absolute(rtol, factors) if atol is None else atol, dtype),
        decay=jnp.asarray(weight_decay, dtype),
        rate=jnp.asarray(b_rate, dtype),
        solver=diffrax.Dopri8() if solver is None else solver,
        adjoint=diffrax.ForwardMode() if adjoint is None else adjoint,
        max_steps=max_steps,
        interpolate=interpolate,
        metric=_metric_of(metric),
    )
    core, status, steps, drift = _integrate(run, problem, factors, _stands(run.metric, factors))
    if frames is None:
        return Path(run.times, core, problem, None, status, steps, drift)
    return Path(run.times, core, problem, frames, status, steps, drift, factors, run)
