"""Claims of Rushka, Klabjan 2026 (arXiv:2602.10212): the rank–accuracy trade-off."""

import jax.numpy as jnp
import numpy as np
import optax

from lorajax.claims.base import Control, Evidence, Run, claim
from lorajax.claims.instances import factorization, lora_start
from lorajax.flows import descend, sequential_descent


@claim(
    "rushka2026.sequential",
    source="Rushka, Klabjan 2026 (arXiv:2602.10212); theory §6",
    standing="reconstructed",
    tolerance="order of the next term: step · s_1 at the coarsest step of the fit",
    control=Control("the exponent 1 becomes 1.05", {"exponent": 1.05}),
)
def sequential(run: Run, exponent: float = 1.0) -> Evidence:
    """Updating A and B in turn has the same gradient flow as updating both at once: at fixed time
    the two descents differ in proportion to the step.
    """
    problem, start = factorization(run), lora_start(run, 0.05, index=40)
    horizon, counts = 2.0, [400, 800, 1600, 3200]

    def simulate():
        gaps = []
        for count in counts:
            step = horizon / count
            both = descend(problem, start, optax.sgd(step), count, learning_rate=step, every=count)
            turns = sequential_descent(problem, start, step, count, every=count)
            gap = both.factors.product[-1] - turns.factors.product[-1]
            gaps.append(float(jnp.linalg.norm(gap)))
        return np.array(gaps)

    gaps = run.once("sequential", simulate)
    steps = horizon / np.array(counts)
    slope = float(np.polyfit(np.log(steps), np.log(gaps), 1)[0])

    def draw(ax):
        ax.loglog(steps, gaps, "o", label="simulated")
        ax.loglog(
            steps, gaps[-1] * (steps / steps[-1]) ** exponent, "--", label=f"step^{exponent:g}"
        )
        ax.set(xlabel="step [1/s]", ylabel=f"‖difference of AB‖ at t = {horizon:g}")
        ax.legend()

    return Evidence(
        measured={"exponent": slope},
        predicted={"exponent": exponent},
        error=abs(slope - exponent),
        tolerance=float(steps[0] * problem.singular_values[0]),
        draw=draw,
        caption="The gap between sequential and simultaneous descent closes with the step.",
    )
