"""Sweeps: a function over named axes, as fast as the machine allows, into an `xarray.Dataset`.

This room knows functions and axes and nothing of LoRA; `flows` has the engines that run many flows
at once, and the command `lorajax sweep` puts the two together.
"""

from lorajax.sweeps.estimate import Estimate, estimate
from lorajax.sweeps.identity import identity
from lorajax.sweeps.outputs import NOT_RUN, STATUS
from lorajax.sweeps.run import Progress, sweep
from lorajax.sweeps.store import open_sweep

__all__ = [
    "NOT_RUN",
    "STATUS",
    "Estimate",
    "Progress",
    "estimate",
    "identity",
    "open_sweep",
    "sweep",
]
