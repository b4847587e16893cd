"""The full state of an adapted model, or of its training, through orbax."""

import os
import pathlib
from typing import Any

import jax
from flax import nnx


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
        checkpointer.save(target, _without_keys(nnx.to_pure_dict(_state(state))))


def load_checkpoint(template: Any, folder: str | os.PathLike) -> None:
    """Reads a checkpoint into a module of the same structure, in place.

    Args:
      template: an adapted model, optimizer or dict of them, as `save_checkpoint` was given; its
        Variables are overwritten, in their dtypes and shardings.
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
            restored = checkpointer.restore(source, _without_keys(wanted))
    except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{str(source)!r} is no checkpoint of this model and its adapters: {first}"
        ) from None
    restored = jax.tree.map(_with_key, wanted, restored)
    nnx.replace_by_pure_dict(state, restored)
    _update(template, state)


def _checkpointer() -> Any:
    # Orbax takes a second to import, which whoever saves no checkpoint need not wait for.
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer()


def _is_key(leaf: Any) -> bool:
    return jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _without_keys(tree: Any) -> Any:
    """The tree with PRNG keys, such as those of dropout, as the integers that orbax can write."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _with_key(wanted: Any, restored: Any) -> Any:
    if not _is_key(wanted):
        return restored
    return jax.random.wrap_key_data(restored, impl=jax.random.key_impl(wanted))


def _state(module: Any) -> Any:
    return nnx.state(nnx.Dict(module) if isinstance(module, dict) else module)


def _update(module: Any, state: Any) -> None:
    nnx.update(nnx.Dict(module) if isinstance(module, dict) else module, state)
