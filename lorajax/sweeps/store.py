"""Results in a Zarr store, from which a killed sweep goes on.

A chunk of the store is a chunk of the sweep. Its variables are written first and its part of
`status` last, each file by a rename, so that a chunk whose status says so is complete, and one that
does not is run again and overwritten by the same bytes.
"""

import errno
import json
import os
import pathlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import xarray
import zarr
import zarr.codecs
from jax.experimental import multihost_utils

from lorajax.environment import files
from lorajax.environment.agreement import together
from lorajax.environment.judging import judged
from lorajax.sweeps.axes import Block, Grid
from lorajax.sweeps.identity import Unstable, digest, identity
from lorajax.sweeps.outputs import (
    NOT_RUN,
    STATUS_ATTRIBUTES,
    Variable,
    check_storable,
    coordinates,
    fill_value,
)

ATTRIBUTE = "lorajax_sweep"
# Zarr's own choice, level 3, takes half as long again to write a chunk of flows, which a
# device faster than the disk waits for, and makes it no smaller: 726 bytes a lane of 1,200,
# and 728 at level 1.
FAST = zarr.codecs.ZstdCodec(level=1)
# What Zarr raises for a description that a stranger or a failing disk wrote.
_HOSTILE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_SHOWN = 32  # longer lists of values are told apart by a digest


def told(function: Callable[..., Any], settings: Mapping[str, Any]) -> str:
    """What a store says of a function, in the same words in any process.

    Args:
      function: what is swept.
      settings: what its user says of it.

    Returns:
      Its `identity`; its type where it has none but `settings` tell the rest.

    Raises:
      ValueError: where it has none and there are no settings.
    """
    try:
        return identity(function)
    except Unstable as error:
        if settings:
            return f"a {type(function).__qualname__}, told by settings"
        raise ValueError(
            f"a store cannot tell this sweep from another: {error}. Give what it stands for as "
            "JSON in settings, or define it at the top of a module."
        ) from error


def _summary(values: Any) -> Any:
    """Values as JSON, or their size and digest where there are many."""
    array = np.asarray(values)
    if array.dtype == object:
        array = np.array([v if isinstance(v, str) else identity(v) for v in array])
    if array.size <= _SHOWN:
        return array.tolist()
    ends = [array.ravel()[0].item(), array.ravel()[-1].item()]
    shown = json.dumps(array.tolist()).encode()
    return {"shape": list(array.shape), "ends": ends, "digest": digest(shown)}


def _seed(key: Any) -> Any:
    """A PRNG key's words; with the generator's name where it is not the usual one."""
    if key is None:
        return None
    if not jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
        return np.asarray(key).tolist()
    words, name = np.asarray(jax.random.key_data(key)).tolist(), str(jax.random.key_impl(key))
    return words if name in ("fry", "threefry2x32") else {"generator": name, "words": words}


def configuration(
    function: str,
    grid: Grid,
    variables: Mapping[str, Variable],
    coords: Mapping[str, Any],
    key: Any,
    fold: list[str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """All that determines the results, as JSON.

    Args:
      function: what is swept, from `told`.
      grid: the lanes.
      variables: the outputs.
      coords: coordinates of output dimensions.
      key: the sweep's key or None.
      fold: the parameters folded into it.
      settings: anything else, representable in JSON.

    Returns:
      Nested dictionaries of JSON values, the same for the same sweep in any process.

    Raises:
      ValueError: if the settings cannot be written as JSON, or an output not as Zarr.
    """
    check_storable(variables)
    axes: dict[str, dict[str, Any]] = {name: {} for name in grid.names}
    for name, p in grid.parameters.items():
        axes[grid.names[p.axis]][name] = _summary(p.values)
    try:
        settings = json.loads(json.dumps(dict(settings)))
    except TypeError as error:
        raise ValueError(f"settings cannot be written as JSON: {error}.") from error
    return {
        "function": function,
        "axes": axes,
        "key": _seed(key),
        "fold": fold,
        "outputs": {
            name: {"dims": list(v.dims), "shape": list(v.shape), "dtype": str(v.dtype)}
            for name, v in variables.items()
        },
        "coords": {name: _summary(values) for name, values in coords.items()},
        "settings": settings,
    }


def differences(stored: Any, now: Any, where: str = "") -> Iterator[str]:
    """Where two configurations differ, one line each."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for name in sorted({*stored, *now}):
            inner = f"{where}.{name}" if where else name
            if name not in stored:
                yield f"{inner}: not in the store, now {now[name]}"
            elif name not in now:
                yield f"{inner}: {stored[name]} in the store, not there now"
            else:
                yield from differences(stored[name], now[name], inner)
    elif json.dumps(stored) != json.dumps(now):  # 1, 1.0 and True differ, NaN is NaN
        yield f"{where}: {stored} in the store, now {now}"


def _damaged(path: str, what: str, error: Exception) -> ValueError:
    return ValueError(
        f"store {path} is damaged: {what} cannot be read ({error}); delete it and sweep again."
    )


def _group(path: str) -> zarr.Group | None:
    try:
        return zarr.open_group(path, mode="r")
    except FileNotFoundError:
        return None
    except _HOSTILE as error:  # a file of the store that is no JSON, or says what none does
        raise _damaged(path, "its description", error) from error


def _saved(path: str) -> dict[str, Any] | None:
    """What a store says of its sweep; None where there is none, or one cut short in the making."""
    group = _group(path)
    if group is None:
        if "://" not in path and os.path.isdir(path) and os.listdir(path):
            raise ValueError(f"store {path} is a folder that holds something else; give another.")
        return None
    saved: Any = group.attrs.get(ATTRIBUTE)
    if saved is None:
        raise ValueError(f"store {path} is a Zarr group but no sweep; give another.")
    if not isinstance(saved, dict):
        raise _damaged(path, "its description", TypeError(f"a {type(saved).__name__} for a sweep"))
    return None if saved.get("creating") else saved


def stored_chunk(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Lanes along each axis of a store's chunks; None where there is no store."""
    saved = _saved(os.fspath(path))
    return None if saved is None else tuple(saved["chunk"])


@judged
def open_sweep(path: str | os.PathLike[str]) -> xarray.Dataset:
    """The results in a store, read as they are used.

    Args:
      path: of a store that `sweep` has written, complete or not.

    Returns:
      The data set; lanes that were not run yet have status −1.

    Raises:
      ValueError: if there is no sweep at the path, or its status cannot be read; running the same
        sweep again mends what is damaged.
    """
    path = os.fspath(path)
    if _saved(path) is None:
        raise ValueError(f"store {path} does not exist; run the sweep first.")
    try:
        found = xarray.open_zarr(path, consolidated=False, chunks=None)
        return found.assign(status=found["status"].load())
    except (*_HOSTILE, OSError, RuntimeError, MemoryError) as error:
        raise _damaged(path, "its status", error) from error


class ZarrStore:
    """Results of a sweep on disk, or wherever Zarr can write.

    Args:
      path: of the store, made if there is none.
      grid: the lanes.
      variables: the outputs.
      coords: coordinates of output dimensions.
      sizes: lanes along each axis of a chunk.
      config: from `configuration`.

    Raises:
      ValueError: for a store of another configuration or other chunks, with the differences.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        grid: Grid,
        variables: Mapping[str, Variable],
        coords: Mapping[str, Any],
        sizes: tuple[int, ...],
        config: Mapping[str, Any],
    ):
        self._path, self._grid = os.fspath(path), grid
        self._variables, self._sizes = variables, sizes
        wanted = {**config, "chunk": list(sizes)}
        with together():  # or the others would wait for what one of them refuses
            self._check(wanted)
            if jax.process_index() == 0:
                if _saved(self._path) is None:
                    self._make(wanted, coords)
                self._lock()
        with together():  # once more, now that the first one has said what the store is of
            self._check(wanted)
        try:
            # A chunk of fill values is written like any other: one that is gone is then noticed.
            with zarr.config.set({"array.write_empty_chunks": True}):
                group = zarr.open_group(self._path, mode="r+")
                self._arrays = {name: _array(group, name) for name in variables}
            if jax.process_index() == 0:
                self._mend_coordinates(group, coords)
        except _HOSTILE as error:
            raise _damaged(self._path, "the description of its arrays", error) from error

    def _check(self, wanted: dict[str, Any]) -> None:
        """Raises ValueError where the store, if there is one, is of another sweep."""
        saved = _saved(self._path)
        if saved is not None and (found := list(differences(saved, wanted))):
            raise ValueError(
                f"store {self._path} holds another sweep; give another store or delete this one. "
                f"It differs in {'; '.join(found)}."
            )

    def _make(self, wanted: dict[str, Any], coords: Mapping[str, Any]) -> None:
        """Makes the store, in one step where that can be done: another run may do so as well."""
        path = pathlib.Path(self._path)
        if "://" in self._path or path.exists():
            self._create(self._path, wanted, coords)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with files.replacing(path) as partial:
                self._create(str(partial), wanted, coords)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            self._check(wanted)

    def _lock(self) -> None:
        """Tells other runs that this one writes, and sweeps up where there are none.

        A folder on a system without locks is swept up by every run, as it was.
        """
        if "://" in self._path:
            return
        folder = os.open(self._path, os.O_RDONLY)
        weakref.finalize(self, os.close, folder)
        try:
            import fcntl

            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sweep_up()
            fcntl.flock(folder, fcntl.LOCK_SH)
        except BlockingIOError:
            fcntl.flock(folder, fcntl.LOCK_SH)
        except (ImportError, OSError):
            self._sweep_up()

    def _create(self, path: str, wanted: dict[str, Any], coords: Mapping[str, Any]) -> None:
        group = zarr.open_group(path, mode="w", attributes={ATTRIBUTE: {"creating": True}})
        for name, v in self._variables.items():
            group.create_array(
                name,
                shape=(*self._grid.shape, *v.shape),
                chunks=(*self._sizes, *(max(1, n) for n in v.shape)),
                dtype=v.dtype,
                compressors=FAST,
                fill_value=NOT_RUN if name == "status" else fill_value(v.dtype),
                dimension_names=(*self._grid.names, *v.dims),
                attributes=STATUS_ATTRIBUTES if name == "status" else {},
            )
        for name, (dims, values) in coordinates(self._grid, coords).items():
            array = group.create_array(
                name,
                shape=values.shape,
                chunks=tuple(max(1, n) for n in values.shape),
                dtype=str if values.dtype.kind == "U" else values.dtype,
                dimension_names=dims,
            )
            array[...] = values
        names = sorted(set(coordinates(self._grid, coords)) - {*self._grid.names, *coords})
        # Only once all is there does the store say what it is.
        group.attrs.update(
            {ATTRIBUTE: wanted, **({"coordinates": " ".join(names)} if names else {})}
        )

    def _mend_coordinates(self, group: zarr.Group, coords: Mapping[str, Any]) -> None:
        """Writes what is no longer there as it was, which Zarr would read as zeros."""
        for name, (_, values) in coordinates(self._grid, coords).items():
            array = _array(group, name)
            try:
                found = np.asarray(array[...])
                same = np.array_equal(found.astype(values.dtype), values, values.dtype.kind == "f")
            except (OSError, RuntimeError, ValueError):  # what codecs raise
                same = False
            if not same:
                array[...] = values

    def _sweep_up(self) -> None:
        """Removes what a killed run was writing under a temporary name."""
        if "://" not in self._path:
            for left in pathlib.Path(self._path).rglob("*.partial"):
                left.unlink(missing_ok=True)

    def wait(self, name: str) -> None:
        """Waits until all processes of the run are here."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"lorajax sweep {name} {self._path}")

    def is_done(self, block: Block) -> bool:
        """Whether a block has been written and can be read: what is damaged is run again."""
        try:
            if np.any(np.asarray(self._arrays["status"][block.slices]) == NOT_RUN):
                return False
            for name, array in self._arrays.items():
                if not self._is_there(name, block):
                    return False
                _ = array[block.slices]
        except (OSError, RuntimeError, ValueError):  # what codecs raise
            return False
        return True

    def _is_there(self, name: str, block: Block) -> bool:
        """Whether a block's chunk has a file: Zarr reads one that is gone as nothing but NaN."""
        if "://" in self._path:
            return True
        place = [s.start // n for s, n in zip(block.slices, self._sizes, strict=True)]
        place += [0] * len(self._variables[name].shape)
        return pathlib.Path(self._path, name, "c", *map(str, place)).is_file()

    def write(self, block: Block, results: dict[str, np.ndarray]) -> None:
        """Writes a block's variables, then its status."""
        for name in sorted(results, key=lambda name: name == "status"):
            rest = (slice(None),) * len(self._variables[name].shape)
            self._arrays[name][(*block.slices, *rest)] = results[name]

    def dataset(self) -> xarray.Dataset:
        """The results in the store, read as they are used."""
        return open_sweep(self._path)


def _array(group: zarr.Group, name: str) -> zarr.Array:
    found = group[name]
    assert isinstance(found, zarr.Array)
    return found
