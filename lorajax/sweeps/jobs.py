"""A sweep that has been checked: its lanes, the program that runs them, the size of its calls."""

import concurrent.futures
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lorajax.sweeps.axes import Block, Grid, fold_words, lane_keys, make_grid
from lorajax.sweeps.outputs import Variable, describe, named, with_status

MEMORY = 2**29
"""Bytes that the results and the temporaries of one chunk may take unless told otherwise."""

DEFAULT_BUCKET = 256
"""Lanes of one call where costs differ."""

MOST_LANES = 2**16
"""Most lanes of a chunk: beyond it nothing is gained, and more is lost when a run is killed."""


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
def run_lanes(function, names, batched, traced, key, words):
    """The compiled call of a batch of lanes; see `Job.arguments`."""
    # Static by identity: one function, one compilation per shape of a call and device.
    return _lanes(function, names, batched, traced, key, words)


@dataclasses.dataclass(frozen=True)
class Job:
    """A sweep that has been checked: everything its chunks have in common.

    Attributes:
      function, batched, key: as in `sweep`.
      grid: its lanes.
      accepted: parameters that the function takes.
      words: what is folded into the key of a lane; see `fold_words`.
      cost: predicted cost of every lane, if any.
      devices: that take turns in the calls.
      variables: outputs by name.
      sizes: lanes along each axis of a chunk.
      bucket: lanes of a call.
    """

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
        """Arguments of `run_lanes` for some lanes of a block, on a device."""
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
            calls.append((lanes, run_lanes(*self.arguments(block, padded, device))))
        return calls

    def compile(self, device: Any) -> jax.stages.Compiled:
        """The program of a call on a device; calls of it find it compiled."""
        block = next(self.grid.blocks(self.sizes))
        lanes = np.resize(np.arange(block.lanes), self.bucket)
        return run_lanes.lower(*self.arguments(block, lanes, device)).compile()

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


def _like(values: np.ndarray, width: int) -> jax.ShapeDtypeStruct:
    """What stands for values of so many lanes."""
    return jax.ShapeDtypeStruct((width, *values.shape[1:]), values.dtype)


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
    function, grid: Grid, accepted: set[str], batched: bool, key, words, width: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Outputs of one lane, the same for all values of the static parameters.

    A call of so many lanes is traced for each of these, which one of that width finds traced.
    """
    found: dict[str, jax.ShapeDtypeStruct] | None = None
    static = sorted(grid.static_axes())
    sizes = tuple(1 if i in static else n for i, n in enumerate(grid.shape))
    for block in grid.blocks(sizes):
        one = Block(0, tuple(slice(s.start, s.start + 1) for s in block.slices))
        traced, names = grid.arguments(one, accepted)
        word = _stack_words(grid, words, grid.indices(one), 1)
        arrays = {n: _like(_default_dtype(v), width) for n, v in traced.items()}
        given = tuple(sorted(names.items()))
        out = run_lanes.eval_shape(function, given, batched, arrays, key, _like(word, width))
        for name, leaf in out.items():
            if leaf.shape[:1] != (width,):
                raise ValueError(
                    f"function returns {name!r} of shape {leaf.shape} for a batch of width "
                    f"{width}; its leading axis must be the lanes."
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


def prepare(
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
) -> tuple[Job, int, float]:
    """Checks a sweep, finds the sizes of its calls, and compiles it.

    Args: those of `sweep`, and `block_shape`, lanes along each axis of a store's chunks.

    Returns:
      The Job, bytes of a call, and flops of a lane.

    Raises:
      ValueError: as `sweep` does.
    """
    grid = make_grid(axes, static)
    for name, number in {"chunk": chunk, "bucket": bucket, "memory": memory}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1.")
    if fold is not None and key is None:
        raise ValueError("fold is given without a key; give the key that lanes are folded into.")
    words = fold_words(grid, fold) if key is not None else {}
    accepted = _accepted(function, grid, words, key)
    costs = _costs(grid, cost)
    used = _devices(devices)
    spread = None if costs is None else _spread(costs)

    def split(limit: int) -> tuple[tuple[int, ...], int]:
        """Lanes along each axis of a chunk, and lanes of a call."""
        sizes = block_shape or grid.block_shape(limit, spread)
        share = math.ceil(math.prod(sizes) / len(used))
        width = min(bucket or (share if costs is None else DEFAULT_BUCKET), share)
        # A batch of one is compiled to unbatched products, which round otherwise.
        return sizes, max(width, 2) if grid.lanes > 1 and bucket != 1 else width

    # Traced as wide as it is going to run where memory allows.
    _, width = split(chunk or MOST_LANES)
    shapes = _shapes(function, grid, accepted, batched, key, words, width)
    variables = describe(grid, shapes, dims, coords)
    lane_bytes = sum(math.prod(v.shape) * v.dtype.itemsize for v in variables.values())
    limit = chunk or max(1, min(MOST_LANES, memory // (2 * lane_bytes)))
    while True:
        sizes, width = split(limit)
        lanes = math.prod(sizes)
        job = Job(
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
