"""Rank against accuracy: final loss of LoRA at each rank, and its distance to the full update.

After Rushka, Klabjan 2026 (arXiv:2602.10212), who state zero loss at any rank and an error of the
order r^{−1/2} for the trace-squared loss, and the best approximation of rank r for low-rank
approximation. Sizes and spectra are chosen here; the formulas beyond the stated order are
reconstructed. Left: distance of LoRA's end from that of full fine-tuning on ½(tr W)², simulated
(dots) and by law (lines), for orthonormal and Gaussian A0; bars are one standard deviation over
repetitions. Right: final losses over the rank.
"""

import dataclasses
import os

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lorajax import (  # noqa: E402
    Factors,
    MatrixFactorization,
    TraceSquared,
    gradient_flow,
    initializers,
    laws,
    plots,
    sweeps,
)
from lorajax.studies import simulation  # noqa: E402

TRACE = 3.0
SCALE = 0.5
HORIZON = 12.0


@dataclasses.dataclass(frozen=True)
class Profile:
    size: int
    repetitions: int


PROFILES = {"quick": Profile(10, 5), "full": Profile(40, 30)}


def simulate(profile: Profile, seed: int):
    """Ends of both problems at every rank, for both kinds of start."""
    n = profile.size
    spectrum = tuple(np.geomspace(4.0, 1.0, n // 2))
    times = jnp.array([0.0, HORIZON])

    def lane(rank, start, key):
        keys = jax.random.split(key)
        a = getattr(initializers, start)(keys[0], (n, n), n, SCALE).a
        # A start of lower rank has zeros in its last columns, which stay: one program for all.
        factors = Factors(jnp.where(jnp.arange(n) < rank, a, 0), jnp.zeros((n, n), a.dtype))
        traces = TraceSquared(jnp.asarray(TRACE, a.dtype), n)
        approximation = MatrixFactorization.from_spectrum(keys[1], (n, n), spectrum)
        ends = [
            gradient_flow(problem, factors, last * times, rtol=1e-8, reduced=False)
            for problem, last in ((traces, 1.0), (approximation, 4.0))
        ]
        full = traces.full_update()
        end = ends[0].core.product[-1]
        return {
            "trace_loss": ends[0].losses[-1],
            "trace_error": jnp.linalg.norm(end - full) / jnp.linalg.norm(full),
            "law": laws.trace_squared_error(factors.a),
            "low_rank_loss": ends[1].losses[-1] / ends[1].losses[0],
            "status": jnp.maximum(ends[0].status, ends[1].status),
        }

    axes = {
        "rank": np.arange(1, n + 1),
        "start": ["orthogonal", "lora"],
        "seed": range(profile.repetitions),
    }
    found = sweeps.sweep(lane, axes, key=jax.random.key(seed), fold=("seed",), static=("start",))
    squares = np.array([*spectrum, *[0.0] * (n - len(spectrum))]) ** 2
    best = np.append(squares[::-1].cumsum()[::-1], 0.0)[1:] / squares.sum()
    return found, best


def run(profile: Profile, seed: int):
    """The figure, and what it shows in numbers."""
    found, best = simulate(profile, seed)
    n, ranks = profile.size, found["rank"].values
    numbers = {
        "largest final loss of ½(tr W)²": float(found["trace_loss"].max()),
        "largest gap between distance and law": float(
            abs(found["trace_error"] - found["law"]).max()
        ),
        "largest gap to the best approximation of the rank": float(
            abs(found["low_rank_loss"] - best[:, None, None]).max()
        ),
        "failed lanes": int((found["status"] != 0).sum()),
    }
    figure, (left, right) = plots.figure(1, 2)
    with plots.style():
        for i, (start, name) in enumerate((("orthogonal", "orthonormal"), ("lora", "Gaussian"))):
            here = found.sel(start=start)
            error, law = here["trace_error"], here["law"].mean("seed")
            said = f"{name}, ± 1 sd of {here.sizes['seed']} seeds"
            left.errorbar(
                ranks, error.mean("seed"), error.std("seed"), fmt="o", color=f"C{i}", label=said
            )
            left.plot(ranks, law, "--", color=f"C{i}")
            loss = here["low_rank_loss"].mean("seed")
            right.plot(ranks, loss, "ox"[i], color=f"C{i}", label=f"low rank, {name}")
        left.plot(ranks, np.sqrt((n + 1) / ranks), ":", color="black", label="√((n + 1)/r)")
        right.plot(ranks, best, "--", color="black", label="best of the rank")
        right.plot(
            ranks,
            found["trace_loss"].mean(("start", "seed")),
            "-",
            color="C2",
            label="trace squared",
        )
        left.set(xlabel="rank r", ylabel="‖AB − ΔW‖ / ‖ΔW‖", title=f"trace squared, n = {n}")
        right.set(xlabel="rank r", ylabel="final loss / initial loss", title="final losses")
        left.legend()
        right.legend()
    return figure, numbers


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    simulation.command(__doc__ or "", PROFILES, run, "rushka2026/rank_accuracy")
