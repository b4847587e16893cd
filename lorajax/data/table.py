"""Samples in named columns: all that training knows of a data set."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from lorajax.environment.judging import judged


@runtime_checkable
class Column(Protocol):
    """One thing about every sample: a NumPy array, or what reads it when it is asked for.

    A file format becomes a column by these two methods; nothing else in the package knows of it.
    """

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def __getitem__(self, index: Any, /) -> Any:
        """The entries at an array of indices or a slice, as a NumPy array, samples first."""
        ...


class Rows:
    """Some rows of a column, in an order of their own, read no earlier than it reads them.

    Args:
      column: what to choose from.
      index: of the rows, in the order wanted.
    """

    @judged
    def __init__(self, column: Column, index: np.ndarray):
        self.column = column
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: Any, /) -> np.ndarray:
        return self.column[self.index[index]]


class Table:
    """Samples in named columns of one length.

    Args:
      columns: by name; each a NumPy array with samples on its first axis, or another `Column`.

    Raises:
      ValueError: for no columns, empty ones, or columns of different lengths.

    Attributes:
      columns: as given.

    `table[index]` is a batch, a dictionary of NumPy arrays, `len(table)` counts the samples, and a
    column is an attribute, too: `table.answer`.

    Example:
      >>> import numpy as np
      >>> from lorajax import data
      >>> table = data.Table({"tokens": np.arange(12).reshape(4, 3), "answer": np.arange(4)})
      >>> table[np.array([3, 0])]["answer"].tolist()
      [3, 0]
      >>> len(table.take(slice(0, 4, 2))), table.answer.shape
      (2, (4,))
    """

    @judged
    def __init__(self, columns: Mapping[str, Column]):
        self.columns = dict(columns)
        lengths = {name: len(column) for name, column in self.columns.items()}
        if not lengths or len(set(lengths.values())) > 1 or not min(lengths.values()):
            raise ValueError(
                f"columns have the lengths {lengths}; there must be at least one, all of the same "
                "length, and not empty."
            )

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getattr__(self, name: str) -> Column:
        # Copying asks for attributes of a table that has no columns yet.
        columns = self.__dict__.get("columns", {})
        if name not in columns:
            raise AttributeError(f"a table of {', '.join(columns)} has no column {name!r}")
        return columns[name]

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(column[index]) for name, column in self.columns.items()}

    def take(self, index: Any) -> "Table":
        """A table of some of the samples; columns that are no arrays are read when asked for.

        Args:
          index: an array of indices, a boolean mask, or a slice.

        Returns:
          The Table of these samples, in the order of the index.
        """
        rows = np.arange(len(self))[index]
        return Table(
            {
                name: column[rows] if isinstance(column, np.ndarray) else Rows(column, rows)
                for name, column in self.columns.items()
            }
        )


class Dataset(NamedTuple):
    """A data set for classification.

    Attributes:
      name: for reports.
      train: what to learn from.
      test: what to measure on.
      classes: names of the classes, in the order of their numbers.
      left_out: what lies there and is none of its samples, for whoever looks for it.
      kind: of what `test` is: "test", or "held-out" where it was set aside from the training set.
    """

    name: str
    train: Table
    test: Table
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    kind: str = "test"


@judged
def stacked(batches: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Batches of one shape as one, with a new axis in front.

    Args:
      batches: at least one.

    Returns:
      The columns, each of shape (batches, samples, …).
    """
    several = list(batches)
    return {name: np.stack([np.asarray(each[name]) for each in several]) for name in several[0]}
