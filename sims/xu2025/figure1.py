"""Small against spectral start for a generic target: loss, alignment and norm.

After figure 1 of Xu et al. 2025 (arXiv:2503.06982): Y_ft = Y_pre + 5 u vᵀ
along random unit vectors. Left: loss over time for several scales α, small random start (solid) and
small spectral start (dashed). Middle: misalignment of the first layer's stacked factors with the
top eigenvector γ₁ of H(W₂ᵀE). Right: loss, alignment and norm of one scale together. Means and one
standard deviation of the logarithm over repetitions.

The panels and the 30 repetitions are stated; sizes, ranks, spectra of the layers and step sizes are
not known from the paper and chosen here, with gradient flow in the place of descent. Losses below
1e-15 are the error of the solver.
"""

import dataclasses
import os

os.environ.setdefault("NPROC", "16")  # see "Good to know" in the README

import jax  # noqa: E402

from lorajax import plots, presets, simulation, sweeps  # noqa: E402
from lorajax.plots.sweeps import init_scale_figure  # noqa: E402

TARGET = "generic"


@dataclasses.dataclass(frozen=True)
class Profile:
    size: int
    rank: int
    repetitions: int
    decades: int


PROFILES = {"quick": Profile(16, 2, 5, 5), "full": Profile(32, 4, 30, 6)}


def run(profile: Profile, seed: int):
    """The figure, and what it shows in numbers."""
    preset = presets.init_scale(
        profile.size, profile.rank, profile.repetitions, profile.decades, target=TARGET
    )
    options = {**preset.options, "key": jax.random.key(seed)}
    found = sweeps.sweep(preset.function, preset.axes, settings=preset.settings, **options)
    with plots.style():
        figure = init_scale_figure(found)
    return figure, presets.init_scale_statements(found)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    simulation.command(__doc__ or "", PROFILES, run, "xu2025/figure1")
