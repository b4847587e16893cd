"""Claims of LoRA-RITE (Yen et al. 2024, arXiv:2410.20625; theory §9)."""

import functools
from typing import Any

import jax
import numpy as np
import optax

from lorajax import laws
from lorajax.claims.base import Control, Evidence, Run, claim
from lorajax.claims.instances import factorization, refactored
from lorajax.factors import Factors
from lorajax.flows import descend, lora_rite

SOURCE = "LoRA-RITE: Yen et al. 2024 (arXiv:2410.20625), by its published code; theory §9"
EPS = float(np.finfo(np.float64).eps)
RATE, STEPS, EVERY = 0.01, 300, 10
ADAM = optax.adam(RATE)


@functools.cache
def _mixed(mix: float) -> optax.GradientTransformation:
    """LoRA-RITE with a share of its steps taken by Adam."""
    parts = lora_rite(RATE), ADAM

    def init(params: Any) -> Any:
        return tuple(part.init(params) for part in parts)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        (rite, one), (adam, other) = (
            part.update(updates, kept, params) for part, kept in zip(parts, state, strict=True)
        )
        return jax.tree.map(lambda x, y: x + mix * (y - x), rite, adam), (one, other)

    return optax.GradientTransformation(init, update)


def _conditions(path: Any) -> float:
    worst = 1.0
    for factor in path.core:
        values = np.linalg.svd(np.asarray(factor), compute_uv=False)
        worst *= float((values[:, 0] / values[:, -1]).max())
    return worst


@claim(
    "lora_rite2024.invariance",
    source=SOURCE,
    standing="derived",
    tolerance="rounding: eps · κ(A) κ(B), the worst along each path, for each of its steps",
    control=Control("5 % of every step is Adam's", {"mix": 0.05}),
)
def invariance(run: Run, mix: float = 0.0) -> Evidence:
    """The path of A B under LoRA-RITE is the same from (A R, R⁻¹B) as from (A, B); that of Adam is
    not."""
    problem, starts = factorization(run), refactored(run)

    def paths(optimizer: Any) -> Any:
        # optax's own bias correction mixes dtypes.
        with jax.numpy_dtype_promotion("standard"):
            return [descend(problem, x, optimizer, STEPS, every=EVERY) for x in starts]

    ours = run.once(("lora_rite", mix), lambda: paths(_mixed(mix)))
    adam = run.once("adam", lambda: paths(ADAM))
    gaps = {}
    for name, pair in (("lora_rite", ours), ("adam", adam)):
        one, other = (np.asarray(path.factors.product) for path in pair)
        gaps[name] = np.linalg.norm(one - other, ord=2, axis=(1, 2)) / 4

    def draw(ax):
        for name, gap in gaps.items():
            steps = EVERY * np.arange(len(gap))
            ax.semilogy(steps, np.maximum(gap, 1e-18), label=name)
        ax.set(xlabel="step", ylabel="distance of the two products / s_1")
        ax.legend()

    found = {name: float(gap.max()) for name, gap in gaps.items()}
    losses = np.asarray(ours[0].losses)
    return Evidence(
        measured=found | {"final_loss_share": float(losses[-1] / losses[0])},
        predicted={"lora_rite": 0.0},
        error=found["lora_rite"],
        tolerance=EPS * STEPS * sum(_conditions(path) for path in ours),
        draw=draw,
        caption=f"Two factorings of one start, R of condition 9, {STEPS} steps of {RATE:g}.",
    )


@claim(
    "lora_rite2024.adam_scales",
    source="theory §9; LoRA-RITE: Yen et al. 2024 (arXiv:2410.20625)",
    standing="derived",
    tolerance="rounding of a product of rank 3 and of its norm: eps times the root of its entries",
    control=Control("the exponent 1 becomes 1.05", {"exponent": 1.05}),
)
def adam_scales(run: Run, exponent: float = 1.0) -> Evidence:
    """From (sA, B/s) Adam's first step changes the product through A by 1/s and through B by s
    times as much; LoRA-RITE's first step is the same for every s."""
    problem, (start, _) = factorization(run), refactored(run)
    scales = np.array([0.15, 0.6, 1.0, 2.0, 7.0])

    def first(optimizer: Any, factor: float) -> list[float]:
        x = Factors(factor * start.a, start.b / factor)
        with jax.numpy_dtype_promotion("standard"):
            moved, _ = optimizer.update(problem.gradient(x), optimizer.init(x), x)
        changes = (moved.a @ x.b, x.a @ moved.b)
        return [float(np.linalg.norm(change)) for change in changes]

    found = run.once(
        "first_steps",
        lambda: {
            name: np.array([first(optimizer, float(s)) for s in scales])
            for name, optimizer in (("adam", optax.adam(1.0, eps=0.0)), ("rite", lora_rite(1.0)))
        },
    )
    law = np.stack([np.asarray(x) for x in laws.adam_first_step(scales, exponent=exponent)], axis=1)
    adam, rite = (found[name] / found[name][2] for name in ("adam", "rite"))
    error = max(np.abs(adam / law - 1).max(), np.abs(rite - 1).max())

    def draw(ax):
        for i, name in enumerate(("A", "B")):
            ax.loglog(scales, adam[:, i], f"C{i}o", label=f"Adam, through {name}")
            ax.loglog(scales, law[:, i], "--", color=f"C{i}")
            ax.loglog(scales, rite[:, i], f"C{i}x", label=f"LoRA-RITE, through {name}")
        ax.set(xlabel="factor s between A and B", ylabel="first change of the product, relative")
        ax.legend()

    return Evidence(
        measured={"through_a": adam[:, 0].tolist(), "through_b": adam[:, 1].tolist()},
        predicted={"through_a": law[:, 0].tolist(), "through_b": law[:, 1].tolist()},
        error=float(error),
        tolerance=EPS * float(np.prod(problem.shape)) ** 0.5,
        draw=draw,
        caption="Factors of one product at five scales; dashed: 1/s and s.",
    )
