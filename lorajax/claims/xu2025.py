"""Claims of Xu et al. 2025 (arXiv:2503.06982): two frozen layers with an adapter on each.

The abstract and the captions are stated; the formulas here are reconstructed or derived (theory
§4). Sizes, ranks and spectra are not known from the paper: 16×16 layers, rank 2, W2 half as strong
as W1 (so that δ_w = 1/2), W2 = U Σ2 Pᵀ and W1 = P Σ1 Vᵀ as gradient flow would have pre-trained
them. "Top" and "bottom" add 5 u vᵀ along the first and last principal component of Y_pre, "generic"
along random unit vectors.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lorajax import laws, spectra
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim
from lorajax.claims.instances import SAVES
from lorajax.flows import lanes
from lorajax.initializers import small, spectral
from lorajax.problems import Target, TwoLayer, TwoLayerFactors

SOURCE = "Xu et al. 2025 (arXiv:2503.06982); theory §4"
WIDTH, RANK, STRENGTH = 16, 2, 5.0
KINDS: tuple[Target, ...] = ("top", "bottom", "generic")
LINEAR = np.linspace(0.0, 1.0, SAVES)
RTOL = 1e-9


class Observed(NamedTuple):
    """What a lane keeps of its flow, each of shape (..., t), first layer before the second.

    Attributes:
      times: in 1/s.
      losses: relative to the loss at the start.
      norms: ‖Z_i‖₂ of the stacked factors, shape (..., 2, t).
      misalignments: 1 − cos between Z_i's top left singular vector and the top eigenvector of
        H(M_i), shape (..., 2, t).
      status: int32 code of the flow.
      decay: rate at which the residual decays at the last point, in 1/time.
    """

    times: Array
    losses: Array
    norms: Array
    misalignments: Array
    status: Array
    decay: Array


def make_problem(run: Run, kind: Target, repetition: int = 0) -> TwoLayer:
    """The instance of a kind; see the module's docstring."""
    return TwoLayer.pretrained(run.key(1000 + repetition), WIDTH, kind, strength=STRENGTH)


def _residual_decay(problem: TwoLayer, end: TwoLayerFactors):
    """Rate of the residual near convergence along its own direction: ⟨R, JJᵀR⟩/‖R‖².

    With the factors frozen at their end the residual obeys Ṙ = −JJᵀR, J the derivative of the
    product with respect to the factors, so this Rayleigh quotient is its decay rate (derived).
    """
    unit = problem.shift / jnp.linalg.norm(problem.shift)
    layer1 = problem.w1 + end.first.product
    layer2 = problem.w2 + end.second.product
    pulled1, pulled2 = layer2.T @ unit, unit @ layer1.T
    squares = [
        jnp.sum((pulled1 @ end.first.b.T) ** 2),
        jnp.sum((end.first.a.T @ pulled1) ** 2),
        jnp.sum((pulled2 @ end.second.b.T) ** 2),
        jnp.sum((end.second.a.T @ pulled2) ** 2),
    ]
    return sum(squares[1:], squares[0])


_BATCH = 15
"""Lanes of one call: all claims then share one compiled program."""


@functools.partial(jax.jit, static_argnames="start")
def _starts(problem: TwoLayer, keys: Array, scales: Array, *, start: str) -> TwoLayerFactors:
    def one(key, scale):
        if start == "small":
            return problem.blind_start(functools.partial(small, rank=RANK, scale=scale), key)
        return problem.directed_start(
            functools.partial(spectral, rank=RANK, scale=scale, directions=1)
        )

    return jax.vmap(one)(keys, scales)


@jax.jit
def _flows(problem: TwoLayer, factors: TwoLayerFactors, grid, units, rtol):
    """Losses, factors and status of a batch of lanes; time t of lane l is units[l] · grid[t]."""
    found = lanes.two_layer(
        problem,
        factors,
        grid,
        observe=lambda f: {"factors": f},
        units=units,
        rtol=rtol,
        bucket=_BATCH,
    )
    return found.observed["losses"], found.observed["factors"], found.status


@jax.jit
def _look(problem: TwoLayer, losses, factors: TwoLayerFactors, status, grid, units) -> Observed:
    # Both layers have one shape here, so that one batched decomposition serves them.
    directions = jax.vmap(spectra.top_direction)(jnp.stack(problem.alignment_matrices()))
    layers = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *factors)
    vectors, norms = spectra.leading(layers)
    last = jax.tree.map(lambda x: x[:, -1], factors)
    of_layers = jax.vmap(spectra.misalignment, (1, 0), 1)
    return Observed(
        units[:, None] * grid[None],
        losses / losses[:, :1],
        norms,
        of_layers(vectors, directions),
        status,
        jax.vmap(functools.partial(_residual_decay, problem))(last),
    )


def observe(
    run: Run,
    kind: Target,
    scales,
    horizons,
    grid=LINEAR,
    *,
    start: str = "small",
    repetitions: int | None = None,
    rtol: float = RTOL,
) -> tuple[TwoLayer, Observed]:
    """Flows of a kind for repetitions × scales, each scale with its own horizon."""
    problem = make_problem(run, kind)
    count: int = run.pick(5, 30) if repetitions is None else repetitions
    scales = np.asarray(scales, float)
    horizons = np.broadcast_to(np.asarray(horizons, float), scales.shape)
    name = (kind, tuple(scales), tuple(horizons), float(grid[1]), start, count, rtol)

    def simulate() -> Observed:
        keys = np.asarray(jax.random.key_data(jax.random.split(run.key(2000), count)))
        # Lanes (repetition, scale) in one row, filled up to whole batches with the last one.
        which = np.arange(count * len(scales))
        which = np.append(which, np.full(-which.size % _BATCH, which[-1]))
        repetition, index = np.divmod(which, len(scales))
        units, times, seen = horizons[index], jnp.asarray(grid), []
        for first in range(0, which.size, _BATCH):
            part = slice(first, first + _BATCH)
            draws = jax.random.wrap_key_data(jnp.asarray(keys[repetition[part]]))
            factors = _starts(problem, draws, scales[index[part]], start=start)
            flows = _flows(problem, factors, times, units[part], rtol)
            seen.append(_look(problem, *flows, times, units[part]))
        together = jax.tree.map(lambda *x: np.concatenate(x), *seen)
        shape = (count, len(scales))
        return jax.tree.map(
            lambda x: x[: count * len(scales)].reshape(*shape, *x.shape[1:]), together
        )

    return problem, run.once(name, simulate)


def _rates(problem: TwoLayer) -> tuple[float, float, int]:
    """Faster rate, δ_w, and the index of the slow layer."""
    rates = [float(x) for x in laws.growth_rates(problem)]
    return max(rates), min(rates) / max(rates), int(np.argmin(rates))


ESCAPE_SCALES = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


def _escape(run: Run, kind: Target) -> dict[str, Any]:
    """Escape times (loss below 0.9 of its start) and what the layers look like then."""
    fast = _rates(make_problem(run, kind))[0]
    # Long enough for ln(1/α) e-foldings and for the loss to fall afterwards.
    horizons = (np.log(1 / np.array(ESCAPE_SCALES)) + 6) / fast
    problem, seen = observe(run, kind, ESCAPE_SCALES, horizons)
    fast, delta, slow = _rates(problem)

    def one(times, losses, norms, misalignments):
        # 1 − loss grows exponentially before escape, so its logarithm interpolates well.
        grown = jnp.log(jnp.maximum(1 - losses, 1e-300))
        time = spectra.hitting_times(times, grown, jnp.log(jnp.asarray(0.1)))
        at = functools.partial(jnp.interp, time, times)
        logs = jnp.stack([at(jnp.log(z)) for z in norms])
        angles = jnp.stack([at(jnp.log(jnp.maximum(z, 1e-300))) for z in misalignments])
        return time, logs, angles

    times, log_norms, log_angles = jax.vmap(jax.vmap(one))(
        seen.times, seen.losses, seen.norms, seen.misalignments
    )
    spacing = float(horizons.max()) / (SAVES - 1)
    # Interpolation of a curve with second derivative of order fast² leaves (fast Δt)²/8 at each end
    # of the fit's range of ln α.
    span = np.log(ESCAPE_SCALES[0] / ESCAPE_SCALES[-1])
    resolution = 2 * (fast * spacing) ** 2 / 8 / span
    return {
        "log_scales": np.log(np.array(ESCAPE_SCALES)),
        "times": np.asarray(times),
        "log_norms": np.asarray(log_norms),
        "log_angles": np.asarray(log_angles),
        "fast": fast,
        "delta": delta,
        "slow": slow,
        "resolution": resolution,
        "finite_scale": ESCAPE_SCALES[0] ** (2 * (1 - delta)),
        "converged": bool(np.all(np.asarray(seen.status) == 0)),
    }


def _slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slopes of the rows of y over x."""
    centered = x - x.mean()
    return (y - y.mean(axis=1, keepdims=True)) @ centered / (centered @ centered)


def _distinct_rates(delta: float) -> Assumption:
    return Assumption("the layers grow at different rates", delta < 0.9, f"δ_w = {delta:.3f}")


ESCAPE_TOLERANCE = (
    "finite-scale order α^{2(1 − δ_w)} at the largest α, the slow layer's share in the growth at "
    "escape, plus the resolution of the saved times, plus twice the standard error over repetitions"
)


def _scatter(data: dict[str, dict[str, Any]], value, label: str, law):
    def draw(ax):
        for i, (kind, escape) in enumerate(data.items()):
            x = np.exp(escape["log_scales"])
            y = value(escape)
            ax.semilogx(x, y.T, "o", color=f"C{i}", alpha=0.4, markersize=4)
            slope = law(escape)
            mean = y.mean(axis=0)
            line = mean[-1] + slope * (escape["log_scales"] - escape["log_scales"][-1])
            ax.semilogx(x, line, "--", color=f"C{i}", label=f"{kind}: slope {slope:.3g}")
        ax.set(xlabel="scale α of the start", ylabel=label)
        ax.legend(title="dashed: law")

    return draw


def _slope_evidence(
    run: Run,
    value,
    law,
    label: str,
    caption: str,
    *,
    relative: bool,
    kinds: tuple[Target, ...] = KINDS,
) -> Evidence:
    """Slopes over ln α at escape for kinds of target, against a law for each."""
    data = {kind: run.once(("escape", kind), lambda k=kind: _escape(run, k)) for kind in KINDS}
    measured, predicted, errors, tolerances = {}, {}, [], []
    for kind, escape in data.items():
        slopes = _slopes(escape["log_scales"], value(escape))
        if kind not in kinds:
            measured[f"{kind}_outside_the_assumption"] = float(slopes.mean())
            continue
        target = law(escape)
        unit = abs(target) if relative else 1.0
        measured[kind], predicted[kind] = float(slopes.mean()), float(target)
        errors.append(abs(slopes.mean() - target) / unit)
        sampling = 2 * slopes.std(ddof=1) / len(slopes) ** 0.5 / unit
        # A time is resolved to Δt, so a slope of times relative to 1/fast to fast Δt, as a
        # logarithm is.
        tolerances.append(escape["finite_scale"] + escape["resolution"] + sampling)
    worst = int(np.argmax(np.array(errors) / np.array(tolerances)))
    return Evidence(
        measured=measured,
        predicted=predicted,
        error=float(errors[worst]),
        tolerance=float(tolerances[worst]),
        assumptions=(
            *(_distinct_rates(escape["delta"]) for escape in data.values()),
            Assumption("all flows converged", all(e["converged"] for e in data.values())),
        ),
        draw=_scatter({kind: data[kind] for kind in kinds}, value, label, law),
        caption=caption,
    )


@claim(
    "xu2025.escape_slope",
    source=SOURCE,
    standing="reconstructed",
    tolerance=ESCAPE_TOLERANCE,
    control=Control("the slope 1/max(g1, g2) becomes 1.05 times that", {"factor": 1.05}),
)
def escape_slope(run: Run, factor: float = 1.0) -> Evidence:
    """From a small start of scale α the loss begins to fall at ln(1/α)/max(g1, g2) + const with
    g1 = σ1(W2ᵀE), g2 = σ1(E W1ᵀ)."""
    return _slope_evidence(
        run,
        lambda e: e["times"],
        lambda e: -factor / e["fast"],
        "escape time [1/s]",
        "Time at which the loss falls below 0.9 of its start, five repetitions.",
        relative=True,
    )


@claim(
    "xu2025.slow_layer_exponent",
    source=SOURCE,
    standing="reconstructed",
    tolerance=ESCAPE_TOLERANCE,
    control=Control("the exponent 1 − δ_w becomes 1.05 (1 − δ_w)", {"factor": 1.05}),
)
def slow_layer_exponent(run: Run, factor: float = 1.0) -> Evidence:
    """When the fast layer escapes, the slow layer has norm ‖Z_slow‖ ∝ α^{1 − δ_w}."""
    return _slope_evidence(
        run,
        lambda e: e["log_norms"][:, :, e["slow"]],
        lambda e: factor * (1 - e["delta"]),
        "ln ‖Z_slow‖ at escape",
        "Norm of the slow layer's stacked factors at escape.",
        relative=False,
    )


@claim(
    "xu2025.alignment_exponent",
    source="derived here from theory §4: along a principal component one direction "
    "grows and the rest "
    "stays at α",
    standing="derived",
    tolerance=ESCAPE_TOLERANCE,
    control=Control("the exponent 2 δ_w becomes 2.1 δ_w", {"factor": 1.05}),
)
def alignment_exponent(run: Run, factor: float = 1.0) -> Evidence:
    """For a shift along a principal component of Y_pre the slow layer is aligned at escape up to
    1 − cos ∝ α^{2 δ_w}: its one growing direction has reached α^{1 − δ_w}, the others stayed at α.
    (For a generic shift the fast layer's growth turns the slow one's direction, and the law does
    not hold.)
    """
    return _slope_evidence(
        run,
        lambda e: e["log_angles"][:, :, e["slow"]],
        lambda e: 2 * factor * e["delta"],
        "ln(1 − cos) of the slow layer at escape",
        "Misalignment of the slow layer with the top eigenvector of H(M) at escape.",
        relative=False,
        kinds=("top", "bottom"),
    )


@claim(
    "xu2025.alignment_improves",
    source=SOURCE,
    standing="reconstructed",
    tolerance="0: an order has no tolerance; the error is the share of neighboring "
    "pairs out of order",
    control=Control("the order is reversed: larger α, better alignment", {"sign": -1.0}),
)
def alignment_improves(run: Run, sign: float = 1.0) -> Evidence:
    """The smaller the scale α of the start, the smaller the record low of 1 − cos between the
    layers' top singular vectors and those of W2ᵀE and E W1ᵀ during the run.
    """
    scales = (1e-2, 1e-3, 1e-4, 1e-5)
    wrong, pairs, shown = 0, 0, {}
    for kind in KINDS:
        fast = _rates(make_problem(run, kind))[0]
        horizons = (np.log(1 / np.array(scales)) + 6) / fast
        _, seen = observe(run, kind, scales, horizons)
        record = np.log(np.asarray(seen.misalignments).min(axis=-1))
        falls = sign * np.diff(record, axis=1) < 0
        wrong, pairs = wrong + int((~falls).sum()), pairs + falls.size
        shown[kind] = record

    def draw(ax):
        for i, (kind, record) in enumerate(shown.items()):
            for layer, marker in enumerate("os"):
                mean = record[:, :, layer].mean(axis=0) / np.log(10)
                name = f"{kind}, layer {layer + 1}"
                ax.semilogx(scales, mean, marker + "-", color=f"C{i}", label=name)
        ax.set(xlabel="scale α of the start", ylabel="log₁₀ of the least 1 − cos")
        ax.legend(ncol=2)

    return Evidence(
        measured={
            kind: (record.mean(axis=(0, 2)) / np.log(10)).tolist() for kind, record in shown.items()
        },
        predicted={},
        error=wrong / pairs,
        tolerance=0.0,
        draw=draw,
        caption="Record low of 1 − cos over the alignment phase and the first descent.",
    )


TAIL_GRID = np.concatenate([[0.0], np.geomspace(1e-3, 1.0, SAVES - 1)])


def _late(run: Run, kind: Target, scales, *, start: str = "small", rtol=RTOL, reach=1000.0):
    """Flows to a horizon of `reach` growth times, on a logarithmic grid."""
    fast = _rates(make_problem(run, kind))[0]
    return observe(run, kind, scales, reach / fast, TAIL_GRID, start=start, rtol=rtol)


def _draw_losses(curves):
    def draw(ax):
        for i, (name, times, losses) in enumerate(curves):
            for j, row in enumerate(losses):
                label = name if j == 0 else None
                ax.loglog(
                    times[1:], np.maximum(row[1:], 1e-32), color=f"C{i}", alpha=0.6, label=label
                )
        ax.set(xlabel="time [1/s]", ylabel="loss / initial loss")
        ax.legend()

    return draw


@claim(
    "xu2025.loss_floor",
    source="theory §2.4, §4",
    standing="derived",
    tolerance="finite-scale order α^{2(1 − δ_w)} at the largest α, plus twice the "
    "standard error over "
    "repetitions",
    control=Control("the exponent 4 becomes 4.2", {"exponent": 4.2}),
)
def loss_floor(run: Run, exponent: float = 4.0) -> Evidence:
    """From a small random start the loss along a principal component falls to a floor ∝ α⁴ and
    stays there until t ~ 1/α²: what the start put across the learned direction.
    """
    scales = (1e-2, 3e-3, 1e-3)
    measured, tolerances, curves, errors = {}, [], [], []
    for kind in ("top", "bottom"):
        problem, seen = _late(run, kind, scales, reach=100.0)
        floors = np.log(np.asarray(seen.losses)[..., -1])
        slopes = _slopes(np.log(np.array(scales)), floors)
        measured[kind] = float(slopes.mean())
        errors.append(abs(slopes.mean() - exponent))
        sampling = 2 * slopes.std(ddof=1) / len(slopes) ** 0.5
        tolerances.append(scales[0] ** (2 * (1 - _rates(problem)[1])) + sampling)
        for j, scale in enumerate(scales):
            rows = np.asarray(seen.losses)[:, j]
            if kind == "top":
                curves.append((f"α = {scale:g}", np.asarray(seen.times)[0, j], rows))
    worst = int(np.argmax(np.array(errors) / np.array(tolerances)))
    return Evidence(
        measured=measured,
        predicted=dict.fromkeys(measured, exponent),
        error=float(errors[worst]),
        tolerance=float(tolerances[worst]),
        draw=_draw_losses(curves),
        caption="Top principal component: the floor falls by 10⁻⁴ for each decade of α.",
    )


@claim(
    "xu2025.slow_tail",
    source=SOURCE,
    standing="reconstructed",
    tolerance="finite-scale order α^{2(1 − δ_w)} at the largest α, plus twice the "
    "standard error over "
    "repetitions",
    control=Control("the exponent 4 of α becomes 4.2", {"exponent": 4.2}),
)
def slow_tail(run: Run, exponent: float = 4.0) -> Evidence:
    """From a small random start the loss ends as α⁴ f(α² t): a tail whose clock slows down with α²,
    where a spectral start converges exponentially at the rate of the learned direction."""
    scales, clock = (0.1, 0.07, 0.05), 1.0
    problem = make_problem(run, "top")
    _, delta, _ = _rates(problem)
    horizons = 2 * clock / np.array(scales) ** 2
    _, seen = observe(run, "top", scales, horizons, TAIL_GRID, repetitions=run.pick(4, 30))
    losses, times = np.asarray(seen.losses), np.asarray(seen.times)[0]
    # All lanes share the grid of t α², so one index is one value of α² t.
    index = int(np.argmin(np.abs(times[0] * scales[0] ** 2 - clock)))
    slopes = _slopes(np.log(np.array(scales)), np.log(losses[:, :, index]))
    late = times[0] > times[0, -1] / 2
    tails = _slopes(np.log(times[0, late]), np.log(losses[:, 0, late]))

    def draw(ax):
        for j, scale in enumerate(scales):
            for i, row in enumerate(losses[:, j]):
                label = f"α = {scale:g}" if i == 0 else None
                ax.loglog(
                    times[j, 1:] * scale**2,
                    row[1:] / scale**4,
                    color=f"C{j}",
                    label=label,
                    linestyle=("-", "--", ":")[j],
                )
        ax.set(xlabel="α² t", ylabel="loss / (α⁴ initial loss)", ylim=(1e-4, 1e2))
        handles, labels = ax.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        ax.legend(unique.values(), unique.keys())

    return Evidence(
        measured={
            "exponent_of_alpha": float(slopes.mean()),
            "local_exponents_of_time": tails.tolist(),
        },
        predicted={"exponent_of_alpha": exponent},
        error=float(abs(slopes.mean() - exponent)),
        tolerance=float(
            scales[0] ** (2 * (1 - delta)) + 2 * slopes.std(ddof=1) / len(slopes) ** 0.5
        ),
        assumptions=(
            Assumption("all flows converged", bool(np.all(np.asarray(seen.status) == 0))),
        ),
        draw=draw,
        caption="Top principal component: in the clock α² t the tails of three scales "
        "fall together, "
        "repetition by repetition. Their exponents in t differ with the draw.",
    )


def _off_principal(problem: TwoLayer) -> float:
    """How far the shift's directions are from singular vectors of W2 and W1, relative."""
    u, _, vt = np.linalg.svd(np.asarray(problem.shift))
    w1, w2 = np.asarray(problem.w1), np.asarray(problem.w2)

    def rest(gram: np.ndarray, unit: np.ndarray) -> float:
        image = gram @ unit
        return float(np.linalg.norm(image - (unit @ image) * unit) / np.linalg.norm(image))

    return max(rest(w2 @ w2.T, u[:, 0]), rest(w1.T @ w1, vt[0]))


@claim(
    "xu2025.spectral_exponential",
    source=SOURCE,
    standing="reconstructed",
    tolerance="the relative residual at the start of the fit: so far are the factors that set the "
    "rate from their limit there, and the fit's slope moves by less",
    control=Control("the rate becomes 1.05 times that", {"factor": 1.05}),
)
def spectral_exponential(run: Run, factor: float = 1.0) -> Evidence:
    """From a small spectral start along a principal component the loss falls exponentially to
    1e-25, at twice the residual's decay rate ⟨R, JJᵀR⟩/‖R‖² of the converged factors.
    """
    rates, predicted, curves, lowest, moving, turned = {}, {}, [], [], [], []
    for kind in ("top", "bottom"):
        # Enough for 25 decades of the loss after escape at four times the growth rate.
        fast = _rates(make_problem(run, kind))[0]
        problem, seen = observe(
            run,
            kind,
            (1e-2,),
            (np.log(1e2) + 20.0) / fast,
            start="spectral",
            repetitions=1,
            rtol=1e-13,
        )
        times, losses = np.asarray(seen.times)[0, 0], np.asarray(seen.losses)[0, 0]
        fit = (losses < 1e-6) & (losses > 1e-23)
        moving.append(float(np.sqrt(losses[fit][0])))
        turned.append(_off_principal(problem))
        rates[kind] = float(-np.polyfit(times[fit], np.log(losses[fit]), 1)[0])
        predicted[kind] = float(2 * factor * seen.decay[0, 0])
        lowest.append(float(losses.min()))
        curves.append((kind, times, losses))
    _, generic = _late(run, "generic", (1e-2,), start="spectral")
    errors = [abs(rates[kind] / predicted[kind] - 1) for kind in rates]

    def draw(ax):
        for i, (kind, times, losses) in enumerate(curves):
            ax.semilogy(times, np.maximum(losses, 1e-32), color=f"C{i}", label=kind)
            mid = int(np.argmin(np.abs(np.log(np.maximum(losses, 1e-300)) - np.log(1e-12))))
            line = losses[mid] * np.exp(-predicted[kind] * (times - times[mid]))
            keep = (line < 1) & (line > 1e-28)
            ax.semilogy(times[keep], line[keep], "--", color="black")
        ax.set(xlabel="time [1/s]", ylabel="loss / initial loss", title="dashed: predicted rate")
        ax.legend()

    return Evidence(
        measured={
            **rates,
            "lowest_loss": max(lowest),
            "generic_target_loss_at_1000_growth_times": float(np.median(generic.losses[..., -1])),
        },
        predicted=predicted,
        error=float(max(errors)),
        tolerance=max(moving),
        assumptions=(
            Assumption(
                "u and v are singular vectors of W2 and W1 (principal component of Y_pre)",
                max(turned) < 1e-12,
                f"‖W2W2ᵀu − (uᵀW2W2ᵀu)u‖/‖W2W2ᵀu‖ and the same for v ≤ {max(turned):.1e}",
            ),
            Assumption("the loss reaches 1e-25", max(lowest) < 1e-25, f"{max(lowest):.1e}"),
        ),
        draw=draw,
        caption="Small spectral start, α = 1e-2. For a generic target the same start "
        "keeps a slow tail.",
    )


def _smaller_is_lower(
    run: Run, kinds: tuple[Target, ...], sign: float = 1.0, order: tuple[int, ...] = (0, 1, 2)
) -> Evidence:
    """Whether the median loss at 1000 growth times falls with every decade of α."""
    scales = (1e-1, 1e-2, 1e-3)
    medians, curves, wrong = {}, [], []
    for kind in kinds:
        _, seen = _late(run, kind, scales)
        losses = np.asarray(seen.losses)
        medians[kind] = np.median(losses[..., -1], axis=0)
        wrong.append(float(np.max(sign * np.diff(np.log10(medians[kind][list(order)])))))
        if kind == kinds[0]:
            for j, scale in enumerate(scales):
                curves.append((f"α = {scale:g}", np.asarray(seen.times)[0, j], losses[:, j]))
    return Evidence(
        measured={kind: values.tolist() for kind, values in medians.items()},
        predicted={},
        error=max(wrong),
        tolerance=0.0,
        draw=_draw_losses(curves),
        caption=f"{kinds[0].capitalize()} target, loss over time for three scales.",
    )


SMALLER_TOLERANCE = (
    "0: an order has no tolerance; the error is the largest change of log10 of the "
    "median loss from one "
    "scale to the next smaller one"
)


@claim(
    "xu2025.smaller_alpha_aligned",
    source=SOURCE,
    standing="stated",
    tolerance=SMALLER_TOLERANCE,
    control=Control("the order is reversed: smaller α, higher loss", {"sign": -1.0}),
)
def smaller_alpha_aligned(run: Run, sign: float = 1.0) -> Evidence:
    """For a target along the top or bottom principal component of Y_pre a smaller scale of a random
    start ends at a lower loss (median, at 1000 growth times)."""
    return _smaller_is_lower(run, ("top", "bottom"), sign)


@claim(
    "xu2025.smaller_alpha_generic",
    source=SOURCE,
    standing="reconstructed",
    tolerance=SMALLER_TOLERANCE,
    # The reversed order is what the simulation shows here, so it could not serve as the control.
    control=Control(
        "the scales are compared in cyclic order, 1e-2, 1e-3, 1e-1", {"order": (1, 2, 0)}
    ),
)
def smaller_alpha_generic(run: Run, order: tuple[int, ...] = (0, 1, 2)) -> Evidence:
    """For a target along random directions, too, a smaller scale of a random start ends at a lower
    loss (median, at 1000 growth times).
    """
    return _smaller_is_lower(run, ("generic",), order=order)
