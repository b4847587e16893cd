"""What a sweep would do and take, said in advance."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from lorajax.environment.judging import at_least, judged
from lorajax.sweeps.jobs import MEMORY, prepare, run_lanes
from lorajax.sweeps.outputs import Variable
from lorajax.sweeps.store import stored_chunk


@judged(chunk=at_least(1), bucket=at_least(1))
@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a sweep will do and take.

    Attributes:
      lanes: number of lanes in all.
      chunk: lanes along each axis that are run and written together.
      chunks: number of chunks.
      bucket: lanes of one compiled call; a chunk takes several on several devices and where costs
        differ.
      programs: number of programs to compile.
      variables: outputs with their dimensions, by name.
      bytes: size of all results.
      chunk_bytes: results and temporaries of a call on each device, as the compiler counts them.
      flops: floating point operations of one lane, as the compiler counts them; a loop counts once.
      seconds: predicted time of this process, from one call that was run; None if none was.
    """

    lanes: int
    chunk: tuple[int, ...]
    chunks: int
    bucket: int
    programs: int
    variables: dict[str, Variable]
    bytes: int
    chunk_bytes: int
    flops: float
    seconds: float | None = None


@judged
def estimate(
    function: Callable[..., Any], axes: Mapping[str, Any], *, probe: bool = True, **options: Any
) -> Estimate:
    """What `sweep` would do with the same arguments: lanes, chunks, memory and time.

    Args:
      function: as in `sweep`.
      axes: as in `sweep`.
      probe: whether to run one call and predict the time from it.
      **options: those of `sweep`; `progress` and `settings` play no part.

    Returns:
      An Estimate. Nothing is written.

    Raises:
      ValueError: as `sweep` does.
    """
    names = ("key", "fold", "cost", "chunk", "bucket", "devices", "block_shape")
    chosen: dict[str, Any] = dict.fromkeys(names)
    chosen |= {"static": (), "batched": False, "dims": {}, "coords": {}, "memory": MEMORY}
    store = options.pop("store", None)
    options = {k: v for k, v in options.items() if k not in ("progress", "settings")}
    if unknown := set(options) - set(chosen):
        raise ValueError(f"options names {', '.join(sorted(unknown))}, which sweep does not have.")
    if store is not None and not options.get("chunk"):
        chosen["block_shape"] = stored_chunk(store)
    job, call_bytes, flops = prepare(
        function, axes, **chosen | {k: v for k, v in options.items() if v is not None}
    )
    grid, sizes = job.grid, job.sizes
    chunks = math.prod(math.ceil(n / s) for n, s in zip(grid.shape, sizes, strict=True))
    seconds = None
    if probe:
        block = next(grid.blocks(sizes))
        lanes = np.resize(np.arange(block.lanes), job.bucket)
        if job.cost is not None:
            # A lane of middling cost: the cheapest and the dearest would both mislead.
            middle = np.argsort(job.cost[block.slices].ravel())[block.lanes // 2]
            lanes = np.full(job.bucket, middle)
        times = []
        for _ in range(2):  # the first one also loads what was compiled
            begin = time.perf_counter()
            calls = [run_lanes(*job.arguments(block, lanes, device)) for device in job.devices]
            jax.block_until_ready(calls)
            times.append(time.perf_counter() - begin)
        rounds = chunks * math.ceil(math.prod(sizes) / job.bucket / len(job.devices))
        seconds = min(times) * rounds / jax.process_count()
    per_lane = sum(math.prod(v.shape) * v.dtype.itemsize for v in job.variables.values())
    return Estimate(
        lanes=grid.lanes,
        chunk=sizes,
        chunks=chunks,
        bucket=job.bucket,
        programs=math.prod(grid.shape[i] for i in grid.static_axes()),
        variables=job.variables,
        bytes=grid.lanes * per_lane,
        chunk_bytes=call_bytes,
        flops=flops,
        seconds=seconds,
    )
