"""A claim on blends of a base and an adapter (AutoLoRA guidance, recalled; theory §9)."""

import jax
import numpy as np

from lorajax import laws
from lorajax.claims.base import Control, Evidence, Run, claim

GAMMAS = np.array([-1.0, 0.5, 2.0, 4.0])
SIZES = np.array([2e-4, 1e-4])


@claim(
    "guidance.second_order",
    source="AutoLoRA guidance, theory §9 (recalled); the gap is derived here",
    standing="derived",
    tolerance="the next order in the update: twice what halving it changes in the gap over its "
    "square",
    control=Control("the factor ½ becomes 0.525", {"constant": 0.525}),
)
def second_order(run: Run, constant: float = 0.5) -> Evidence:
    """Blending weights, W + γ A B, gives the outputs that blending outputs gives, base +
    γ (adapted − base), up to ½ γ(γ − 1) f'' and higher orders of the update."""
    numbers = np.random.default_rng(np.asarray(jax.random.key_data(run.key(143))))
    n, hidden, rank = 20, 30, 3
    x, w = numbers.normal(size=(16, n)), numbers.normal(size=(n, hidden)) / n**0.5
    v = numbers.normal(size=hidden) / hidden**0.5
    update = numbers.normal(size=(n, rank)) @ numbers.normal(size=(rank, hidden))
    update = update / np.linalg.norm(update, 2)
    h, along = x @ w, x @ update

    def output(step: float) -> np.ndarray:
        return np.tanh(h + step * along) @ v

    second = (-2 * np.tanh(h) / np.cosh(h) ** 2 * along**2) @ v
    gaps = np.stack(
        [
            [(output(g * e) - output(0.0) - g * (output(e) - output(0.0))) / e**2 for g in GAMMAS]
            for e in SIZES
        ]
    )
    law = np.stack([np.asarray(laws.guidance_gap(second, g, constant=constant)) for g in GAMMAS])
    scale = np.abs(second).max() * np.abs(GAMMAS * (GAMMAS - 1))[:, None] / 2
    # What is left is of order ε: half of it goes when ε is halved, and as much remains.
    left = 2 * np.abs(gaps[1] - gaps[0]) / scale
    off = np.abs(gaps[1] - law) / scale

    def draw(ax):
        for i, gamma in enumerate(GAMMAS):
            ax.plot(law[i], gaps[1, i], f"C{i}o", label=f"γ = {gamma:g}")
        ends = np.array([law.min(), law.max()])
        ax.plot(ends, ends, "k--")
        ax.set(xlabel="law: ½ γ(γ − 1) f''", ylabel="weights − outputs, over ε²")
        ax.legend()

    return Evidence(
        measured={"worst": float(off.max())},
        predicted={"worst": 0.0},
        error=float(off.max()),
        tolerance=float(left.max()),
        draw=draw,
        caption="Outputs of vᵀ tanh(Wᵀx) for 16 inputs, an update of norm 1e-4.",
    )
