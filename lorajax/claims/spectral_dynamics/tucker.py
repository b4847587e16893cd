"""Tucker-LoRA: `ΔT = G ×₁ U_1 ×₂ U_2 ×₃ U_3` fitted to a tensor by gradient flow.

The paper states that its matrix results carry over; the conserved quantities and the depth law are
derived (theory §3). Targets are orthogonally decomposable, 12×10×8, so that "mode" has a meaning.

Changed after a result was seen: `tucker_benign_rank` followed blind starts to a fixed time and was
refuted at 2 of 12 further seeds, whose last mode had not begun by then. It follows them to where
they end now, and each flow is judged by its own solver error.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lorajax import laws
from lorajax.claims.base import (
    Assumption,
    Control,
    Evidence,
    Run,
    claim,
)
from lorajax.claims.instances import solver_error, tight_flow
from lorajax.factors import TuckerFactors, unfold
from lorajax.flows import Path
from lorajax.initializers import hosvd, superdiagonal, tucker
from lorajax.problems import TuckerFactorization
from lorajax.spectra import hitting_times

SOURCE = "OpenReview gg2Wb2HPOI; theory §3"
SHAPE = (12, 10, 8)
SPECTRUM = (4.0, 2.0, 1.0)
RANKS = (3, 3, 3)
SUPERFLUOUS = 5
SCALE = 0.2
BLIND_SCALE, HORIZON = 0.5, 60.0
EPS = float(np.finfo(np.float64).eps)
SAVES = 801


def _problem(run: Run, modes: int = 3) -> TuckerFactorization:
    shape = (*SHAPE, 6)[:modes]
    return TuckerFactorization.from_spectrum(run.key(50), shape, SPECTRUM)


@jax.jit
def _along(problem: TuckerFactorization, path: TuckerFactors) -> Array:
    """The update along the target's directions over time, shape (t, k)."""
    return jax.vmap(problem.modes)(path)


@jax.jit
def _rates(problem: TuckerFactorization, path: TuckerFactors) -> tuple[Array, Array]:
    """The update along the target's directions, and how fast the flow's field changes it."""
    field = jax.tree.map(jnp.negative, jax.vmap(problem.gradient)(path))
    return jax.jvp(lambda x: _along(problem, x), (path,), (field,))


@jax.jit
def _drift(path: TuckerFactors, constant: Any) -> Array:
    """Largest change of U_iᵀU_i − G_(i)G_(i)ᵀ of each mode, relative to the size of its terms."""
    drifts = []
    for mode, u in enumerate(path.factors):
        core = jax.vmap(lambda g, mode=mode: unfold(g, mode))(path.core)
        law = functools.partial(laws.tucker_level, mode=mode, constant=constant)
        level = jax.vmap(law)(path)
        size = jnp.max(jnp.sum(u**2, (1, 2)) + jnp.sum(core**2, (1, 2)))
        drifts.append(jnp.linalg.norm(level - level[:1], axis=(1, 2)) / size)
    return jnp.stack(drifts)


def _flow(problem: TuckerFactorization, start: TuckerFactors, horizon: float) -> Path:
    """The flow of a start of any ranks up to `SUPERFLUOUS`, all by one compiled program.

    Zeros in the further columns of a factor and slices of the core: no gradient ever fills them.
    """
    wider = [SUPERFLUOUS - rank for rank in start.core.shape]
    padded = TuckerFactors(
        jnp.pad(start.core, [(0, more) for more in wider]),
        tuple(
            jnp.pad(u, ((0, 0), (0, more))) for u, more in zip(start.factors, wider, strict=True)
        ),
    )
    return tight_flow(problem, padded, np.linspace(0.0, horizon, SAVES))


@claim(
    "spectral_dynamics.tucker_conservation",
    source="theory §3",
    standing="derived",
    tolerance="solver error, 2 · steps · rtol; the terms are quadratic in the factors",
    control=Control("G_(i)G_(i)ᵀ is weighted by 1.05", {"constant": 1.05}),
)
def tucker_conservation(run: Run, constant: float = 1.0) -> Evidence:
    """Along the gradient flow of a Tucker update U_iᵀU_i − G_(i)G_(i)ᵀ stays constant for every
    mode i.
    """
    problem = _problem(run)
    keys = jax.random.split(run.key(51), 4)
    shapes = [(SUPERFLUOUS,) * 3, *((n, SUPERFLUOUS) for n in SHAPE)]
    core, *factors = [
        0.5 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)
    ]
    start = TuckerFactors(core, tuple(factors))
    path = run.once("tucker_generic", lambda: _flow(problem, start, 6.0))
    drift = np.asarray(_drift(path.core, constant))
    losses = np.asarray(path.losses / path.losses[0])

    def draw(ax):
        for mode in range(3):
            ax.semilogy(
                path.times[1:], np.maximum(drift[mode, 1:], 1e-18), label=f"mode {mode + 1}"
            )
        ax.semilogy(path.times, losses, "--", color="black", label="loss / initial loss")
        ax.set(xlabel="time [1/s^1.5]", ylabel="relative drift")
        ax.legend()

    worst = drift.max(axis=1)
    return Evidence(
        measured={f"mode_{i + 1}": float(x) for i, x in enumerate(worst)},
        predicted={f"mode_{i + 1}": 0.0 for i in range(3)},
        error=float(worst.max()),
        tolerance=solver_error(path),
        assumptions=(Assumption("the flow was integrated to its end", path.converged),),
        draw=draw,
        caption="U_iᵀU_i − G_(i)G_(i)ᵀ of all three modes while the loss falls, ranks (5, 5, 5).",
    )


def _aligned(run: Run, modes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Path]:
    """Times, singular values, their rates along the field, and the path of the aligned start."""
    problem = _problem(run, modes)
    horizon = 1.5 * float(laws.tucker_half_time(SPECTRUM[-1], SCALE, modes)) + 4.0
    start = superdiagonal(problem.target, len(SPECTRUM), SCALE)
    path = run.once(("tucker_aligned", modes), lambda: _flow(problem, start, horizon))
    values, rates = run.once(("tucker_rates", modes), lambda: _rates(problem, path.core))
    return np.asarray(path.times), np.asarray(values), np.asarray(rates), path


@claim(
    "spectral_dynamics.tucker_depth",
    source="theory §3",
    standing="derived",
    tolerance="solver error of a product of p + 1 factors, (p + 1) · steps · rtol, times the "
    "sensitivity to the start, 1 + (p − 1) · half-time · steepest rate, in units of λ_1",
    control=Control("the exponent 2 − 2/(p+1) becomes 1.05 times it", {"power": 1.05}),
)
def tucker_depth(run: Run, power: float = 1.0) -> Evidence:
    """Aligned, balanced modes of a Tucker update with p tensor modes obey
    σ̇ = (p + 1) σ^{2 − 2/(p+1)} (λ − σ), whose solution is a closed form of the time.
    """
    errors, bounds, shown = {}, [], {}
    s = np.array(SPECTRUM)
    for modes in run.pick((3,), (2, 3, 4)):
        times, values, rates, path = _aligned(run, modes)
        law = np.asarray(laws.tucker_mode(times[:, None], s[None], SCALE ** (modes + 1), modes))
        # Rounding may leave a mode that has not begun to grow on either side of 0.
        rate = np.asarray(laws.tucker_rate(np.abs(values), s[None], modes, power=power))
        steepest = rate.max(axis=0) / s
        errors[f"rate_p_{modes}"] = float((np.abs(rates - rate) / rate.max(axis=0)).max())
        errors[f"solution_p_{modes}"] = float((np.abs(values - law) / s).max())
        halves = np.asarray(laws.tucker_half_time(s, SCALE, modes))
        sensitivity = 1 + (modes - 1) * float((halves * steepest).max())
        bounds.append((modes + 1) / 2 * solver_error(path) * sensitivity)
        shown[modes] = values, rates, rate

    def draw(ax):
        values, rates, rate = shown[3]
        for i, value in enumerate(SPECTRUM):
            order = np.argsort(values[:, i])
            ax.plot(values[order, i], rates[order, i], color=f"C{i}", label=f"λ = {value:g}")
            ax.plot(values[order, i], rate[order, i], ":", color="black")
        ax.plot([], [], ":", color="black", label="depth law")
        ax.set(xlabel="σ", ylabel="dσ/dt")
        ax.legend()

    return Evidence(
        measured=errors,
        predicted=dict.fromkeys(errors, 0.0),
        error=max(errors.values()),
        tolerance=max(bounds),
        draw=draw,
        caption=f"Three tensor modes from aligned, balanced factors of scale {SCALE}: growth rates "
        "along the flow of all factors against the depth law. Rates are read off the field, so the "
        "comparison differentiates nothing numerically.",
    )


def _escape(path: Path, share: float = 0.9) -> float:
    """Time at which the loss first falls below a share of its start."""
    losses = path.losses / path.losses[0]
    return float(hitting_times(path.times, losses, share))


DELAY_SCALES = (0.1, 0.05, 0.025)


@claim(
    "spectral_dynamics.tucker_delay",
    source="theory §3",
    standing="derived",
    tolerance="order of the next term once a constant is eliminated, scale^{p−1} at the coarsest "
    "scale",
    control=Control("the exponent p − 1 becomes p − 0.9, 5 % more", {"order": 0.9}),
)
def tucker_delay(run: Run, order: float = 1.0) -> Evidence:
    """From a small blind start (core 0) a Tucker update escapes after a time that grows as a power
    of the scale, scale^{1−p}, where a matrix has its logarithm.
    """
    problem, modes = _problem(run), 3
    horizon, escapes, converged = 4.0 / DELAY_SCALES[0] ** (modes - 1), [], True
    for scale in DELAY_SCALES:
        start = tucker(run.key(52), SHAPE, RANKS, scale)
        path = run.once(
            ("tucker_blind", scale),
            lambda start=start, horizon=horizon: _flow(problem, start, horizon),
        )
        converged = converged and path.converged
        escapes.append(_escape(path))
        # The scales halve: what is left to find is how far beyond the power the next one comes.
        horizon = 1.2 * 2 ** (modes - 1) * escapes[-1]
    gaps = np.diff(escapes)
    exponent = float(np.log2(gaps[1] / gaps[0]))
    law = laws.tucker_delay_exponent(modes, order=order)
    scales = np.array(DELAY_SCALES)

    def draw(ax):
        ax.loglog(scales, escapes, "o", label="simulated")
        ax.loglog(scales, escapes[-1] * (scales / scales[-1]) ** -law, "--", label=f"a^−{law:g}")
        ax.set(xlabel="scale of the start a", ylabel="time of escape [1/s^1.5]")
        ax.legend()

    return Evidence(
        measured={"exponent": exponent, "escape_times": escapes},
        predicted={"exponent": law},
        error=abs(exponent - law),
        tolerance=DELAY_SCALES[0] ** (modes - 1),
        assumptions=(
            Assumption(
                "every flow was integrated to its end and escaped in time",
                converged and bool(np.all(np.isfinite(escapes))),
            ),
        ),
        draw=draw,
        caption="Escape times of three tensor modes from blind orthonormal factors, core 0. The "
        "exponent is that of their differences, free of a constant.",
    )


def _along_gradient(run: Run, rank: int = len(SPECTRUM)) -> tuple[TuckerFactorization, Path]:
    """The flow that starts along the gradient's directions, core 0, all ranks alike."""
    problem = _problem(run)
    start = hosvd(problem.target, (rank,) * 3, SCALE)
    return problem, run.once(("tucker_hosvd", rank), lambda: _flow(problem, start, HORIZON))


@claim(
    "spectral_dynamics.tucker_ordering",
    source=SOURCE,
    standing="stated",
    tolerance="0: an order has no tolerance; the error is the largest violation of it, in units of "
    "the time between neighbors",
    control=Control("the order is reversed: smallest first", {"sign": -1.0}),
)
def tucker_ordering(run: Run, sign: float = 1.0) -> Evidence:
    """Tucker-LoRA that starts along the gradient's directions (higher-order SVD, core 0) learns the
    modes one after the other, in decreasing order of λ_i.
    """
    problem, path = _along_gradient(run)
    values = _along(problem, path.core)
    half = np.asarray(hitting_times(path.times, values, jnp.array(SPECTRUM) / 2))
    gaps = np.diff(half)
    times = np.asarray(path.times)

    def draw(ax):
        for i, s in enumerate(SPECTRUM):
            ax.plot(times, np.asarray(values)[:, i], label=f"λ = {s:g}")
        ax.set(xlabel="time [1/s^1.5]", ylabel="singular value σ")
        ax.legend()

    return Evidence(
        measured={"half_times": half.tolist()},
        predicted={},
        error=float((-sign * gaps / np.abs(gaps)).max()),
        tolerance=0.0,
        assumptions=(
            Assumption("distinct λ_i", len(set(SPECTRUM)) == len(SPECTRUM), f"λ = {SPECTRUM}"),
            Assumption("every mode passes λ/2 in time", bool(np.isfinite(half).all())),
        ),
        draw=draw,
        caption=f"Factors along the gradient's directions with scale {SCALE}, core 0.",
    )


def _to_horizon(problem: TuckerFactorization, start: TuckerFactors) -> Path:
    return _flow(problem, start, HORIZON)


def _to_rest(problem: TuckerFactorization, start: TuckerFactors) -> Path:
    """The flow of a blind start to where it ends, which may take long: its last mode waits for a
    power of what the start has along it. A flow that never ends is followed for 1024 horizons.
    """
    horizon = HORIZON
    path = _flow(problem, start, horizon)
    while path.losses[-1] > solver_error(path) ** 2 * path.losses[0] and horizon < 1000 * HORIZON:
        horizon *= 4
        path = _flow(problem, start, horizon)
    return path


@claim(
    "spectral_dynamics.tucker_benign_rank",
    source=SOURCE,
    standing="stated",
    tolerance="solver error of a product of p + 1 factors, (p + 1) · steps · rtol, squared: "
    "relative to the loss",
    control=Control("one rank below the target's is among the ranks", {"below": 1}),
)
def tucker_benign_rank(run: Run, below: int = 0) -> Evidence:
    """Tucker-LoRA ends at zero loss for any ranks r_i ≥ r_i* along the gradient's directions, and
    for superfluous ranks from a blind start too: they do no harm.
    """
    problem, rank = _problem(run), len(SPECTRUM)
    paths = {
        f"along the gradient, rank {each}": _along_gradient(run, each)[1]
        for each in (rank - below, SUPERFLUOUS)
    }
    for each, follow in ((SUPERFLUOUS, _to_rest), (rank, _to_horizon)):
        start = tucker(run.key(53), SHAPE, (each,) * 3, BLIND_SCALE)
        paths[f"blind, rank {each}"] = run.once(
            ("tucker_rank", each), functools.partial(follow, problem, start)
        )
    curves = {name: np.asarray(path.losses / path.losses[0]) for name, path in paths.items()}
    final = {name: float(curve[-1]) for name, curve in curves.items()}
    # Without a column to spare a blind start may face a mode with next to nothing along it, whose
    # delay is the inverse of that: shown, but not part of the claim.
    slow = final.pop(f"blind, rank {rank}")
    allowed = {name: (2 * solver_error(paths[name])) ** 2 for name in final}
    worst = max(final, key=lambda name: final[name] / allowed[name])

    def draw(ax):
        for i, (name, curve) in enumerate(curves.items()):
            style = "-" if name in final else ":"
            times = np.asarray(paths[name].times)
            ax.loglog(times[1:], np.maximum(curve[1:], 1e-16), style, color=f"C{i}", label=name)
        ax.set(xlabel="time [1/s^1.5]", ylabel="loss / initial loss")
        ax.legend()

    return Evidence(
        measured={**final, f"blind, rank {rank}, not claimed": slow},
        predicted=dict.fromkeys(final, 0.0),
        error=final[worst],
        tolerance=allowed[worst],
        assumptions=(
            Assumption(
                "every flow was integrated to its end",
                all(paths[name].converged for name in final),
            ),
        ),
        draw=draw,
        caption=f"Target of ranks {RANKS}. Dotted: blind factors of no more than the target's "
        "ranks, whose last mode waits for a power of what little they have along it.",
    )


@claim(
    "spectral_dynamics.tucker_parameters",
    source=SOURCE,
    standing="stated",
    tolerance="solver error of a product of p + 1 factors, (p + 1) · steps · rtol, squared, and "
    "the rounding of a singular value decomposition: relative to the loss",
    control=Control("LoRA is allowed the target's rank", {"rank": len(SPECTRUM)}),
)
def tucker_parameters(run: Run, rank: int | None = None) -> Evidence:
    """Tucker-LoRA is the more parameter-efficient: with ∏ r_i + Σ n_i r_i parameters it fits a
    tensor that no LoRA of as many, r(m + n), on the matricized tensor can fit closer than
    ½ Σ_{i>r} λ_i².
    """
    problem, path = _along_gradient(run)
    budget = problem.parameters(RANKS)
    matrix = np.asarray(unfold(problem.target, 0))
    allowed = budget // sum(matrix.shape)
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    # Eckart–Young: the best that any training of any rank can reach.
    best = np.append(squares[::-1].cumsum()[::-1], 0.0) / squares.sum()
    law = float(np.sum(np.square(SPECTRUM[allowed:])) / np.sum(np.square(SPECTRUM)))
    tucker_loss = float(path.losses[-1] / path.losses[0])
    lora_loss = float(best[allowed if rank is None else rank])

    def draw(ax):
        counts = np.arange(1, 5)
        ax.plot(counts * sum(matrix.shape), best[counts], "o--", label="LoRA, best of rank 1 … 4")
        ax.plot([budget], [tucker_loss], "s", label=f"Tucker-LoRA of ranks {RANKS}, simulated")
        ax.set(xlabel="parameters", ylabel="loss / initial loss")
        ax.legend()

    return Evidence(
        measured={
            "parameters_tucker": float(budget),
            "loss_tucker": tucker_loss,
            "loss_lora": lora_loss,
            "parameters_lora_at_zero_loss": float(len(SPECTRUM) * sum(matrix.shape)),
        },
        predicted={"loss_tucker": 0.0, "loss_lora": law},
        error=max(tucker_loss, abs(lora_loss - law)),
        tolerance=(2 * solver_error(path)) ** 2 + EPS * max(matrix.shape),
        assumptions=(Assumption("the flow was integrated to its end", path.converged),),
        draw=draw,
        caption=f"A {SHAPE} tensor of ranks {RANKS} against its {matrix.shape} matricization.",
    )
