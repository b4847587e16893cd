"""What every run returns: the factors over time, how they were found, and a status."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lorajax.exact import Frames
from lorajax.factors import is_traced

CONVERGED, MAX_STEPS, NON_FINITE, FAILED = 0, 1, 2, 3
STATUS = ("converged", "max steps", "non-finite", "failed")
"""Names of the codes in `Path.status`."""


class Path(eqx.Module):
    """Factors at the times asked for.

    The factors are kept in the frames of the reduction where there is one (`core`): singular
    values, losses and norms are the same there, at a cost that does not depend on the size.
    `factors` lifts them to full size.

    Attributes:
      times: shape (t,), in the problem's unit (steps times learning rate for a descent).
      core: the factors at the times, in the frames if there are any; leaves have a leading axis t.
      problem: the problem of `core`: the reduced one where there are frames, else the original.
      frames: what lifts `core` to full size; None where nothing was reduced.
      status: int32 code; see `STATUS`. Anything but 0 has NaN from the failure on.
      steps: int32, steps taken by the solver, the propagator or the descent.
    """

    times: Float[Array, " t"]
    core: Any
    problem: Any
    frames: Frames | None
    status: Int[Array, ""]
    steps: Int[Array, ""]

    @property
    def factors(self) -> Any:
        """The factors at full size, leaves with a leading axis t."""
        return self.core if self.frames is None else self.frames.lift(self.core)

    @property
    def losses(self) -> Float[Array, " t"]:
        """The loss at the times, shape (t,)."""
        return _losses(self.problem, self.core)

    @property
    def converged(self) -> bool:
        """Whether the run ended well (for a single, concrete run)."""
        return int(self.status) == CONVERGED

    def describe(self) -> str:
        """One line: how the run ended and what it took."""
        name = STATUS[int(self.status)]
        size = "full size" if self.frames is None else "reduced frames"
        return f"{name} after {int(self.steps)} steps in {size}"


def finite_status(core: Any) -> Int[Array, ""]:
    """CONVERGED where every entry is finite, NON_FINITE elsewhere."""
    xp: Any = jnp if is_traced(core) else np
    finite = xp.all(xp.stack([xp.all(xp.isfinite(x)) for x in jax.tree.leaves(core)]))
    return jnp.asarray(xp.where(finite, CONVERGED, NON_FINITE), jnp.int32)


@eqx.filter_jit
def _losses(problem: Any, core: Any) -> Float[Array, " t"]:
    return jax.vmap(problem.loss)(core)
