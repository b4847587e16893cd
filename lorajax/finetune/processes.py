"""Runs of several processes: all of them compute, the first one reads and writes.

JAX runs one program in all processes that `jax.distributed.initialize` has joined, and waits in
each for what the others have to give. So whatever may fail in one of them alone, or come out
otherwise there, is told to all before they go on. Every function here is called by all of them, in
the same order; in a single process each does what its name says and waits for nobody.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from lorajax.environment.agreement import together as together
from lorajax.environment.agreement import votes
from lorajax.finetune import sharding
from lorajax.finetune.checkpoints import Checkpoints
from lorajax.finetune.training import State, Trainer

_CHANGING = (nnx.BatchStat, nnx.RngState)
_PATIENCE = 10
"""Steps between two looks at whether a process is to stop: each waits for all devices."""


def first() -> bool:
    """Whether this is the process that reads and writes."""
    return jax.process_index() == 0


def given(data: bytes) -> bytes:
    """What the first process has, in every process."""
    if jax.process_count() == 1:
        return data
    # As bytes, since JAX cuts integers off at 32 bits.
    length = np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)
    sent = np.asarray(multihost_utils.broadcast_one_to_all(length), np.uint8)
    size = int.from_bytes(sent.tobytes(), "little")
    held = np.frombuffer(data, np.uint8) if first() else np.zeros(size, np.uint8)
    # Not as numbers of their own types: those are added up, and −0 + 0 is 0.
    return multihost_utils.broadcast_one_to_all(held).tobytes()


def model_of(trainer: Trainer, state: State, model: Any, wrt: Any) -> Any:
    """`trainer.model(state)`, whole in the memory of each process.

    Args:
      trainer: of the run.
      state: of the trainer.
      model: that the trainer was made from; what is frozen is shared with it.
      wrt: that the trainer was made with.

    Returns:
      The model.
    """
    if jax.process_count() == 1:
        return trainer.model(state)
    graph, _, _, frozen = nnx.split(model, wrt, _CHANGING, ...)
    params, rest = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x,
        sharding.whole((state.params, state.rest)),
    )
    return nnx.merge(graph, params, rest, frozen, copy=True)


def agreed(stop: Callable[[], bool]) -> Callable[[], bool]:
    """Whether to stop, at the same step in every process, soon after one of them has to.

    Args:
      stop: says so of this process; asked after each step.

    Returns:
      The same for all of them.
    """
    if jax.process_count() == 1:
        return stop
    asked = 0

    def both() -> bool:
        nonlocal asked
        asked += 1
        return asked % _PATIENCE == 0 and any(votes(stop()))

    return both


class Shared:
    """The checkpoints of a run of several processes, in a folder of the first one alone.

    Args:
      store: of the first process; None in the others.
    """

    def __init__(self, store: Checkpoints | None):
        self._store = store

    def save(self, state: State, history: Mapping[str, Any]) -> None:
        """As `Checkpoints.save`; whole arrays, so that any number of processes can go on."""
        state = sharding.whole(state)
        with together():
            if self._store is not None:
                self._store.save(state, history)

    def restore(self, trainer: Trainer) -> tuple[State, dict[str, Any]] | None:
        """As `Checkpoints.restore`; the folder need not be seen by the other processes."""
        like, found = sharding.whole(trainer.init()), None
        with together():
            if self._store is not None:
                found = self._store.read(like)
        if not votes(found is not None)[0]:
            return None
        state, history = (like, {}) if found is None else found
        history = json.loads(given(json.dumps(history).encode()))
        state = jax.tree.map(_given_array, state)
        if trainer.mesh is not None:
            state = sharding.place(state, trainer.mesh, trainer.layout)
        return state, history


def _given_array(x: Any) -> Any:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _given_array(jax.random.key_data(x))
        return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(x))
    x = np.ascontiguousarray(x)
    return np.frombuffer(given(x.tobytes()), x.dtype).reshape(x.shape)
