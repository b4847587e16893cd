"""A claim on starts that know no gradient: tight frames (ICML 2026, abstract; theory §9)."""

import jax
import jax.numpy as jnp
import numpy as np

from lorajax import laws
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim, standard_errors
from lorajax.initializers import lora, orthogonal

SHAPE, RANK = (30, 20), 6


@claim(
    "tight_frames2026.orthonormal",
    source="tight frames: ICML 2026, abstract; theory §9, the law derived here",
    standing="derived",
    tolerance="standard errors of a mean over gradients, as many as chance exceeds in any of three "
    "starts in 1 of 1000 cases (`claims.SAMPLING_RISK`)",
    control=Control("the law's factor 1 becomes 1.05", {"constant": 1.05}),
)
def orthonormal(run: Run, constant: float = 1.0) -> Evidence:
    """With the gradient unknown, no A beats orthonormal columns: from B = 0 the best first step of
    B takes (tr K)²/(m tr K²) of a quadratic loss in the mean, K = AᵀA, and that is at most r/m."""
    draws = run.pick(4000, 40000)
    skewed = np.asarray(orthogonal(run.key(100), SHAPE, RANK, 1.0).a) * np.geomspace(1, 0.2, RANK)
    starts = {
        "orthonormal": np.asarray(orthogonal(run.key(101), SHAPE, RANK, 1.0).a),
        "gaussian": np.asarray(lora(run.key(102), SHAPE, RANK, 1.0).a),
        "unequal columns": skewed,
    }

    def simulate() -> dict[str, np.ndarray]:
        gradients = np.asarray(jax.random.normal(run.key(103), (draws, *SHAPE)))
        found = {}
        for name, a in starts.items():
            k = a.T @ a
            rate = np.trace(k) / np.sum(k**2)
            along = a.T[None] @ gradients
            gain = rate * np.sum(along**2, axis=(1, 2))
            gain = gain - rate**2 / 2 * np.sum((a[None] @ along) ** 2, axis=(1, 2))
            found[name] = 2 * gain / np.prod(SHAPE)
        return found

    found = run.once("frames", simulate)
    grams = [jnp.asarray(a.T @ a) for a in starts.values()]
    law = np.array([float(laws.frame_gain(k, SHAPE[0], constant=constant)) for k in grams])
    mean = np.array([x.mean() for x in found.values()])
    bars = np.array([x.std(ddof=1) for x in found.values()]) / draws**0.5
    share = np.abs(mean - law) / bars
    worst = int(np.argmax(share))

    def draw(ax):
        places = np.arange(len(law))
        ax.errorbar(places, mean, bars, fmt="o", label="simulated, ± 1 standard error")
        ax.plot(places, law, "k_", markersize=16, label="law")
        ax.axhline(RANK / SHAPE[0], linestyle=":", label="r/m")
        ax.set(xticks=places, xticklabels=list(starts))
        ax.set(xlabel="start", ylabel="share of the loss")
        ax.margins(x=0.2)
        ax.legend()

    return Evidence(
        measured=dict(zip(starts, mean.tolist(), strict=True)),
        predicted=dict(zip(starts, law.tolist(), strict=True)),
        error=float(np.abs(mean - law)[worst]),
        tolerance=standard_errors(len(law), draws - 1) * float(bars[worst]),
        assumptions=(
            Assumption(
                "orthonormal columns come first",
                bool(mean[0] > mean[1:].max()),
                f"shares {np.round(mean, 4).tolist()}",
            ),
        ),
        draw=draw,
        caption=f"A of {SHAPE[0]}×{RANK}, {draws} gradients of random direction.",
    )
