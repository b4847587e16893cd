"""Where LoRA gets stuck: the share of runs above the global minimum over rank and samples.

After Jang, Lee, Ryu 2024 (arXiv:2402.11867), who prove that there are no spurious local minima
where r(r+1)/2 > KN; the map is ours. 8×8 updates, Gaussian features and targets, one output,
squared loss, decay a tenth of ‖∇L̂(0)‖₂, entries of both factors of standard deviation ½ at the
start; accelerated descent until it rests. Every run's end has a certificate of its own: it is
global if its duality gap is at most 1e-8 of L̂(0). On the left the share of runs that are not. Below
the threshold a rank may just be too small for the global minimum; on the right are the runs that
end above another start of the same instance and rank: they are stuck in a spurious minimum. The
solid line is the theorem's threshold, the dashed one Park's count r(m + n) − r² > 1.35 KN
(arXiv:2605.03724).
"""

import dataclasses
import os

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import jax  # noqa: E402
import numpy as np  # noqa: E402

from lorajax import Factors, optima, plots, sweeps  # noqa: E402
from lorajax.claims import jang2024, ntk  # noqa: E402
from lorajax.plots.sweeps import heat  # noqa: E402
from lorajax.studies import simulation  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Profile:
    samples: tuple[int, ...]
    ranks: tuple[int, ...]
    instances: int
    starts: int
    steps: int = 2000


PROFILES = {
    "quick": Profile((3, 6, 10, 15, 20), (1, 2, 3, 4, 5, 6, 7), 6, 6),
    "full": Profile((1, 2, 3, 4, 6, 8, 10, 12, 15, 18, 20), (1, 2, 3, 4, 5, 6, 7), 16, 16, 4000),
}
AT_REST = 1e-6
"""Norm of the gradient in the factors over w, below which a run rests."""


def simulate(profile: Profile, seed: int = 0):
    """Gaps, objectives and residuals of all runs, by samples, rank, instance and start."""

    def run(samples, rank, start, key):
        keys = jax.random.split(key)
        most, size, widest = max(profile.samples), ntk.SIZE, max(profile.ranks)
        features, targets = ntk.normals(keys[0], (most, 1, size, size), (most, 1))
        a, b = ntk.normals(jax.random.fold_in(keys[1], start), (size, widest), (widest, size))
        problem = ntk.masked_problem(features, targets, samples)
        factors = ntk.masked_factors(Factors(ntk.SCALE * a, ntk.SCALE * b), rank)
        rest = ntk.come_to_rest(problem, ntk.decay_of(problem), factors, profile.steps)
        return {"gap": rest.gap, "objective": rest.objective, "residual": rest.residual}

    axes = {
        "samples": np.asarray(profile.samples),
        "rank": np.asarray(profile.ranks),
        "instance": range(profile.instances),
        "start": range(profile.starts),
    }
    found = sweeps.sweep(run, axes, key=jax.random.key(seed), fold=("instance",))
    above, stuck = jang2024.outcomes(found["gap"].values, found["objective"].values)
    return found.assign(
        uncertified=(found["gap"].dims, above.astype(float)),
        stuck=(found["gap"].dims, stuck.astype(float)),
    )


def statements(found) -> dict[str, float]:
    """What the figure shows, in numbers."""
    ranks, samples = found["rank"].values, found["samples"].values
    least = np.array([optima.sufficient_rank(int(n)) for n in samples])
    beyond = ranks[None, :] >= least[:, None]
    uncertified, stuck = found["uncertified"].values, found["stuck"].values
    cells = stuck.mean(axis=(2, 3))
    return {
        "runs above the threshold": float(uncertified[beyond].size),
        "of them not certified global": float(uncertified[beyond].sum()),
        "runs below the threshold": float(uncertified[~beyond].size),
        "of them above the global minimum, share": float(uncertified[~beyond].mean()),
        "of them stuck above the best of their rank, share": float(stuck[~beyond].mean()),
        "largest share of stuck runs in a cell": float(cells.max()),
        "runs that do not rest": float((found["residual"].values > AT_REST).sum()),
    }


def draw(found):
    """Two maps over (samples, rank) with the counts of the theorems."""
    figure, panels = plots.figure(1, 2, size=(3.4, 2.8))
    samples, ranks = found["samples"].values, list(found["rank"].values)
    counts = {
        "-": [optima.sufficient_rank(int(n)) for n in samples],
        "--": [optima.manifold_rank(int(n), (ntk.SIZE, ntk.SIZE)) for n in samples],
    }
    with plots.style():
        runs = found.stack(run=("instance", "start"))
        for panel, name, title in (
            (panels[0], "uncertified", "above the global minimum"),
            (panels[1], "stuck", "above the best of their rank"),
        ):
            heat(panel, runs[name], x="samples", y="rank", over="run", label="share of runs")
            for style, least in counts.items():
                edges = [ranks.index(r) - 0.5 if r in ranks else len(ranks) - 0.5 for r in least]
                x = np.arange(len(samples) + 1) - 0.5
                panel.stairs(edges, x, color="white", linestyle=style, linewidth=1.6, baseline=None)
            panel.set_title(title)
            panel.set_xlabel("samples N (K = 1)")
            panel.grid(False)
    return figure


def run(profile: Profile, seed: int):
    """The figure and what it shows."""
    found = simulate(profile, seed)
    return draw(found), statements(found)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)  # certificates to 1e-8 need float64
    simulation.command(__doc__ or "", PROFILES, run, "jang2024/stuck_map")
