"""The full state of an adapted model, or of its training, through orbax."""

import os
import pathlib
from typing import Any

import orbax.checkpoint as ocp
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
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target, nnx.to_pure_dict(_state(state)))


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
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(source, wanted)
    except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{str(source)!r} is no checkpoint of this model and its adapters: {first}"
        ) from None
    nnx.replace_by_pure_dict(state, restored)
    _update(template, state)


def _state(module: Any) -> Any:
    return nnx.state(nnx.Dict(module) if isinstance(module, dict) else module)


def _update(module: Any, state: Any) -> None:
    nnx.update(nnx.Dict(module) if isinstance(module, dict) else module, state)
