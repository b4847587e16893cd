"""Claims of Jang, Lee, Ryu 2024 (arXiv:2402.11867): LoRA in the NTK regime has no spurious minima.

The instances are those of `claims.ntk`: 8×8 updates, up to 20 Gaussian data, one output, squared
loss, decay a tenth of the least one at which nothing is learned. A map over (rank, samples) is one
vmapped program, and every run's end is judged by its own certificate.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from lorajax import optima
from lorajax.claims import ntk
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim
from lorajax.factors import Factors
from lorajax.problems import Linearized

SOURCE = "Jang, Lee, Ryu 2024 (arXiv:2402.11867); theory §5"
CELLS = (
    *((20, rank) for rank in range(1, ntk.MOST_RANK + 1)),
    (10, 3),
    (10, 5),
    (6, 2),
    (6, 4),
    (3, 3),
)
"""(N, r) of the runs; enough ranks at N = 20 to see where stuck runs begin."""
STEPS = 1600
AT_REST = 1e-6
"""Norm of the gradient in the factors over w, below which a run rests."""
NOISE = 0.02
"""Entries of the perturbation P over w."""


def _draws(run: Run, shape: tuple[int, ...], stream: int) -> np.ndarray:
    # numpy draws without compiling anything.
    return np.random.default_rng([run.seed, stream]).standard_normal(shape)


def _instances(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Features (I, N, 1, m, n) and targets (I, N, 1) of a few independent problems."""
    count = run.pick(6, 16)
    features = _draws(run, (count, ntk.SAMPLES, 1, ntk.SIZE, ntk.SIZE), 1)
    return features, _draws(run, (count, ntk.SAMPLES, 1), 2)


@eqx.filter_jit
def _runs(features, targets, starts, samples, ranks, perturbations) -> ntk.Rest:
    """Ends of all runs: lanes (cell, instance, start)."""

    def one(features, targets, perturbation, start, samples, rank) -> ntk.Rest:
        problem = ntk.masked_problem(features, targets, samples)
        w = ntk.decay_of(problem)
        start = ntk.masked_factors(start, rank)
        return ntk.come_to_rest(problem, w, start, STEPS, w * perturbation)

    over_starts = jax.vmap(one, (None, None, None, 0, None, None))
    over_instances = jax.vmap(over_starts, (0, 0, 0, None, None, None))
    return jax.vmap(over_instances, (None, None, None, None, 0, 0))(
        features, targets, perturbations, starts, samples, ranks
    )


def _ends(run: Run, noise: float = 0.0) -> ntk.Rest:
    """The map of runs with a perturbation of `noise` times w, simulated once."""

    def simulate() -> ntk.Rest:
        features, targets = _instances(run)
        starts = run.pick(6, 16)
        a = ntk.SCALE * _draws(run, (starts, ntk.SIZE, ntk.MOST_RANK), 3)
        b = ntk.SCALE * _draws(run, (starts, ntk.MOST_RANK, ntk.SIZE), 4)
        p = _draws(run, (len(features), 2 * ntk.SIZE, 2 * ntk.SIZE), 5)
        p = noise * (p + p.transpose(0, 2, 1)) / 2
        samples, ranks = (jnp.asarray(x) for x in zip(*CELLS, strict=True))
        begin = Factors(jnp.asarray(a), jnp.asarray(b))
        x, y, p = (jnp.asarray(each) for each in (features, targets, p))
        return _runs(x, y, begin, samples, ranks, p)

    return run.once(("jang2024", noise), simulate)


@eqx.filter_jit
def _optima(features, targets, samples, factor) -> tuple[optima.Optimum, Any]:
    """Certified global optima of lanes, and their L̂(0)."""

    def one(features, targets, samples):
        problem = ntk.masked_problem(features, targets, samples)
        found = optima.minimize(
            problem, factor * ntk.decay_of(problem), tolerance=ntk.CERTIFIED / 10
        )
        return found, problem.loss(problem.zero())

    return jax.vmap(one)(features, targets, samples)


COUNTS = (1, 3, 6, 10, 20)
DEGENERATE = (1, 3)


def _solved(run: Run, factor: float = 1.0):
    """Optima of all instances at all COUNTS, and of degenerate ones: their features are g ⊗ I₄."""
    features, targets = _instances(run)
    half = _draws(run, (*features.shape[:3], ntk.SIZE // 4, ntk.SIZE // 4), 6)
    pairs = np.kron(half, np.eye(4))
    blocks = [(features, targets, n) for n in COUNTS] + [(pairs, targets, n) for n in DEGENERATE]

    def simulate():
        stack = [jnp.asarray(np.concatenate([b[i] for b in blocks])) for i in (0, 1)]
        samples = jnp.asarray(np.repeat([n for *_, n in blocks], len(features)))
        found, scale = _optima(stack[0], stack[1], samples, jnp.asarray(factor))
        rows = [len(features) * i for i in range(len(blocks) + 1)]
        parts = [slice(x, y) for x, y in zip(rows, rows[1:], strict=False)]
        return blocks, parts, found, np.asarray(scale)

    return run.once(("jang2024 optima", factor), simulate)


def _ranks(updates: np.ndarray) -> np.ndarray:
    """Ranks of a stack; the proximal map leaves exact zeros but for rounding."""
    s = np.linalg.svd(updates, compute_uv=False)
    return (s > 1e-9 * np.maximum(s[:, :1], 1e-300)).sum(axis=1)


@claim(
    "jang2024.existence",
    source=SOURCE + "; the reduction of ranks is Pataki's and Barvinok's argument (recalled)",
    standing="stated",
    tolerance="0: a count has no tolerance; the error is the largest r(r+1)/2 − KN",
    control=Control("the count r(r+1)/2 becomes 1.05 times that", {"factor": 1.05}),
)
def existence(run: Run, factor: float = 1.0) -> Evidence:
    """Nuclear-norm fine-tuning has a global minimizer of a rank r with r(r+1)/2 ≤ KN: the solver's
    where it is unique, and one that is found by reducing ranks where it is not."""
    blocks, parts, found, scale = _solved(run)
    updates = np.asarray(found.update)
    ranks = {}
    for n, part in zip(COUNTS, parts, strict=False):
        ranks[f"KN = {n}"] = [float(r) for r in _ranks(updates[part])]
    gaps, spared = [], []
    for (features, targets, n), part in list(zip(blocks, parts, strict=True))[len(COUNTS) :]:
        problem = ntk.masked_problem(jnp.asarray(features[0]), jnp.asarray(targets[0]), n)
        u, s, vt = np.linalg.svd(updates[part][0])
        keep = s > 1e-9 * s[0]
        left, right = u[:, keep] * np.sqrt(s[keep]), np.sqrt(s[keep])[:, None] * vt[keep]
        reduced, passed = optima.reduce_rank(
            problem, Factors(jnp.asarray(left), jnp.asarray(right))
        )
        certificate = optima.certify(problem, reduced, ntk.decay_of(problem))
        gaps.append(float(certificate.gap) / scale[part][0])
        spared.append(passed[0] - passed[-1])
        ranks[f"degenerate, KN = {n}"] = [float(reduced.rank)]
    errors = []
    for name, found_ranks in ranks.items():
        worst, n = max(found_ranks), float(name.split()[-1])
        errors.append(factor * worst * (worst + 1) / 2 - n)
    # Outputs stay to rounding; the decay moves with the distance from the minimum, the root of the
    # gap, along a path of length one.
    allowed = ntk.CERTIFIED**0.5
    optimal = np.asarray(found.certificate.gap) / scale

    def draw(ax):
        counts = np.array(COUNTS)
        for x, n in enumerate(COUNTS):
            ax.plot(
                np.full(len(ranks[f"KN = {n}"]), x), ranks[f"KN = {n}"], "o", color="C0", alpha=0.4
            )
        bound = [optima.existing_rank(int(n)) for n in counts]
        ax.step(np.arange(len(counts)), bound, "k--", where="mid", label="bound r(r+1)/2 ≤ KN")
        ax.set_xticks(range(len(counts)), [str(n) for n in counts])
        ax.set_yticks(range(1, int(max(bound)) + 1))
        ax.set(xlabel="KN", ylabel="rank of the global minimizer")
        ax.legend()

    return Evidence(
        measured=ranks,
        predicted={f"KN = {n}": float(optima.existing_rank(n)) for n in COUNTS},
        error=max(errors),
        tolerance=0.0,
        assumptions=(
            Assumption(
                "the solver's gaps are certified",
                bool(optimal.max() <= ntk.CERTIFIED),
                f"largest gap {optimal.max():.1e} of L̂(0)",
            ),
            Assumption(
                "degenerate solutions lose ranks and stay global",
                bool(min(spared) > 0 and max(gaps) < allowed),
                f"ranks lost {spared}, gaps up to {max(gaps):.1e}",
            ),
        ),
        draw=draw,
        caption="Ranks of certified minimizers of random instances, against the bound.",
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


def _rested(ends: ntk.Rest) -> Assumption:
    worst = float(np.asarray(ends.residual).max())
    return Assumption("all runs rest", worst < AT_REST, f"largest residual {worst:.1e} of w")


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
    ends = _ends(run, noise)
    found = _stuck_map(ends)
    above = {c: v for c, v in found.items() if c[1] >= optima.sufficient_rank(c[0], factor=factor)}
    bad = sum(v["uncertified"] for v in above.values())
    name = "perturbed, " if noise else ""
    return Evidence(
        measured={
            "runs_above": sum(v["runs"] for v in above.values()),
            "stuck_above": float(bad),
            "stuck_share_below": [v["stuck"] for c, v in found.items() if c not in above],
        },
        predicted={"stuck_above": 0.0},
        error=float(bad),
        tolerance=0.0,
        assumptions=(_rested(ends),),
        draw=_draw_map({name: found}),
        caption=f"{ntk.SAMPLES} data, {ntk.SIZE}×{ntk.SIZE} updates, random starts, by rank.",
    )


NO_SPURIOUS = (
    f"0: a count; a run is global if its certified gap is at most {ntk.CERTIFIED:g} of L̂(0), the "
    "square of what a run that rests leaves in the gradient being far below that"
)
WRONG_SIDE = Control("the threshold lies at KN/10: runs below it take part", {"factor": 0.1})


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
    perturbation of the loss; here there is none.)"""
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
    ends = _ends(run)
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
            _rested(ends),
            Assumption("some runs below are stuck", max(stuck) > 0, f"up to {max(stuck):.2f}"),
        ),
        draw=_draw_map({"": found}),
        caption="Runs above the global minimum may have too small a rank for it; those above the "
        "best of their rank are stuck.",
    )


@claim(
    "jang2024.equivalence",
    source=SOURCE,
    standing="stated",
    tolerance="the gaps that both certificates leave, over L̂(0)",
    control=Control("the nuclear norm's weight w becomes 1.05 w", {"factor": 1.05}),
)
def equivalence(run: Run, factor: float = 1.0) -> Evidence:
    """Full fine-tuning with w‖δ‖_* and LoRA of enough rank with decay (w/2)(‖A‖² + ‖B‖²) reach the
    same value."""
    ends = _ends(run)
    _, parts, found, scale = _solved(run, factor)
    full = np.asarray(found.certificate.objective) / scale
    gap = np.asarray(found.certificate.gap) / scale
    errors, points = [], []
    for i, (n, r) in enumerate(CELLS):
        if r < optima.sufficient_rank(n):
            continue
        part = parts[COUNTS.index(n)]
        lora = np.asarray(ends.objective)[i]
        errors.append(np.abs(lora - full[part][:, None]).max())
        points.append((np.repeat(full[part], lora.shape[1]), lora.ravel(), f"N = {n}, r = {r}"))

    def draw(ax):
        for x, y, label in points:
            ax.plot(x, y, "o", alpha=0.5, markersize=4, label=label)
        ends_of_line = [min(x.min() for x, *_ in points), max(x.max() for x, *_ in points)]
        ax.plot(ends_of_line, ends_of_line, "k--", linewidth=1)
        ax.set(
            xlabel="full fine-tuning, w‖δ‖_*", ylabel="LoRA with decay", title="objective over L̂(0)"
        )
        ax.legend()

    return Evidence(
        measured={"largest_difference": float(max(errors))},
        predicted={"largest_difference": 0.0},
        error=float(max(errors)),
        tolerance=ntk.CERTIFIED + float(gap.max()),
        assumptions=(_rested(ends),),
        draw=draw,
        caption="Least objectives of both; every run of LoRA is a point.",
    )


@claim(
    "jang2024.certificate",
    source="theory §5",
    standing="derived",
    tolerance="0: the share of runs for which the two sides disagree, global meaning within "
    f"{ntk.CERTIFIED:g} of L̂(0) of the least value and ‖∇L̂‖₂ ≤ w resolved to {AT_REST:g} of w",
    control=Control("‖∇L̂(X)‖₂ ≤ w becomes ‖∇L̂(X)‖₂ ≤ 1.05 w", {"factor": 1.05}),
)
def certificate(run: Run, factor: float = 1.0) -> Evidence:
    """A point X where a run rests is a global minimum exactly if ‖∇L̂(X)‖₂ ≤ w; the equality
    ⟨∇L̂(X), X⟩ = −w‖X‖_* holds at all of them."""
    ends = _ends(run)
    _, parts, found, scale = _solved(run)
    least = np.asarray(found.certificate.objective) / scale
    norms = np.asarray(ends.certificate.gradient_norm / ends.decay)
    heights = []
    for i, (n, _) in enumerate(CELLS):
        best = least[parts[COUNTS.index(n)]]
        heights.append(np.asarray(ends.objective)[i] - best[:, None])
    heights = np.stack(heights)
    by_value, by_gradient = heights <= ntk.CERTIFIED, norms <= factor * (1 + AT_REST)
    alignment = float(np.abs(np.asarray(ends.certificate.alignment / ends.scale)).max())

    def draw(ax):
        ax.loglog(
            np.maximum(norms.ravel() - 1, 1e-16), np.maximum(heights.ravel(), 1e-17), "o", alpha=0.3
        )
        ax.axvline(AT_REST, color="black", linestyle="--")
        ax.axhline(ntk.CERTIFIED, color="black", linestyle="--")
        ax.set(xlabel="‖∇L̂(X)‖₂ / w − 1", ylabel="objective above the least, over L̂(0)")

    return Evidence(
        measured={
            "disagreeing_share": float((by_value != by_gradient).mean()),
            "global_share": float(by_value.mean()),
            "largest_alignment": alignment,
        },
        predicted={"disagreeing_share": 0.0},
        error=float((by_value != by_gradient).mean()),
        tolerance=0.0,
        assumptions=(
            _rested(ends),
            Assumption("⟨∇L̂, X⟩ + w‖X‖_* vanishes", alignment < ntk.CERTIFIED, f"{alignment:.1e}"),
            Assumption(
                "there are runs of both kinds",
                bool(0 < by_value.mean() < 1),
                f"{by_value.mean():.2f}",
            ),
        ),
        draw=draw,
        caption="Global minima lie at the lower left, all others at the upper right.",
    )


SIDE, LENGTHS = 3, (1e3, 1e4, 1e5)


@eqx.filter_jit
def _gaps(features, targets, samples) -> tuple[Any, Any]:
    """Generalization gap per nuclear norm of lanes, and whether they converged."""

    def one(features, targets, samples):
        problem = Linearized.from_features(features, targets)
        weights = jnp.full_like(problem.sample_weights, 1) / samples
        problem = eqx.tree_at(lambda p: p.sample_weights, problem, weights)
        found = optima.minimize(problem, ntk.decay_of(problem, 0.5), tolerance=1e-12)
        x, zero = found.update, problem.zero()
        fitted = problem.loss(zero) - problem.loss(x)
        # On new data ½E(⟨G, X⟩ − y)² exceeds its value at 0 by ½‖X‖².
        nuclear = jnp.sum(jnp.linalg.svd(x, compute_uv=False))
        return (jnp.sum(x**2) / 2 + fitted) / nuclear, found.converged

    return jax.vmap(one)(features, targets, samples)


@claim(
    "jang2024.generalization_rate",
    source="Rademacher bound ∝ ‖δ*‖_* √K G R/√N of Jang, Lee, Ryu 2024 (arXiv:2402.11867)",
    standing="recalled",
    tolerance="order of the next term, mn/N at the smallest N, over the range of ln N, plus twice "
    "the standard error over repetitions",
    control=Control("the exponent −½ becomes −0.525", {"exponent": -0.525}),
)
def generalization_rate(run: Run, exponent: float = -0.5) -> Evidence:
    """On targets that are noise, where the Rademacher bound is attained, the solution's
    generalization gap per unit of ‖δ*‖_* falls as N^{−1/2} (decay half of ‖∇L̂(0)‖₂)."""
    repetitions = run.pick(300, 2000)

    def simulate():
        # N Gaussian rows act through their triangular factor alone (Bartlett's decomposition), so
        # that mn + 1 rows stand for any N of them, exactly.
        rng, rows = np.random.default_rng([run.seed, 7]), SIDE**2 + 1
        lanes = (len(LENGTHS), repetitions)
        r = np.triu(rng.standard_normal((*lanes, rows, rows)), 1)
        freedom = np.array(LENGTHS)[:, None, None] - np.arange(rows)
        i = np.arange(rows)
        r[..., i, i] = np.sqrt(rng.chisquare(np.broadcast_to(freedom, (*lanes, rows))))
        r = r.reshape(-1, rows, rows)
        features = r[:, :, :-1].reshape(-1, rows, 1, SIDE, SIDE)
        samples = np.repeat(LENGTHS, repetitions)
        lanes_of = [jnp.asarray(x) for x in (features, r[:, :, -1:], samples)]
        gap, converged = _gaps(lanes_of[0], lanes_of[1], lanes_of[2])
        return np.asarray(gap).reshape(lanes), bool(np.all(converged))

    gaps, converged = run.once("jang2024 generalization", simulate)
    x, logs = np.log(np.array(LENGTHS)), np.log(gaps)
    slope = float(np.polyfit(x, logs.mean(axis=1), 1)[0])
    weights = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    errors = logs.std(axis=1, ddof=1) / repetitions**0.5
    sampling = float(np.sqrt(np.sum((weights * errors) ** 2)))

    def draw(ax):
        ax.errorbar(
            LENGTHS, gaps.mean(axis=1), gaps.std(axis=1), fmt="o", label="simulated, ± 1 sd"
        )
        line = gaps.mean() * (np.array(LENGTHS) / np.exp(x.mean())) ** exponent
        line *= np.exp(logs.mean()) / np.exp(np.log(line).mean())
        ax.plot(LENGTHS, line, "k--", label=f"N^{exponent:g}")
        ax.set(xscale="log", yscale="log", xlabel="N", ylabel="generalization gap / ‖δ*‖_*")
        ax.legend()

    return Evidence(
        measured={"exponent": slope, "gaps": gaps.mean(axis=1).tolist()},
        predicted={"exponent": exponent},
        error=abs(slope - exponent),
        tolerance=SIDE**2 / LENGTHS[0] / float(x[-1] - x[0]) + 2 * sampling,
        assumptions=(Assumption("all solutions are certified", converged),),
        draw=draw,
        caption=f"{SIDE}×{SIDE} updates on Gaussian features, targets of pure noise.",
    )
