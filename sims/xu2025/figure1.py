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

import functools
import os

os.environ.setdefault("NPROC", "16")  # see "Good to know" in the README

import jax  # noqa: E402

from lorajax import presets, simulation  # noqa: E402
from lorajax.plots.sweeps import init_scale_figure  # noqa: E402

PROFILES = {
    "quick": {"size": 16, "rank": 2, "seeds": 5, "scales": 5},
    "full": {"size": 32, "rank": 4, "seeds": 30, "scales": 6},
}
PRESET = functools.partial(presets.init_scale, target="generic")

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    run = simulation.swept(PRESET, init_scale_figure, presets.init_scale_statements)
    simulation.command(__doc__ or "", PROFILES, run, "xu2025/figure1")
