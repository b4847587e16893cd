"""Small against spectral start: loss, alignment and norm over the initialization scale.

After figures 1, 3 and 4 of Xu et al. 2025 (arXiv:2503.06982): Y_ft = Y_pre + 5 u vᵀ along random
unit vectors (figure 1), the top (3) or the bottom (4) principal component of Y_pre. Left: loss over
time for several scales α, small random start (solid) and small spectral start (dashed). Middle:
misalignment of the first layer's stacked factors with the top eigenvector γ₁ of H(W₂ᵀE). Right:
loss, alignment and norm of one scale together. Means and one standard deviation of the logarithm
over repetitions.

The panels and the 30 repetitions are stated; sizes, ranks, spectra of the layers and step sizes are
not known from the paper and chosen here, with gradient flow in the place of descent. Losses below
1e-15 are the error of the solver.
"""

import os

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import jax  # noqa: E402

from lorajax import studies  # noqa: E402
from lorajax.studies import simulation  # noqa: E402

FIGURES = {"figure1": "generic", "figure3": "top", "figure4": "bottom"}
PROFILES = {
    "quick": {
        "size": 16,
        "rank": 2,
        "seeds": range(5),
        "scales": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    },
    "full": {},
}

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for name, target in FIGURES.items():
        profiles = {profile: {**given, "target": target} for profile, given in PROFILES.items()}
        run = simulation.swept(studies.find("init-scale"))
        simulation.command(__doc__ or "", profiles, run, f"xu2025/{name}")
