"""How the loss ends: floors, tails, exponential convergence, and which scale ends lower."""

import jax
import jax.numpy as jnp
import numpy as np

from lorajax import laws
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim, standard_errors
from lorajax.claims.instances import SAVES
from lorajax.claims.xu2025.instances import (
    SOURCE,
    fit_slopes,
    growth,
    make_problem,
    observe,
)
from lorajax.problems import Target, TwoLayer

TAIL_GRID = np.concatenate([[0.0], np.geomspace(1e-3, 1.0, SAVES - 1)])


def _late(run: Run, kind: Target, scales, *, start: str = "small", reach=1000.0, target: int = 0):
    """Flows to a horizon of `reach` growth times, on a logarithmic grid."""
    fast = growth(make_problem(run, kind, target))[0]
    return observe(run, kind, scales, reach / fast, TAIL_GRID, start=start, target=target)


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
    tolerance="finite-scale order α^{2(1 − δ_w)} at the largest α, plus as many standard errors "
    "over repetitions (Student's t) as chance exceeds in 1 of 1000 cases (`claims.SAMPLING_RISK`)",
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
        slopes = fit_slopes(np.log(np.array(scales)), floors)
        measured[kind] = float(slopes.mean())
        errors.append(abs(slopes.mean() - exponent))
        many = standard_errors(2, len(slopes) - 1)
        sampling = many * slopes.std(ddof=1) / len(slopes) ** 0.5
        tolerances.append(scales[0] ** (2 * (1 - growth(problem)[1])) + sampling)
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
    tolerance="finite-scale order α^{2(1 − δ_w)} at the largest α, plus as many standard errors "
    "over repetitions (Student's t) as chance exceeds in 1 of 1000 cases (`claims.SAMPLING_RISK`)",
    control=Control("the exponent 4 of α becomes 4.2", {"exponent": 4.2}),
)
def slow_tail(run: Run, exponent: float = 4.0) -> Evidence:
    """From a small random start the loss ends as α⁴ f(α² t): a tail whose clock slows down with α²,
    where a spectral start converges exponentially at the rate of the learned direction."""
    scales, clock = (0.07, 0.05, 0.035), 1.0
    problem = make_problem(run, "top")
    _, delta, _ = growth(problem)
    horizons = 2 * clock / np.array(scales) ** 2
    _, seen = observe(run, "top", scales, horizons, TAIL_GRID, repetitions=run.pick(10, 30))
    losses, times = np.asarray(seen.losses), np.asarray(seen.times)[0]
    # All lanes share the grid of t α², so one index is one value of α² t.
    index = int(np.argmin(np.abs(times[0] * scales[0] ** 2 - clock)))
    slopes = fit_slopes(np.log(np.array(scales)), np.log(losses[:, :, index]))
    late = times[0] > times[0, -1] / 2
    tails = fit_slopes(np.log(times[0, late]), np.log(losses[:, 0, late]))

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
            scales[0] ** (2 * (1 - delta))
            + standard_errors(1, len(slopes) - 1) * slopes.std(ddof=1) / len(slopes) ** 0.5
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
    control=Control("the rate becomes 1.05 times that", {"constant": 2.1}),
)
def spectral_exponential(run: Run, constant: float = 2.0) -> Evidence:
    """From a small spectral start along a principal component the loss falls exponentially to
    1e-25, at twice the residual's decay rate ⟨R, JJᵀR⟩/‖R‖² of the converged factors.
    """
    rates, predicted, curves, lowest, moving, turned = {}, {}, [], [], [], []
    for kind in ("top", "bottom"):
        # Enough for 25 decades of the loss after escape at four times the growth rate.
        fast = growth(make_problem(run, kind))[0]
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
        end = jax.tree.map(lambda x: jnp.asarray(x[0, 0]), seen.last)
        predicted[kind] = float(laws.loss_decay(problem, end, constant=constant))
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


SMALLER = (1e-1, 1e-2, 1e-3)


def _change(losses: np.ndarray) -> float:
    """Largest change of log10 of the median loss from one scale to the next smaller one."""
    return float(np.max(np.diff(np.log10(np.median(losses[..., -1], axis=0)))))


def _draw_scales(seen):
    losses, times = np.asarray(seen.losses), np.asarray(seen.times)[0]
    return _draw_losses(
        [(f"α = {scale:g}", times[j], losses[:, j]) for j, scale in enumerate(SMALLER)]
    )


@claim(
    "xu2025.smaller_alpha_aligned",
    source=SOURCE,
    standing="reconstructed",
    tolerance="0: an order has no tolerance; the error is the largest change of log10 of the "
    "median loss from one scale to the next smaller one",
    control=Control("the order is reversed: smaller α, higher loss", {"sign": -1}),
)
def smaller_alpha_aligned(run: Run, sign: int = 1) -> Evidence:
    """For a target along the top or bottom principal component of Y_pre a smaller scale of a random
    start ends at a lower loss (median, at 1000 growth times)."""
    seen = {kind: _late(run, kind, SMALLER)[1] for kind in ("top", "bottom")}
    losses = {kind: np.asarray(each.losses) for kind, each in seen.items()}
    return Evidence(
        measured={kind: np.median(each[..., -1], axis=0).tolist() for kind, each in losses.items()},
        predicted={},
        error=max(_change(each[:, ::sign]) for each in losses.values()),
        tolerance=0.0,
        draw=_draw_scales(seen["top"]),
        caption="Top target, loss over time for three scales.",
    )


TARGETS = (12, 30)


@claim(
    "xu2025.smaller_alpha_generic",
    source=SOURCE,
    standing="reconstructed",
    tolerance="0: the error is the share of targets for which the statement fails. Where it fails "
    "for about half of all targets, twelve of them all agree with it at 2 seeds in 10 000",
    # The reversed order holds for some targets as well, so it is no less refuted.
    control=Control(
        "the scales are compared in cyclic order, 1e-2, 1e-3, 1e-1", {"order": (1, 2, 0)}
    ),
)
def smaller_alpha_generic(run: Run, order: tuple[int, ...] = (0, 1, 2)) -> Evidence:
    """For every target along random directions, too, a smaller scale of a random start ends at a
    lower loss (median, at 1000 growth times).
    """
    seen = [_late(run, "generic", SMALLER, target=each)[1] for each in range(run.pick(*TARGETS))]
    losses = [np.asarray(each.losses) for each in seen]
    changes = np.array([_change(each[:, list(order)]) for each in losses])
    return Evidence(
        measured={
            "changes": changes.tolist(),
            "first_target": np.median(losses[0][..., -1], axis=0).tolist(),
        },
        predicted={},
        error=float(np.mean(changes >= 0)),
        tolerance=0.0,
        draw=_draw_scales(seen[0]),
        caption="The first of the random targets, loss over time for three scales.",
    )
