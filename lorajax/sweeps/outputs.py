"""What a sweep's function returns: named arrays with a status, and where they are kept."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import xarray

from lorajax.sweeps.axes import Block, Grid

STATUS = ("converged", "max steps", "non-finite", "failed", "unbalanced")
"""Names of the codes in the variable `status` of a sweep; those of `flows.STATUS`."""

NON_FINITE = STATUS.index("non-finite")
NOT_RUN = -1
"""Status of a lane that has not been run yet."""


class Variable(NamedTuple):
    """A variable of the results.

    Attributes:
      dims: names of its dimensions after those of the axes.
      shape: of one lane.
      dtype: of its entries.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype


def named(out: Any) -> dict[str, Any]:
    """Outputs of a function by name: those of a mapping or a named tuple, `value` for an array."""
    if isinstance(out, Mapping):
        return dict(out)
    if hasattr(out, "_asdict"):
        return dict(out._asdict())
    if hasattr(out, "shape"):
        return {"value": out}
    raise ValueError(
        f"function returns a {type(out).__name__}; it must return an array, a mapping of names to "
        "arrays or a named tuple of arrays."
    )


def with_status(out: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Adds or completes the status of batched outputs, and blanks the lanes that failed.

    Args:
      out: arrays with a leading axis of lanes. If there is a `status` it is taken as it is, so that
        a function may return NaN as a value (codes that `STATUS` does not have are "failed"); if
        not, a lane fails where a number is not finite.

    Returns:
      The outputs with `status`, int8, and NaN in every floating-point entry of a failed lane.

    Raises:
      ValueError: for a status that is not one integer a lane.
    """
    out = dict(out)
    floats = [n for n, x in out.items() if jnp.issubdtype(x.dtype, jnp.inexact)]
    if "status" in out:
        codes = out.pop("status")
        if not jnp.issubdtype(codes.dtype, jnp.integer) or codes.ndim != 1:
            raise ValueError(
                f"function returns a status of dtype {codes.dtype} and shape {codes.shape[1:]} a "
                "lane; it must be one integer, a code of sweeps.STATUS (0 is good)."
            )
        known = (codes >= 0) & (codes < len(STATUS))
        status = jnp.where(known, codes, STATUS.index("failed")).astype(jnp.int8)
    else:
        lanes = next(iter(out.values())).shape[0]
        finite = jnp.ones((lanes,), bool)
        for name in floats:
            x = out[name]
            finite &= jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
        status = jnp.where(finite, 0, NON_FINITE).astype(jnp.int8)
    for name in floats:
        x = out[name]
        good = jnp.reshape(status == 0, (-1,) + (1,) * (x.ndim - 1))
        out[name] = jnp.where(good, x, jnp.asarray(jnp.nan, x.dtype))
    return {**out, "status": status}


def describe(
    grid: Grid,
    shapes: Mapping[str, Any],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Any],
) -> dict[str, Variable]:
    """Names the dimensions of the outputs.

    Args:
      grid: the lanes.
      shapes: what each output of one lane looks like, with `shape` and `dtype`.
      dims: names of an output's own dimensions; `NAME_0`, `NAME_1`, … where there are none.
      coords: coordinates of output dimensions, for a check of their lengths.

    Returns:
      A Variable for each output.

    Raises:
      ValueError: where names clash, or dims or coords do not fit the shapes.
    """
    if unknown := set(dims) - set(shapes):
        raise ValueError(f"dims names {sorted(unknown)}; the outputs are {', '.join(shapes)}.")
    taken = set(grid.names) | set(grid.parameters)
    sizes: dict[str, int] = {}
    variables = {}
    for name, leaf in shapes.items():
        if name in taken:
            raise ValueError(
                f"function returns {name!r}, which is the name of an axis; rename one."
            )
        own = tuple(dims.get(name, [f"{name}_{i}" for i in range(len(leaf.shape))]))
        if len(own) != len(leaf.shape):
            raise ValueError(
                f"dims gives {name!r} the dimensions {own}; a lane's output has shape {leaf.shape}."
            )
        for dim, size in zip(own, leaf.shape, strict=True):
            if dim in taken:
                raise ValueError(f"dims uses {dim!r}, which is the name of an axis; rename one.")
            if sizes.setdefault(dim, size) != size:
                raise ValueError(
                    f"dimension {dim!r} has size {sizes[dim]} and, in {name!r}, {size}; rename one."
                )
        variables[name] = Variable(own, tuple(leaf.shape), _plain_dtype(name, leaf.dtype))
    for dim, values in coords.items():
        if dim not in sizes:
            raise ValueError(
                f"coords names {dim!r}; the outputs' dimensions are {', '.join(sizes)}."
            )
        if np.shape(values) != (sizes[dim],):
            raise ValueError(
                f"coords gives {dim!r} shape {np.shape(values)}; it must be ({sizes[dim]},)."
            )
    return variables


def coordinates(grid: Grid, coords: Mapping[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Coordinates of the data set: parameters along their axes, and those of output dimensions."""
    found: dict[str, tuple[tuple[str, ...], Any]] = {}
    for name, p in grid.parameters.items():
        own = tuple(f"{name}_{i}" for i in range(p.values.ndim - 1))
        values = p.values
        if values.dtype == object:
            values = np.array([v if isinstance(v, str) else repr(v) for v in values], dtype=str)
        found[name] = ((grid.names[p.axis], *own), values)
    return found | {dim: ((dim,), np.asarray(values)) for dim, values in coords.items()}


def _plain_dtype(name: str, dtype: Any) -> np.dtype:
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        raise ValueError(
            f"function returns {name!r} of dtype {dtype}; return numbers (of a PRNG key "
            "jax.random.key_data)."
        )
    return np.dtype(dtype)


def check_storable(variables: Mapping[str, Variable]) -> None:
    """Raises ValueError for an output whose dtype a Zarr store does not have."""
    for name, variable in variables.items():
        if variable.dtype.isbuiltin != 1:
            raise ValueError(
                f"function returns {name!r} of dtype {variable.dtype}, which a store cannot hold; "
                "return it as float32, or sweep without a store."
            )


STATUS_ATTRIBUTES = {
    "long_name": "how the lane ended",
    "flag_values": [NOT_RUN, *range(len(STATUS))],
    "flag_meanings": " ".join(["not_run", *(s.replace(" ", "_") for s in STATUS)]),
}


def fill_value(dtype: np.dtype) -> Any:
    """What stands for a value that is not there."""
    return np.nan if np.issubdtype(dtype, np.inexact) else np.zeros((), dtype)[()]


@runtime_checkable
class Sink(Protocol):
    """Where results go."""

    def is_done(self, block: Block) -> bool:
        """Whether a block's results are there."""
        ...

    def write(self, block: Block, results: dict[str, np.ndarray]) -> None:
        """Takes a block's results, shaped like the block."""
        ...

    def dataset(self) -> xarray.Dataset:
        """All results."""
        ...


class Memory:
    """Results in arrays of their own, for sweeps that fit."""

    def __init__(self, grid: Grid, variables: Mapping[str, Variable], coords: Mapping[str, Any]):
        self._grid, self._variables, self._coords = grid, variables, coords
        self._arrays = {
            name: np.full((*grid.shape, *v.shape), fill_value(v.dtype), v.dtype)
            for name, v in variables.items()
        }

    def is_done(self, block: Block) -> bool:
        """Nothing is there before it is written."""
        return False

    def write(self, block: Block, results: dict[str, np.ndarray]) -> None:
        """Copies a block into place."""
        for name, values in results.items():
            self._arrays[name][block.slices] = values

    def dataset(self) -> xarray.Dataset:
        """The data set around the arrays."""
        data = {
            name: ((*self._grid.names, *v.dims), self._arrays[name])
            for name, v in self._variables.items()
        }
        found = xarray.Dataset(data, coordinates(self._grid, self._coords))
        found["status"].attrs.update(STATUS_ATTRIBUTES)
        return found
