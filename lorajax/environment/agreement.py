"""What several processes tell each other, so that all of them go on or none does.

JAX waits in each process for what the others have to give: one that has ended by itself leaves the
others waiting. Every function here is called by all processes, in the same order; a single process
waits for nobody.
"""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


def votes(value: bool) -> list[bool]:
    """What every process has said, in their order."""
    if jax.process_count() == 1:
        return [bool(value)]
    said = multihost_utils.process_allgather(np.asarray(value, np.uint8))
    return [bool(each) for each in np.reshape(said, -1)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that ends in every process as it ends in the others.

    Raises:
      ValueError: what the block raised here; or, where it raised in another process, that it did;
        with an attribute `agreed`, as all processes end by it.
    """
    failure: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = error
    failed = [i for i, each in enumerate(votes(failure is not None)) if each]
    if failed:
        failure = failure or ValueError(
            f"process {failed[0]} has ended, and says why where it runs."
        )
        failure.agreed = True  # type: ignore[union-attr]
        raise failure
