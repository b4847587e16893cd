"""The seam between data and training: a task gives scores per sample, which add up to a mean."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, UInt32

from lorajax.environment.judging import SHARE, judged

PRNGKey = Key[Array, ""] | UInt32[Array, "2"]
Batch = Mapping[str, Any]
"""Columns by name: arrays with the samples on their first axis."""


class Scores(NamedTuple):
    """What a task says of each sample; sums, so that batches of any sizes add up.

    Attributes:
      objective: what trains, with smoothed labels for example; summed over the sample's answers.
      loss: what is reported, in nats; likewise.
      hits: right answers.
      count: answers asked for: 1 for one image, the unmasked tokens of a text, 0 for filling.
    """

    objective: Float[Array, " b"]
    loss: Float[Array, " b"]
    hits: Float[Array, " b"]
    count: Float[Array, " b"]


@runtime_checkable
class Task(Protocol):
    """What a batch means to a model.

    A task is hashable and never changes (a frozen dataclass does), so that programs close over it.
    What trains is Σ objective / Σ count over a batch, and what is reported Σ loss / Σ count and
    Σ hits / Σ count: a mean over answers, however they are spread over samples and batches.
    """

    @property
    def unit(self) -> str:
        """What samples are called, in the plural: "images", "sequences"."""
        ...

    def prepare(self, batch: Batch, key: PRNGKey | None = None) -> Batch:
        """A batch as the model takes it; pure.

        Args:
          batch: rows of a `data.Table`.
          key: to augment with in training; None leaves the samples as they are.

        Returns:
          The columns that `scores` reads.
        """
        ...

    def scores(self, model: Any, batch: Batch) -> Scores:
        """Calls the model on a prepared batch and scores its answers; pure, float32."""
        ...


@runtime_checkable
class Asks(Protocol):
    """What a task of one answer a sample offers, so that a model can be linearized in it."""

    def asked(self, batch: Batch) -> tuple[Array, Array]:
        """What the model is called with, and the class that is right, of a prepared batch."""
        ...


@runtime_checkable
class Predicts(Protocol):
    """What a task offers beside, so that `finetune.judge` can hold predictions against answers."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of `tasks.METRICS` that mean something for its predictions."""
        ...

    def predictions(self, model: Any, batch: Batch) -> tuple[Array, Array]:
        """What the model predicts for each sample of a prepared batch, and the right answers."""
        ...


@runtime_checkable
class Padded(Protocol):
    """What a task offers beside whose samples are filled up to a common length."""

    def stands(self, batch: Batch) -> Array:
        """Where something stands in a prepared batch, bool of shape (b, t), and no filling."""
        ...


class Totals(NamedTuple):
    """Scores summed over samples.

    Attributes:
      objective: as in Scores, and so are the others.
      loss: in nats.
      hits: right answers.
      count: answers asked for.
    """

    objective: Float[Array, ""]
    loss: Float[Array, ""]
    hits: Float[Array, ""]
    count: Float[Array, ""]

    def mean(self, name: str) -> Float[Array, ""]:
        """A field for each answer asked for; 0 where none was."""
        return getattr(self, name) / jnp.maximum(self.count, 1)


@judged
def totals(scores: Scores, weights: Float[Array, " b"] | None = None) -> Totals:
    """Sums over samples.

    Args:
      scores: of a batch.
      weights: of the samples, 0 for rows that only fill a batch up; 1 for all if None.

    Returns:
      The Totals, whose sum over batches is that of all samples.
    """
    columns = scores if weights is None else [column * weights for column in scores]
    return Totals(*(column.sum() for column in columns))


@judged(smoothing=SHARE)
def classified(
    logits: Float[Array, "b k"], classes: Int[Array, " b"], smoothing: float = 0.0
) -> Scores:
    """Scores where each sample has one answer out of k.

    Args:
      logits: one for each class; half precision is brought to float32, in which the sums are taken.
      classes: the right ones, from 0.
      smoothing: share of the probability that training spreads evenly over all classes, in [0, 1).

    Returns:
      Scores: the cross-entropy to the smoothed classes trains, that to the classes themselves is
      reported, since the entropy of smoothed ones is no error.
    """
    logits = logits.astype(jnp.float32)
    aims = optax.smooth_labels(
        jax.nn.one_hot(classes, logits.shape[-1], dtype=jnp.float32), smoothing
    )
    objective = optax.softmax_cross_entropy(logits, aims)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
    hits = (logits.argmax(-1).astype(classes.dtype) == classes).astype(jnp.float32)
    return Scores(objective, loss, hits, jnp.ones_like(objective))


@judged
def per_sample(task: Task) -> Callable[[Any, Batch], tuple[Array, Array]]:
    """The loss of a task in the form that `adapters.gradients` and `adapters.select_ranks` take.

    Args:
      task: what to score by.

    Returns:
      A function of a model and rows of a table: the reported loss of each sample and its count.
    """

    def loss(model: Any, batch: Batch) -> tuple[Array, Array]:
        scores = task.scores(model, task.prepare(batch))
        return scores.loss, scores.count

    return loss


@judged
def standing(task: Task) -> Callable[[Batch], Array] | None:
    """Which inputs of a task's batches count, in the form that `adapters.input_moments` takes.

    Args:
      task: what batches are of.

    Returns:
      A function of rows of a table; None for a task whose samples are not filled up.
    """
    if not isinstance(task, Padded):
        return None
    return lambda batch: task.stands(task.prepare(batch))
