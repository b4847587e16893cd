"""The stated growth law, order of learning and superfluous rank, for a matrix."""

import jax.numpy as jnp
import numpy as np

from lorajax import laws
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim
from lorajax.claims.instances import (
    SPECTRUM,
    factorization,
    lora_start,
    tight_flow,
    until,
)
from lorajax.spectra import hitting_times, singular_values

SOURCE = "OpenReview gg2Wb2HPOI; theory §3"
SCALES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
TIMES = until(40.0)


def _flow(run: Run, std: float, rank: int = 5):
    """Singular values over time from LoRA's start, and the start."""
    start = lora_start(run, std, rank=rank, index=20)
    name = ("spectral_dynamics", std, rank)
    path = run.once(name, lambda: tight_flow(factorization(run), start, TIMES))
    return start, np.asarray(singular_values(path)), path


@claim(
    "spectral_dynamics.tanh_squared",
    source=SOURCE,
    standing="stated",
    tolerance="5 % of λ_i: the alteration that negative controls must be able to see; a law that "
    "misses by more says nothing that its own altered form does not say as well",
    control=Control("λ_i becomes 1.05 λ_i in the argument of tanh²", {"rate": 1.05 / 2**0.5}),
)
def tanh_squared(run: Run, rate: float = 2**-0.5) -> Evidence:
    """From a small start the singular values follow σ_i(t) ≈ λ_i tanh²(λ_i t/√2)."""
    problem = factorization(run)
    s = np.asarray(problem.singular_values)
    law = np.asarray(laws.tanh_squared(TIMES[:, None], s[None], rate=rate))
    errors, exact_errors, shown = [], [], {}
    for std in SCALES:
        start, values, _ = _flow(run, std)
        exact = np.asarray(laws.lora_modes(problem, start, jnp.asarray(TIMES)))
        errors.append(float((np.abs(values[:, :3] - law) / s).max()))
        exact_errors.append(float((np.abs(values[:, :3] - exact) / s).max()))
        if std in (1e-1, 1e-3, 1e-6):
            shown[std] = values[:, 0], exact[:, 0]

    def draw(ax):
        for i, (std, (values, exact)) in enumerate(shown.items()):
            ax.plot(TIMES, values, color=f"C{i}", label=f"std {std:g}, simulated")
            ax.plot(TIMES, exact, ":", color="black", label=None if i else "exact law")
        ax.plot(TIMES, law[:, 0], "--", color="C3", label="tanh² law, any start")
        ax.set(xlabel="time [1/s]", ylabel="largest singular value of AB", xlim=(0, 10))
        ax.legend()

    best = min(errors)
    return Evidence(
        measured={
            "std": list(SCALES),
            "sup_error": errors,
            "sup_error_of_exact_law": exact_errors,
        },
        predicted={"sup_error": [0.0] * len(SCALES)},
        error=best,
        tolerance=0.05,
        draw=draw,
        caption="The law has no dependence on the start; the flow's delay grows with ln(1/scale). "
        "Error: the best over the scales of the worst over time and modes, in units of λ_i.",
    )


@claim(
    "spectral_dynamics.ordering",
    source=SOURCE,
    standing="stated",
    tolerance="0: an order has no tolerance; the error is the largest violation of it, in units of "
    "the time between neighbors",
    control=Control("the order is reversed: smallest first", {"sign": -1.0}),
)
def ordering(run: Run, sign: float = 1.0) -> Evidence:
    """From a small start the modes are learned one after the other, in decreasing order of λ_i."""
    s = np.asarray(factorization(run).singular_values)
    stds = SCALES[1:]
    half, gaps = [], []
    for std in stds:
        _, values, _ = _flow(run, std)
        levels = jnp.asarray(s / 2)
        half.append(
            np.asarray(hitting_times(jnp.asarray(TIMES), jnp.asarray(values[:, :3]), levels))
        )
        gaps.append(sign * np.diff(half[-1]))
    spread = np.abs(np.array(gaps))
    violation = float((-np.array(gaps) / spread).max())
    found = np.array(half)

    def draw(ax):
        for i, value in enumerate(s):
            ax.semilogx(stds, found[:, i], "o-", label=f"λ = {value:g}")
        ax.set(xlabel="std of A", ylabel="half-time [1/s]")
        ax.legend()

    return Evidence(
        measured={"smallest_gap": float(spread.min()), "half_times": found.ravel().tolist()},
        predicted={},
        error=violation,
        tolerance=0.0,
        assumptions=(
            Assumption("distinct λ_i", bool(np.all(np.diff(s) < 0)), f"λ = {SPECTRUM}"),
            Assumption("every mode passes λ/2 in time", bool(np.isfinite(found).all())),
        ),
        draw=draw,
        caption="Half-times of the three modes over the scale of the start.",
    )


@claim(
    "spectral_dynamics.benign_rank",
    source=SOURCE,
    standing="stated",
    tolerance="what the horizon leaves of the slowest mode, (1 + ln r) e^{−λ_k (T − t_k)}, "
    "squared and relative to the loss, plus rounding",
    control=Control("rank r* − 1, one below the target's, is among the ranks", {"below": 1}),
)
def benign_rank(run: Run, below: int = 0) -> Evidence:
    """Every rank r ≥ r* ends at zero loss; superfluous rank does no harm."""
    problem = factorization(run)
    std = 1e-3
    s_k, k = SPECTRUM[-1], len(SPECTRUM)
    rank_list = [k - below, k] if below else [k, 2 * k, 8 * k]
    final, tolerance, curves = {}, 0.0, {}
    for rank in rank_list:
        start, _, path = _flow(run, std, rank)
        losses = np.asarray(path.losses)
        curves[rank] = losses / losses[0]
        final[f"rank_{rank}"] = float(curves[rank][-1])
        if rank >= k:
            a = float(np.asarray(laws.deflated_amplitudes(problem, start))[k - 1])
            left = np.exp(-s_k * (TIMES[-1] - float(laws.half_time(s_k, a))))
            bound = ((1 + np.log(rank)) * left) ** 2 + np.finfo(np.float64).eps
            tolerance = max(tolerance, float(bound))

    def draw(ax):
        for rank, curve in curves.items():
            ax.semilogy(TIMES, np.maximum(curve, 1e-30), label=f"r = {rank}")
        ax.set(xlabel="time [1/s]", ylabel="loss / initial loss")
        ax.legend()

    return Evidence(
        measured=final,
        predicted=dict.fromkeys(final, 0.0),
        error=max(final.values()),
        tolerance=tolerance,
        draw=draw,
        caption=f"Target of rank {k}; ranks at and above it all reach zero loss.",
    )
