"""Claims of RefLoRA (Zhang et al. 2025, arXiv:2505.18877; theory §9)."""

import numpy as np

from lorajax.claims.base import Control, Evidence, Run, claim
from lorajax.claims.instances import (
    FINE_RTOL,
    SHAPE,
    factorization,
    landed_flow,
    metric_of,
    product_error,
    refactored,
)
from lorajax.factors.descents import reflora
from lorajax.flows import reflora_flow
from lorajax.initializers import orthogonal
from lorajax.spectra import singular_values

SOURCE = "RefLoRA: Zhang et al. 2025 (arXiv:2505.18877); theory §9"
LAST = 4.0


@claim(
    "reflora2025.balanced_flow",
    source=SOURCE,
    standing="derived",
    tolerance="solver error, 2 · steps · rtol · ‖A‖ ‖B‖, over s_1",
    control=Control("the exponent −1 of A B's singular values becomes −1.05", {"exponent": 1.05}),
)
def balanced_flow(run: Run, exponent: float = 1.0) -> Evidence:
    """RefLoRA's flow of A B is plain gradient flow from the balanced factorization of the same
    product, whatever the factors; plain gradient flow from these factors is another."""
    problem = factorization(run)
    start = refactored(run)[1]
    metric = metric_of(reflora, exponent)
    path = run.once(
        ("reflora_path", exponent),
        lambda: landed_flow(problem, start, LAST, metric=metric),
    )
    plain, law = run.once(
        "reflora_law",
        lambda: (
            landed_flow(problem, start, LAST),
            reflora_flow(problem, start, path.times),
        ),
    )
    expected, times = np.asarray(law.factors.product), np.asarray(path.times)
    gaps = {
        name: np.linalg.norm(np.asarray(each.factors.product) - expected, ord=2, axis=(1, 2)) / 4
        for name, each in (("reflora", path), ("plain", plain))
    }

    def draw(ax):
        for name, gap in gaps.items():
            ax.semilogy(times, np.maximum(gap, 1e-17), label=f"{name} flow")
        ax.set(xlabel="time [1/s]", ylabel="distance from the balanced flow / s_1")
        ax.legend()

    found = {name: float(gap.max()) for name, gap in gaps.items()}
    return Evidence(
        measured=found,
        predicted={"reflora": 0.0},
        error=found["reflora"],
        tolerance=product_error(path),
        draw=draw,
        caption="Factors that are not balanced, against the closed form of the rebalanced start.",
    )


@claim(
    "reflora2025.warm_up",
    source=SOURCE,
    standing="derived",
    tolerance="solver error of three flows, 2 · steps · rtol · ‖A‖ ‖B‖ each, over s_1",
    control=Control("the warm-up lasts 1.05 as long in the law", {"warmup": 0.525}),
)
def warm_up(run: Run, warmup: float = 0.5) -> Evidence:
    """From B = 0, where RefLoRA's S is singular, plain gradient flow for a while and RefLoRA after
    it is the closed form of both, joined at the end of the warm-up."""
    problem, lasts = factorization(run), 0.5
    start = orthogonal(run.key(84), SHAPE, 3, scale=0.3)
    early = run.once("reflora_early", lambda: landed_flow(problem, start, lasts))
    end = type(start)(*(x[-1] for x in early.factors))
    late = run.once(
        "reflora_late",
        lambda: landed_flow(problem, end, LAST, metric=metric_of(reflora, 1.0)),
    )
    times = np.asarray(late.times)
    law = reflora_flow(problem, start, lasts + times, warmup=warmup, rtol=FINE_RTOL)
    expected, found = np.asarray(law.factors.product), np.asarray(late.factors.product)
    error = float(np.linalg.norm(found - expected, ord=2, axis=(1, 2)).max() / 4)
    values = [np.asarray(singular_values(each)) for each in (late, law)]

    def draw(ax):
        for i in range(3):
            ax.plot(lasts + times, values[0][:, i], color=f"C{i}", label=f"mode {i + 1}")
            ax.plot(lasts + times, values[1][:, i], "--", color="black")
        ax.set(xlabel="time [1/s]", ylabel="singular value of AB", title="dashed: closed form")
        ax.legend()

    return Evidence(
        measured={"sup_error": error, "smallest_at_switch": float(values[0][0, 2])},
        predicted={"sup_error": 0.0},
        error=error,
        tolerance=product_error(early, late, law),
        draw=draw,
        caption="A with orthonormal columns times 0.3, B = 0; the warm-up lasts 0.5.",
    )
