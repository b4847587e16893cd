"""A whole fine-tuning run as one pure function, so that a sweep trains many adapters at once.

`sweeps.sweep(run, {"scale": …, "rank": …, "seed": …}, key=key)` then holds the frozen base once,
trains all lanes in one program, spreads them over the devices, and stores and resumes as any sweep.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from scipy.special import stdtrit

from lorajax import adapters, data
from lorajax.adapters import paths
from lorajax.adapters.starts import resolve
from lorajax.adapters.surgery import Targets
from lorajax.environment.judging import at_least, judged
from lorajax.factors import Factors
from lorajax.finetune import probes
from lorajax.finetune.budgets import budgeted
from lorajax.finetune.recipes import Recipe
from lorajax.finetune.training import Trainer
from lorajax.tasks import Batch, Predicts, Task, Totals

Start = str | Callable[..., Any]


@judged
def picked(starts: Sequence[Callable[..., Factors]], index: Any) -> Callable[..., Factors]:
    """One of several starts, chosen inside the program, so that lanes may differ in it.

    Args:
      starts: initializers that return factors; all of them are computed.
      index: which one; may be traced.

    Returns:
      An initializer with the parameters of all of them.
    """
    signatures = [inspect.signature(start) for start in starts]
    parameters = {
        name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for start, signature in zip(starts, signatures, strict=True)
        for name, parameter in signature.parameters.items()
        if name not in getattr(start, "keywords", {})
    }

    def filled(**arguments: Any) -> Factors:
        found = []
        for start, signature in zip(starts, signatures, strict=True):
            each = start(**{k: v for k, v in arguments.items() if k in signature.parameters})
            if not isinstance(each, Factors):
                raise ValueError(
                    "start has an offset; only starts that are factors alone can be picked from."
                )
            found.append(each)
        return jax.tree.map(lambda *x: jnp.stack(x)[index], *found)

    filled.__signature__ = inspect.Signature(list(parameters.values()))  # pyright: ignore[reportFunctionMemberAccess]
    return filled


@judged
def mask(model: Any, ranks: Mapping[str, Any]) -> None:
    """Zeroes each layer's columns of A and rows of B beyond its rank, in the model itself.

    A column of A and the row of B that meets it are a fixed point of every gradient method when
    both are zero, so the adapter trains as one of that rank (derived; theory section 1).

    Args:
      model: with LoRA adapters.
      ranks: by path, of the layers to cut; may be traced.

    Raises:
      ValueError: for a start with an offset, whose columns cannot be left out.
    """
    found = adapters.layers(model)
    for path, rank in ranks.items():
        each = found[path].adapters["default"]
        if not isinstance(each, adapters.LoRA) or each.offset is not None:
            raise ValueError(
                f"the start of {path!r} has an offset; only starts that are factors alone can be "
                "masked."
            )
        keep = (jnp.arange(each.rank, dtype=jnp.int32) < rank).astype(each.a.dtype)
        each.a.set_value(each.a[...] * keep[None, :])
        each.b.set_value(each.b[...] * keep[:, None])


@judged
def interval(values: Any, level: float = 0.95) -> tuple[float, float]:
    """Mean over repetitions and half the width of its confidence interval.

    Args:
      values: one number a repetition, at least two; for paired runs their differences.
      level: probability that an interval made like this one covers the expectation.

    Returns:
      Mean and half-width, by Student's t: exact where the repetitions are independent and normal.

    Raises:
      ValueError: for fewer than two values or a level outside (0, 1).

    Example:
      >>> from lorajax import finetune
      >>> mean, half = finetune.interval([1.0, 2.0, 3.0, 4.0, 5.0])
      >>> round(mean, 3), round(half, 3)
      (3.0, 1.963)
    """
    numbers = np.asarray(values, np.float64).ravel()
    if numbers.size < 2:
        raise ValueError(f"values hold {numbers.size}; an interval takes at least 2.")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie in (0, 1).")
    quantile = float(stdtrit(numbers.size - 1, (1 + level) / 2))
    return float(numbers.mean()), quantile * float(numbers.std(ddof=1)) / numbers.size**0.5


_LEVEL = 0.99865  # of 3 standard deviations, on one side


class Ends(NamedTuple):
    """Mean training losses of a run's first and last twentieth of the steps.

    Attributes:
      first: where it began.
      last: where it ended.
      higher: whether it ended higher: by more than chance does in one of 700 runs that stand still,
        or with all of its last losses above three times all of its first, or at what is no number.
    """

    first: float
    last: float
    higher: bool


@judged
def ends(losses: Sequence[float] | Float[np.ndarray, " steps"]) -> Ends:
    """Where training began and ended: a rate that is too large can end at what chance has.

    Args:
      losses: of training, one a step.

    Returns:
      The Ends; fewer than 40 steps are too few to call one higher.

    Raises:
      ValueError: for no losses.

    Example:
      >>> from lorajax import finetune
      >>> finetune.ends([0.4] * 50 + [0.69] * 50).higher
      True
    """
    numbers = np.asarray(losses, np.float64).ravel()
    if not numbers.size:
        raise ValueError("losses are empty; give those of a run, one a step.")
    part = max(1, numbers.size // 20)
    first, last = numbers[:part], numbers[-part:]
    found = float(first.mean()), float(last.mean())
    if part == 1:
        return Ends(*found, higher=False)
    # One that diverges scatters as much as it rises.
    apart = bool(last.min() > 3 * first.max() > 0)
    with np.errstate(invalid="ignore"):
        error = ((first.var(ddof=1) + last.var(ddof=1)) / part) ** 0.5
        most = found[0] + stdtrit(2 * (part - 1), _LEVEL) * error
        return Ends(*found, higher=apart or not found[1] <= most)


@judged(rank=at_least(1), every=at_least(0), at_once=at_least(1))
def run_of(
    model: Any,
    task: Task,
    train: data.Table,
    recipe: Recipe,
    *,
    targets: Targets | None = "**/attention/*",
    rank: int = 8,
    start: Start | Sequence[Start] = "lora",
    heads: tuple[str, ...] = (),
    gradients: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    test: data.Table | Mapping[str, data.Table] | None = None,
    watch: data.Table | None = None,
    every: int = 1,
    orders: int = 1,
    allocations: Sequence[Mapping[str, int]] = (),
    final_rank: float | None = None,
    final_parameters: int | None = None,
    predicting: bool = False,
    at_once: int = 250,
) -> "Run":
    """Makes the function `run(key, scale, rank, …)` of one fine-tuning run.

    Args:
      model: an NNX module; frozen, in evaluation mode for its statistics.
      task: what a batch means to it.
      train: what to train on; all of it goes to the device.
      recipe: how to train.
      targets: which layers are adapted; None trains the whole model and () nothing but `heads`,
        without adapters and probes.
      rank: the largest rank.
      start: an initializer with a scale, or its name; or several, of which a lane picks one.
      heads: path patterns of what trains in full beside the adapters.
      gradients: for starts that need one, and for the alignment probe; from `adapters.gradients`.
      inputs: for EVA, from `adapters.input_moments`.
      test: what accuracy is measured on at the end, or several such tables by name; None for none.
      watch: what loss and accuracy are measured on at every probe; None for nothing.
      every: steps between probes, a divisor of the recipe's steps; 0 for no probes.
      orders: how many orders of the samples there are; lanes of one order see the same batches.
      allocations: ranks of the layers by path, of which a lane picks one; instead of `targets` and
        `rank`, which they determine. A layer that one leaves out has rank 0 in it.
      final_rank: adapters are AdaLoRA's, begin with `rank` and are pruned to this mean rank.
      final_parameters: likewise, pruned until they have as many parameters at most.
      predicting: whether a run returns what it predicts for `test`; see `tasks.Predicts`.
      at_once: samples that are measured at a time.

    Returns:
      A `Run`: call it with a key, sweep it over its arguments.

    Raises:
      ValueError: if `every` does not divide the steps, for predictions of a task that offers none,
        and whatever `adapters.adapt` raises.
    """
    _check(task, recipe, every, orders, predicting)
    several: Any = start if isinstance(start, Sequence) and not isinstance(start, str) else [start]
    named = {"test": test} if isinstance(test, data.Table) else dict(test or {})
    orders_of = [_orders(train, recipe, recipe.seed + i) for i in range(orders)]
    return Run(
        model=model,
        task=task,
        recipe=recipe,
        columns=_on_device(train[:]),
        orders=np.stack(orders_of).reshape(orders, -1, every or recipe.steps, recipe.batch_size),
        starts=tuple(resolve(each) for each in several),
        targets=targets,
        allocations=tuple(allocations),
        options={"rank": rank, "gradients": gradients, "inputs": inputs},
        heads=heads,
        tables={name: _chunks(table, at_once) for name, table in named.items()},
        watched=None if watch is None else _chunks(watch, at_once),
        towards=None if gradients is None else probes.directions(gradients),
        probing=bool(every) and final_rank is None and final_parameters is None,
        final_rank=final_rank,
        final_parameters=final_parameters,
        predicting=predicting,
    )


def _check(task: Task, recipe: Recipe, every: int, orders: int, predicting: bool) -> None:
    if every and recipe.steps % every:
        raise ValueError(f"every is {every}; it must divide steps = {recipe.steps}.")
    if orders < 1:
        raise ValueError(f"orders is {orders}; it must be at least 1.")
    if predicting and not isinstance(task, Predicts):
        raise ValueError(
            f"predicting is True, and the task {type(task).__name__} offers no predictions."
        )


@judged
@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One fine-tuning run as a pure function of arguments that may all be traced; from `run_of`.

    Its attributes are what `run_of` was given, brought to the device.
    """

    model: Any
    task: Task
    recipe: Recipe
    columns: Batch
    orders: np.ndarray
    starts: tuple[Callable[..., Any], ...]
    targets: Any
    allocations: tuple[Mapping[str, int], ...]
    options: Mapping[str, Any]
    heads: tuple[str, ...]
    tables: Mapping[str, tuple[Batch, Array]]
    watched: tuple[Batch, Array] | None
    towards: Mapping[str, Array] | None
    probing: bool
    final_rank: float | None
    final_parameters: int | None
    predicting: bool

    def __call__(
        self,
        key: Any,
        scale: Any = None,
        rank: Any = None,
        rate: Any = None,
        start: Any = None,
        order: Any = None,
        allocation: Any = None,
    ) -> dict[str, Array]:
        """Trains from one start.

        Args:
          key: a PRNG key for the start.
          scale: of the start.
          rank: how many columns are filled; the largest if None.
          rate: multiplies the recipe's learning rate.
          start: which one of those given; the first if None, and so are the next two.
          order: which order of the samples.
          allocation: which allocation of ranks.

        Returns:
          `loss` and `accuracy` of every step's batch, shape (steps,); the fields of a Probe, shape
          (steps/every, layers, …), if asked for; `watch_loss` and `watch_accuracy`, shape
          (steps/every,), if something is watched; `NAME_loss` and `NAME_accuracy` for each table
          of `test`, with NAME "test" for a single one, and `NAME_predictions` of each of its
          samples, if asked for. AdaLoRA has no Probe, but `ranks`, the number of singular values
          of each layer at the end.
        """
        adapted, wrt = self._adapted(key, scale, start)
        if rank is not None:
            mask(adapted, dict.fromkeys(adapters.layers(adapted), jnp.asarray(rank, jnp.int32)))
        if allocation is not None:
            mask(adapted, {path: r[allocation] for path, r in self._allocated().items()})
        trainer = self._trainer(adapted, wrt, rate)
        # What lies before the first thing that trains would else be computed while XLA compiles,
        # and much slower: below a head alone that is the whole network.
        columns, tables, watched = jax.lax.optimization_barrier(
            (self.columns, self.tables, self.watched)
        )
        probing = self.probing and not self._bare

        def stretch(state, indices):
            probe = probes.measure(trainer.model(state), self.towards) if probing else None
            outside = None if watched is None else _measured(trainer, state, watched)
            state, metrics = jax.lax.scan(step, state, indices)
            return state, (metrics, probe, outside)

        def step(state, index):
            batch = {name: column[index] for name, column in columns.items()}
            return trainer.advance(state, trainer.frozen, batch)

        batches = jnp.asarray(self.orders)[0 if order is None else order]
        state, (metrics, probe, outside) = jax.lax.scan(stretch, trainer.init(), batches)
        found = {"loss": metrics.loss.reshape(-1), "accuracy": metrics.accuracy.reshape(-1)}
        if probe is not None:
            found |= probe._asdict()
            if self.towards is None:
                del found["misalignment"]
        if self._pruned:
            layers = adapters.layers(trainer.model(state)).values()
            alive = [jnp.sum(each.adapters["default"].e[...] != 0) for each in layers]
            found["ranks"] = jnp.stack(alive).astype(jnp.int32)
        for name, chunks in tables.items():
            loss, accuracy = _measured(trainer, state, chunks)
            found |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
            if self.predicting:
                # Only the last chunk is filled up, at its end.
                samples = int(np.count_nonzero(self.tables[name][1]))
                found[f"{name}_predictions"] = _predicted(trainer, state, chunks[0])[:samples]
        if outside is not None:
            found |= {"watch_loss": outside[:, 0], "watch_accuracy": outside[:, 1]}
        return found

    @property
    def _pruned(self) -> bool:
        """Whether the adapters are AdaLoRA's."""
        return self.final_rank is not None or self.final_parameters is not None

    @property
    def _bare(self) -> bool:
        """Whether there are no adapters."""
        return (self.targets is None or self.targets == ()) and not self.allocations

    def _allocated(self) -> dict[str, Array]:
        """The ranks of each layer in all allocations, by path."""
        named = dict.fromkeys(path for each in self.allocations for path, r in each.items() if r)
        return {
            path: jnp.asarray([each.get(path, 0) for each in self.allocations], jnp.int32)
            for path in named
        }

    def _adapted(self, key: Any, scale: Any, start: Any) -> tuple[Any, Any]:
        """The model with adapters, and the filter of what trains in it."""
        if self._bare:
            everything = self.targets is None
            return self.model, nnx.Param if everything else paths.Trainable((), self.heads)
        begins = [
            each if scale is None else functools.partial(each, scale=scale) for each in self.starts
        ]
        options = dict(self.options, start=begins[0] if start is None else picked(begins, start))
        if self._pruned:
            options["kind"] = "adalora"
        targets = self.targets
        if self.allocations:
            largest = [path for each in self.allocations for path, r in each.items() if r]
            targets = {
                path: max(each.get(path, 0) for each in self.allocations) for path in largest
            }
        adapted = adapters.adapt(self.model, targets, key=key, **options)
        return adapted, adapters.trainable(adapted, heads=self.heads)

    def _trainer(self, adapted: Any, wrt: Any, rate: Any) -> Trainer:
        transformation, penalty = self.recipe.transformation(), None
        if rate is not None:
            # Behind everything else: the updates of all recipes are linear in the learning rate.
            transformation = optax.chain(
                transformation,
                optax.scale(jnp.asarray(rate, jnp.float32)),  # pyright: ignore[reportArgumentType]
            )
        if self._pruned:
            ends = self.final_rank, self.recipe.steps, self.final_parameters
            transformation = budgeted(transformation, adapted, wrt, *ends)
            penalty = _orthogonality
        return Trainer(
            adapted, wrt, self.task, self.recipe, transformation=transformation, penalty=penalty
        )


def _measured(trainer: Trainer, state: Any, chunks: tuple[Batch, Array]) -> Float[Array, "2"]:
    """Loss and accuracy on a table in chunks."""

    def step(_, chunk):
        return None, trainer.sums(state, trainer.frozen, *chunk)

    _, sums = jax.lax.scan(step, None, chunks)
    found = Totals(*sums.sum(axis=0))
    return jnp.stack([found.mean("loss"), found.mean("hits")])


def _predicted(trainer: Trainer, state: Any, batches: Batch) -> Array:
    """What is predicted for the samples of chunks, one after the other."""
    found = jax.lax.map(lambda batch: trainer.predictions(state, trainer.frozen, batch)[0], batches)
    return found.reshape(-1)


def _orthogonality(model: Any) -> Array:
    # 0.1 is the weight that AdaLoRA's paper gives the penalty (recalled).
    return jnp.float32(0.1) * adapters.orthogonality(model)


def _orders(train: data.Table, recipe: Recipe, seed: int) -> np.ndarray:
    order = data.Order(len(train), recipe.batch_size, seed)
    return np.stack([order(step) for step in range(recipe.steps)]).astype(np.int32)


def _on_device(batch: Batch) -> dict[str, Array]:
    return {name: jnp.asarray(column) for name, column in batch.items()}


def _chunks(table: data.Table, size: int) -> tuple[Batch, Array]:
    """A table in chunks with weights: lanes × samples would not fit the memory at once."""
    batches, weights = zip(*data.batches(table, min(size, len(table))), strict=True)
    return _on_device(data.stacked(batches)), jnp.asarray(np.stack(weights))
