"""Claims of LoRA-GA (Wang et al. 2024, arXiv:2407.05000): a start whose first step is the best."""

import jax
import jax.numpy as jnp
import numpy as np

from lorajax.claims.base import Assumption, Control, Evidence, Run, claim
from lorajax.claims.instances import SHAPE
from lorajax.factors import Factors
from lorajax.initializers import lora, lora_ga

EPS = float(np.finfo(np.float64).eps)


@claim(
    "lora_ga2024.first_step",
    source="LoRA-GA: Wang et al. 2024 (arXiv:2407.05000); theory §7",
    standing="recalled",
    tolerance="rounding: eps times the larger side",
    control=Control("B lies along the same top r directions as A", {"shared": True}),
)
def first_step(run: Run, shared: bool = False) -> Evidence:
    """Along LoRA-GA's start the weight first moves by the best approximation of the full gradient
    that any pair of factors allows, of rank 2r: the rest is √(Σ_{i>2r} σ_i²).
    """
    gradient = (
        jax.random.normal(run.key(66), SHAPE) * jnp.exp(-0.1 * jnp.arange(float(SHAPE[1])))[None]
    )
    full = np.asarray(gradient)
    values = np.linalg.svd(full, compute_uv=False)
    ranks = (2, 4, 8, 16)
    size = float(np.linalg.norm(values))

    def rest(factors: Factors) -> float:
        """What the first step leaves of the gradient once it is scaled at best."""
        # M = AB moves by Ȧ B + A Ḃ with Ȧ = −G Bᵀ, Ḃ = −AᵀG.
        a, b = np.asarray(factors.a), np.asarray(factors.b)
        step = (full @ b.T) @ b + a @ (a.T @ full)
        scale = np.sum(step * full) / np.sum(step**2)
        return float(np.linalg.norm(full - scale * step)) / size

    found, blind = [], []
    for rank in ranks:
        start = lora_ga(gradient, rank, scale=1.0).factors
        if shared:
            start = start._replace(b=jnp.asarray(np.linalg.svd(full)[2][:rank]))
        found.append(rest(start))
        blind.append(rest(lora(run.key(67), SHAPE, rank)))
    law = [float(np.linalg.norm(values[2 * rank :])) / size for rank in ranks]

    def draw(ax):
        ax.plot(ranks, blind, "x-", label="LoRA's default start")
        ax.plot(ranks, found, "o", label="LoRA-GA")
        ax.plot(ranks, law, "--", color="black", label="√(Σ σ_i², i > 2r)")
        ax.set(xlabel="rank r", ylabel="rest of the gradient / ‖G‖", ylim=(0, 1))
        ax.legend()

    return Evidence(
        measured={"rest": found, "rest_of_default_start": blind},
        predicted={"rest": law},
        error=float(np.abs(np.array(found) - law).max()),
        tolerance=EPS * max(SHAPE),
        assumptions=(
            Assumption(
                "no start does better",
                bool(np.all(np.array(blind) >= law)),
                "the blind ones lie above the bound",
            ),
        ),
        draw=draw,
        caption=f"A {SHAPE} gradient; the step's length is chosen at best for each start.",
    )
