"""The laws of single modes, of several modes, and of directions without a target (theory §2)."""

import jax.numpy as jnp
import numpy as np

from lorajax import laws
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim
from lorajax.claims.instances import (
    SHAPE,
    factorization,
    log_times,
    lora_start,
    solver_error,
    tight_flow,
    until,
)
from lorajax.factors import Factors
from lorajax.flows import gradient_flow
from lorajax.initializers import lora, small, spectral
from lorajax.problems import DiagonalFactorization
from lorajax.spectra import hitting_times, singular_values


def _one_mode(run: Run, name: str, s: float, a: float, b: float, times):
    """A single aligned mode, integrated."""
    start = Factors(jnp.full((1, 1), a), jnp.full((1, 1), b))
    problem = DiagonalFactorization(jnp.array([s]), (1, 1))
    path = run.once((name, s, a, b), lambda: tight_flow(problem, start, times))
    return path, np.asarray(path.core.product[:, 0, 0])


def _draw_modes(times, simulated, law, names, law_name):
    def draw(ax):
        for i, (curve, prediction, name) in enumerate(zip(simulated.T, law.T, names, strict=True)):
            ax.plot(times, curve, color=f"C{i}", label=f"{name}, simulated")
            ax.plot(times, prediction, "--", color="black", label=law_name if i == 0 else None)
        ax.set(xlabel="time [1/s]", ylabel="singular value of AB")
        ax.legend()

    return draw


@claim(
    "gradient_flow.lora_mode",
    source="theory §2.2",
    standing="derived",
    tolerance="solver error, 2 · steps · rtol",
    control=Control("a² becomes 1.05 a² in the law", {"square": 1.05}),
)
def lora_mode(run: Run, square: float = 1.0) -> Evidence:
    """A mode of LoRA's default start (B = 0) follows a closed form at every scale, lazy to rich."""
    s, scales = 2.0, [3.0, 1.0, 1e-1, 1e-3, 1e-6]
    times = until(12.0)
    curves, predictions, bound = [], [], 0.0
    for a in scales:
        path, curve = _one_mode(run, "lora_mode", s, a, 0.0, times)
        curves.append(curve)
        predictions.append(np.asarray(laws.lora_mode(times, s, a, square=square)))
        bound = max(bound, solver_error(path))
    simulated, law = np.stack(curves, 1), np.stack(predictions, 1)
    errors = np.abs(simulated - law).max(0) / s
    return Evidence(
        measured={f"sup_error_at_{a:g}": float(e) for a, e in zip(scales, errors, strict=True)},
        predicted={f"sup_error_at_{a:g}": 0.0 for a in scales},
        error=float(errors.max()),
        tolerance=bound,
        draw=_draw_modes(times, simulated, law, [f"a = {a:g}" for a in scales], "closed form"),
        caption="One mode, s = 2, from the lazy (a = 3) to the rich regime (a = 1e-6).",
    )


@claim(
    "gradient_flow.logistic",
    source="theory §2.2; Saxe et al. 2014 (arXiv:1312.6120)",
    standing="derived",
    tolerance="solver error, 2 · steps · rtol, relative to s_1",
    control=Control("the rate 2s becomes 2.1 s", {"rate": 2.1}),
)
def logistic(run: Run, rate: float = 2.0) -> Evidence:
    """From a balanced start along the target's singular vectors (spectral initialization) every
    mode follows its own logistic curve."""
    problem = factorization(run)
    start = spectral(problem.target, 3, scale=1e-2)
    times = until(10.0)
    path = run.once("logistic", lambda: tight_flow(problem, start, times))
    simulated = np.asarray(singular_values(path))
    s = np.asarray(problem.singular_values)
    law = np.asarray(laws.logistic(times[:, None], s[None], 1e-4, rate=rate))
    errors = np.abs(simulated - law).max(0)
    return Evidence(
        measured={"sup_error": errors.tolist()},
        predicted={"sup_error": [0.0] * 3},
        error=float(errors.max() / s[0]),
        tolerance=solver_error(path),
        draw=_draw_modes(times, simulated, law, [f"s = {x:g}" for x in s], "logistic law"),
        caption="Spectral initialization at scale 1e-2, 60×40.",
    )


@claim(
    "gradient_flow.lazy_limit",
    source="theory §2.2",
    standing="derived",
    tolerance="order of the next term: √(1 + 4x²) = 1 + 2x² − 2x⁴ with x = σ/a², so "
    "the exponent 4 is "
    "off by the share x² ≤ s²/a⁴ at the smallest a of the fit; plus the solver error's "
    "share of the "
    "smallest remainder",
    control=Control("the limit's rate a² becomes 1.05 a²", {"rate": 1.05}),
)
def lazy_limit(run: Run, rate: float = 1.0) -> Evidence:
    """For a² ≫ s a mode tends to the lazy law s(1 − e^{−a²t}), the remainder falling as a^{−4}."""
    s, scales, rtol = 1.0, [6.0, 8.0, 12.0, 16.0], 1e-13
    problem = DiagonalFactorization(jnp.array([s]), (1, 1))
    remainders, bound = [], 0.0
    for a in scales:
        # Times in units of the lazy relaxation, the same for all a.
        times = until(12.0) / a**2
        start = Factors(jnp.full((1, 1), a), jnp.zeros((1, 1)))
        path = run.once(
            ("lazy", a),
            lambda start=start, times=times: gradient_flow(problem, start, times, rtol=rtol),
        )
        curve = np.asarray(path.core.product[:, 0, 0])
        # The tolerance follows the larger factor A, so that B ~ s/a is resolved to rtol · a.
        bound = max(bound, solver_error(path, rtol=rtol) * a**2 / s)
        remainders.append(np.abs(curve - np.asarray(laws.lazy(times, s, a, rate=rate))).max() / s)
    slope = float(np.polyfit(np.log(scales), np.log(remainders), 1)[0])

    def draw(ax):
        a = np.array(scales)
        ax.loglog(a, remainders, "o", label="sup |σ − lazy law| / s")
        ax.loglog(a, remainders[-1] * (a / a[-1]) ** -4, "--", label="a⁻⁴")
        ax.set(xlabel="amplitude a [√s]", ylabel="remainder")
        ax.legend()

    return Evidence(
        measured={"exponent": slope, "remainder": [float(x) for x in remainders]},
        predicted={"exponent": -4.0},
        error=abs(slope + 4.0),
        tolerance=4.0 * s**2 / scales[0] ** 4 + bound / min(remainders),
        draw=draw,
        caption="Far in the lazy regime the mode relaxes exponentially at rate a².",
    )


def _deflation_order(amplitudes, s) -> float:
    """What is left of mode i in the factors when mode i − 1 saturates: (a²/4s)^{1 − s_{i+1}/s_i}.

    Mode i takes ln(4s_i/a_i²)/(2s_i) to saturate; the next one has then grown by e^{s_{i+1}t}, to
    that fraction of √s: the error of treating it as still untouched.
    """
    small_parameter = amplitudes**2 / (4 * s)
    return float((small_parameter[:-1] ** (1 - s[1:] / s[:-1])).max())


@claim(
    "gradient_flow.multi_mode",
    source="theory §2.3",
    standing="derived",
    tolerance="solver error, 2 · steps · rtol, as a share of the least sup error, over the "
    "logarithm of the orders' range. The order's constant depends on the draw and drops out: "
    "starts of one draw differ in scale alone, and further terms fall faster",
    control=Control("a² becomes 1.05 a² in the law of each mode", {"square": 1.05}),
)
def multi_mode(run: Run, square: float = 1.0, deflate: bool = True) -> Evidence:
    """From a small LoRA start each mode follows the single-mode law of its deflated amplitude
    |R_ii|, AᵀU = QR, the better the smaller the start: in every draw the sup error falls at least
    as max_i (a_i²/4s_i)^{1 − s_{i+1}/s_i}, the share of the next mode when a mode saturates.
    """
    problem = factorization(run)
    times = until(22.0)
    s = np.asarray(problem.singular_values)
    stds = [1e-2, 1e-3, 1e-4]
    draws = run.pick(3, 20)
    errors, orders, shown = np.zeros((draws, len(stds))), np.zeros((draws, len(stds))), None
    bound = 0.0
    for i in range(draws):
        for j, std in enumerate(stds):
            start = lora_start(run, std, index=100 + i)
            path = run.once(
                ("multi_mode", std, i), lambda start=start: tight_flow(problem, start, times)
            )
            simulated = np.asarray(singular_values(path))[:, :3]
            law = laws.lora_modes(
                problem, start, jnp.asarray(times), deflate=deflate, square=square
            )
            law = np.asarray(law)
            orders[i, j] = _deflation_order(np.asarray(laws.deflated_amplitudes(problem, start)), s)
            errors[i, j] = (np.abs(simulated - law) / s).max()
            bound = max(bound, solver_error(path))
            shown = (simulated, law) if (i, j) == (0, 0) else shown
    x, y = np.log(orders), np.log(errors)
    exponents = (y[:, 0] - y[:, -1]) / (x[:, 0] - x[:, -1])
    assert shown is not None
    return Evidence(
        measured={
            "sup_error": errors.max(0).tolist(),
            "finite_scale_order": orders.max(0).tolist(),
            "exponents": exponents.tolist(),
        },
        predicted={"least_exponent": 1.0},
        error=float(max(1.0 - exponents.min(), 0.0)),
        tolerance=float(bound / errors.min() / (x[:, 0] - x[:, -1]).min()),
        draw=_draw_modes(times, *shown, [f"s = {x:g}" for x in s], "deflated law"),
        caption=f"LoRA start with std {stds[0]:g}, 60×40, rank 5: one law a mode.",
    )


@claim(
    "gradient_flow.half_times",
    source="theory §2.2, §2.3",
    standing="derived",
    tolerance="the finite-scale order of the multi-mode law times the draw's own constant, "
    "which is read off at the largest scale, plus solver error, over the slope ½ s per unit time; "
    "starts of one draw differ in scale alone. A wrong law's error grows with ln(1/scale) instead",
    control=Control("ln(4s/a²)/(2s) becomes 1.05 times that", {"slope": 0.525}),
)
def half_times(run: Run, slope: float = 0.5) -> Evidence:
    """From a small LoRA start mode i reaches s_i/2 at ln(4s_i/a_i²)/(2s_i), a_i deflated."""
    problem = factorization(run)
    times = until(30.0)
    s = np.asarray(problem.singular_values)
    stds = [1e-3, 1e-5, 1e-7]
    measured, predicted, orders, bounds = [], [], [], []
    for std in stds:
        start = lora_start(run, std, index=7)
        path = run.once(("half_times", std), lambda start=start: tight_flow(problem, start, times))
        share = singular_values(path)[:, :3] / problem.singular_values[None, :]
        # In the logit a logistic mode is a straight line, which interpolation does not bend.
        share = jnp.clip(share, 1e-300, 1 - 1e-15)
        logit = jnp.log(share / (1 - share))
        measured.append(np.asarray(hitting_times(path.times, logit, 0.0)))
        amplitudes = laws.deflated_amplitudes(problem, start)
        predicted.append(np.asarray(laws.half_time(s, amplitudes, slope=slope)))
        orders.append(_deflation_order(np.asarray(amplitudes), s))
        bounds.append(solver_error(path))
    found, law = np.array(measured), np.array(predicted)
    # σ moves by s²/2 per unit time at its midpoint, so an error ε s of σ moves the time by 2ε/s.
    shift = np.abs(found - law) * s / 2
    constant = shift[0].max() / orders[0]
    allowed = constant * np.array(orders[1:]) + np.array(bounds[1:])
    ratio = float((shift[1:].max(axis=1) / allowed).max())

    def draw(ax):
        for i, value in enumerate(s):
            ax.semilogx(stds, found[:, i], "o", color=f"C{i}", label=f"s = {value:g}, simulated")
            ax.semilogx(stds, law[:, i], "--", color=f"C{i}")
        ax.set(xlabel="std of A", ylabel="half-time [1/s]", title="dashed: ln(4s/a²)/(2s)")
        ax.legend()

    return Evidence(
        measured={
            "half_times": found.ravel().tolist(),
            "largest_ratio": ratio,
            "constant": float(constant),
        },
        predicted={"half_times": law.ravel().tolist()},
        error=ratio,
        tolerance=1.0,
        assumptions=(
            Assumption("every mode passes s/2 within the horizon", bool(np.isfinite(found).all())),
        ),
        draw=draw,
        caption="Half-times grow with the logarithm of the scale, the slower the smaller s.",
    )


@claim(
    "gradient_flow.superfluous_lora",
    source="theory §2.4",
    standing="derived",
    tolerance="rounding of the observable: r · eps · s_1 of a backward-stable SVD, plus its "
    "accumulation over the steps",
    control=Control(
        "B starts at 5 % of A's scale instead of 0, the assumption broken", {"b_scale": 0.05}
    ),
)
def superfluous_lora(run: Run, b_scale: float = 0.0) -> Evidence:
    """With B = 0 and r > k the extra singular values of AB stay exactly 0."""
    problem = factorization(run)
    times = until(20.0)
    start = lora_start(run, 0.05, rank=6, index=8)
    noise = small(run.key(9), SHAPE, 6, 0.05 * SHAPE[0] ** 0.5).b
    path = run.once(
        ("superfluous_lora", b_scale),
        lambda: tight_flow(problem, Factors(start.a, b_scale * noise), times),
    )
    values = np.asarray(singular_values(path))
    extra = float(values[:, 3:].max())

    def draw(ax):
        shown = np.maximum(values, 1e-18)
        ax.semilogy(times, shown[:, :3], color="C0")
        ax.semilogy(times, shown[:, 3:], color="C3")
        ax.plot([], color="C0", label="modes of the target")
        ax.plot([], color="C3", label="extra modes")
        ax.set(xlabel="time [1/s]", ylabel="singular value of AB")
        ax.legend()

    eps = float(np.finfo(np.float64).eps)
    return Evidence(
        measured={"largest_extra_value": extra},
        predicted={"largest_extra_value": 0.0},
        error=extra,
        tolerance=eps * 4.0 * (6 + int(path.steps)),
        draw=draw,
        caption="Target of rank 3, adapter of rank 6, B = 0 at the start.",
    )


@claim(
    "gradient_flow.superfluous_balanced",
    source="theory §2.4",
    standing="derived",
    tolerance="solver error, 2 · steps · rtol, relative to m0",
    control=Control("m0/(1 + 2 m0 t) becomes m0/(1 + 2.1 m0 t)", {"rate": 2.1}),
)
def superfluous_balanced(run: Run, rate: float = 2.0) -> Evidence:
    """A direction without a target decays as m0/(1 + 2 m0 t) when balanced, faster when not."""
    times = log_times(1e-2, 1e3)
    cases = {"balanced": (0.4, 0.4), "λ = 0.12": (0.4, 0.2)}
    problem = DiagonalFactorization(jnp.array([1.0]), (2, 2))
    errors, curves, bound = {}, {}, 0.0
    for name, (a, b) in cases.items():
        start = Factors(jnp.diag(jnp.array([0.1, a])), jnp.diag(jnp.array([0.1, b])))
        path = run.once(
            ("superfluous_balanced", name), lambda start=start: tight_flow(problem, start, times)
        )
        curve = np.asarray(path.core.product[:, 1, 1])
        law = np.asarray(laws.superfluous(times, a * b, a**2 - b**2, rate=rate))
        errors[name], curves[name] = float(np.abs(curve - law).max() / (a * b)), (curve, law)
        bound = max(bound, solver_error(path))

    def draw(ax):
        for i, (name, (curve, law)) in enumerate(curves.items()):
            keep = (curve > 1e-12) & (times > 0)
            ax.loglog(times[keep], curve[keep], color=f"C{i}", label=name)
            ax.loglog(times[keep], law[keep], "--", color="black", label="law" if i == 0 else None)
        ax.set(xlabel="time [1/s]", ylabel="singular value")
        ax.legend()

    return Evidence(
        measured=errors,
        predicted=dict.fromkeys(errors, 0.0),
        error=max(errors.values()),
        tolerance=bound,
        draw=draw,
        caption="Extra directions die algebraically when balanced, exponentially when not.",
    )


@claim(
    "gradient_flow.loss_tail",
    source="theory §2.4",
    standing="derived",
    tolerance="distance from the asymptote: the local exponent is −2 · 2mt/(1 + 2mt), off by "
    "2/(1 + 2 m t) with m the smallest extra mode at the start of the fit",
    control=Control("the tail's exponent −2 becomes −2.1", {"exponent": -2.1}),
)
def loss_tail(run: Run, exponent: float = -2.0) -> Evidence:
    """With both factors random and r > k the loss ends in an algebraic tail t^{−2}, not an
    exponential one."""
    problem = factorization(run)
    rank, scale = 6, 0.5
    times = log_times(1.0, 1e4)
    start = run.once("loss_tail_start", lambda: _balanced_extra(run, problem, rank, scale))
    path = run.once(
        "loss_tail",
        lambda: gradient_flow(problem, start, times, rtol=1e-8),
    )
    losses = np.asarray(path.losses)
    late = times > 1e3
    slope = float(np.polyfit(np.log(times[late]), np.log(losses[late]), 1)[0])
    smallest = float(np.asarray(singular_values(path))[late][0, 3:].min())
    bound = 2 / (1 + 2 * scale**2 * times[late][0])

    def draw(ax):
        ax.loglog(times[1:], losses[1:], label="loss")
        tail = losses[-1] * (times[late] / times[-1]) ** exponent
        ax.loglog(times[late], tail, "--", color="black", label=f"t^{exponent:g}")
        ax.set(xlabel="time [1/s]", ylabel="loss")
        ax.legend()

    return Evidence(
        measured={"exponent": slope, "extra_mode_at_start_of_fit": smallest},
        predicted={"exponent": exponent},
        error=abs(slope - exponent),
        tolerance=bound,
        draw=draw,
        caption="Rank 6 on a target of rank 3, both factors random (balanced) at scale 0.5.",
    )


def _balanced_extra(run: Run, problem, rank: int, scale: float) -> Factors:
    """Aligned modes on the target and balanced random extra directions across it."""
    start = lora(run.key(10), SHAPE, rank, scale)
    reference = lora(run.key(11), (SHAPE[1], SHAPE[0]), rank, scale)

    def across(frame, factor):
        rest = factor - frame @ (frame.T @ factor)
        return jnp.linalg.qr(rest)[0]

    k = problem.rank
    a = jnp.concatenate([problem.u, across(problem.u, start.a)[:, : rank - k]], axis=1)
    b = jnp.concatenate([problem.v, across(problem.v, reference.a)[:, : rank - k]], axis=1)
    return Factors(scale * a, scale * b.T)
