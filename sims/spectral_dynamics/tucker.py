"""Tucker-LoRA: growth of the modes by the depth law, and a delay that is a power of the scale.

The paper (OpenReview gg2Wb2HPOI) states that its matrix results carry over to Tucker-LoRA; the
depth law is derived in this package, and sizes, spectrum and starts are chosen here. Left: singular
values of a 12×10×8 update from aligned, balanced factors, simulated (colors) and by the depth law
(dotted). Right: half-time of the weakest mode over the scale of the start, for tensors of two and
three modes, simulated (dots) and by law (lines); black: the logarithm of a matrix with the same
singular value.
"""

import dataclasses
import os

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lorajax import (  # noqa: E402
    TuckerFactorization,
    gradient_flow,
    initializers,
    laws,
    plots,
    spectra,
    sweeps,
)
from lorajax.studies import simulation  # noqa: E402

SHAPE = (12, 10, 8)
SPECTRUM = (4.0, 2.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Profile:
    scales: tuple[float, ...]
    saves: int


PROFILES = {
    "quick": Profile((0.3, 0.2, 0.1), 401),
    "full": Profile((0.3, 0.2, 0.15, 0.1, 0.07, 0.05), 2001),
}


def simulate(profile: Profile, seed: int):
    """Modes over time and their half-times, for every scale and number of tensor modes."""
    s = jnp.array(SPECTRUM)

    def lane(scale, modes, key):
        problem = TuckerFactorization.from_spectrum(key, SHAPE[:modes], SPECTRUM)
        start = initializers.superdiagonal(problem.target, len(SPECTRUM), scale)
        weakest = laws.tucker_half_time(s[-1], scale, modes)
        times = (1.2 * weakest + 3.0) * jnp.linspace(0.0, 1.0, profile.saves)
        path = gradient_flow(problem, start, times, rtol=1e-9)
        values = jax.vmap(problem.modes)(path.core)
        law = laws.tucker_mode(times[:, None], s[None], scale ** (modes + 1), modes)
        return {
            "times": times,
            "values": values,
            "law": law,
            "half_times": spectra.hitting_times(times, values, s / 2),
            "predicted": laws.tucker_half_time(s, scale, modes),
            "status": path.status,
        }

    dims = {
        "times": ("save",),
        "values": ("save", "mode"),
        "law": ("save", "mode"),
        "half_times": ("mode",),
        "predicted": ("mode",),
    }
    axes = {"scale": profile.scales, "modes": [2, 3]}
    key = jax.random.key(seed)
    return sweeps.sweep(lane, axes, key=key, fold=(), static=("modes",), dims=dims)


def run(profile: Profile, seed: int):
    """The figure, and what it shows in numbers."""
    found = simulate(profile, seed)
    scales = found["scale"].values
    gap = abs(found["values"] - found["law"]).max(("scale", "modes", "save")).values
    half = found["half_times"].isel(mode=-1)
    numbers = {
        "largest gap to the depth law, in units of λ": float(np.max(gap / np.array(SPECTRUM))),
        "slope of the last half-times, p = 2 and 3": [
            float(np.polyfit(np.log(scales[-2:]), np.log(half.sel(modes=p).values[-2:]), 1)[0])
            for p in (2, 3)
        ],
        "failed lanes": int((found["status"] != 0).sum()),
    }
    figure, (left, right) = plots.figure(1, 2, size=(3.4, 2.8))
    with plots.style():
        here = found.sel(modes=3).isel(scale=1)
        for i, value in enumerate(SPECTRUM):
            left.plot(here["times"], here["values"].isel(mode=i), label=f"λ = {value:g}")
        left.plot(here["times"], here["law"], ":", color="black")
        left.set(
            xlabel="time [1/s^1.5]", ylabel="singular value σ", title=f"p = 3, scale {scales[1]:g}"
        )
        left.legend()
        fine = np.geomspace(scales.min(), scales.max(), 60)
        for i, p in enumerate((2, 3)):
            right.loglog(scales, half.sel(modes=p), "o", color=f"C{i}", label=f"p = {p}")
            law = laws.tucker_half_time(SPECTRUM[-1], fine, p)
            right.loglog(fine, np.asarray(law), "--", color=f"C{i}")
        matrix = laws.tucker_half_time(SPECTRUM[-1], fine, 1)
        right.loglog(fine, np.asarray(matrix), color="black", label="matrix")
        right.set(xlabel="scale of the start", ylabel="half-time [s^(2/(p+1) − 2)]")
        right.set_title("weakest mode")
        right.legend()
    return figure, numbers


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    simulation.command(__doc__ or "", PROFILES, run, "spectral_dynamics/tucker")
