"""Claims of ALLoRA (Huang, Balestriero 2024, arXiv:2410.09692): rates that fall with the update."""

from typing import Any

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


@claim(
    "allora2024.frozen_time",
    source=SOURCE,
    standing="derived",
    tolerance="order of the next term of descent, step · fastest rate a² η, and of the "
    "interpolation, relative to the time",
    control=Control("1/√(ω + 1/η²) becomes 1/√(1.1 (ω + 1/η²)), 5 % slower", {"square": 1.1}),
)
def frozen_time(run: Run, square: float = 1.0) -> Evidence:
    """With A frozen (columns orthonormal times a) ALLoRA learns column j of the update by
    ω̇ = a²(s_j − ω)/√(ω + 1/η²), whose solution is a closed form of the time.
    """
    problem, start = _instance(run)
    count = run.pick(2000, 20000)
    step = HORIZON / count

    def freeze(updates: Any, _: Any) -> Any:
        return updates._replace(a=jnp.zeros_like(updates.a))

    optimizer = optax.chain(allora(step, ETA), optax.stateless(freeze))
    path = run.once(
        "allora_frozen",
        lambda: descend(problem, start, optimizer, count, learning_rate=step, every=count // 200),
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
    law = laws.allora_time(levels, goals[None, :], AMPLITUDE, ETA, square=square)
    law = np.asarray(law)
    error = np.abs(found - law) / law

    def draw(ax):
        for i, share in enumerate(shares):
            order = np.argsort(np.asarray(goals))
            ax.plot(np.asarray(goals)[order], found[i][order], "o", color=f"C{i}")
            ax.plot(
                np.asarray(goals)[order], law[i][order], "--", color=f"C{i}", label=f"{share:g} s"
            )
        ax.set(xlabel="size s of the column to learn", ylabel="time at which it is reached")
        ax.legend()

    fastest = AMPLITUDE**2 * ETA
    spacing = HORIZON / 200
    return Evidence(
        measured={"largest_relative_error": float(error.max())},
        predicted={"largest_relative_error": 0.0},
        error=float(error.max()),
        tolerance=step * fastest + (spacing * fastest) ** 2 / 8 / float(law.min() * fastest),
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
