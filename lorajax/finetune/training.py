"""Training by pure steps.

A model is split once into what trains, what is frozen and what a forward pass changes (running
averages, dropout's counters). A step is a pure function of the first and last; everything random in
it is a function of the seed and the step's number, so a run that is cut off and resumed takes the
very same steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from lorajax import data, tasks
from lorajax.environment import memory
from lorajax.environment.judging import judged
from lorajax.finetune import sharding
from lorajax.finetune.recipes import Recipe
from lorajax.tasks import Batch, Task, Totals


class Metrics(NamedTuple):
    """What a step or an evaluation measures.

    Attributes:
      loss: as the task reports it, for each answer asked for, in nats; float32.
      accuracy: share of the answers that are right.
      gradient_norm: of everything trainable; 0 in an evaluation.
    """

    loss: Any
    accuracy: Any
    gradient_norm: Any


class State(NamedTuple):
    """What changes from step to step.

    Attributes:
      step: steps taken.
      params: trainable parameters.
      optimizer: state of the optax transformation.
      rest: running averages and dropout's counters.
    """

    step: Int[Array, ""]
    params: Any
    optimizer: Any
    rest: Any


class Trainer:
    """The pure functions that train a model on a task, compiled once.

    Args:
      model: an NNX module, adapted or not, in the mode to train in. It is not changed.
      wrt: NNX filter of what trains: `adapters.trainable(model)`, or `nnx.Param` for everything.
      task: what a batch means to the model.
      recipe: how to train.
      transformation: an optax transformation to use instead of the recipe's.
      penalty: a function of the model that is added to the loss that trains, not to the reported.
      mesh: of one axis, as `sharding.mesh_of` makes it: weights, adapters and the optimizer's state
        are placed on its devices, and each batch is split among them. None leaves all where it is.
      layout: how they are placed: "data" copies the weights to every device, "full" splits them.

    Raises:
      ValueError: for a model without trainable parameters, a batch that the devices do not divide,
        or weights that differ between the processes of a mesh.
    """

    @judged
    def __init__(
        self,
        model: Any,
        wrt: Any,
        task: Task,
        recipe: Recipe,
        *,
        transformation: optax.GradientTransformation | None = None,
        penalty: Callable[[Any], Array] | None = None,
        mesh: jax.sharding.Mesh | None = None,
        layout: str = "data",
    ):
        self.task = task
        self.recipe = recipe
        self.mesh, self.layout = mesh, layout
        self._penalty = penalty
        changing = (nnx.BatchStat, nnx.RngState)
        self.graph, self._params, self._rest, self.frozen = nnx.split(model, wrt, changing, ...)
        if not jax.tree.leaves(self._params):
            raise ValueError("wrt matches no parameter of the model; nothing would train.")
        if mesh is not None:
            sharding.check_batch(recipe.batch_size, recipe.accumulate, mesh.size)
            sharding.check_same("the weights", (self._params, self._rest, self.frozen))
            self._params, self._rest, self.frozen = sharding.place(
                (self._params, self._rest, self.frozen), mesh, layout
            )
        self.transformation = transformation or recipe.transformation()
        # XLA's CPU backend else drops the barriers by which a model says what is kept for the
        # backward pass and what is computed again (`models.layers.kept`, `--remat`): jaxlib 0.10.
        keeping = {"xla_disable_hlo_passes": "cse_barrier_expander"}
        keeping = keeping if jax.default_backend() == "cpu" else None
        self._step = jax.jit(self.advance, donate_argnums=0, compiler_options=keeping)
        self._compiled: set[tuple[tuple[int, ...], ...]] = set()
        self._evaluate = jax.jit(self.sums)
        self._predict = jax.jit(self.predictions)
        # One program: leaf by leaf, each new shape would compile a handful of small ones.
        self._begin = jax.jit(self._beginning)

    @property
    def parameters(self) -> int:
        """Number of trainable entries."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._params))

    def init(self) -> State:
        """The state before the first step."""
        return self._begin(self._params, self._rest)

    def _beginning(self, params: Any, rest: Any) -> State:
        # Copies: `step` donates its state, and the model's own arrays must survive that.
        params, rest = jax.tree.map(jnp.copy, (params, rest))
        state = State(jnp.zeros((), jnp.int32), params, self.transformation.init(params), rest)
        return self._kept(state)

    def _kept(self, state: State) -> State:
        """The state where it is meant to be; XLA else decides anew at every step."""
        return state if self.mesh is None else sharding.constrain(state, self.mesh, self.layout)

    def _placed(self, batch: Batch) -> Batch:
        return batch if self.mesh is None else sharding.place_batch(batch, self.mesh)

    def seen(self, batch: Batch, step: Any = 0) -> Batch:
        """A batch as the model sees it in a step of training: augmented and normalized.

        Args:
          batch: arrays by name, as the task takes them.
          step: number of the step, from 0.

        Returns:
          The batch as `task.prepare` gives it.
        """
        key = jax.random.fold_in(jax.random.key(self.recipe.seed), step)
        return self.task.prepare(batch, key)

    def advance(self, state: State, frozen: Any, batch: Batch) -> tuple[State, Metrics]:
        """One step as a pure function, for use inside `jit`, `vmap` and `scan`.

        Args:
          state: from `init` or the last step.
          frozen: `trainer.frozen`; an argument, so that it is no constant of the program.
          batch: arrays by name, as the task takes them.

        Returns:
          The next state, and metrics of the batch at the parameters before the step.
        """
        batch = self.seen(batch, state.step)
        gradient, loss, accuracy, rest = self._gradient(state, frozen, batch)
        # optax mixes integer counts and floats, which users may have forbidden.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self.transformation.update(gradient, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradient).astype(jnp.float32)
        state = self._kept(State(state.step + 1, params, optimizer, rest))
        return state, Metrics(loss, accuracy, norm)

    def _gradient(self, state: State, frozen: Any, batch: Batch) -> tuple[Any, Array, Array, Any]:
        """Of a prepared batch's mean objective, with reported loss, accuracy, and the new rest."""

        def objective(params, rest, part):
            model = self._merged(params, rest, frozen)
            sums = tasks.totals(self.task.scores(model, part))
            return sums.objective, (sums, nnx.state(model, (nnx.BatchStat, nnx.RngState)))

        def mean(params):
            total, (sums, rest) = objective(params, state.rest, batch)
            del total
            return sums.mean("objective") + penalty(params), (sums, rest)

        def penalty(params):
            if self._penalty is None:
                return 0.0
            return self._penalty(self._merged(params, state.rest, frozen))

        parts = self.recipe.accumulate
        if parts == 1:
            gradient, (sums, rest) = jax.grad(mean, has_aux=True)(state.params)
            return gradient, sums.mean("loss"), sums.mean("hits"), rest

        def add(carry, part):
            total, rest = carry
            more, (sums, rest) = jax.grad(objective, has_aux=True)(state.params, rest, part)
            return (jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, more), rest), sums

        # Sums of many parts in half precision would lose the last ones.
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), state.params
        )
        split = {
            name: column.reshape(parts, -1, *column.shape[1:]) for name, column in batch.items()
        }
        (total, rest), several = jax.lax.scan(add, (zeros, state.rest), split)
        sums = Totals(*(column.sum() for column in several))
        count = jnp.maximum(sums.count, 1)
        gradient = jax.tree.map(
            lambda x, like: (x / count.astype(x.dtype)).astype(like.dtype), total, state.params
        )
        if self._penalty is not None:
            gradient = jax.tree.map(jnp.add, gradient, jax.grad(penalty)(state.params))
        return gradient, sums.mean("loss"), sums.mean("hits"), rest

    def step(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """`advance`, compiled; the state's buffers are given up.

        Args:
          state: from `init` or the last step.
          batch: arrays by name, such as `table[index]`.

        Returns:
          The next state and metrics, as `advance`.
        """
        arrays = self._placed({name: jnp.asarray(column) for name, column in batch.items()})
        shapes = tuple(column.shape for column in arrays.values())
        if shapes not in self._compiled:
            # Before the first step rather than in it: what compiling took would still be held
            # while the step holds its activations.
            self.lower(state, arrays).compile()
            memory.release()
            self._compiled.add(shapes)
        return self._step(state, self.frozen, arrays)

    def lower(self, state: State, batch: Batch) -> jax.stages.Lowered:
        """The program of `step`, not yet compiled: `.compile().memory_analysis()` tells its bytes.

        Args:
          state: from `init` or the last step; shapes do.
          batch: arrays by name, as the task takes them; shapes do.

        Returns:
          What `jax.jit(…).lower` returns.
        """
        return self._step.lower(state, self.frozen, batch)

    def evaluate(self, state: State, table: data.Table, batch_size: int = 256) -> Metrics:
        """Loss and accuracy on a whole table, in evaluation mode.

        Args:
          state: of the trainer.
          table: what to measure on.
          batch_size: samples at a time.

        Returns:
          Metrics over all answers asked for, as NumPy numbers.
        """
        sums = np.zeros(len(Totals._fields))
        for batch, weights in data.batches(table, min(batch_size, len(table))):
            found = self._evaluate(state, self.frozen, self._placed(batch), weights)
            sums = sums + np.asarray(sharding.whole(found), np.float64)
        found = dict(zip(Totals._fields, sums, strict=True))
        loss, accuracy = (found[name] / max(found["count"], 1) for name in ("loss", "hits"))
        return Metrics(loss, accuracy, np.zeros_like(loss))

    def predict(
        self, state: State, table: data.Table, batch_size: int = 256
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the model predicts for each sample of a table, in evaluation mode.

        Args:
          state: of the trainer.
          table: what to predict.
          batch_size: samples at a time.

        Returns:
          Predictions and the right answers, arrays of shape (n,).

        Raises:
          ValueError: for a task that offers no predictions (`tasks.Predicts`).
        """
        if not isinstance(self.task, tasks.Predicts):
            raise ValueError(
                f"task is {type(self.task).__name__}, which offers no predictions to judge; "
                "measure its loss by evaluate."
            )
        found = []
        for batch, weights in data.batches(table, min(batch_size, len(table))):
            pair = self._predict(state, self.frozen, self._placed(batch))
            found.append([np.asarray(sharding.whole(each))[weights > 0] for each in pair])
        predictions, answers = map(np.concatenate, zip(*found, strict=True))
        return predictions, answers

    def predictions(self, state: State, frozen: Any, batch: Batch) -> tuple[Array, Array]:
        """What the model predicts for a batch in evaluation mode; pure, as `advance`.

        Args:
          state: of the trainer.
          frozen: `trainer.frozen`.
          batch: arrays by name.

        Returns:
          Predictions and the right answers, (b,) each, by a task that offers them.
        """
        model = self._merged(state.params, state.rest, frozen)
        model.eval()
        task: Any = self.task
        return task.predictions(model, task.prepare(batch))

    def model(self, state: State) -> Any:
        """A model with the parameters of a state, which shares the frozen base's arrays."""
        # `step` donates its state, so that a model handed out keeps arrays of its own.
        params, rest = (jax.tree.map(jnp.copy, tree) for tree in (state.params, state.rest))
        return self._merged(params, rest, self.frozen)

    def _merged(self, params: Any, rest: Any, frozen: Any) -> Any:
        # A copy, since running averages and counters change at the level of this very trace.
        return nnx.merge(self.graph, params, rest, frozen, copy=True)

    def sums(self, state: State, frozen: Any, batch: Batch, weights: Any) -> Float[Array, "4"]:
        """The fields of the weighted `Totals` in evaluation mode; pure, as `advance`.

        Args:
          state: of the trainer.
          frozen: `trainer.frozen`.
          batch: arrays by name.
          weights: of the samples, 0 for those that fill the batch up.

        Returns:
          Sums of objective, loss, hits and count, to be added up over batches.
        """
        model = self._merged(state.params, state.rest, frozen)
        model.eval()
        scores = self.task.scores(model, self.task.prepare(batch))
        return jnp.stack(tasks.totals(scores, weights))


class Record(NamedTuple):
    """What `fit` hands to its callback.

    Attributes:
      step: steps taken so far.
      metrics: of the last step, on its batch.
      state: after that step.
    """

    step: int
    metrics: Metrics
    state: State


@judged
def order_of(table: data.Table, recipe: Recipe) -> data.Order | data.Buckets:
    """Which samples of a table each step of a recipe takes.

    Raises:
      ValueError: for a batch larger than the table, or a window where no length differs.
    """
    if not recipe.window:
        return data.Order(len(table), recipe.batch_size, recipe.seed)
    lengths = data.text.lengths(table)
    return data.Buckets(lengths, recipe.batch_size, recipe.seed, recipe.window)


@judged
def fit(
    trainer: Trainer,
    table: data.Table,
    *,
    state: State | None = None,
    until: int | None = None,
    callback: Callable[[Record], None] | None = None,
) -> State:
    """Trains from a state to the recipe's last step.

    Args:
      trainer: what to train and how.
      table: what to train on.
      state: where to go on, from `init` or a checkpoint; the start if None.
      until: step to stop at; the recipe's last if None.
      callback: called after each step, with metrics that may still be on their way (looking at
        their values waits for the device).

    Returns:
      The state at the end. It depends on the trainer, the table and the step alone, not on how
      often the run was cut off.

    Raises:
      ValueError: for a batch larger than the table.
    """
    state = trainer.init() if state is None else state
    recipe = trainer.recipe
    order = order_of(table, recipe)
    last = recipe.steps if until is None else min(until, recipe.steps)
    for step in range(int(state.step), last):
        state, metrics = trainer.step(state, table[order(step)])
        if callback is not None:
            callback(Record(step + 1, metrics, state))
    return state
