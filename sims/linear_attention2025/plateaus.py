"""Plateaus of in-context learning: linear attention learns one principal component after the other.

After Zhang et al. 2025 (arXiv:2501.16265), recalled: with rank-one heads the population loss of
in-context linear regression rests at d + 1 levels. Eigenvalues, context lengths, number and scale
of the heads are chosen here. One panel a context length N: loss over time, one line a repetition,
and the predicted plateaus (dashed).
"""

import dataclasses
import os

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lorajax import LinearAttention, gradient_flow, laws, plots, sweeps  # noqa: E402
from lorajax.studies import simulation  # noqa: E402

CONTEXTS = (4.0, 31.0)
HEADS = 4
SCALE = 0.01


@dataclasses.dataclass(frozen=True)
class Profile:
    eigenvalues: tuple[float, ...]
    horizon: float
    repetitions: int


PROFILES = {
    "quick": Profile((1.0, 0.7, 0.45), 3e3, 4),
    "full": Profile((1.0, 0.8, 0.6, 0.4), 1e4, 30),
}


def simulate(profile: Profile, seed: int):
    """Losses over time, for every context length and repetition."""
    times = jnp.geomspace(1.0, profile.horizon, 601)

    def lane(context, key):
        problem = LinearAttention(jnp.array(profile.eigenvalues), context)
        start = problem.start(key, HEADS, SCALE)
        path = gradient_flow(problem, start, times, rtol=1e-8)
        return {
            "losses": path.losses,
            "levels": laws.attention_plateaus(problem),
            "status": path.status,
        }

    return sweeps.sweep(
        lane,
        {"context": CONTEXTS, "seed": range(profile.repetitions)},
        key=jax.random.key(seed),
        fold=("seed",),
        dims={"losses": ("time",), "levels": ("plateau",)},
        coords={"time": np.asarray(times)},
    )


def run(profile: Profile, seed: int):
    """The figure, and what it shows in numbers."""
    found = simulate(profile, seed)
    nearest = abs(found["losses"] - found["levels"]).min("time")
    numbers = {
        "nearest to each plateau, worst repetition": nearest.max("seed").values,
        "failed lanes": int((found["status"] != 0).sum()),
    }
    figure, panels = plots.figure(1, len(CONTEXTS))
    with plots.style():
        for axes, context in zip(panels, CONTEXTS, strict=True):
            here = found.sel(context=context)
            axes.semilogx(here["time"], here["losses"].transpose("time", "seed"), color="C0", lw=1)
            for level in here["levels"].isel(seed=0).values:
                axes.axhline(level, linestyle="--", color="black", lw=0.8)
            axes.set(
                xlabel="time (rate × steps)", ylabel="population loss", title=f"N = {context:g}"
            )
    return figure, numbers


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    simulation.command(__doc__ or "", PROFILES, run, "linear_attention2025/plateaus")
