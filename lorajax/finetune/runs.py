"""A whole run: a model made ready for a task, trained, looked at on the way, resumed exactly."""

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from lorajax import adapters, data
from lorajax.adapters import paths
from lorajax.adapters.selection import shapes
from lorajax.adapters.starts import resolve
from lorajax.adapters.surgery import Targets
from lorajax.environment.judging import POSITIVE, SEED, at_least, judged
from lorajax.finetune import probes, sharding
from lorajax.finetune.setup import adapt, gradients_of, moments_of, select_ranks
from lorajax.finetune.training import Metrics, Record, State, Trainer, fit
from lorajax.tasks import METRICS, Predicts, Task


class Prepared(NamedTuple):
    """A model ready to train.

    Attributes:
      model: adapted.
      wrt: NNX filter of what trains.
      heads: path patterns of what trains in full.
      gradients: that ranks, starts and probes are read off, by path.
    """

    model: Any
    wrt: Any
    heads: tuple[str, ...]
    gradients: Mapping[str, adapters.Gradient]


@judged(rank=at_least(1))
def targets_of(
    model: Any,
    targets: Targets | None = None,
    also: Sequence[str] | None = None,
    rank: int | None = None,
) -> tuple[Targets, tuple[str, ...]]:
    """What is adapted in a model and what trains in full, with the defaults of `prepare`.

    Args:
      model: a model with `heads` and `beside`.
      targets: layers to adapt; if None all but what trains in full and tables of embeddings.
      also: path patterns of what trains in full beside the heads; `model.beside` if None.
      rank: that all of them are to have; None leaves it open.

    Returns:
      Targets, and patterns of what trains in full.

    Raises:
      ValueError: for a pattern that matches nothing, or a rank that does not fit a layer.
    """
    heads = in_full(model, also)
    params = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))]
    for pattern in heads:
        if not any(_below(pattern, path) for path in params):
            raise ValueError(f"also holds {pattern!r}, which matches no part of the model.")

    def body(path: str, layer: Any) -> bool:
        # A table's row is met by few samples, and a language model's is often its head as well.
        tables = isinstance(layer, nnx.Embed)
        return not tables and not any(_below(pattern, path) for pattern in heads)

    chosen = body if targets is None else targets
    for path, (shape, _) in shapes(model, chosen).items():
        if rank is not None and not 1 <= rank <= min(shape):
            raise ValueError(
                f"rank is {rank}; for {path}, of shape {shape}, it must lie in 1 … {min(shape)}."
            )
    return chosen, heads


@judged
def in_full(model: Any, also: Sequence[str] | None = None) -> tuple[str, ...]:
    """Patterns of what trains in full: heads, and `also`, or `model.beside` where that is None."""
    return (*model.heads, *(model.beside if also is None else also))


@judged
def widened(model: Any, patterns: Sequence[str], dtype: Any = "float32") -> Any:
    """A model whose parameters at some paths are in a wider type, in which training adds them up.

    In half precision a small step is lost to rounding. What a layer computes in is its own `dtype`.

    Args:
      model: an NNX module, with arrays or shapes alone. It is not changed.
      patterns: path patterns of the modules.
      dtype: of their parameters, and no narrower than they are now.

    Returns:
      A model that shares all other arrays.
    """
    wanted = np.dtype(dtype)

    def leaf(path: tuple[Any, ...], variable: Any) -> Any:
        value, name = variable.get_value(), "/".join(map(str, path))
        inside = isinstance(variable, nnx.Param) and any(_below(p, name) for p in patterns)
        if not inside or value.dtype.itemsize >= wanted.itemsize:
            return variable
        if isinstance(value, jax.ShapeDtypeStruct):
            return variable.replace(jax.ShapeDtypeStruct(value.shape, wanted))
        return variable.replace(value.astype(wanted))

    graph, state = nnx.split(model)
    changed = {path: leaf(path, x) for path, x in nnx.to_flat_state(state)}
    return nnx.merge(graph, nnx.from_flat_state(changed))


def _below(pattern: str, path: str) -> bool:
    """Whether a path is what a pattern matches, or lies below it."""
    keys = path.split("/")
    return any(paths.matches(pattern, "/".join(keys[: i + 1])) for i in range(len(keys)))


@judged(scale=POSITIVE)
def check_start(start: str | Callable[..., Any], scale: float | int | None = None) -> Any:
    """A start with its scale, judged on a layer of a moment before any long work.

    Args:
      start: an initializer or its name.
      scale: of the start; its own if None.

    Returns:
      The start, with the scale bound to it.

    Raises:
      ValueError: for an unknown name, a scale that the start does not take or that is not positive,
        or a start that asks for what nobody has.
    """
    found = resolve(start)
    if scale is not None:
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale is {scale}; it must be positive.")
        if "scale" not in inspect.signature(found).parameters:
            raise ValueError(f"scale is {scale}, but the start {start!r} has none; leave it out.")
        found = functools.partial(found, scale=scale)
    layer = nnx.Linear(8, 8, use_bias=False, rngs=nnx.Rngs(0))
    eye = jax.numpy.eye(8, dtype="float32")
    adapters.adapt(
        layer,
        key=jax.random.key(0),
        rank=2,
        start=found,
        gradients={"": eye},
        inputs={"": eye},
    )
    return start if scale is None else found


@judged(rank=at_least(1), alpha=POSITIVE, samples=at_least(1), batch_size=at_least(1), seed=SEED)
def prepare(
    model: Any,
    task: Task,
    train: data.Table,
    *,
    key: Any,
    rank: int | None = None,
    start: str | Callable[..., Any] = "orthogonal",
    alpha: float | int | None = None,
    targets: Targets | None = None,
    also: Sequence[str] | None = None,
    samples: int = 2048,
    batch_size: int = 128,
    seed: int = 0,
    **selection: Any,
) -> Prepared:
    """A model with the adapters that `lorajax finetune` gives it.

    Args:
      model: a model with `heads` and `beside`, its head fitted (`fit_head`). It is not changed.
      task: what a batch means to it.
      train: what ranks and starts are read off.
      key: of the start.
      rank: of every adapter; None chooses ranks by `select_ranks`.
      start: an initializer or its name.
      alpha: numerator of the scaling alpha/rank; a scaling of 1 if None.
      targets: layers to adapt; all but what trains in full if None.
      also: path patterns of what trains in full beside the heads; `model.beside` if None.
      samples: that gradients are averaged over, at most.
      batch_size: samples at a time.
      seed: of the draw of samples.
      **selection: for `select_ranks`: `rule`, `budget`, `max_rank` and the rule's constants.

    Returns:
      The Prepared.

    Raises:
      ValueError: if no layer is given a rank, and as `adapt`.
    """
    chosen, heads = targets_of(model, targets, also, rank)
    data_options = {"targets": chosen, "samples": samples, "seed": seed, "batch_size": batch_size}
    options: dict[str, Any] = {"start": start, "alpha": alpha}
    if rank is not None:
        options["rank"] = rank
        gradients: Mapping[str, Any] = gradients_of(model, task, train, **data_options)
    else:
        found = select_ranks(model, task, train, **data_options, **selection)
        chosen, gradients = found.ranks, found.gradients
        if not chosen:
            raise ValueError(
                "rank is chosen by the data, which has no direction above the noise in any layer; "
                "give a rank, or more samples."
            )
    if "inputs" in inspect.signature(resolve(start)).parameters:
        options["inputs"] = moments_of(model, task, train, **data_options)
    adapted = adapt(model, chosen, key=key, gradients=gradients, **options)
    return Prepared(adapted, adapters.trainable(adapted, heads=heads), heads, gradients)


@judged
@dataclasses.dataclass(frozen=True)
class Looks:
    """How often a run is looked at, evenly spread over its steps.

    Attributes:
      tests: measurements on the test set, and one before the first step.
      probes: looks at the theory's quantities, and one before the first step; 0 for none.
      checkpoints: states that are saved, where there is a store.
    """

    tests: int = 3
    probes: int = 30
    checkpoints: int = 5

    def __post_init__(self):
        for name in ("tests", "probes", "checkpoints"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative.")

    def steps(self, name: str, last: int) -> frozenset[int]:
        """The steps after which one of them is due, the last step among them."""
        count = min(getattr(self, name), last)
        return frozenset(round(i * last / count) for i in range(1, count + 1))


@runtime_checkable
class Store(Protocol):
    """Where a run is saved and goes on from; `finetune.checkpoints.Checkpoints` is one."""

    def save(self, state: State, history: Mapping[str, Any]) -> None:
        """Keeps a state and what was recorded until then."""
        ...

    def restore(self, trainer: Trainer) -> tuple[State, dict[str, Any]] | None:
        """The latest state and history; None if there is none yet."""
        ...


class Observer:
    """What a run tells whoever listens; a subclass overrides what it wants to hear."""

    def resumed(self, step: int) -> None:
        """The run goes on after a step that was taken before."""

    def stepped(self, record: Record) -> None:
        """A step was taken; looking at its metrics waits for the device."""

    def tested(self, step: int, metrics: Metrics, rate: float | None) -> None:
        """The test set was measured; rate is in samples a second, None before the first step."""


class Stopped(Exception):
    """A run was asked to end before its last step.

    Args:
      step: that it took last.
      last: that it would have gone to.
    """

    @judged
    def __init__(self, step: int, last: int):
        super().__init__(f"stopped after step {step} of {last}.")
        self.step, self.last = step, last


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
      state: after the last step.
      history: as plain numbers: `step`, `loss` and `accuracy` of every batch; `test_step`,
        `test_loss` and `test_accuracy`; `probe_step` and `probes`, the fields of a Probe with a
        leading axis of looks; `layers`, paths of what is probed; `seconds` of training.
    """

    state: State
    history: dict[str, Any]


@judged(test_batch=at_least(1))
def run(
    trainer: Trainer,
    train: data.Table,
    test: data.Table,
    *,
    looks: Looks | None = None,
    gradients: Mapping[str, Any] | None = None,
    store: Store | None = None,
    observer: Observer | None = None,
    test_batch: int = 256,
    stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Trains from the start, or from the last checkpoint, to the recipe's last step.

    Args:
      trainer: what to train and how.
      train: what to train on.
      test: what to measure on.
      looks: how often; `Looks()` if None. Models without adapters are not probed.
      gradients: whose top directions the probes measure alignment with, by path.
      store: for checkpoints; a run that was cut off goes on from the latest one there.
      observer: what is told on the way.
      test_batch: samples that are measured at a time.
      stop: asked after each step whether to end there.

    Returns:
      The Outcome. It does not depend on how often the run was cut off, but for `seconds`.

    Raises:
      ValueError: for a batch larger than the table.
      Stopped: when `stop` said so before the last step; the state is in the store then.
    """
    looks, observer = looks or Looks(), observer or Observer()
    restored = None if store is None else store.restore(trainer)
    state, history = restored or (trainer.init(), _empty())
    layers = probes.paths(trainer.model(state))
    history["layers"] = list(layers)
    diary = _Diary(trainer, test, history, observer, int(state.step), bool(layers), gradients)
    diary.batch_size = test_batch
    if restored is not None:
        observer.resumed(int(state.step))
    else:
        diary.test(state, 0)
        if looks.probes:
            diary.probe(state, 0)
    last = trainer.recipe.steps
    due = {name: looks.steps(name, last) for name in ("probes", "tests", "checkpoints")}

    def after(record: Record) -> None:
        diary.note(record)
        if record.step in due["probes"]:
            diary.probe(record.state, record.step)
        if record.step in due["tests"]:
            diary.test(record.state, record.step)
        if store is not None and record.step in due["checkpoints"]:
            store.save(record.state, diary.collected())
        if stop is not None and record.step < last and stop():
            if store is not None:
                store.save(record.state, diary.collected())
            raise Stopped(record.step, last)

    state = fit(trainer, train, state=state, callback=after)
    return Outcome(state, diary.collected())


def _empty() -> dict[str, Any]:
    names = ("step", "loss", "accuracy", "test_step", "test_loss", "test_accuracy", "probe_step")
    return {name: [] for name in names} | {"probes": {}, "seconds": 0.0}


class _Diary:
    """Writes a history as a run goes on."""

    def __init__(
        self,
        trainer: Trainer,
        test: data.Table,
        history: dict[str, Any],
        observer: Observer,
        first: int,
        probing: bool,
        gradients: Mapping[str, Any] | None,
    ):
        self.trainer, self.table, self.history, self.observer = trainer, test, history, observer
        self.first, self.probing, self.batch_size = first, probing, 256
        towards = None if gradients is None or not probing else probes.directions(gradients)
        self._measure = jax.jit(lambda state: probes.measure(trainer.model(state), towards))
        self._pending: list[tuple[int, Metrics]] = []
        self._begin, self._before = time.perf_counter(), history["seconds"]

    def note(self, record: Record) -> None:
        self._pending.append((record.step, record.metrics))
        self.observer.stepped(record)

    def probe(self, state: State, step: int) -> None:
        if not self.probing:
            return
        self.history["probe_step"].append(step)
        for name, value in sharding.whole(self._measure(state))._asdict().items():
            value = np.asarray(value, np.float64).tolist()
            self.history["probes"].setdefault(name, []).append(value)

    def test(self, state: State, step: int) -> None:
        measured = self.trainer.evaluate(state, self.table, self.batch_size)
        self.history["test_step"].append(step)
        self.history["test_loss"].append(float(measured.loss))
        self.history["test_accuracy"].append(float(measured.accuracy))
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        samples = self.trainer.recipe.batch_size * (step - self.first)
        self.observer.tested(step, measured, samples / seconds if samples else None)

    def collected(self) -> dict[str, Any]:
        """The history until now; metrics that were still on their way are waited for."""
        for step, metrics in self._pending:
            self.history["step"].append(step)
            self.history["loss"].append(float(metrics.loss))
            self.history["accuracy"].append(float(metrics.accuracy))
        if self._pending:
            self.history["seconds"] = self._before + time.perf_counter() - self._begin
        self._pending.clear()
        return self.history


@judged
def check_metrics(task: Task, names: Sequence[str]) -> None:
    """Raises ValueError unless a task's predictions can be judged by these names.

    Args:
      task: what a batch means.
      names: of `tasks.METRICS`.

    Raises:
      ValueError: for a name that the task does not offer.
    """
    offered = task.metrics if isinstance(task, Predicts) else ()
    for name in names:
        if name not in offered:
            raise ValueError(
                f"metric is {name!r}; {type(task).__name__} offers {', '.join(offered) or 'none'}."
            )


@judged(batch_size=at_least(1))
def judge(
    trainer: Trainer,
    state: State,
    table: data.Table,
    names: Sequence[str],
    batch_size: int = 256,
) -> dict[str, float]:
    """Measures of how predictions on a table agree with its answers.

    Args:
      trainer: whose task offers predictions (`tasks.Predicts`).
      state: of the trainer.
      table: what to measure on.
      names: of `tasks.METRICS`, among those that the task offers.
      batch_size: samples at a time.

    Returns:
      The measures by name.

    Raises:
      ValueError: for a name that the task does not offer.
    """
    check_metrics(trainer.task, names)
    if not names:
        return {}
    found = trainer.predict(state, table, batch_size)
    return {name: METRICS[name](*found) for name in names}


@judged
def stable_ranks(history: Mapping[str, Any]) -> Float[np.ndarray, " layers"] | None:
    """Stable rank `Σσ²/σ₁²` of each layer's update at the last probe; None where there was none."""
    if len(history["probe_step"]) < 2:
        return None
    values = np.asarray(history["probes"]["singular_values"])[-1]
    return (values**2).sum(1) / np.maximum(values[:, 0], 1e-30) ** 2
