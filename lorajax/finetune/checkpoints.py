"""Full-state checkpoints of a run, through orbax, so that it resumes exactly."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from lorajax.adapters.checkpoints import restored, storable, wanted_of
from lorajax.finetune.training import State, Trainer


def _numbered(tree: Any) -> dict[str, Any]:
    """The leaves by number: independent of what Flax and optax call their containers."""
    return {f"{i:05}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


class Checkpoints:
    """The checkpoints of one run in a folder; a context manager.

    Args:
      folder: made if it is not there.
      settings: what determines the run, as JSON; a folder of other settings is refused.
      keep: how many of the latest are kept.

    Raises:
      ValueError: if the folder holds checkpoints of a run with other settings.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any], keep: int = 2):
        self.settings = dict(settings)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)
        step = self._manager.latest_step()
        if step is not None:
            args = ocp.args.Composite(settings=ocp.args.JsonRestore())
            found = self._manager.restore(step, args=args)["settings"]
            for name in sorted({*found, *self.settings}):
                if found.get(name) != self.settings.get(name):
                    raise ValueError(
                        f"{folder} holds a run with {name} = {found.get(name)!r}, not "
                        f"{self.settings.get(name)!r}; give another folder or the same settings."
                    )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the latest checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: State, history: Mapping[str, Any]) -> None:
        """Writes a state and what was recorded until then (as JSON); complete or not at all."""
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(storable(_numbered(state))),
                settings=ocp.args.JsonSave(self.settings),
                history=ocp.args.JsonSave(dict(history)),
            ),
        )

    def restore(self, trainer: Trainer) -> tuple[State, dict[str, Any]] | None:
        """The latest state and history; None if there is no checkpoint yet."""
        step = self._manager.latest_step()
        if step is None:
            return None
        like = trainer.init()
        wanted = _numbered(like)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(wanted_of(wanted)), history=ocp.args.JsonRestore()
        )
        found = self._manager.restore(step, args=args)
        leaves = restored(wanted, found["state"])
        values = [leaves[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), values), found["history"]
