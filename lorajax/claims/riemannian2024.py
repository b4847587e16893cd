"""Claims of Riemannian (scaled) LoRA (Zhang, Pilanci 2024, arXiv:2402.02347; theory §9)."""

import numpy as np

from lorajax import laws
from lorajax.claims.base import Control, Evidence, Run, claim
from lorajax.claims.instances import (
    factorization,
    landed_flow,
    metric_of,
    product_error,
    refactored,
)
from lorajax.factors.descents import riemannian
from lorajax.initializers import spectral
from lorajax.spectra import hitting_times, singular_values

SOURCE = "Zhang, Pilanci 2024 (arXiv:2402.02347); theory §9"
LAST = 4.0


@claim(
    "riemannian2024.invariance",
    source=SOURCE,
    standing="derived",
    tolerance="solver error of both flows, 2 · steps · rtol · ‖A‖ ‖B‖ each, over s_1",
    control=Control("the exponent −1 of the Gram matrices becomes −1.05", {"exponent": 1.05}),
)
def invariance(run: Run, exponent: float = 1.0) -> Evidence:
    """The path of A B under Riemannian gradient flow is the same from (A R, R⁻¹B) as from (A, B);
    that of plain gradient flow is not."""
    problem, starts = factorization(run), refactored(run)
    metric = metric_of(riemannian, exponent)
    paths = run.once(
        ("riemannian_paths", exponent),
        lambda: [landed_flow(problem, x, LAST, metric=metric) for x in starts],
    )
    plain = run.once("plain_paths", lambda: [landed_flow(problem, x, LAST) for x in starts])
    times = np.asarray(plain[0].times)
    gaps = {}
    for name, pair in (("riemannian", paths), ("plain", plain)):
        one, other = (np.asarray(path.factors.product) for path in pair)
        gaps[name] = np.linalg.norm(one - other, ord=2, axis=(1, 2)) / 4.0

    def draw(ax):
        for name, gap in gaps.items():
            ax.semilogy(times, np.maximum(gap, 1e-17), label=f"{name} flow")
        ax.set(xlabel="time (a pure number)", ylabel="distance of the two products / s_1")
        ax.legend()

    found = {name: float(gap.max()) for name, gap in gaps.items()}
    return Evidence(
        measured=found,
        predicted={"riemannian": 0.0},
        error=found["riemannian"],
        tolerance=product_error(*paths),
        draw=draw,
        caption="Two factorings of one start, R of condition 9.",
    )


@claim(
    "riemannian2024.one_rate",
    source=SOURCE,
    standing="derived",
    tolerance="solver error, 2 · steps · rtol · ‖A‖ ‖B‖, over s_1",
    control=Control("the rate 2 becomes 2.1", {"rate": 2.1}),
)
def one_rate(run: Run, rate: float = 2.0) -> Evidence:
    """Aligned modes under Riemannian gradient flow follow σ(t) = s + (σ0 − s) e^{−2t}, all at one
    rate whatever s; under plain gradient flow the larger ones come first."""
    problem, scale = factorization(run), 0.1
    start = spectral(problem.target, 3, scale=scale)
    metrics = metric_of(riemannian, 1.0), None
    path, plain = run.once(
        "riemannian_modes",
        lambda: [landed_flow(problem, start, LAST, metric=m) for m in metrics],
    )
    s, times = np.asarray(problem.singular_values), np.asarray(path.times)
    values = np.asarray(singular_values(path))
    law = np.asarray(laws.riemannian_mode(times[:, None], s[None], scale**2, rate=rate))
    halves = {
        name: np.asarray(hitting_times(each.times, singular_values(each), 0.5 * s))
        for name, each in (("riemannian", path), ("plain", plain))
    }

    def draw(ax):
        for i, value in enumerate(s):
            ax.plot(times, values[:, i] / value, color=f"C{i}", label=f"s = {value:g}")
            ax.plot(times, law[:, i] / value, "--", color="black", label=None if i else "law")
            ax.plot(times, np.asarray(singular_values(plain))[:, i] / value, ":", color=f"C{i}")
        ax.set(xlabel="time (a pure number)", ylabel="σ / s", title="dotted: plain gradient flow")
        ax.legend()

    error = float(np.abs(values - law).max() / s[0])
    return Evidence(
        measured={"sup_error": error} | {f"half_times_{k}": v.tolist() for k, v in halves.items()},
        predicted={"sup_error": 0.0},
        error=error,
        tolerance=product_error(path),
        draw=draw,
        caption="From spectral initialization, σ0 = 0.01 for every mode.",
    )
