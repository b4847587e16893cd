"""Training by pure steps.

A model is split once into what trains, what is frozen and what a forward pass changes (running
averages, dropout's counters). A step is a pure function of the first and last; everything random in
it is a function of the seed and the step's number, so a run that is cut off and resumed takes the
very same steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from lorajax import data, models
from lorajax.adapters.optimizers import lora_plus, scale_beside
from lorajax.environment import memory


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
      steps: in all.
      batch_size: images a step.
      optimizer: "adamw", "adam", "sgd" (with `momentum`), or "lora-plus" (Adam with B's learning
        rate multiplied by `ratio`).
      learning_rate: at its peak.
      schedule: "constant", or "linear" or "cosine" to zero, after the warm-up.
      warmup: steps in which the learning rate rises linearly from zero.
      weight_decay: decoupled, of matrices only; 0 for optimizers other than "adamw".
      momentum: of "sgd".
      ratio: of "lora-plus".
      beside: learning rate of what trains beside adapters (a head, embeddings) over theirs.
      clip: bound on the norm of the gradient; 0 for none.
      smoothing: of the labels.
      augment: a name of `data.policy`.
      seed: of the order of samples and of augmentations.
    """

    steps: int
    batch_size: int = 64
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    momentum: float = 0.0
    ratio: float = 16.0
    beside: float = 1.0
    clip: float = 0.0
    smoothing: float = 0.0
    augment: str = "none"
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch_size", "learning_rate", "ratio", "beside"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive.")
        for name in ("warmup", "weight_decay", "momentum", "clip", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative.")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}; it must lie in [0, 1).")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup}; it must be less than steps = {self.steps}.")
        for name, known in (
            ("optimizer", ("adamw", "adam", "sgd", "lora-plus")),
            ("schedule", ("constant", "linear", "cosine")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}."
                )
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(
                f"weight_decay is {self.weight_decay}; with optimizer {self.optimizer!r} it must "
                "be 0."
            )

    def rate(self) -> optax.Schedule:
        """The learning rate as a function of the step."""
        left = self.steps - self.warmup
        if self.schedule == "constant":
            after: optax.Schedule = optax.constant_schedule(self.learning_rate)
        elif self.schedule == "linear":
            after = optax.linear_schedule(self.learning_rate, 0.0, left)
        else:
            after = optax.cosine_decay_schedule(self.learning_rate, left)
        if not self.warmup:
            return after
        rise = optax.linear_schedule(0.0, self.learning_rate, self.warmup)
        return optax.join_schedules([rise, after], [self.warmup])

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer as an optax transformation of the trainable state."""
        rate = self.rate()
        if self.optimizer == "adamw":
            core = optax.adamw(rate, weight_decay=self.weight_decay, mask=_matrices)
        elif self.optimizer == "adam":
            core = optax.adam(rate)
        elif self.optimizer == "sgd":
            core = optax.sgd(rate, momentum=self.momentum or None)
        else:
            core = optax.chain(optax.adam(rate), lora_plus(self.ratio))
        if self.beside != 1:
            core = optax.chain(core, scale_beside(self.beside))
        return optax.chain(optax.clip_by_global_norm(self.clip), core) if self.clip else core


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


class Metrics(NamedTuple):
    """What a step or an evaluation measures.

    Attributes:
      loss: mean cross-entropy with the labels as they are, not smoothed; float32.
      accuracy: share of images whose largest logit is right.
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
    """The pure functions that train a model, compiled once.

    Args:
      model: a model of `lorajax.models`, adapted or not, in the mode to train in. It is not
        changed. Normalization and image size are those of its configuration.
      wrt: NNX filter of what trains: `adapters.trainable(model)`, or `nnx.Param` for everything.
      recipe: how to train.
      transformation: an optax transformation to use instead of the recipe's.
      penalty: a function of the model that is added to the loss that trains, not to the reported.

    Raises:
      ValueError: for a model without trainable parameters.
    """

    def __init__(
        self,
        model: Any,
        wrt: Any,
        recipe: Recipe,
        *,
        transformation: optax.GradientTransformation | None = None,
        penalty: Callable[[Any], Array] | None = None,
    ):
        self.config = model.config
        self.recipe = recipe
        self._penalty = penalty
        changing = (nnx.BatchStat, nnx.RngState)
        self.graph, self._params, self._rest, self.frozen = nnx.split(model, wrt, changing, ...)
        if not jax.tree.leaves(self._params):
            raise ValueError("wrt matches no parameter of the model; nothing would train.")
        self.transformation = transformation or recipe.transformation()
        # ViTs have one image size; the convolutional models take what comes.
        self._size = getattr(self.config, "image_size", None)
        self._augment = data.policy(recipe.augment, self._size)
        self._step = jax.jit(self.advance, donate_argnums=0)
        self._compiled: set[tuple[int, ...]] = set()
        self._evaluate = jax.jit(self.sums)
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
        return State(jnp.zeros((), jnp.int32), params, self.transformation.init(params), rest)

    def advance(self, state: State, frozen: Any, images: Any, labels: Any) -> tuple[State, Metrics]:
        """One step as a pure function, for use inside `jit`, `vmap` and `scan`.

        Args:
          state: from `init` or the last step.
          frozen: `trainer.frozen`; an argument, so that it is no constant of the program.
          images: bytes, shape (batch, height, width, channels).
          labels: integer classes, shape (batch,).

        Returns:
          The next state, and metrics of the batch at the parameters before the step.
        """
        key = jax.random.fold_in(jax.random.key(self.recipe.seed), state.step)
        images = self._augment(key, images)

        def loss_of(params):
            logits, changed = self._logits(params, state.rest, frozen, images, True)
            targets = optax.smooth_labels(
                jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32), self.recipe.smoothing
            )
            loss = optax.softmax_cross_entropy(logits, targets).mean()
            reported = loss
            if self.recipe.smoothing:
                # Smoothed labels have an entropy of their own, which a test loss does not.
                reported = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            aux = reported, _hits(logits, labels).mean(), changed
            if self._penalty is not None:
                merged = nnx.merge(self.graph, params, state.rest, frozen, copy=True)
                loss = loss + self._penalty(merged)
            return loss, aux

        gradient, (loss, accuracy, rest) = jax.grad(loss_of, has_aux=True)(state.params)
        # optax mixes integer counts and floats, which users may have forbidden.
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = self.transformation.update(gradient, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradient).astype(jnp.float32)
        return State(state.step + 1, params, optimizer, rest), Metrics(loss, accuracy, norm)

    def step(
        self, state: State, images: UInt8[Array | np.ndarray, "b h w c"], labels: Any
    ) -> tuple[State, Metrics]:
        """`advance`, compiled; the state's buffers are given up."""
        arguments = (state, self.frozen, jnp.asarray(images), jnp.asarray(labels))
        if images.shape not in self._compiled:
            # Before the first step rather than in it: what compiling took would still be held
            # while the step holds its activations.
            self._step.lower(*arguments).compile()
            memory.release()
            self._compiled.add(images.shape)
        return self._step(*arguments)

    def evaluate(self, state: State, split: data.Split, batch_size: int = 256) -> Metrics:
        """Loss and accuracy on a whole split, in evaluation mode.

        Args:
          state: of the trainer.
          split: images and labels.
          batch_size: images at a time.

        Returns:
          Metrics over all images, as NumPy numbers.
        """
        totals = np.zeros(2)
        batch_size = min(batch_size, len(split.labels))
        for images, labels, weights in data.batches(split, batch_size):
            arrays = (jnp.asarray(images), jnp.asarray(labels), jnp.asarray(weights))
            sums = self._evaluate(state, self.frozen, *arrays)
            totals = totals + np.asarray(sums, np.float64)
        loss, accuracy = totals / len(split.labels)
        return Metrics(loss, accuracy, np.zeros_like(loss))

    def model(self, state: State) -> Any:
        """A model with the parameters of a state, which shares the frozen base's arrays."""
        # `step` donates its state, so that a model handed out keeps arrays of its own.
        params, rest = (jax.tree.map(jnp.copy, tree) for tree in (state.params, state.rest))
        return nnx.merge(self.graph, params, rest, self.frozen, copy=True)

    def _logits(self, params, rest, frozen, images, train: bool):
        # A copy, since running averages and counters change at the level of this very trace.
        model: Any = nnx.merge(self.graph, params, rest, frozen, copy=True)
        if not train:
            model.eval()
        config = self.config
        x = models.normalize(
            images,
            config.mean,
            config.std,
            channels=config.channels,
            dtype=model.dtype or jnp.float32,
        )
        # Sums over classes lose too much in half precision.
        logits = model(x).astype(jnp.float32)
        return logits, nnx.state(model, (nnx.BatchStat, nnx.RngState))

    def sums(
        self, state: State, frozen: Any, images: Any, labels: Any, weights: Any
    ) -> Float[Array, "2"]:
        """Weighted sums of losses and of right answers in evaluation mode; pure, as `advance`."""
        images = data.resize(images, self._size) if self._size else images
        logits, _ = self._logits(state.params, state.rest, frozen, images, False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.stack([(losses * weights).sum(), (_hits(logits, labels) * weights).sum()])


def _hits(logits: Array, labels: Array) -> Array:
    return (logits.argmax(-1).astype(labels.dtype) == labels).astype(jnp.float32)


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


def fit(
    trainer: Trainer,
    split: data.Split,
    *,
    state: State | None = None,
    until: int | None = None,
    callback: Callable[[Record], None] | None = None,
) -> State:
    """Trains from a state to the recipe's last step.

    Args:
      trainer: what to train and how.
      split: what to train on.
      state: where to go on, from `init` or a checkpoint; the start if None.
      until: step to stop at; the recipe's last if None.
      callback: called after each step, with metrics that may still be on their way (looking at
        their values waits for the device).

    Returns:
      The state at the end. It depends on the trainer, the split and the step alone, not on how
      often the run was cut off.
    """
    state = trainer.init() if state is None else state
    recipe = trainer.recipe
    order = data.Order(len(split.labels), recipe.batch_size, recipe.seed)
    last = recipe.steps if until is None else min(until, recipe.steps)
    for step in range(int(state.step), last):
        index = order(step)
        state, metrics = trainer.step(state, split.images[index], split.labels[index])
        if callback is not None:
            callback(Record(step + 1, metrics, state))
    return state
