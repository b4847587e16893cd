"""Where runs get stuck, and from which rank on nowhere."""

import numpy as np
from jaxtyping import Bool, Float

from lorajax import optima
from lorajax.claims import ntk
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim
from lorajax.claims.jang2024.instances import (
    AT_REST,
    BUILT_RANK,
    CELLS,
    NOISE,
    SOURCE,
    decided,
    ends_of,
    least_data,
)


def outcomes(
    gaps: Float[np.ndarray, "*cells starts"], objectives: Float[np.ndarray, "*cells starts"]
) -> tuple[Bool[np.ndarray, "*cells starts"], Bool[np.ndarray, "*cells starts"]]:
    """Which runs end above the global minimum, and which of them are stuck.

    A run above the global minimum is stuck where another start of the same instance and rank ends
    lower: otherwise the rank may just be too small to hold the global minimizer.

    Args:
      gaps: certified gaps over L̂(0), the last axis running over starts.
      objectives: LoRA's objectives over L̂(0), likewise.

    Returns:
      Two arrays of truth values: above the global minimum; above the best of the rank as well.
    """
    above = gaps > ntk.CERTIFIED
    best = objectives.min(axis=-1, keepdims=True)
    return above, above & (objectives > best + ntk.CERTIFIED)


def _stuck_map(ends: ntk.Rest) -> dict[tuple[int, int], dict[str, float]]:
    """What became of the runs of every cell."""
    above, stuck = outcomes(np.asarray(ends.gap), np.asarray(ends.objective))
    return {
        cell: {"runs": float(x.size), "uncertified": float(x.sum()), "stuck": float(y.mean())}
        for cell, x, y in zip(CELLS, above, stuck, strict=True)
    }


def _draw_map(maps: dict[str, dict]):
    def draw(ax):
        for i, (name, found) in enumerate(maps.items()):
            ranks = [r for n, r in found if n == ntk.SAMPLES]
            share = [
                found[ntk.SAMPLES, r]["uncertified"] / found[ntk.SAMPLES, r]["runs"] for r in ranks
            ]
            stuck = [found[ntk.SAMPLES, r]["stuck"] for r in ranks]
            ax.plot(ranks, share, "o-", color=f"C{i}", label=f"{name}above the global minimum")
            ax.plot(ranks, stuck, "s--", color=f"C{i}", label=f"{name}above the best of its rank")
        ax.axvline(optima.sufficient_rank(ntk.SAMPLES) - 0.5, color="black", linestyle=":")
        park = optima.manifold_rank(ntk.SAMPLES, (ntk.SIZE, ntk.SIZE))
        ax.axvline((park or 0) - 0.5, color="gray", linestyle=":")
        ax.set(xlabel="rank", ylabel="share of runs", title="dotted: Park's count, the threshold")
        ax.legend()

    return draw


def _no_spurious(run: Run, noise: float, factor: float) -> Evidence:
    ends = ends_of(run, noise)
    found = _stuck_map(ends)
    above = {c: v for c, v in found.items() if c[1] >= optima.sufficient_rank(c[0], factor=factor)}
    bad = sum(v["uncertified"] for v in above.values())
    count, built = least_data(run, noise)
    spurious = bool(built.gap > ntk.CERTIFIED)
    if BUILT_RANK >= optima.sufficient_rank(count, factor=factor):
        bad += spurious
    name = "perturbed, " if noise else ""
    return Evidence(
        measured={
            "runs_above": sum(v["runs"] for v in above.values()),
            "stuck_above": float(bad),
            "stuck_share_below": [v["stuck"] for c, v in found.items() if c not in above],
            "built_run_gap": float(built.gap),
        },
        predicted={"stuck_above": 0.0},
        error=float(bad),
        tolerance=0.0,
        assumptions=(
            decided(ends),
            Assumption(
                "the built run rests at a spurious minimum",
                spurious and bool(built.residual < AT_REST),
                f"r = {BUILT_RANK}, KN = {count}, residual {float(built.residual):.1e} of w",
            ),
        ),
        draw=_draw_map({name: found}),
        caption=f"{ntk.SAMPLES} data, {ntk.SIZE}×{ntk.SIZE} updates, random starts, by rank. "
        f"Not shown: r = {BUILT_RANK} with KN = r(r + 3)/2 = {count}, the fewest data on which a "
        "spurious minimum can be built; the run that starts next to it stays.",
    )


NO_SPURIOUS = (
    f"0: a count; a run is global if its certified gap is at most {ntk.CERTIFIED:g} of L̂(0), the "
    "square of what a run that rests leaves in the gradient being far below that"
)
WRONG_SIDE = Control(
    "the threshold lies at 0.95 KN: a run next to a built spurious minimum takes part",
    {"factor": 0.95},
)


@claim(
    "jang2024.no_spurious_minima",
    source=SOURCE,
    standing="stated",
    tolerance=NO_SPURIOUS,
    control=WRONG_SIDE,
)
def no_spurious_minima(run: Run, factor: float = 1.0) -> Evidence:
    """At ranks with r(r+1)/2 > KN gradient descent on LoRA with decay gets stuck nowhere: every run
    from a random start ends at a certified global minimum. (Stated for almost every small
    perturbation of the loss; here there is none.) The count is nearly the least there is: spurious
    minima take KN ≥ r(r+3)/2 (derived here), and on as many data one is built.
    """
    return _no_spurious(run, 0.0, factor)


@claim(
    "jang2024.no_spurious_minima_perturbed",
    source=SOURCE + "; the form of the perturbation is reconstructed",
    standing="reconstructed",
    tolerance=NO_SPURIOUS,
    control=WRONG_SIDE,
)
def no_spurious_minima_perturbed(run: Run, factor: float = 1.0) -> Evidence:
    """The same with the small random perturbation ½⟨P, Z Zᵀ⟩, Z = [A; Bᵀ], of the theorem, against
    the certificate of the perturbed problem."""
    return _no_spurious(run, NOISE, factor)


@claim(
    "jang2024.conservative",
    source="theory §5",
    standing="derived",
    tolerance="0: an order of ranks has no tolerance; the error is by how many ranks it is wrong",
    control=Control("the threshold is claimed to be necessary", {"necessary": True}),
)
def conservative(run: Run, necessary: bool = False) -> Evidence:
    """The threshold r(r+1)/2 > KN is sufficient and conservative: well below it there are stuck
    runs, but runs are clean from a smaller rank on. Park's count r(m+n) − r² > 1.35 KN is beside
    it."""
    ends = ends_of(run)
    found = _stuck_map(ends)
    ranks = [r for n, r in found if n == ntk.SAMPLES]
    dirty = [r for r in ranks if found[ntk.SAMPLES, r]["uncertified"]]
    clean, threshold = max(dirty) + 1, optima.sufficient_rank(ntk.SAMPLES)
    stuck = [found[ntk.SAMPLES, r]["stuck"] for r in ranks if r < threshold]
    park = optima.manifold_rank(ntk.SAMPLES, (ntk.SIZE, ntk.SIZE))
    return Evidence(
        measured={
            "clean_from": float(clean),
            "stuck_share_below": stuck,
            "parks_count": float(park or 0),
        },
        predicted={"threshold": float(threshold)},
        error=float(threshold - clean if necessary else clean - (threshold - 1)),
        tolerance=0.0,
        assumptions=(
            decided(ends),
            Assumption("some runs below are stuck", max(stuck) > 0, f"up to {max(stuck):.2f}"),
        ),
        draw=_draw_map({"": found}),
        caption="Runs above the global minimum may have too small a rank for it; those above the "
        "best of their rank are stuck.",
    )
