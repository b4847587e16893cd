"""Training over several devices: batches split among them, and weights either copied or split."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorajax.environment import content

AXIS = "data"
"""Name of the one axis of a mesh here."""
LAYOUTS = ("data", "full")
"""Every device has all weights and a part of the batch; or it has a part of every weight, too."""


def mesh_of(devices: int | None = None) -> Mesh:
    """A mesh of one axis over the first devices there are.

    Args:
      devices: how many; all if None.

    Returns:
      The Mesh.

    Raises:
      ValueError: for more devices than there are.
    """
    found = jax.devices()
    count = len(found) if devices is None else devices
    if not 1 <= count <= len(found):
        raise ValueError(
            f"devices is {count}; there are {len(found)} of kind {found[0].platform} (XLA makes "
            "more of a CPU with XLA_FLAGS=--xla_force_host_platform_device_count=N)."
        )
    return Mesh(np.asarray(found[:count]), (AXIS,))


def check_layout(layout: str) -> None:
    """Raises ValueError for a name that is not in LAYOUTS."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}.")


def check_batch(batch_size: int, accumulate: int, devices: int) -> None:
    """Raises ValueError unless each device has as many samples of a batch, and of each part."""
    if batch_size % (accumulate * devices):
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        raise ValueError(
            f"batch_size is {batch_size}{parts}; it must be a multiple of the {devices} devices"
            + (" times the parts." if parts else ".")
        )


def spec(shape: tuple[int, ...], devices: int, layout: str) -> PartitionSpec:
    """How an array of weights is split.

    Args:
      shape: of the array.
      devices: of the mesh.
      layout: of LAYOUTS.

    Returns:
      With "full" the longest axis that the devices divide is split, the first of equal ones; an
      array without one is copied, as every array with "data" is.
    """
    check_layout(layout)
    whole = [side for side in shape if side % devices == 0 and side > 0]
    if layout == "data" or devices == 1 or not whole:
        return PartitionSpec()
    axis = shape.index(max(whole))
    return PartitionSpec(*(AXIS if i == axis else None for i in range(len(shape))))


def share(shape: tuple[int, ...], devices: int, layout: str) -> int:
    """Entries of an array of weights that each device has."""
    entries = int(np.prod(shape, dtype=np.int64))
    return entries // devices if any(spec(shape, devices, layout)) else entries


def _sharding(leaf: Any, mesh: Mesh, layout: str) -> NamedSharding:
    return NamedSharding(mesh, spec(tuple(leaf.shape), mesh.size, layout))


def place(tree: Any, mesh: Mesh, layout: str = "data") -> Any:
    """The same arrays on the devices of a mesh; what is there already is not copied.

    Args:
      tree: of arrays: a state of parameters, an optimizer's state.
      mesh: of one axis. Where it spans processes, each of them holds the whole arrays at first, and
        the same ones.
      layout: of LAYOUTS.

    Returns:
      A tree of the same structure.
    """
    return jax.tree.map(lambda x: _put(x, _sharding(x, mesh, layout)), tree)


def _put(x: Any, sharding: NamedSharding) -> Any:
    if sharding.is_fully_addressable or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    # `device_put` would gather what every process holds, to compare it, at every step.
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def constrain(tree: Any, mesh: Mesh, layout: str) -> Any:
    """Inside a compiled function, what `place` is outside."""
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, _sharding(x, mesh, layout)), tree
    )


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Columns split by samples where the devices divide them, else copied.

    Args:
      batch: arrays by name, samples on the first axis; the same in every process of the mesh.
      mesh: of one axis.

    Returns:
      The columns on the devices.
    """
    found = {}
    for name, column in batch.items():
        split = column.shape[0] % mesh.size == 0
        found[name] = _put(
            column, NamedSharding(mesh, PartitionSpec(AXIS) if split else PartitionSpec())
        )
    return found


def whole(tree: Any) -> Any:
    """The same arrays in the memory of every process, where a mesh has split them among several.

    Args:
      tree: of arrays; all processes call this for the same ones, one after the other.

    Returns:
      A tree of the same structure, with NumPy arrays (keys: JAX arrays) for what spans processes;
      the rest is what it was.
    """
    return jax.tree.map(_whole, tree)


def _whole(x: Any) -> Any:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _whole(jax.random.key_data(x))
        return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(x))
    if not x.is_fully_replicated:
        copied = NamedSharding(x.sharding.mesh, PartitionSpec())  # type: ignore[attr-defined]
        x = jax.jit(lambda x: x, out_shardings=copied)(x)
    return np.asarray(x.addressable_data(0))


def check_same(what: str, tree: Any) -> None:
    """Raises ValueError unless every process holds the same arrays.

    Args:
      what: they are, for the sentence.
      tree: of arrays in this process's memory, numbers and strings.
    """
    if jax.process_count() == 1:
        return  # hashing all weights takes a second for each gigabyte
    digest = bytes.fromhex(content.digest(tree))
    found = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    others = [str(i) for i, each in enumerate(found) if not np.array_equal(each, found[0])]
    if others:
        raise ValueError(
            f"{what} of process {', '.join(others)} differ from those of process 0; give all of "
            "them the same options and files, on machines of one kind."
        )
