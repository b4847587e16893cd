"""A claim on GoRA's start (He et al. 2025, arXiv:2502.12171; theory §9)."""

import jax
import jax.numpy as jnp
import numpy as np

from lorajax import laws
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim, standard_errors
from lorajax.initializers import gora

SHAPE, RANKS = (24, 10), np.array([1, 3, 8])


@claim(
    "gora2025.projection",
    source="GoRA: He et al. 2025 (arXiv:2502.12171), recalled; theory §9; the mean is derived here",
    standing="derived",
    tolerance="standard errors of a mean over A, as many as chance exceeds in any of three means "
    "in 1 of 1000 cases (`claims.SAMPLING_RISK`); the means are exact",
    control=Control("the share's factor 1 becomes 1.05", {"constant": 1.05}),
)
def projection(run: Run, constant: float = 1.0) -> Evidence:
    """GoRA's start takes the gradient's step within the columns of a random A, the nearest that its
    rank can come to it given A: in the mean r/m of the gradient's energy, whatever the gradient."""
    numbers = np.random.default_rng(np.asarray(jax.random.key_data(run.key(141))))
    draws = run.pick(2500, 20000)
    # A gradient of a decaying spectrum; its directions do not matter.
    g = numbers.normal(size=SHAPE) * np.geomspace(1, 0.1, SHAPE[1])
    gradient = jnp.asarray(g / np.linalg.norm(g))

    def simulate() -> np.ndarray:
        keys = jax.random.split(run.key(142), draws)
        made = jax.jit(jax.vmap(lambda key: gora(key, gradient, int(RANKS[-1]))))(keys)
        found = []
        for rank in RANKS:
            # The first columns of A are a Gaussian A of that rank; B is the nearest by itself.
            q = np.linalg.qr(np.asarray(made.a)[:, :, :rank])[0]
            found.append(np.sum((np.swapaxes(q, 1, 2) @ np.asarray(gradient)) ** 2, axis=(1, 2)))
        product = np.asarray(made.a @ made.b)
        found.append(np.sum(product**2, axis=(1, 2)))
        found.append(np.sum(product * np.asarray(gradient)[None], axis=(1, 2)))
        return np.stack(found)

    *shares, taken, along = run.once("gora", simulate)
    mean = np.array([x.mean() for x in shares])
    bars = np.array([x.std(ddof=1) for x in shares]) / draws**0.5
    law = np.asarray(laws.projected_share(RANKS.astype(float), float(SHAPE[0]), constant=constant))
    off = np.abs(mean - law) / bars
    # The start itself: as much energy as the projection, and downhill.
    same = max(np.abs(taken - shares[-1]).max(), np.abs(along + shares[-1]).max())

    def draw(ax):
        ax.errorbar(RANKS, mean, bars, fmt="o", label="simulated, ± 1 standard error")
        ax.plot(RANKS, law, "--", label="r/m")
        ax.set(xlabel="rank", ylabel="share of the gradient's energy")
        ax.legend()

    return Evidence(
        measured={"shares": mean.tolist()},
        predicted={"shares": law.tolist()},
        error=float(off.max()),
        tolerance=standard_errors(len(RANKS), draws - 1),
        assumptions=(
            Assumption(
                "the start is minus the projection of the gradient on A's columns",
                bool(same < 1e-10),
                f"off by {same:.1e}",
            ),
        ),
        draw=draw,
        caption=f"{SHAPE[0]}×{SHAPE[1]}, {draws} draws of A.",
    )
