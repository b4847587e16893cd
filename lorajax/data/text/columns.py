"""Texts of any length as columns of a table: filled up a batch at a time, or packed into rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lorajax.data.table import Column, Rows, Table
from lorajax.environment.judging import judged


@judged
def sizes(longest: int) -> tuple[int, ...]:
    """The lengths that batches are filled up to, so that few programs are compiled.

    Args:
      longest: tokens of the longest text.

    Returns:
      16, 32, 48, 64, 96, 128, 192, … : powers of two and the middles between them; the last is
      `longest` itself.

    Example:
      >>> from lorajax.data import text
      >>> text.sizes(100)
      (16, 32, 48, 64, 96, 100)
    """
    found = [16]
    while found[-1] < longest:
        last = found[-1]
        power = 2 ** (last.bit_length() - 1)
        found.append(32 if last == 16 else last + power // 2)
    return (*(size for size in found if size < longest), longest)


class Ragged:
    """A column of sequences of any lengths; a batch of them is filled up to one length.

    Args:
      rows: one array a sample, of one dtype.
      fill: what stands behind a sequence's end.
      lengths: that batches may have, rising; the least that holds the longest of a batch is taken,
        so that a batch's shape is one of few. `sizes` of the longest sequence if None.

    Raises:
      ValueError: if a sequence is longer than the last of the lengths.
    """

    @judged
    def __init__(
        self, rows: Sequence[np.ndarray], fill: int = 0, lengths: Sequence[int] | None = None
    ):
        self.counts = np.array([len(row) for row in rows], np.int64)
        longest = int(self.counts.max(initial=1))
        self.lengths = tuple(sizes(longest) if lengths is None else lengths)
        if longest > self.lengths[-1]:
            raise ValueError(
                f"lengths end at {self.lengths[-1]}; the longest sequence has {longest} entries."
            )
        self.fill = fill
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])[:-1]
        self._flat = np.concatenate([np.asarray(row) for row in rows])

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: Any, /) -> np.ndarray:
        rows = np.arange(len(self))[index]
        if not rows.shape:
            start = self._starts[rows]
            return self._flat[start : start + self.counts[rows]]
        counts, starts = self.counts[rows], self._starts[rows]
        longest = int(counts.max(initial=1))
        width = next(size for size in self.lengths if size >= longest)
        places = np.arange(width)
        inside = places < counts[:, None]
        taken = np.where(inside, starts[:, None] + places, 0)
        return np.where(inside, self._flat[taken], np.asarray(self.fill, self._flat.dtype))


@judged
def lengths(table: Table) -> np.ndarray:
    """How many entries each sample of a table has in its longest column of sequences.

    Args:
      table: with a `Ragged` column, or rows of one.

    Returns:
      int64 array of shape (n,).

    Raises:
      ValueError: for a table whose samples are all of one length.
    """
    found = [each for each in map(_counts, table.columns.values()) if each is not None]
    if not found:
        raise ValueError(
            f"the table has the columns {', '.join(table.columns)}, none of which is Ragged; its "
            "samples cannot be ordered by length."
        )
    return np.max(found, axis=0)


def _counts(column: Column) -> np.ndarray | None:
    if isinstance(column, Rows):
        inside = _counts(column.column)
        return None if inside is None else inside[column.index]
    return column.counts if isinstance(column, Ragged) else None


@judged
def pack(rows: Sequence[Sequence[np.ndarray]], length: int) -> dict[str, np.ndarray]:
    """Sequences side by side in rows of one length, so that little of a row is filling.

    A sequence goes into the first row, of the last 64 that are open, that has room for it.

    Args:
      rows: one a sequence: its tokens, and which of them are answers; each of shape (t,).
      length: of a row.

    Returns:
      `tokens`, `targets` (bool), `positions`, counted from 0 in each sequence, and `segments`, from
      1 in each row and 0 where it is filled up; all of shape (n, length). Attention must not cross
      from one segment to another, and no answer is asked for across.

    Raises:
      ValueError: for a sequence longer than a row.

    Example:
      >>> import numpy as np
      >>> from lorajax.data import text
      >>> rows = [(np.arange(1, n + 1), np.ones(n, bool)) for n in (3, 4, 2)]
      >>> text.pack(rows, 5)["segments"].tolist()
      [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]]
    """
    opened: list[int] = []
    room: list[int] = []
    members: list[list[int]] = []
    for i, (tokens, _) in enumerate(rows):
        if len(tokens) > length:
            raise ValueError(
                f"length is {length}; sequence {i} has {len(tokens)} tokens and goes into no row."
            )
        place = next((row for row in opened if room[row] >= len(tokens)), None)
        if place is None:
            place = len(members)
            members.append([])
            room.append(length)
            opened = [*opened, place][-64:]
        members[place].append(i)
        room[place] -= len(tokens)
    shape = (len(members), length)
    found = {name: np.zeros(shape, np.int32) for name in ("tokens", "positions", "segments")}
    found["targets"] = np.zeros(shape, bool)
    for row, inside in enumerate(members):
        start = 0
        for segment, i in enumerate(inside, 1):
            tokens, targets = rows[i]
            place = slice(start, start + len(tokens))
            found["tokens"][row, place], found["targets"][row, place] = tokens, targets
            found["positions"][row, place] = np.arange(len(tokens))
            found["segments"][row, place] = segment
            start += len(tokens)
    return found
