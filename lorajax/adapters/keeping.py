"""Sums over batches that outlive an interruption: kept on the disk, told by what they come from."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorajax import environment
from lorajax.environment import content, files
from lorajax.environment.judging import at_least, judged

_SHARE = 20
"""Writing may take one part in so many of the time of a pass."""


class Stopped(Exception):
    """A pass was asked to end before its last batch, and what it has summed is kept.

    Args:
      done: batches.
      count: of all of them.
    """

    def __init__(self, done: int, count: int):
        super().__init__(f"stopped after batch {done} of {count}.")
        self.done, self.count = done, count


class Kept:
    """Where passes over batches keep what they have summed, for the same call to go on from.

    Sums are told by the digest of the weights, the batches and the code that they come from, so
    that those of anything else are never taken, and what goes on ends with the very same numbers.

    Args:
      folder: that exists.
      settings: whatever else the sums depend on, such as the loss, as JSON.
      every: seconds between two writings, or longer where they would take a twentieth of the time.
      stopping: makes a context in which a function says whether to stop, asked after each batch.

    Attributes:
      resumed: of each pass that went on, the batches that were done before, and all of them.

    Raises:
      ValueError: for settings that are no JSON.
    """

    @judged(every=at_least(0))
    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        settings: Any = None,
        every: float | int = 60,
        stopping: Callable[[], AbstractContextManager[Callable[[], bool]]] | None = None,
    ):
        self._folder = pathlib.Path(folder)
        try:
            self._settings = json.dumps(settings, sort_keys=True)
        except TypeError as error:
            raise ValueError(f"settings must be JSON: {error}.") from error
        self._own: list[pathlib.Path] = []
        self._every = every
        self._stopping = stopping or (lambda: contextlib.nullcontext(lambda: False))
        self.resumed: list[tuple[int, int]] = []

    def fold(
        self,
        step: Callable[[Any, Any, int], Any],
        sums: Any,
        batches: Sequence[Any],
        identity: Any,
    ) -> Any:
        """`step(sums, batch, index)` over all batches, from where an earlier call was cut short.

        Args:
          step: adds a batch up.
          sums: tree of arrays before the first batch.
          batches: of arrays.
          identity: arrays that the sums depend on beside the batches.

        Returns:
          The sums after the last batch.

        Raises:
          Stopped: where it was asked to; the sums are kept.
        """
        # The code and the machine as well, since the bytes are to be the same.
        where = (self._settings, environment.code(), environment.versions())
        path = self._folder / f"sums-{content.digest((where, identity, list(batches)))}.npz"
        self._own.append(path)
        done, sums = self._read(path, sums)
        if done:
            self.resumed.append((done, len(batches)))
        cost, last = 0.0, time.monotonic()
        with self._stopping() as stop:
            for index in range(done, len(batches)):
                # What is on its way could neither be stopped nor timed.
                sums = jax.block_until_ready(step(sums, batches[index], index))
                asked, now = stop(), time.monotonic()
                if asked or now - last >= max(self._every, _SHARE * cost):
                    self._write(path, index + 1, sums)
                    last = time.monotonic()
                    cost = last - now
                if asked:
                    raise Stopped(index + 1, len(batches))
        return sums

    def clear(self) -> None:
        """Removes what these passes have kept, once it has served; that of others stays."""
        for path in self._own:
            path.unlink(missing_ok=True)

    @staticmethod
    def _write(path: pathlib.Path, done: int, sums: Any) -> None:
        leaves = enumerate(map(np.ascontiguousarray, jax.tree.leaves(sums)))
        flat: dict[str, Any] = {f"{i:05}": x.reshape(-1).view(np.uint8) for i, x in leaves}
        with files.replacing(path) as partial, open(partial, "wb") as file:
            np.savez(file, done=np.int64(done), **flat)

    @staticmethod
    def _read(path: pathlib.Path, like: Any) -> tuple[int, Any]:
        leaves, tree = jax.tree.flatten(like)
        try:
            # Opened here, since NumPy leaves a file open that turns out not to be an archive.
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                found = [
                    jnp.asarray(file[f"{i:05}"].view(x.dtype).reshape(x.shape))
                    for i, x in enumerate(leaves)
                ]
                return int(file["done"]), jax.tree.unflatten(tree, found)
        except FileNotFoundError:
            return 0, like
        except Exception:  # half a file, of which zip, zlib and NumPy raise many kinds
            path.unlink(missing_ok=True)
            return 0, like
