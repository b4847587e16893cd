"""Claims of ALLoRA (Huang, Balestriero 2024, arXiv:2410.09692): rates that fall with the update."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorajax import laws
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim
from lorajax.factors import Factors, column_norms
from lorajax.flows import allora, descend
from lorajax.initializers import orthogonal
from lorajax.problems import MatrixFactorization
from lorajax.spectra import hitting_times, imbalance_drift

SOURCE = "ALLoRA: Huang, Balestriero 2024 (arXiv:2410.09692); theory §7"
SHAPE, SPECTRUM, RANK, AMPLITUDE, ETA = (16, 12), (4.0, 2.0, 1.0), 4, 0.8, 4.0
HORIZON = 4.0


def _instance(run: Run) -> tuple[MatrixFactorization, Factors]:
    problem = MatrixFactorization.from_spectrum(run.key(80), SHAPE, SPECTRUM)
    return problem, orthogonal(run.key(81), SHAPE, RANK, AMPLITUDE)


@jax.jit
def _rates(value, s, square):
    """The law's time to ω, ln(f(0)/f(ω)) and |f'(0)|, f being ω̇ as a function of ω."""

    def law(w, top):
        return laws.allora_time(w, top, AMPLITUDE, ETA, square=square)

    def one(w, top):
        slowness = jax.grad(law)
        first, bend = jax.value_and_grad(lambda x: 1 / slowness(x, top))(jnp.zeros_like(w))
        return law(w, top), jnp.log(first * slowness(w, top)), jnp.abs(bend)

    return jax.vmap(one)(value, s)


def _time_of_descent(value, s, step: float, spacing: float, square: float):
    """Times at which descent reaches ω, by the law, and how far they may be off.

    Euler's steps of length h for ω̇ = f(ω) follow ω̇ = f − ½ h f f' + (h²/12)(f f'' + 4 f'²) f + …
    (backward error analysis), so that the time to ω is ∫dω/f + ½ h ln(f(ω)/f(0)) and a term of
    (h²/12)[f'(ω) − f'(0) + ∫f'²/f dω] in size. |f'| is largest at 0, so where ln(f(0)/f(ω)) > 1/5,
    as at all levels here, that is below ½ h² |f'(0)| ln(f(0)/f(ω)). A chord of a curve of second
    derivative f f' is off by Δ²|f f'|/8 at most, a time by 1/f of that.
    """
    value, s = jnp.broadcast_arrays(value, s)
    flat = _rates(value.ravel(), s.ravel(), jnp.asarray(square))
    time, ahead, bend = (np.asarray(x).reshape(value.shape) for x in flat)
    return time - step * ahead / 2, bend * (step**2 * ahead / 2 + spacing**2 / 8)


@claim(
    "allora2024.frozen_time",
    source=SOURCE,
    standing="derived",
    tolerance="the next term of descent's delay, ½ h² |ω̇'(0)| ln(ω̇(0)/ω̇(ω)), and of the "
    "interpolation between saved times Δ apart, Δ² |ω̇'(0)|/8, relative to the time",
    control=Control("1/√(ω + 1/η²) becomes 1/√(1.1 (ω + 1/η²)), 5 % slower", {"square": 1.1}),
)
def frozen_time(run: Run, square: float = 1.0) -> Evidence:
    """With A frozen (columns orthonormal times a) ALLoRA learns column j of the update by
    ω̇ = a²(s_j − ω)/√(ω + 1/η²), whose solution is a closed form of the time. Descent of step h
    arrives earlier by ½ h ln(ω̇(0)/ω̇(ω)), which the prediction allows for.
    """
    problem, start = _instance(run)
    count = run.pick(2000, 20000)
    step, every = HORIZON / count, count // 2000

    def freeze(updates: Any, _: Any) -> Any:
        return updates._replace(a=jnp.zeros_like(updates.a))

    optimizer = optax.chain(allora(step, ETA), optax.stateless(freeze))
    path = run.once(
        "allora_frozen",
        lambda: descend(problem, start, optimizer, count, learning_rate=step, every=every),
    )
    columns = column_norms(path.core)
    # Only what lies in A's span can be learned.
    frame = start.a / AMPLITUDE
    goals = jnp.linalg.norm(frame.T @ problem.target, axis=0)
    shares = (0.25, 0.5, 0.75)
    found = np.stack(
        [np.asarray(hitting_times(path.times, columns, share * goals)) for share in shares]
    )
    levels = jnp.array(shares)[:, None] * goals[None, :]
    law, allowed = _time_of_descent(levels, goals[None, :], step, every * step, square)
    error, tolerance = np.abs(found - law) / law, allowed / law
    worst = np.unravel_index(np.argmax(error / tolerance), error.shape)

    def draw(ax):
        for i, share in enumerate(shares):
            order = np.argsort(np.asarray(goals))
            ax.plot(np.asarray(goals)[order], found[i][order], "o", color=f"C{i}")
            ax.plot(
                np.asarray(goals)[order], law[i][order], "--", color=f"C{i}", label=f"{share:g} s"
            )
        ax.set(xlabel="size s of the column to learn", ylabel="time (rate × steps)")
        ax.legend()

    return Evidence(
        measured={"largest_relative_error": float(error.max())},
        predicted={"largest_relative_error": 0.0},
        error=float(error[worst]),
        tolerance=float(tolerance[worst]),
        assumptions=(
            Assumption("every column reaches its levels in time", bool(np.isfinite(found).all())),
        ),
        draw=draw,
        caption="Larger columns take longer: the rate falls with what is learned. Dots: descent "
        "through optax; lines: closed form.",
    )


@claim(
    "allora2024.breaks_conservation",
    source="theory §1",
    standing="derived",
    tolerance="order of the next term, step · s_1 · η at the coarsest step",
    control=Control("plain gradient descent, whose drift vanishes with the step", {"plain": True}),
)
def breaks_conservation(run: Run, plain: bool = False) -> Evidence:
    """ALLoRA breaks the conservation of AᵀA − BBᵀ: at fixed time the drift tends to a constant as
    the step goes to 0, where gradient descent's is of the order of the step.
    """
    problem, start = _instance(run)
    counts = (400, 1600)
    rate = 1.0 / np.array(counts)

    def measure(count: int, rule: str) -> float:
        step = 1.0 / count
        optimizer = optax.sgd(step) if rule == "plain" else allora(step, ETA)
        path = descend(problem, start, optimizer, count, learning_rate=step, every=count)
        return float(imbalance_drift(path))

    drifts = {
        rule: run.once(
            ("allora_drift", rule), lambda rule=rule: [measure(count, rule) for count in counts]
        )
        for rule in (("plain",) if plain else ("ALLoRA", "plain"))
    }
    tested = np.array(drifts["plain" if plain else "ALLoRA"])
    slope = float(np.diff(np.log(tested))[0] / np.diff(np.log(rate))[0])

    def draw(ax):
        for rule, values in drifts.items():
            ax.loglog(rate, values, "o--", label=rule)
        ax.set(xlabel="step [1/s]", ylabel="relative drift of Λ at t = 1")
        ax.legend()

    return Evidence(
        measured={"exponent": slope, "drift": tested.tolist()},
        predicted={"exponent": 0.0},
        error=abs(slope),
        tolerance=float(SPECTRUM[0] * ETA * rate[0]),
        draw=draw,
        caption=f"η = {ETA:g}; the imbalance of ALLoRA's flow is not conserved.",
    )
