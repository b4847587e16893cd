"""The full state of an adapted model, or of its training, through orbax.

`storable` and `restored` say how any tree of arrays goes through orbax and comes back as it was:
PRNG keys as integers, each array in its dtype and sharding, and what was committed to no device
free again, so that it goes on following what it meets.
"""

import contextlib
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorajax.environment.judging import judged


def storable(tree: Any) -> Any:
    """A tree of arrays as orbax can write it.

    Args:
      tree: arrays, PRNG keys among them, in any containers.

    Returns:
      The same tree with keys as the integers that they are made of.
    """
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def wanted_of(tree: Any) -> Any:
    """What orbax is to restore for a tree: arrays on the host for those committed nowhere.

    Args:
      tree: the arrays that are to be replaced.

    Returns:
      A tree to give to orbax's restore, then `restored`.
    """

    def like(leaf: Any) -> Any:
        return leaf if _is_committed(leaf) else np.empty(leaf.shape, leaf.dtype)

    return jax.tree.map(like, storable(tree))


def restored(tree: Any, found: Any) -> Any:
    """What orbax restored, with the keys, dtypes and placement of the tree that it replaces.

    Args:
      tree: the arrays that are replaced.
      found: what orbax made of `wanted_of(tree)`.

    Returns:
      A tree of arrays.
    """

    def place(old: Any, new: Any) -> Any:
        if _is_key(old):
            data = place(jax.random.key_data(old), new)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(old))
        if _is_committed(old):
            return new
        # Made anew where the old one lies: only what is put there by name is committed to it.
        home = old.devices() if isinstance(old, jax.Array) else set()
        where = jax.default_device(*home) if len(home) == 1 else contextlib.nullcontext()
        with where:
            return jnp.asarray(np.asarray(new), old.dtype)

    return jax.tree.map(place, tree, found)


@judged
def save_checkpoint(state: Any, folder: str | os.PathLike) -> None:
    """Writes every Variable of a module: base, adapters, offsets, optimizer state.

    Args:
      state: an adapted model, an `nnx.Optimizer`, or a dict of them.
      folder: must not exist yet.

    Raises:
      ValueError: if the folder exists.

    What is saved are the arrays; the program around them (ranks, alphas, which adapters are active)
    is that of the object that `load_checkpoint` is given. Tied adapters and other shared Variables
    are saved once.
    """
    target = pathlib.Path(os.path.abspath(folder))
    if target.exists():
        raise ValueError(f"{str(target)!r} exists already; a checkpoint needs a folder of its own.")
    with _checkpointer() as checkpointer:
        checkpointer.save(target, storable(nnx.to_pure_dict(_state(state))))


@judged
def load_checkpoint(template: Any, folder: str | os.PathLike) -> None:
    """Reads a checkpoint into a module of the same structure, in place.

    Args:
      template: an adapted model, optimizer or dict of them, as `save_checkpoint` was given; its
        Variables are overwritten, in their dtypes and shardings; arrays that were committed to no
        device stay so.
      folder: the checkpoint's folder.

    Raises:
      ValueError: if there is no checkpoint, or one of another structure or of other shapes.
    """
    source = pathlib.Path(os.path.abspath(folder))
    if not source.is_dir():
        raise ValueError(f"{str(source)!r} holds no checkpoint.")
    state = _state(template)
    wanted = nnx.to_pure_dict(state)
    try:
        with _checkpointer() as checkpointer:
            found = checkpointer.restore(source, wanted_of(wanted))
    except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{str(source)!r} is no checkpoint of this model and its adapters: {first}"
        ) from None
    nnx.replace_by_pure_dict(state, restored(wanted, found))
    _update(template, state)


def _checkpointer() -> Any:
    # Orbax takes a second to import, which whoever saves no checkpoint need not wait for.
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer()


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_committed(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and getattr(leaf, "committed", True)


def _state(module: Any) -> Any:
    return nnx.state(nnx.Dict(module) if isinstance(module, dict) else module)


def _update(module: Any, state: Any) -> None:
    nnx.update(nnx.Dict(module) if isinstance(module, dict) else module, state)
