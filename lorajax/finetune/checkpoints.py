"""Full-state checkpoints of a run, through orbax, so that it resumes exactly."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lorajax.finetune.training import State, Trainer


def _packed(state: State) -> dict[str, Any]:
    """The leaves by number: independent of what Flax and optax call their containers."""

    def plain(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return {f"{i:05}": plain(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}


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
                state=ocp.args.StandardSave(_packed(state)),
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
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(_packed(like)), history=ocp.args.JsonRestore()
        )
        found = self._manager.restore(step, args=args)
        leaves, tree = jax.tree.flatten(like)

        def typed(leaf, value):
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            return jax.random.wrap_key_data(value) if is_key else value

        values = [typed(leaf, found["state"][f"{i:05}"]) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(tree, values), found["history"]
