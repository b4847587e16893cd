"""Texts: a class or a number for each, or each next token."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lorajax.environment.judging import SHARE, judged
from lorajax.tasks.base import Batch, PRNGKey, Scores, classified


@judged
def takes(model: Any) -> str:
    """What a model answers, which decides the task that it can be trained on.

    Args:
      model: any; it says so by an attribute `takes`, and takes images if it has none.

    Returns:
      "images"; "texts", for one vector of logits a text, as `Texts` and `Regression` want; or
      "tokens", for logits of each next token, as `NextToken` wants.
    """
    return getattr(model, "takes", "images")


def _as_arrays(batch: Batch) -> dict[str, Array]:
    return {name: jnp.asarray(column) for name, column in batch.items()}


def _logits(model: Any, batch: Batch) -> Array:
    """One vector a text, by the columns `tokens`, `mask` and, where there are any, `types`."""
    options = {"types": batch["types"]} if "types" in batch else {}
    return model(batch["tokens"], mask=batch["mask"], **options)


@judged(smoothing=SHARE)
@dataclasses.dataclass(frozen=True)
class Texts:
    """Which class a text, or a pair of them, is of.

    The columns are `tokens` (integers, shape (b, t)), `mask` (bool: where a token stands), `types`
    (0 and 1 for the two of a pair; may be missing) and `labels` (integers, shape (b,)). The model
    is called as `model(tokens, mask=mask, types=types)` and returns logits of shape (b, classes).

    Attributes:
      smoothing: of the classes in training, in [0, 1).
      unit: "texts".
      metrics: names of `tasks.METRICS` that its predictions can be judged by.

    Raises:
      ValueError: for a smoothing out of range.
    """

    smoothing: float = 0.0
    unit: str = "texts"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "matthews")

    def __post_init__(self):
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}; it must lie in [0, 1).")

    def prepare(self, batch: Batch, key: PRNGKey | None = None) -> Batch:
        """The columns as they are; see `Task.prepare`."""
        del key
        return _as_arrays(batch)

    def stands(self, batch: Batch) -> Array:
        """Where a token stands; see `Padded`."""
        return batch["mask"].astype(bool)

    def scores(self, model: Any, batch: Batch) -> Scores:
        """Cross-entropy of each text's class; see `Task.scores`."""
        return classified(_logits(model, batch), batch["labels"], self.smoothing)

    def predictions(self, model: Any, batch: Batch) -> tuple[Array, Array]:
        """The most likely class of each text of a prepared batch, and the right one."""
        return _logits(model, batch).argmax(-1).astype(jnp.int32), batch["labels"]


@judged
@dataclasses.dataclass(frozen=True)
class Regression:
    """Which number a text, or a pair of them, has; columns as for `Texts`, `labels` being numbers.

    What trains is the squared error in units of `std`, so that rates that fit classes fit here;
    what is reported as loss is the squared error in the numbers' own units.

    Attributes:
      mean: that the model's output 0 stands for, the mean of the numbers to learn. 0 and a std of 1
        take the outputs as they are, as for a head that was trained before.
      std: that an output of 1 stands for above the mean; positive.
      within: the error, in the numbers' own units, up to which an answer counts as right.
      unit: "texts".
      metrics: as for `Texts`.

    Raises:
      ValueError: for a std or a bound that is not positive.
    """

    mean: float = 0.0
    std: float = 1.0
    within: float = 0.5
    unit: str = "texts"
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman")

    def __post_init__(self):
        for name in ("std", "within"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive.")

    def prepare(self, batch: Batch, key: PRNGKey | None = None) -> Batch:
        """The columns as they are; see `Task.prepare`."""
        del key
        return _as_arrays(batch)

    def stands(self, batch: Batch) -> Array:
        """Where a token stands; see `Padded`."""
        return batch["mask"].astype(bool)

    def _outputs(self, model: Any, batch: Batch) -> Float[Array, " b"]:
        found = _logits(model, batch)
        if found.shape[1:] != (1,):
            raise ValueError(
                f"the model returns shape {found.shape}; to predict numbers it needs one output "
                "(classes=1)."
            )
        return found[:, 0].astype(jnp.float32)

    def scores(self, model: Any, batch: Batch) -> Scores:
        """Squared error of each text's number; see `Task.scores`."""
        wanted = batch["labels"].astype(jnp.float32)
        error = self._outputs(model, batch) - (wanted - self.mean) / self.std
        hits = (jnp.abs(error) * self.std <= self.within).astype(jnp.float32)
        return Scores(error**2, (error * self.std) ** 2, hits, jnp.ones_like(error))

    def predictions(self, model: Any, batch: Batch) -> tuple[Array, Array]:
        """The number of each text of a prepared batch, and the right one."""
        found = self._outputs(model, batch) * self.std + self.mean
        return found, batch["labels"].astype(jnp.float32)


@judged
@dataclasses.dataclass(frozen=True)
class NextToken:
    """Each next token of a text, of those that are asked for.

    The columns are `tokens` (integers, shape (b, t)), `targets` (bool: which tokens are to be
    predicted, from those before them), `positions` and `segments` (integers; 0 where nothing
    stands, from 1 for the texts of a row). The model is called as
    `model(tokens, mask=segments > 0, positions=positions, segments=segments)`, must see no later
    token and no other segment, and returns logits of shape (b, t, vocabulary).

    A sample's scores are sums over its tokens, and its count is how many are asked for: what trains
    and what is reported is the mean over tokens, not over texts. A segment's first token, which
    nothing stands before, is never asked for.

    Attributes:
      unit: "sequences".
    """

    unit: str = "sequences"

    def prepare(self, batch: Batch, key: PRNGKey | None = None) -> Batch:
        """The columns as they are; see `Task.prepare`."""
        del key
        return _as_arrays(batch)

    def stands(self, batch: Batch) -> Array:
        """Where a token stands; see `Padded`."""
        return batch["segments"] > 0

    def scores(self, model: Any, batch: Batch) -> Scores:
        """Cross-entropy of the tokens asked for; see `Task.scores`."""
        tokens, segments = batch["tokens"], batch["segments"]
        logits = model(tokens, mask=segments > 0, positions=batch["positions"], segments=segments)
        asked = batch["targets"][:, 1:] & (segments[:, 1:] == segments[:, :-1])
        asked = asked & (segments[:, 1:] > 0)
        # Where nothing is asked logits may be no numbers, and their derivative times zero as well.
        logits = jnp.where(asked[:, :, None], logits[:, :-1].astype(jnp.float32), 0)
        wanted, asked = tokens[:, 1:], asked.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        loss = (loss * asked).sum(-1)
        right = (logits.argmax(-1).astype(wanted.dtype) == wanted).astype(jnp.float32)
        return Scores(loss, loss, (right * asked).sum(-1), asked.sum(-1))
