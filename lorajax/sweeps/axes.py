"""Axes, the grid of lanes that they span, and the blocks into which the grid is cut."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt32

from lorajax.sweeps.identity import identity


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What one argument of the function takes along an axis.

    Attributes:
      axis: position of its axis in the grid.
      values: shape (size of the axis, ...); objects where they are neither numbers nor booleans.
      static: whether the function gets Python values, so that they may set shapes.
    """

    axis: int
    values: np.ndarray
    static: bool


@dataclasses.dataclass(frozen=True)
class Block:
    """A hyperrectangle of lanes: what is computed, written and marked as done together.

    Attributes:
      number: position in the order of the blocks.
      slices: the part of each axis, in the grid's order.
    """

    number: int
    slices: tuple[slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Lanes along each axis."""
        return tuple(s.stop - s.start for s in self.slices)

    @property
    def lanes(self) -> int:
        """Number of lanes."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Grid:
    """All lanes of a sweep: the Cartesian product of its axes.

    Attributes:
      names: of the axes, which become dimensions.
      shape: their sizes.
      parameters: arguments of the function by name; several may share an axis and then move
        together.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: dict[str, Parameter]

    @property
    def lanes(self) -> int:
        """Number of lanes in all."""
        return math.prod(self.shape)

    def static_axes(self) -> set[int]:
        """Positions of the axes along which a parameter is static."""
        return {p.axis for p in self.parameters.values() if p.static}

    def block_shape(self, limit: int, spread: Sequence[float] | None = None) -> tuple[int, ...]:
        """Sizes of a block of at most `limit` lanes.

        Args:
          limit: at least 1.
          spread: how much the predicted cost varies along each axis; a block grows first along
            the axes where it varies least, so that its lanes cost alike. None grows the last axis
            first.

        Returns:
          One size an axis, 1 along static ones. Blocks along an axis are as even as they can be.
        """
        static = self.static_axes()
        order = sorted(
            range(len(self.names)), key=lambda i: ((spread or [0.0] * len(self.names))[i], -i)
        )
        sizes = [1] * len(self.names)
        left = limit
        for i in order:
            if i in static:
                continue
            most = max(1, min(left, self.shape[i]))
            sizes[i] = math.ceil(self.shape[i] / math.ceil(self.shape[i] / most))
            left //= sizes[i]
        return tuple(sizes)

    def blocks(self, sizes: tuple[int, ...]) -> Iterator[Block]:
        """All blocks of the given sizes in row-major order; those at the ends may be smaller."""
        cuts = [
            [slice(i, min(i + size, n)) for i in range(0, n, size)]
            for n, size in zip(self.shape, sizes, strict=True)
        ]
        for number, slices in enumerate(itertools.product(*cuts)):
            yield Block(number, slices)

    def indices(self, block: Block) -> list[np.ndarray]:
        """Index along each axis of every lane of a block, lanes in row-major order."""
        ranges = [np.arange(s.start, s.stop) for s in block.slices]
        return [x.ravel() for x in np.meshgrid(*ranges, indexing="ij")] if ranges else []

    def arguments(
        self, block: Block, names: Collection[str]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arguments among `names`: traced ones with a leading axis of lanes, and static ones."""
        indices = self.indices(block)
        traced = {
            name: p.values[indices[p.axis]]
            for name, p in self.parameters.items()
            if not p.static and name in names
        }
        static = {
            name: p.values[block.slices[p.axis].start]
            for name, p in self.parameters.items()
            if p.static and name in names
        }
        return traced, {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in static.items()
        }


def _values(name: str, values: Any, static: bool) -> np.ndarray:
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise ValueError(f"axis {name!r} is {values!r}; give it a sequence of values.")
    if len(values) == 0:
        raise ValueError(f"axis {name!r} is empty; it must have at least one value.")
    array = np.asarray(values) if not any(isinstance(v, str) for v in values) else None
    if array is None or array.dtype.kind not in "biuf":
        array = np.empty(len(values), object)
        array[:] = list(values)
        if not static:
            raise ValueError(
                f"axis {name!r} holds {type(values[0]).__name__} values, which cannot be traced; "
                "add its name to `static`."
            )
    elif array.dtype.kind == "f" and not np.all(np.isfinite(array)):
        raise ValueError(
            f"axis {name!r} holds values that are NaN or infinite; all must be finite."
        )
    if static and array.ndim != 1:
        raise ValueError(
            f"axis {name!r} is static and has shape {array.shape}; it must be a vector."
        )
    if static and not all(isinstance(v, Hashable) for v in array):
        raise ValueError(f"axis {name!r} is static and holds values that are not hashable.")
    return array


def make_grid(axes: Mapping[str, Any], static: Sequence[str] = ()) -> Grid:
    """The grid that axes span.

    Args:
      axes: values by name; a mapping of several named sequences of one length instead of values
        makes an axis along which these parameters move together (they are zipped).
      static: names of the parameters that the function gets as Python values.

    Returns:
      The Grid.

    Raises:
      ValueError: for an axis without values, lengths that differ within a zipped axis, a name that
        occurs twice, or a static name that is no parameter.
    """
    if not axes:
        raise ValueError("axes is empty; a sweep needs at least one axis.")
    names, shape, parameters = [], [], {}
    for position, (axis, values) in enumerate(axes.items()):
        members = values if isinstance(values, Mapping) else {axis: values}
        if not members:
            raise ValueError(f"axis {axis!r} is an empty mapping; name at least one parameter.")
        arrays = {n: _values(n, v, n in static) for n, v in members.items()}
        lengths = {n: len(v) for n, v in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"axis {axis!r} zips values of lengths {lengths}; they must be equal.")
        for name, array in arrays.items():
            if name in parameters:
                raise ValueError(f"axes name the parameter {name!r} twice; each may occur once.")
            parameters[name] = Parameter(position, array, name in static)
        names.append(axis)
        shape.append(next(iter(lengths.values())))
    if unknown := set(static) - set(parameters):
        raise ValueError(
            f"static names {sorted(unknown)}; the parameters are {', '.join(parameters)}."
        )
    return Grid(tuple(names), tuple(shape), parameters)


def _bits(values: np.ndarray) -> np.ndarray:
    """64 bits for every value of an axis: of the value alone, not of its spelling."""
    if values.ndim == 1 and values.dtype.kind in "biu":
        return values.astype(np.uint64 if values.dtype.kind == "u" else np.int64).view(np.uint64)
    if values.ndim == 1 and values.dtype.kind == "f":
        wide = values.astype(np.float64)
        whole = (wide == np.round(wide)) & (np.abs(wide) < 2**53)
        # 1.0 folds as 1 does, so that a scale axis (1, 2) and (0.5, 1, 2) share their lanes.
        as_integers = np.where(whole, wide, 0).astype(np.int64).view(np.uint64)
        return np.where(whole, as_integers, wide.view(np.uint64))
    digests = [
        hashlib.blake2b(
            (repr(v) if isinstance(v, str) else identity(v)).encode()
            if values.dtype == object
            else (np.asarray(v, np.float64) + 0.0).tobytes(),
            digest_size=8,
        ).digest()
        for v in values
    ]
    return np.frombuffer(b"".join(digests), np.uint64)


def fold_words(grid: Grid, fold: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Words to fold into the key of a lane, by parameter in the order of their names.

    Args:
      grid: the lanes.
      fold: parameters whose coordinates make a lane's key; all of them if None.

    Returns:
      Arrays of shape (size of the axis, 3), uint32: one word for the name and two for the value, so
      that neither another axis nor another place on the axis changes a lane's key.

    Raises:
      ValueError: if `fold` names what is no parameter.
    """
    chosen = list(grid.parameters) if fold is None else list(fold)
    if unknown := set(chosen) - set(grid.parameters):
        raise ValueError(
            f"fold names {sorted(unknown)}; the parameters are {', '.join(grid.parameters)}."
        )
    words = {}
    for name in sorted(chosen):
        bits = _bits(grid.parameters[name].values)
        mark = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")
        parts = [np.full_like(bits, mark), bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)]
        words[name] = np.stack(parts, axis=1).astype(np.uint32)
    return words


def lane_keys(
    key: Key[Array, ""] | UInt32[Array, "2"], words: UInt32[Array, "lanes words"]
) -> Array:
    """One key a lane: `key` with the lane's words folded in, one after the other.

    Args:
      key: the sweep's key.
      words: shape (lanes, words), uint32; may have no words, and then all lanes share the key.

    Returns:
      Keys, shape (lanes,), of the kind of `key`.
    """

    def one(row: Array) -> Array:
        folded = key
        for i in range(words.shape[1]):
            folded = jax.random.fold_in(folded, row[i])
        return folded

    return jax.vmap(one)(jnp.asarray(words))
