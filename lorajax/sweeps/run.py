"""`sweep`: a function over named axes, chunk by chunk.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from lorajax.sweeps import sweep
  >>> def decay(rate, key):
  ...     times = jnp.linspace(0.0, 1.0, 3)
  ...     return {"x": jnp.exp(-rate * times) * jax.random.normal(key)}
  >>> found = sweep(decay, {"rate": [1.0, 2.0], "seed": range(5)}, key=jax.random.key(0),
  ...               dims={"x": ("time",)})
  >>> dict(found.sizes)
  {'rate': 2, 'seed': 5, 'time': 3}
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray
from jaxtyping import Array

from lorajax.environment.agreement import together
from lorajax.environment.judging import at_least, judged
from lorajax.sweeps.axes import Block
from lorajax.sweeps.jobs import MEMORY, Job, prepare
from lorajax.sweeps.outputs import Memory, Sink
from lorajax.sweeps.store import ZarrStore, configuration, stored_chunk, told


class Progress(NamedTuple):
    """How far a sweep has come.

    Attributes:
      done: lanes whose results are there.
      total: lanes of this process in all.
      resumed: of those done, the ones that were there before.
      failed: of those done in this run, the ones with a status other than converged.
      seconds: since the start of this run.
    """

    done: int
    total: int
    resumed: int
    failed: int
    seconds: float

    @property
    def rate(self) -> float:
        """Lanes a second in this run."""
        return (self.done - self.resumed) / self.seconds if self.seconds > 0 else math.nan

    @property
    def remaining(self) -> float:
        """Seconds until the end, at the rate so far."""
        ran = self.done - self.resumed
        return (self.total - self.done) * self.seconds / ran if ran else math.nan


def drive(
    job: Job, sink: Sink, blocks: list[Block], progress: Callable[[Progress], None] | None
) -> None:
    """Runs the blocks that are missing, each while the one before it is being written."""
    missing = [b for b in blocks if not sink.is_done(b)]
    total = sum(b.lanes for b in blocks)
    resumed = done = total - sum(b.lanes for b in missing)
    failed, begin = 0, time.perf_counter()

    def report() -> None:
        if progress is not None:
            progress(Progress(done, total, resumed, failed, time.perf_counter() - begin))

    report()
    running: tuple[Block, Any] | None = None
    for block in [*missing, None]:
        started = None if block is None else (block, job.start(block))
        if running is not None:
            results = job.collect(*running)
            sink.write(running[0], results)
            done += running[0].lanes
            failed += int(np.sum(results["status"] != 0))
            report()
        running = started


@judged(chunk=at_least(1), bucket=at_least(1), memory=at_least(1))
def sweep(
    function: Callable[..., Any],
    axes: Mapping[str, Any],
    *,
    key: Array | None = None,
    fold: Sequence[str] | None = None,
    static: Sequence[str] = (),
    batched: bool = False,
    dims: Mapping[str, Sequence[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
    cost: Callable[..., Any] | None = None,
    chunk: int | None = None,
    bucket: int | None = None,
    memory: int = MEMORY,
    devices: Sequence[Any] | None = None,
    store: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> xarray.Dataset:
    """Runs a pure function over the lanes that named axes span, each with a key and a status.

    No result depends on chunks, order or devices; no lane that fails spoils another.

    Args:
      function: called with the parameters that it takes (and `key`, where one is given) as keyword
        arguments, and traced under `vmap`. It returns an array, or arrays by name (a mapping or a
        named tuple). An integer output `status` (0 is good; see `STATUS`) is taken as the lane's;
        without one, a lane fails where a number is not finite. A new function compiles anew.
      axes: values by name, numbers or arrays (the first index runs along the axis); the lanes are
        their Cartesian product. A mapping of several parameters in place of values makes them move
        together: `{"run": {"scale": [1e-3, 1e-6], "horizon": [4.0, 8.0]}}`.
      key: a PRNG key; a lane gets it with its coordinates folded in.
      fold: the parameters to fold in, all if None; ("seed",): the same draws all over a seed.
      static: parameters that the function gets as Python values (strings, what sets shapes); each
        combination of them compiles a program.
      batched: whether `function` takes and returns a leading axis of lanes itself.
      dims: names of an output's own dimensions; `NAME_0`, `NAME_1`, … if not named.
      coords: coordinates of output dimensions, e.g. `{"time": times}`.
      cost: predicted relative cost of a lane from the parameters that it names (numpy arrays that
        broadcast). Lanes of like cost run together: a batch ends with its slowest one.
      chunk: lanes that are run and written together; from `memory` if None.
      bucket: lanes of one compiled call; a device's share if None, at most 256 with a `cost`.
      memory: bytes that a chunk's results and temporaries may take.
      devices: devices to spread the calls over; all of this process if None.
      store: path of a Zarr store to write to and to go on from: what is there is not run again.
        With several processes each writes its part.
      settings: what else determines the results, as JSON. A store of another configuration (axes,
        key, outputs, settings, or what the function has bound; see `identity`) is refused.
      progress: called with a Progress after each chunk.

    Returns:
      A data set with the axes as its first dimensions, the parameters as coordinates, an int8
      variable `status`, and NaN in the floating-point outputs of lanes that failed; that of a store
      is read as it is used.

    Raises:
      ValueError: before anything runs, for arguments, axes and outputs that do not fit together, a
        store of another sweep, or several processes without a store.
    """
    processes = jax.process_count()
    if store is None and processes > 1:
        raise ValueError(f"store is None with {processes} processes; give them one to write to.")
    dims, coords = dims or {}, coords or {}
    checked = dict(key=key, fold=fold, static=static, batched=batched, dims=dims, coords=coords)
    sized = dict(cost=cost, chunk=chunk, bucket=bucket, memory=memory, devices=devices)
    with together():
        name = None if store is None else told(function, settings or {})
        chunked = None if chunk or store is None else stored_chunk(store)
        job, _, _ = prepare(function, axes, **checked, **sized, block_shape=chunked)
    blocks = list(job.grid.blocks(job.sizes))
    if store is None:
        drive(job, sink := Memory(job.grid, job.variables, coords), blocks, progress)
        return sink.dataset()
    config = configuration(
        name or "", job.grid, job.variables, coords, key, sorted(job.words), settings or {}
    )
    sink = ZarrStore(store, job.grid, job.variables, coords, job.sizes, config)
    drive(job, sink, blocks[jax.process_index() :: processes], progress)
    sink.wait("end")
    return sink.dataset()
