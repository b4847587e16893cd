"""`sweep_flows`: flows of a problem over named axes, each group of them by its cheapest engine.

What a lane runs is told by the axes: the scale, the rank, the seed, any other parameter of the
start or of the function that makes the problem. Numbers that are not whole are traced, so that all
their lanes share a program; the rank, whole numbers and strings get a program a value.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import xarray
from jaxtyping import Array, Float

from lorajax import initializers, sweeps
from lorajax.environment.judging import POSITIVE, at_least, judged
from lorajax.exact import is_balanced
from lorajax.flows import lanes, observing
from lorajax.flows.gradient import gradient_flow
from lorajax.flows.path import FAILED
from lorajax.flows.plan import Engine, Plan, plan
from lorajax.flows.starts import FILLED, check_parameters, start_of
from lorajax.problems import check_times

Start = str | Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class _Group:
    """What lanes with the same static values have in common."""

    engine: Engine
    one_sided: bool


@dataclasses.dataclass(frozen=True, eq=False)
class _Flows:
    """The function that is swept: all lanes of a call at once."""

    problem: Any
    starts: dict[str, Start]
    times: Array
    observe: observing.Wanted
    of_problem: tuple[str, ...]
    groups: dict[tuple[tuple[str, Any], ...], _Group]
    static: tuple[str, ...]
    rtol: float
    max_steps: int

    def is_shared(self, values: Mapping[str, Any]) -> bool:
        """Whether lanes with these traced values have one problem."""
        traced = set(values) - set(self.static)
        return not (set(self.of_problem) & ({"key"} | traced))

    def problem_of(self, key: Any, values: Mapping[str, Any]) -> Any:
        """The problem of a lane."""
        if not _is_maker(self.problem):
            return self.problem
        given = {"key": key, **values}
        return self.problem(**{n: given[n] for n in self.of_problem if n in given})

    def factors_of(self, problem: Any, key: Any, values: Mapping[str, Any]) -> Any:
        """The start of a lane."""
        own = {n: v for n, v in values.items() if n not in (*self.of_problem, "start", "seed")}
        start = self.starts[values.get("start", next(iter(self.starts)))]
        return start_of(problem, start, key=key, **own)

    def __call__(self, key: Array, **values: Any) -> dict[str, Array]:
        static = {n: values[n] for n in self.static if n in values}
        traced = {n: v for n, v in values.items() if n not in static and n != "seed"}
        group = self.groups[tuple(sorted(static.items()))]
        shared = self.is_shared({**static, **traced})

        def one(key: Array, traced: dict[str, Array]) -> tuple[Any, Any]:
            problem = self.problem_of(_problem_key(key), {**static, **traced})
            factors = self.factors_of(problem, key, {**static, **traced})
            return (None if shared else problem), factors

        problems, factors = jax.vmap(one)(key, traced)
        problem = self.problem_of(None, static) if shared else problems
        found = self.run(group, problem, factors, shared)
        status = found.status
        # The group's engine was chosen by looking at a few of its lanes.
        if group.engine == "closed form":
            status = jnp.where(is_balanced(factors), status, FAILED)
        if group.one_sided:
            status = jnp.where(jnp.any(factors.b, axis=(1, 2)), FAILED, status)
        observed = self.observe.finish(found.observed, problem, self.times, shared)
        return {**observed, "status": status}

    def run(self, group: _Group, problem: Any, factors: Any, shared: bool) -> lanes.LanePaths:
        """The flows of a call by the group's engine."""
        times = jnp.asarray(self.times, jax.tree.leaves(factors)[0].dtype)
        steps = {"rtol": self.rtol, "max_steps": self.max_steps}
        sides = {"one_sided": group.one_sided, "observe": self.observe.spectral}
        if group.engine == "closed form":
            return lanes.closed_form(problem, factors, times, **sides)
        if group.engine == "reduced ODE":
            return lanes.reduced_ode(problem, factors, times, **sides, **steps)
        if shared:
            look = self.observe.look(problem)
            return lanes.full_ode(problem, factors, times, observe=look, **steps)

        def one(problem: Any, factors: Any) -> lanes.LanePaths:
            path = gradient_flow(problem, factors, times, reduced=False, **steps)
            seen = jax.vmap(self.observe.look(problem))(path.core)
            return lanes.LanePaths(seen, path.status, path.steps)

        return jax.vmap(one)(problem, factors)


def _is_maker(problem: Any) -> bool:
    return callable(problem) and not hasattr(problem, "gradient")


def _problem_key(key: Any) -> Any:
    return None if key is None else jax.random.fold_in(key, 1)


@judged
@dataclasses.dataclass(frozen=True)
class FlowSweep:
    """A sweep of flows that has been checked and planned.

    Attributes:
      function: what is swept.
      axes: its axes.
      options: of `sweeps.sweep`: key, fold, static, dims and so on.
      plans: by the static values of a group of lanes ("rank 4, start lora"; "" for all lanes), the
        engine of each of its flows with the reason.
    """

    function: Callable[..., Any]
    axes: Mapping[str, Any]
    options: Mapping[str, Any]
    plans: Mapping[str, Plan]

    def __str__(self) -> str:
        """A line an engine: name, reason, and the lanes that it runs."""
        by_engine: dict[str, tuple[str, list[str]]] = {}
        for group, chosen in self.plans.items():
            reason, groups = by_engine.setdefault(chosen.engine, (chosen.reason, []))
            groups.append(group)
        return "\n".join(
            f"{engine} ({reason})" + (f": {'; '.join(groups)}" if len(by_engine) > 1 else "")
            for engine, (reason, groups) in by_engine.items()
        )

    def run(self, *, settings: Mapping[str, Any] | None = None, **options: Any) -> xarray.Dataset:
        """Runs it.

        Args:
          settings: as in `sweeps.sweep`.
          **options: of `sweeps.sweep`: store, devices, chunk, memory, progress.

        Returns:
          The data set, with the engines in its attribute `engine`.
        """
        found = sweeps.sweep(
            self.function, self.axes, **{**self.options, **options}, settings=settings
        )
        return found.assign_attrs(engine=str(self))


@judged(rtol=POSITIVE, max_steps=at_least(1))
def plan_flows(
    problem: Any,
    start: Start | Sequence[Start],
    axes: Mapping[str, Any],
    times: Float[Array, " t"] | np.ndarray,
    *,
    observe: observing.Observe = ("losses", "singular_values"),
    key: Array | None = None,
    rtol: float = lanes.RTOL,
    max_steps: int = 2**17,
) -> FlowSweep:
    """What `sweep_flows` would run with the same arguments, checked, with its engines.

    Args: those of `sweep_flows`.

    Returns:
      A FlowSweep; `print` shows its engines, `run` runs it.

    Raises:
      ValueError: as `sweep_flows` does.
    """
    check_times(times)
    starts = _starts(start)
    axes = dict(axes) if len(starts) == 1 else {"start": list(starts), **axes}
    values = _values(problem, starts, axes)
    static = tuple(n for n, v in values.items() if _is_static(n, v))
    of_problem = tuple(inspect.signature(problem).parameters) if _is_maker(problem) else ()
    key = jax.random.key(0) if key is None else key
    wanted = observing.wanted(observe)
    dtype = jnp.result_type(float)
    flows = _Flows(
        problem, starts, jnp.asarray(times, dtype), wanted, of_problem, {}, static, rtol, max_steps
    )
    groups, plans, most = {}, {}, 0
    for combination in itertools.product(*(values[n] for n in static)):
        here = dict(zip(static, combination, strict=True))
        sample, factors = _sample(flows, key, here, values)
        chosen = wanted.plan(sample, factors, times, plan)
        a_pair = hasattr(factors, "b")
        engine_takes_sides = chosen.engine in ("closed form", "reduced ODE")
        one_sided = a_pair and engine_takes_sides and not bool(jnp.any(factors.b))
        groups[tuple(sorted(here.items()))] = _Group(chosen.engine, one_sided)
        plans[", ".join(f"{n} {v}" for n, v in here.items())] = chosen
        if a_pair:
            most = max(most, min(factors.rank, *factors.shape))
    wanted = wanted.sized(most, sample, jax.tree.map(lambda x: x[0], factors))
    flows = dataclasses.replace(flows, groups=groups, observe=wanted)
    fold = ("seed",) if "seed" in values else ()
    dims, coords = wanted.dims(), wanted.coords(np.asarray(times))
    options = {"key": key, "fold": fold, "static": static, "batched": True}
    return FlowSweep(flows, axes, {**options, "dims": dims, "coords": coords}, plans)


@judged(rtol=POSITIVE, max_steps=at_least(1))
def sweep_flows(
    problem: Any,
    start: Start | Sequence[Start],
    axes: Mapping[str, Any],
    times: Float[Array, " t"] | np.ndarray,
    *,
    observe: observing.Observe = ("losses", "singular_values"),
    key: Array | None = None,
    rtol: float = lanes.RTOL,
    max_steps: int = 2**17,
    **options: Any,
) -> xarray.Dataset:
    """Gradient flows of a problem over named axes, by the cheapest engine that is exact.

    Args:
      problem: any problem, or a function that makes one from values of axes (and from a parameter
        `key`, which then differs from seed to seed).
      start: a start by its name in `initializers`, or a function; see `flows.start_of`. Several of
        them make an axis "start".
      axes: lists of values: "scale", "rank", "seed" (repetitions, which draw the same numbers at
        all other values), and any parameter of the start or of the function that makes the problem.
      times: when to observe, shape (t,), increasing, from 0 on.
      observe: names among `flows.observing.NAMES`, or a function of the factors of one flow at one
        time, which returns an array or arrays by name. What needs more than singular values and
        losses is seen by the full ODE only.
      key: a PRNG key; `jax.random.key(0)` if None.
      rtol: relative tolerance of a step, where an ODE is solved.
      max_steps: a flow that needs more ends with the status "max steps".
      **options: of `sweeps.sweep`: store (from which a sweep that was stopped goes on), devices,
        chunk, memory, settings, progress.

    Returns:
      A data set with the axes as first dimensions, then "time" and "mode" (of singular values), a
      status of each flow, and the engines with their reasons in the attribute `engine`.

    Raises:
      ValueError: before anything runs, for an axis that neither start nor problem has, a rank or
        scale that cannot be, times that do not increase, or a start that lacks something.

    Example:
      >>> import jax, jax.numpy as jnp, lorajax
      >>> problem = lorajax.MatrixFactorization.from_spectrum(
      ...     jax.random.key(0), shape=(64, 48), singular_values=(4.0, 2.0)
      ... )
      >>> axes = {"scale": [1e-1, 1e-3], "rank": [2, 4], "seed": range(3)}
      >>> found = lorajax.sweep_flows(problem, "orthogonal", axes, jnp.linspace(0.0, 9.0, 40))
      >>> dict(found["losses"].sizes), found.engine.partition(" (")[0]
      ({'scale': 2, 'rank': 2, 'seed': 3, 'time': 40}, 'closed form')
    """
    planned = plan_flows(
        problem, start, axes, times, observe=observe, key=key, rtol=rtol, max_steps=max_steps
    )
    return planned.run(**options)


def _starts(start: Start | Sequence[Start]) -> dict[str, Start]:
    several = [start] if isinstance(start, str) or callable(start) else list(start)
    return {initializers.name_of(each): initializers.resolve(each) for each in several}


def _values(problem: Any, starts: Mapping[str, Start], axes: dict[str, Any]) -> dict[str, Any]:
    """Values of every parameter that the axes name, checked; scales become numbers in the axes."""
    if not axes:
        raise ValueError("axes is empty; name at least one, e.g. {'scale': [1e-1, 1e-3]}.")
    of_problem = list(inspect.signature(problem).parameters) if _is_maker(problem) else []
    values: dict[str, Any] = {}
    for axis, members in axes.items():
        inner = dict(members) if isinstance(members, Mapping) else {axis: members}
        for name, list_ in inner.items():
            inner[name] = values[name] = _checked(name, list_)
            if name in ("seed", *of_problem) or (name == "start" and len(starts) > 1):
                continue
            if name in FILLED:
                raise ValueError(f"axes names {name!r}, which the problem gives to the start.")
            for start in starts.values():
                _check_asked(start, name, of_problem)
        axes[axis] = inner if isinstance(members, Mapping) else inner[axis]
    return values


def _check_asked(start: Start, name: str, of_problem: Sequence[str]) -> None:
    try:
        check_parameters(start, [name])
    except ValueError as error:
        made = f", and the problem is made from {', '.join(of_problem)}" if of_problem else ""
        raise ValueError(
            f"axes names {name!r}: {str(error).rstrip('.')}{made}; 'seed' repeats."
        ) from None


def _checked(name: str, values: Any) -> Any:
    if isinstance(values, str) or not hasattr(values, "__len__"):
        advice = f"range({values})" if name == "seed" else f"[{values!r}]"
        raise ValueError(f"axis {name!r} is {values!r}; give a list of values, e.g. {advice}.")
    if name == "scale":
        return [float(initializers.resolve_scale(value)) for value in values]
    if name == "rank":
        for value in values:
            if isinstance(value, bool) or int(value) != value or value < 1:
                raise ValueError(f"rank is {value!r}; it must be an integer of at least 1.")
        return [int(value) for value in values]
    return values


def _is_static(name: str, values: Any) -> bool:
    if name in ("scale", "seed"):
        return False
    return name in ("rank", "start") or np.asarray(values).dtype.kind != "f"


def _sample(
    flows: _Flows, key: Array, static: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[Any, Any]:
    """A problem of a group, and the starts of its first and its last lane, stacked."""
    # One program a group, in place of one for each operation of a start.
    start = eqx.filter_jit(
        lambda problem, key, traced: flows.factors_of(problem, key, {**static, **traced})
    )
    found = []
    for index in (0, -1):
        traced = {n: np.asarray(v)[index] for n, v in values.items() if n not in (*static, "seed")}
        lane = jax.random.fold_in(key, index % 2)
        problem = flows.problem_of(_problem_key(lane), {**static, **traced})
        found.append(start(problem, lane, {n: jnp.asarray(v) for n, v in traced.items()}))
    return problem, jax.tree.map(lambda *x: jnp.stack(x), *found)  # pyright: ignore


__all__ = ["FlowSweep", "plan_flows", "sweep_flows"]
