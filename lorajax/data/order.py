"""The order of batches: a pure function of a seed and a step, so that runs resume exactly."""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Integer

from lorajax.data.table import Table
from lorajax.environment.judging import SEED, at_least, judged


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, samples: int) -> np.ndarray:
    """A shuffle of 0 … samples − 1 that depends on its arguments alone.

    Args:
      seed: not negative.
      epoch: not negative; each has a shuffle of its own.
      samples: how many.

    Returns:
      int64 array, read-only. It ranks raw Philox words, whose stream NumPy promises to keep, which
      it does not for its own `permutation`.
    """
    words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(samples)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


@judged(samples=at_least(1), batch_size=at_least(1), seed=SEED)
@dataclasses.dataclass(frozen=True)
class Order:
    """Which samples each training step takes.

    Attributes:
      samples: in the data set.
      batch_size: samples a step, at most `samples`; the remainder of an epoch is left out.
      seed: of the shuffles.

    Example:
      >>> from lorajax.data import Order
      >>> order = Order(samples=10, batch_size=3, seed=0)
      >>> order.steps_per_epoch
      3
      >>> bool((order(4) == order(4)).all())
      True
    """

    samples: int
    batch_size: int
    seed: int = 0

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative.")
        if not 1 <= self.batch_size <= self.samples:
            raise ValueError(
                f"batch_size is {self.batch_size}; for {self.samples} samples it must lie in "
                f"1 … {self.samples}."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data set."""
        return self.samples // self.batch_size

    def __call__(self, step: int) -> np.ndarray:
        """Indices of the samples of a step, counted from 0 through all epochs."""
        epoch, i = divmod(step, self.steps_per_epoch)
        shuffle = permutation(self.seed, epoch, self.samples)
        return shuffle[i * self.batch_size : (i + 1) * self.batch_size]


@judged(count=at_least(1), seed=SEED)
def hold_out(
    table: Table, count: int, seed: int = 0, *, by: str | None = None
) -> tuple[Table, Table]:
    """Sets samples aside to choose by: a test set that options were chosen on is none any more.

    Args:
      table: what to divide.
      count: how many are set aside, drawn at random by `permutation`.
      seed: of the draw.
      by: a column of classes, of each of which the same share is set aside, and never the last
        sample; so many classes of one sample make it fewer than `count`.

    Returns:
      The table without them, and those set aside; both in their old order.

    Raises:
      ValueError: unless both parts have at least one sample.

    Example:
      >>> import numpy as np
      >>> from lorajax.data import Table, hold_out
      >>> rest, aside = hold_out(Table({"number": np.arange(10)}), 3)
      >>> len(rest), sorted({*rest[:]["number"], *aside[:]["number"]}) == list(range(10))
      (7, True)
    """
    samples = len(table)
    if not 1 <= count < samples:
        raise ValueError(
            f"count is {count}; of {samples} samples between 1 and {samples - 1} can be set aside."
        )
    order = permutation(seed, 0, samples)
    aside = np.zeros(samples, bool)
    if by is None:
        aside[order[:count]] = True
    else:
        labels = np.asarray(table.columns[by][:])[order]
        for label, most in _shares(labels, count).items():
            aside[order[labels == label][:most]] = True
        if not aside.any():
            raise ValueError(
                f"by is {by!r}, in which no class has two samples, one to learn from and one to "
                "set aside."
            )
    return table.take(np.flatnonzero(~aside)), table.take(np.flatnonzero(aside))


def _shares(labels: np.ndarray, count: int) -> dict[int, int]:
    """How many of each class, largest remainders first, add up to a count."""
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / len(labels))
    shares = np.floor(exact).astype(int)
    rest = np.argsort(-(exact - shares), kind="stable")[: count - shares.sum()]
    shares[rest] += 1
    return dict(zip(classes.tolist(), np.minimum(shares, sizes - 1).tolist(), strict=True))


@judged(batch_size=at_least(1), seed=SEED, window=at_least(1))
@dataclasses.dataclass(frozen=True, eq=False)
class Buckets:
    """An `Order` whose batches hold samples of similar length, so that little of them is filling.

    An epoch takes the very samples that `Order` takes, in its order. Each `window` batches of it
    are sorted by length, equal lengths staying as shuffled, and cut into batches again, and the
    batches of the epoch are shuffled. A large window saves most; a small one mixes lengths better.

    Attributes:
      lengths: of the samples.
      batch_size: samples a step, as for `Order`.
      seed: of the shuffles.
      window: batches that are sorted together.

    Raises:
      ValueError: for a batch size out of range, or a window below 1.

    Example:
      >>> import numpy as np
      >>> from lorajax.data import Buckets
      >>> lengths = np.array([9, 1, 8, 2, 7, 3])
      >>> order = Buckets(lengths, batch_size=2, window=3)
      >>> sorted(sorted(lengths[order(step)].tolist()) for step in range(3))
      [[1, 2], [3, 7], [8, 9]]
    """

    lengths: Integer[np.ndarray, " n"]
    batch_size: int
    seed: int = 0
    window: int = 32

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window is {self.window}; it must be at least 1.")
        Order(len(self.lengths), self.batch_size, self.seed)  # judges what the two have in common
        object.__setattr__(self, "_epoch", functools.lru_cache(maxsize=1)(self._sorted))

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data set."""
        return len(self.lengths) // self.batch_size

    def _sorted(self, epoch: int) -> np.ndarray:
        """The batches of an epoch, shape (steps, batch)."""
        count = self.steps_per_epoch
        shuffle = permutation(self.seed, epoch, len(self.lengths))[: count * self.batch_size]
        size = self.window * self.batch_size
        several = np.split(shuffle, range(size, len(shuffle), size))
        rows = [each[np.argsort(self.lengths[each], kind="stable")] for each in several]
        # Shuffled anew: sorted, each window would begin with its short texts.
        return np.concatenate(rows).reshape(count, -1)[permutation(self.seed + 1, epoch, count)]

    def __call__(self, step: int) -> np.ndarray:
        """Indices of the samples of a step, counted from 0 through all epochs."""
        epoch, i = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[i]  # pyright: ignore[reportAttributeAccessIssue]


@judged(batch_size=at_least(1))
def batches(table: Table, batch_size: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """All samples once, in order, in batches of one size.

    Args:
      table: what to go through.
      batch_size: samples a batch.

    Yields:
      (batch, weights): the last batch is filled up with its first sample at weight 0, so that every
      batch has the same shape; the weights are float32 and sum to the number of samples.

    Raises:
      ValueError: for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
    samples = len(table)
    for start in range(0, samples, batch_size):
        index = np.arange(start, min(start + batch_size, samples))
        fill = batch_size - len(index)
        weights = np.concatenate([np.ones(len(index)), np.zeros(fill)]).astype(np.float32)
        yield table[np.concatenate([index, np.full(fill, start)])], weights
