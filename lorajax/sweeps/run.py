"""`sweep`: a function over named axes, and `plan`, which says what it would cost."""

import concurrent.futures
import dataclasses
import functools
import inspect
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray
from jaxtyping import Array

from lorajax.sweeps.axes import Block, Grid, fold_words, lane_keys, make_grid
from lorajax.sweeps.outputs import Memory, Sink, Variable, describe, named, with_status
from lorajax.sweeps.store import ZarrStore, configuration, stored_chunk

MEMORY = 2**29
"""Bytes that the results and the temporaries of one chunk may take unless told otherwise."""

DEFAULT_BUCKET = 256
"""Lanes of one call where costs differ."""

MOST_LANES = 2**16
"""Most lanes of a chunk: beyond it nothing is gained, and more is lost when a run is killed."""


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sweep will do.

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


def _lanes(function, names, batched, traced, key, words) -> dict[str, Array]:
    """All outputs of a batch of lanes, with a status each."""
    arguments = dict(traced)
    if key is not None:
        arguments["key"] = lane_keys(key, words)
    call = functools.partial(function, **dict(names))
    if batched:
        return with_status(named(call(**arguments)))
    # The words ride along so that there is a lane axis even where nothing else has one.
    return with_status(jax.vmap(lambda a, _: named(call(**a)))(arguments, words))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(function, names, batched, traced, key, words):
    # Static by identity: one function, one compilation per shape of a call and device.
    return _lanes(function, names, batched, traced, key, words)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A sweep that has been checked: everything its chunks have in common."""

    function: Callable[..., Any]
    grid: Grid
    accepted: set[str]
    batched: bool
    key: Array | None
    words: dict[str, np.ndarray]
    cost: np.ndarray | None
    devices: tuple[Any, ...]
    variables: dict[str, Variable]
    sizes: tuple[int, ...]
    bucket: int

    def arguments(self, block: Block, lanes: np.ndarray, device: Any) -> tuple[Any, ...]:
        """Arguments of `_run` for some lanes of a block, on a device."""
        traced, names = self.grid.arguments(block, self.accepted)
        words = _stack_words(self.grid, self.words, self.grid.indices(block), block.lanes)
        arrays = {name: _default_dtype(values[lanes]) for name, values in traced.items()}
        placed = jax.device_put((arrays, self.key, words[lanes]), device)
        return self.function, tuple(sorted(names.items())), self.batched, *placed

    def start(self, block: Block) -> list[tuple[np.ndarray, dict[str, Array]]]:
        """Starts all calls of a block: for each the lanes it holds and its results to be."""
        order = np.arange(block.lanes)
        if self.cost is not None:
            order = np.argsort(self.cost[block.slices].ravel(), kind="stable")
        calls = []
        for i, begin in enumerate(range(0, block.lanes, self.bucket)):
            lanes = order[begin : begin + self.bucket]
            # The last call repeats its last lane up to the compiled size.
            padded = np.pad(lanes, (0, self.bucket - len(lanes)), mode="edge")
            # A call belongs to one device: a program partitioned over several rounds otherwise than
            # the program of one, and a loop that ends when its slowest lane does would make all
            # devices wait for it.
            device = self.devices[i % len(self.devices)]
            calls.append((lanes, _run(*self.arguments(block, padded, device))))
        return calls

    def compile(self, device: Any) -> jax.stages.Compiled:
        """The program of a call on a device; calls of it find it compiled."""
        block = next(self.grid.blocks(self.sizes))
        lanes = np.resize(np.arange(block.lanes), self.bucket)
        return _run.lower(*self.arguments(block, lanes, device)).compile()

    def measure(self) -> tuple[int, float]:
        """Bytes of a call and flops of a lane by the compiler's count."""
        compiled = self.compile(self.devices[0])
        stats, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
        size = stats.temp_size_in_bytes + stats.output_size_in_bytes if stats else 0
        return size * len(self.devices), float(costs.get("flops", math.nan)) / self.bucket

    def collect(self, block: Block, calls) -> dict[str, np.ndarray]:
        """Waits for the calls of a block and puts their lanes in place."""
        results = {}
        for name, v in self.variables.items():
            whole = np.empty((block.lanes, *v.shape), v.dtype)
            for lanes, out in calls:
                whole[lanes] = np.asarray(out[name])[: len(lanes)]
            results[name] = whole.reshape(*block.shape, *v.shape)
        return results


def _default_dtype(values: np.ndarray) -> np.ndarray:
    """Numbers in JAX's default dtype of their kind."""
    kind = {
        "f": float,
        "i": int,
        "u": np.uint64 if jnp.result_type(float) == np.float64 else np.uint32,
    }
    if values.dtype.kind == "b":
        return values
    return values.astype(jnp.result_type(kind[values.dtype.kind]))


def _stack_words(grid: Grid, words: dict[str, np.ndarray], indices, lanes: int) -> np.ndarray:
    parts = [w[indices[grid.parameters[name].axis]] for name, w in words.items()]
    return np.concatenate(parts, axis=1) if parts else np.zeros((lanes, 0), np.uint32)


def _accepted(function: Callable[..., Any], grid: Grid, words: Mapping[str, Any], key) -> set[str]:
    """Names of the parameters that the function takes; the others only make keys."""
    if key is not None and "key" in grid.parameters:
        raise ValueError("axes holds a parameter 'key', the name under which lanes get their key.")
    names = set(grid.parameters)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have none
        return names
    kinds = signature.parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in kinds):
        names &= set(signature.parameters)
        if ignored := sorted(set(grid.parameters) - names - set(words)):
            raise ValueError(
                f"function takes {signature} and not {', '.join(ignored)}; an axis must be an "
                "argument of the function or be folded into its key."
            )
    try:
        given: list[str] = [*names, *(["key"] if key is not None else [])]
        signature.bind(**dict.fromkeys(given))
    except TypeError as error:
        raise ValueError(
            f"function takes {signature}; with the axes {', '.join(grid.names)} and "
            f"{'a' if key is not None else 'no'} key that does not fit: {error}."
        ) from error
    return names


def _shapes(
    function, grid: Grid, accepted: set[str], batched: bool, key, words
) -> dict[str, jax.ShapeDtypeStruct]:
    """Outputs of one lane, the same for all values of the static parameters."""
    found: dict[str, jax.ShapeDtypeStruct] | None = None
    static = sorted(grid.static_axes())
    sizes = tuple(1 if i in static else n for i, n in enumerate(grid.shape))
    for block in grid.blocks(sizes):
        one = Block(0, tuple(slice(s.start, s.start + 1) for s in block.slices))
        traced, names = grid.arguments(one, accepted)
        word = _stack_words(grid, words, grid.indices(one), 1)
        out = jax.eval_shape(
            functools.partial(_lanes, function, tuple(sorted(names.items())), batched),
            {n: _default_dtype(v) for n, v in traced.items()},
            key,
            word,
        )
        for name, leaf in out.items():
            if leaf.shape[:1] != (1,):
                raise ValueError(
                    f"function returns {name!r} of shape {leaf.shape} for a batch of 1 lane; its "
                    "leading axis must be the lanes."
                )
        here = {n: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for n, x in out.items()}
        if found is not None and here != found:
            changed = sorted(n for n in {*here, *found} if here.get(n) != found.get(n))
            raise ValueError(
                f"function returns {', '.join(changed)} in other shapes for {names}; outputs must "
                "not depend on static parameters (pad them)."
            )
        found = here
    assert found is not None
    return found


def _costs(grid: Grid, cost: Callable[..., Any] | None) -> np.ndarray | None:
    if cost is None:
        return None
    shapes = {}
    for name, p in grid.parameters.items():
        around = [1] * len(grid.shape)
        around[p.axis] = len(p.values)
        shapes[name] = p.values.reshape(*around, *p.values.shape[1:])
    wanted = {n: v for n, v in shapes.items() if n in inspect.signature(cost).parameters}
    values = np.broadcast_to(np.asarray(cost(**wanted), float), grid.shape)
    if not np.all(np.isfinite(values)):
        raise ValueError("cost returns values that are NaN or infinite; all must be finite.")
    return values


def _spread(values: np.ndarray) -> list[float]:
    """How much the cost varies along each axis, relative to its mean."""
    size = max(float(np.mean(np.abs(values))), 1e-300)
    return [
        float(np.mean(np.max(values, axis=i) - np.min(values, axis=i))) / size
        for i in range(values.ndim)
    ]


def _devices(devices: Sequence[Any] | None) -> tuple[Any, ...]:
    devices = jax.local_devices() if devices is None else devices
    if not devices:
        raise ValueError("devices is empty; give at least one, or None for all local ones.")
    return tuple(devices)


def _prepare(
    function: Callable[..., Any],
    axes: Mapping[str, Any],
    *,
    key,
    fold,
    static,
    batched,
    dims,
    coords,
    cost,
    chunk,
    bucket,
    memory,
    devices,
    block_shape=None,
) -> tuple[_Job, int, float]:
    grid = make_grid(axes, static)
    for name, number in {"chunk": chunk, "bucket": bucket, "memory": memory}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1.")
    if fold is not None and key is None:
        raise ValueError("fold is given without a key; give the key that lanes are folded into.")
    words = fold_words(grid, fold) if key is not None else {}
    accepted = _accepted(function, grid, words, key)
    shapes = _shapes(function, grid, accepted, batched, key, words)
    variables = describe(grid, shapes, dims, coords)
    costs = _costs(grid, cost)
    used = _devices(devices)
    lane_bytes = sum(math.prod(v.shape) * v.dtype.itemsize for v in variables.values())
    limit = chunk or max(1, min(MOST_LANES, memory // (2 * lane_bytes)))
    spread = None if costs is None else _spread(costs)
    while True:
        sizes = block_shape or grid.block_shape(limit, spread)
        lanes = math.prod(sizes)
        share = math.ceil(lanes / len(used))
        width = min(bucket or (share if costs is None else DEFAULT_BUCKET), share)
        if grid.lanes > 1 and bucket != 1:
            # A batch of one is compiled to unbatched products, which round otherwise.
            width = max(width, 2)
        job = _Job(
            function, grid, accepted, batched, key, words, costs, used, variables, sizes, width
        )
        call_bytes, flops = job.measure()
        # What the caller chose, or a store already holds, is kept whatever it takes.
        if chunk or block_shape or call_bytes + lanes * lane_bytes <= memory or lanes == 1:
            if others := used[1:]:
                # The same program, compiled for each device: at once, as the compiler has threads.
                with concurrent.futures.ThreadPoolExecutor(len(others)) as pool:
                    list(pool.map(job.compile, others))
            return job, call_bytes, flops
        limit = max(1, lanes // 2)


def _drive(
    job: _Job, sink: Sink, blocks: list[Block], progress: Callable[[Progress], None] | None
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
    """Runs a pure function over the lanes that named axes span.

    Lanes are independent: each has a key of its own, made of its coordinates alone, and a status,
    so that no result depends on chunks, order or devices and none spoils another.

    Args:
      function: called with the parameters that it takes (and `key`, where one is given) as keyword
        arguments, and traced under `vmap`. It returns an array, a mapping of names to
        arrays or a named tuple of arrays. An integer output `status` (0 is good; see `STATUS`) is
        taken as the lane's; without one, a lane fails where a number is not finite. Define it
        once: a lambda made anew for each call compiles anew.
      axes: values by name, numbers or arrays (the first index runs along the axis); the lanes are
        their Cartesian product. An axis given as a mapping holds several parameters that move
        together: `{"run": {"scale": [1e-3, 1e-6], "horizon": [4.0, 8.0]}}`.
      key: a PRNG key; a lane gets it with its coordinates folded in.
      fold: the parameters that are folded in, e.g. `("seed",)` for the same draws at every scale;
        all of them if None.
      static: parameters that the function gets as Python values (they may set shapes, or be
        strings); one compilation for each combination of them.
      batched: whether `function` takes and returns a leading axis of lanes itself.
      dims: names of an output's own dimensions; `NAME_0`, `NAME_1`, … if not named.
      coords: coordinates of output dimensions, e.g. `{"time": times}`.
      cost: predicted relative cost of a lane from those parameters that it names, broadcasting
        numpy arrays. Lanes of like cost then run together: a batch ends with its slowest lane.
      chunk: lanes that are run and written together; from `memory` if None.
      bucket: lanes of one compiled call; a device's share of the chunk if None, at most 256 where
        there is a `cost`.
      memory: bytes that a chunk's results and temporaries may take.
      devices: devices to spread the calls over; all of this process if None.
      progress: called with a Progress after each chunk.

      store: path of a Zarr store to write to and to go on from: what is there is not run again, and
        the returned data set is read as it is used. With several processes each writes its part.
      settings: what else determines the results and the function's name does not tell, as JSON; a
        store of another configuration is refused.

    Returns:
      A data set with the axes as its first dimensions, the parameters as coordinates, an int8
      variable `status`, and NaN in the floating-point outputs of lanes that failed.

    Raises:
      ValueError: before anything runs, for arguments, axes and outputs that do not fit together, a
        store of another sweep, or several processes without a store.

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
    processes, process = jax.process_count(), jax.process_index()
    if store is None and processes > 1:
        raise ValueError(f"store is None with {processes} processes; give them one to write to.")
    job, _, _ = _prepare(
        function,
        axes,
        key=key,
        fold=fold,
        static=static,
        batched=batched,
        dims=dims or {},
        coords=coords or {},
        cost=cost,
        chunk=chunk,
        bucket=bucket,
        memory=memory,
        devices=devices,
        block_shape=None if chunk or store is None else stored_chunk(store),
    )
    blocks = list(job.grid.blocks(job.sizes))
    if store is None:
        sink = Memory(job.grid, job.variables, coords or {})
        _drive(job, sink, blocks, progress)
        return sink.dataset()
    config = configuration(
        function, job.grid, job.variables, coords or {}, key, sorted(job.words), settings or {}
    )
    sink = ZarrStore(store, job.grid, job.variables, coords or {}, job.sizes, config)
    _drive(job, sink, blocks[process::processes], progress)
    sink.wait("end")
    return sink.dataset()


def plan(
    function: Callable[..., Any], axes: Mapping[str, Any], *, probe: bool = True, **options: Any
) -> Plan:
    """What `sweep` would do with the same arguments: lanes, chunks, memory and time.

    Args:
      function: as in `sweep`.
      axes: as in `sweep`.
      probe: whether to run one call and predict the time from it.
      **options: those of `sweep`; `progress` and `settings` play no part.

    Returns:
      A Plan. Nothing is written.

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
    job, call_bytes, flops = _prepare(
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
            calls = [_run(*job.arguments(block, lanes, device)) for device in job.devices]
            jax.block_until_ready(calls)
            times.append(time.perf_counter() - begin)
        rounds = chunks * math.ceil(math.prod(sizes) / job.bucket / len(job.devices))
        seconds = min(times) * rounds / jax.process_count()
    per_lane = sum(math.prod(v.shape) * v.dtype.itemsize for v in job.variables.values())
    return Plan(
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
