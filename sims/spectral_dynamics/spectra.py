"""Simulated against analytic spectra: every law of a LoRA start against the flow, over its scale.

The law λ tanh²(λt/√2) is stated (OpenReview gg2Wb2HPOI); the others are derived in this package:
the exact mode of a start with B = 0, the logistic limit of small scales and the lazy limit of large
ones. Shape, spectrum, rank and scales are chosen here. One panel a scale, in units in which a start
is lazy when its square is far above the singular values: simulated modes in color, laws in black.
"""

import dataclasses
import os

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import jax  # noqa: E402

from lorajax import laws  # noqa: E402
from lorajax.studies import comparison, simulation  # noqa: E402

SPECTRUM = (4.0, 2.0, 1.0)
RANK = 5


@dataclasses.dataclass(frozen=True)
class Profile:
    shape: tuple[int, int]
    scales: tuple[float, ...]


PROFILES = {
    "quick": Profile((60, 40), (3.0, 0.3, 1e-3)),
    "full": Profile((600, 400), (10.0, 3.0, 1.0, 0.3, 1e-2, 1e-4)),
}


def run(profile: Profile, seed: int):
    """The figure, and what it shows in numbers."""
    found = comparison.compare_spectra(
        shape=profile.shape,
        singular_values=SPECTRUM,
        rank=RANK,
        start="lora",
        scales=profile.scales,
        laws=tuple(laws.MODE_LAWS),
        seed=seed,
    )
    numbers = {
        f"worst error of {law} at scale {scale:g}, in units of s": max(
            row.sup_error for row in found.rows if (row.law, row.scale) == (law, scale)
        )
        for scale in profile.scales
        for law in laws.MODE_LAWS
    }
    return comparison.draw(found), numbers


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    simulation.command(__doc__ or "", PROFILES, run, "spectral_dynamics/spectra")
