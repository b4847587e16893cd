"""Claims of Zhang et al. 2025 (arXiv:2501.16265): in-context learning by linear attention.

Rank-one heads on the population loss, from small random heads. The formula of the plateaus is
recalled; that the flow rests there, and for how long, is simulated.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lorajax import laws
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim
from lorajax.claims.instances import tight_flow
from lorajax.problems import AttentionHeads, LinearAttention

SOURCE = "Zhang et al. 2025 (arXiv:2501.16265); theory §7"
EIGENVALUES, CONTEXT, HEADS, SCALE = (1.0, 0.7, 0.45), 8.0, 4, 0.01
HORIZON, SAVES = 3000.0, 1501
ROUNDING = 16 * float(np.finfo(np.float64).eps) * sum(EIGENVALUES)


@jax.jit
def _speeds(problem: LinearAttention, path: AttentionHeads):
    """Losses, speeds ‖∇L‖² and M's diagonal along a path."""
    gradients = jax.vmap(problem.gradient)(path)
    squares = [jnp.sum(x.reshape(x.shape[0], -1) ** 2, 1) for x in jax.tree.leaves(gradients)]
    diagonal = jax.vmap(jnp.diagonal)(path.product)
    return jax.vmap(problem.loss)(path), sum(squares[1:], squares[0]), diagonal


@claim(
    "linear_attention2025.plateaus",
    source=SOURCE,
    standing="recalled",
    tolerance="1: each plateau in units of how far from a saddle the loss can be where the flow is "
    "slowest, ⅓ ‖∇L‖ ‖unlearned heads‖ (Euler, the growth is cubic) + ½ ‖∇L‖²/μ, μ the weakest "
    "curvature of a learned head, plus rounding",
    control=Control("tr Λ becomes 1.05 tr Λ within the brackets", {"trace": 1.05}),
)
def plateaus(run: Run, trace: float = 1.0) -> Evidence:
    """Linear attention with rank-one heads learns in context one principal component after the
    other: its loss rests at d + 1 plateaus, tr Λ − Σ_{i≤m} λ_i [1 + (1 + tr Λ/λ_i)/N]^{−1}.
    """
    values = jnp.array(EIGENVALUES)
    problem = LinearAttention(values, jnp.asarray(CONTEXT))
    start = problem.start(run.key(95), HEADS, SCALE)
    path = run.once(
        "plateaus", lambda: tight_flow(problem, start, np.linspace(0.0, HORIZON, SAVES))
    )
    losses, speeds, diagonal = (np.asarray(x) for x in _speeds(problem, path.core))
    count = len(EIGENVALUES)
    learned = np.sum(diagonal > 0.5 * np.asarray(problem.optimum), axis=1)
    law = np.asarray(laws.attention_plateaus(problem, trace=trace))
    strength = np.asarray(problem.optimum) ** (4 / 3)
    moments = np.asarray(problem.second_moments)
    found, tolerances, places = [], [], []
    for m in range(count + 1):
        window = np.nonzero(learned == m)[0]
        if not len(window):
            continue
        at = window[np.argmin(speeds[window])]
        heads = jax.tree.map(lambda x, at=at: np.asarray(x[at]), path.core)
        sizes = np.sort(np.sqrt(heads.value**2 + (heads.key**2 + heads.query**2).sum(1)))
        idle = float(np.linalg.norm(sizes[: HEADS - m]))
        speed = float(np.sqrt(speeds[at]))
        # Tilting a learned head costs 2 c_i λ_j of its strength, stretching it more.
        curvature = 2 * strength[:m].min() * moments.min() * min(EIGENVALUES) if m else np.inf
        found.append(float(losses[at]))
        tolerances.append(speed * idle / 3 + speed**2 / (2 * curvature) + ROUNDING)
        places.append(at)
    complete = len(found) == count + 1
    gaps = np.abs(np.array(found) - law[: len(found)])
    times = np.asarray(path.times)

    def draw(ax):
        for level in law:
            ax.axhline(level, linestyle="--", color="black", lw=0.8)
        ax.semilogx(times[1:], losses[1:], label="simulated")
        ax.semilogx(
            np.maximum(times[places], times[1]), found, "o", label="slowest point of each stage"
        )
        ax.plot([], [], "--", color="black", label="predicted plateaus")
        ax.set(xlabel="time (rate × steps)", ylabel="population loss")
        ax.legend(loc="lower left")

    return Evidence(
        measured={"plateaus": found},
        predicted={"plateaus": law.tolist()},
        error=float((gaps / np.array(tolerances)).max()),
        tolerance=1.0,
        assumptions=(
            Assumption(
                "components are learned one after the other, all in time",
                complete and bool(np.all(np.diff(learned) >= 0)),
            ),
            Assumption(
                "in decreasing order of λ",
                bool(
                    np.all(
                        np.diff(
                            [
                                np.argmax(diagonal[:, i] > 0.5 * problem.optimum[i])
                                for i in range(count)
                            ]
                        )
                        > 0
                    )
                ),
            ),
        ),
        draw=draw,
        caption=f"λ = {EIGENVALUES}, N = {CONTEXT:g}, {HEADS} heads of scale {SCALE}.",
    )
