"""Training over several devices: batches split among them, and weights either copied or split."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
      mesh: of one axis.
      layout: of LAYOUTS.

    Returns:
      A tree of the same structure.
    """
    return jax.tree.map(lambda x: jax.device_put(x, _sharding(x, mesh, layout)), tree)


def constrain(tree: Any, mesh: Mesh, layout: str) -> Any:
    """Inside a compiled function, what `place` is outside."""
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, _sharding(x, mesh, layout)), tree
    )


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Columns split by samples where the devices divide them, else copied.

    Args:
      batch: arrays by name, samples on the first axis.
      mesh: of one axis.

    Returns:
      The columns on the devices.
    """
    found = {}
    for name, column in batch.items():
        split = column.shape[0] % mesh.size == 0
        found[name] = jax.device_put(
            column, NamedSharding(mesh, PartitionSpec(AXIS) if split else PartitionSpec())
        )
    return found
