"""Full-state checkpoints of a run, through orbax, so that it resumes exactly."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lorajax.adapters.checkpoints import restored, storable, wanted_of
from lorajax.environment import files
from lorajax.finetune.training import State, Trainer


def _numbered(tree: Any) -> dict[str, Any]:
    """The leaves by number: independent of what Flax and optax call their containers."""
    return {f"{i:05}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _said(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def _held(folder: Path) -> Callable[[], None]:
    """Keeps other runs out of a folder: orbax removes what it takes for left over."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return files.hold(folder)
    except BlockingIOError as error:
        raise ValueError(
            f"{folder} is in use by a run that goes on; wait for its end or give another folder."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks that orbax logs of what it then raises."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


class Checkpoints:
    """The checkpoints of one run in a folder; a context manager.

    Args:
      folder: made if it is not there.
      settings: what determines the run, as JSON; a folder of other settings is refused.
      neutral: values of settings that did not exist when a folder was begun, and that change
        nothing of what was done then; the folder counts as having been begun with them.
      keep: how many of the latest are kept.
      alone: whether this one of several processes writes and reads without the others, and states
        are whole in its memory (`processes.Shared`); else all of them write to one folder.

    Raises:
      ValueError: if the folder holds checkpoints of a run with other settings, none that can be
        read, or is in use by another process.

    Attributes:
      settings: of the run.
      assumed: those among them that the folder lacks, with the values that it counts as having.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: Mapping[str, Any],
        keep: int = 2,
        *,
        neutral: Mapping[str, Any] | None = None,
        alone: bool = False,
    ):
        self.settings, self.assumed = dict(settings), {}
        self._folder = folder
        self._alone = alone and jax.process_count() > 1
        mine = self._alone or jax.process_index() == 0
        self._release = _held(Path(folder)) if mine else lambda: None
        others: dict[str, Any] = {}
        if self._alone:  # orbax would wait for the others
            only = {"primary_host": jax.process_index(), "active_processes": {jax.process_index()}}
            others["multiprocessing_options"] = ocp.options.MultiprocessingOptions(**only)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not others, enable_async_checkpointing=False, **others
        )
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)
        args = ocp.args.Composite(settings=ocp.args.JsonRestore())
        found = self._latest(lambda step: self._manager.restore(step, args=args)["settings"])
        if found is None:
            return
        self.assumed = {k: v for k, v in (neutral or {}).items() if k not in found}
        self.assumed = {k: v for k, v in self.assumed.items() if k in self.settings}
        then = found | self.assumed
        for name in sorted({*then, *self.settings}):
            if then.get(name) != self.settings.get(name):
                self._release()
                older = f", which was begun before {name} came," if name in self.assumed else ""
                raise ValueError(
                    f"{folder} holds a run{older} with {name} = {then.get(name)!r}, not "
                    f"{self.settings.get(name)!r}; give another folder or the same settings."
                )

    def _latest(self, read: Callable[[int], Any]) -> Any:
        """What is read of the latest checkpoint that is whole; those after it are removed.

        A disk that fails, or a process that is killed, leaves what cannot be read; the same steps
        are taken again from the one before.
        """
        first: Exception | None = None
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged = []
        for step in steps:
            try:
                found = read(step)
            except Exception as error:  # orbax and tensorstore raise of many kinds
                first = first or error
                damaged.append(step)
                continue
            for each in damaged:
                self._manager.delete(each)
            return found
        if first is not None:
            raise ValueError(
                f"{self._folder} holds no state that can be read (step {steps[0]}: {_said(first)});"
                " give another folder, or delete it and train again."
            ) from first
        return None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()
        self._release()

    @property
    def latest(self) -> int | None:
        """Step of the latest checkpoint, or None."""
        return self._manager.latest_step()

    def _written(self, state: State) -> dict[str, Any]:
        found = storable(_numbered(state))
        # Of JAX's arrays that lie in one of several processes orbax writes none.
        return jax.tree.map(np.asarray, found) if self._alone else found

    def save(self, state: State, history: Mapping[str, Any]) -> None:
        """Writes a state and what was recorded until then (as JSON); complete or not at all."""
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        try:
            with _quiet():
                self._manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(self._written(state)),
                        settings=ocp.args.JsonSave(self.settings),
                        history=ocp.args.JsonSave(dict(history)),
                    ),
                )
        except Exception as error:  # of orbax, tensorstore, or the threads that they write in
            raise ValueError(
                f"{self._folder} cannot be written at step {step} ({_said(error)}); make room, and "
                "go on from the step before."
            ) from error

    def restore(self, trainer: Trainer) -> tuple[State, dict[str, Any]] | None:
        """The latest state and history; None if there is no checkpoint yet."""
        return None if self._manager.latest_step() is None else self.read(trainer.init())

    def read(self, like: State) -> tuple[State, dict[str, Any]] | None:
        """As `restore`, into the places and types of the arrays of a state."""
        if self._manager.latest_step() is None:
            return None
        wanted = _numbered(like)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(wanted_of(wanted)), history=ocp.args.JsonRestore()
        )
        found = self._latest(lambda step: self._manager.restore(step, args=args))
        leaves = restored(wanted, found["state"])
        values = [leaves[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), values), found["history"]
