"""What a finished run shows in each adapted layer, beside what theory says of it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax import adapters, laws, spectra
from lorajax.environment.judging import judged
from lorajax.factors import Factors
from lorajax.finetune import probes
from lorajax.finetune.recipes import Recipe
from lorajax.tasks import Task

MOST_VALUES = 32
"""Singular values of a gradient that are kept."""
AGREEMENT = 0.1
"""Relative error up to which the early law counts as holding."""


class Insight(NamedTuple):
    """One adapted layer after training.

    Attributes:
      path: of the layer.
      shape: (m, n) of its update, inputs first.
      rank: that it was given.
      scaling: the factor in front of `A B`.
      gradient: the largest singular values of the gradient before training, in loss per unit of
        weight; empty where none was given.
      learned: singular values of the update after training, in units of the weight.
      used: effective rank of the update, `exp(−Σ p ln p)` with `p = σ/Σσ`.
      stable: stable rank of the update, `Σσ²/σ₁²`.
      regime: `K(0)/K(T)` with `K = |Aᵀu|² + |Bv|²`, u and v the update's top singular vectors: the
        share of the tangent kernel along what was learned that was there before training. 1 is
        lazy, towards 0 is rich; NaN for an update of 0.
      regime_law: the same from the start and the update's size alone, `K(0)/√(λ² + 4σ²)` with
        `λ = |Aᵀu|² − |Bv|²` before training and σ the product's size along u, v; it holds where
        descent conserves λ.
      drift: `‖Λ(T) − Λ(0)‖_F` over the larger of `‖A‖² + ‖B‖²` before and after, Λ = AᵀA − BBᵀ.
      misalignment: `1 − |cos|` of `[A; Bᵀ]` and the gradient's top direction at the last look; NaN
        where none was given.
      predicted: singular values by the law of early descent, shape (looks, r); None where the
        optimizer breaks it.
      agrees: the last step up to which it holds within 10 % for the largest singular value; None
        where there is no law.
      strength: largest singular value of the update.
      threshold: the strength above which a generic direction leaves the weight's bulk.
      intruding: how many directions of the update lie above it.
      alpha: numerator of the scaling.
      most: the alpha at which none does.
    """

    path: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    gradient: list[float]
    learned: list[float]
    used: float
    stable: float
    regime: float
    regime_law: float
    drift: float
    misalignment: float
    predicted: list[list[float]] | None
    agrees: int | None
    strength: float
    threshold: float
    intruding: int
    alpha: float
    most: float


BREAKS = {
    "adamw": "Adam divides every entry's step by its own running size",
    "adam": "Adam divides every entry's step by its own running size",
    "lora-plus": "Adam divides every entry's step by its own running size, and B's is a multiple",
    "riemannian": "the gradient is divided by the other factor's Gram matrix, then by Adam's sizes",
    "reflora": "the factors are rebalanced in every step, and Adam divides by running sizes",
    "lora-rite": "steps are divided by running sizes in the factors' own basis",
    "muon": "the singular values of each matrix's momentum are replaced by 1",
    "spectral": "the gradient's singular values are replaced by 1",
}


@judged
def why_no_law(recipe: Recipe) -> str:
    """Why the law of early descent does not speak of a recipe; empty where it does.

    Args:
      recipe: how a run was trained.

    Returns:
      A reason: `Z(k) = Π_j (I + η_j H(M)) Z(0)` (theory section 4, reconstructed; claim
      `finetuning.early_factors`) is of plain descent, whose rates may differ from step to step.
    """
    if recipe.optimizer != "sgd":
        return BREAKS.get(recipe.optimizer, "the optimizer is not plain descent")
    if recipe.momentum:
        return "momentum adds up the gradients of earlier steps"
    return "steps are clipped" if recipe.clip else ""


@judged
def caveats(recipe: Recipe, task: Task) -> list[str]:
    """What a run does that the law of early descent, where it speaks, leaves out; in words."""
    found = ["the gradient is that of a part of the training data, and of its mean"]
    if smoothing := getattr(task, "smoothing", 0):
        found.append(f"training smooths classes by {smoothing:g}, the gradient's loss does not")
    if getattr(task, "augment", "none") != "none":
        found.append("training augments the samples")
    if getattr(task, "mixup", 0):
        found.append("training mixes samples with each other")
    if recipe.batch_size:
        found.append(f"steps take batches of {recipe.batch_size}")
    found.append("the head and what else trains in full move the gradient as well")
    return found


@judged
def insights(
    start: Any,
    tuned: Any,
    history: Mapping[str, Any],
    recipe: Recipe,
    gradients: Mapping[str, Any] | None = None,
    found: adapters.Intruders | None = None,
) -> list[Insight]:
    """What every probed layer of a run shows.

    Args:
      start: the adapted model before training.
      tuned: the same after it.
      history: of the run (`finetune.run`), for the looks on the way.
      recipe: how it was trained.
      gradients: at the start, by path.
      found: of `adapters.intruders(tuned)`; looked for if None.

    Returns:
      An Insight for each layer with a LoRA on a single matrix, in the order of `probes.paths`.
      Numbers are computed in float64 from float32 factors; a singular value of a gradient below
      about 1e-4 of its largest one is rounding.

    Source: theory sections 1 (Λ), 2.2 (regime and its law; both derived), 4 (early descent,
    reconstructed), 9 (intruders, recalled; effective rank).
    """
    found = adapters.intruders(tuned) if found is None else found
    rows = {row.path: row for row in found.rows if row.adapter == "default"}
    before, after = adapters.layers(start), adapters.layers(tuned)
    looks = history["probe_step"]
    law = not why_no_law(recipe) and gradients is not None and bool(looks)
    rates = _rates(recipe) if law else None
    last = history["probes"]["misalignment"][-1] if looks else None
    paths = probes.paths(tuned)
    learned = [_learned(after[path].adapters["default"]) for path in paths]
    used = _used(learned)
    result = []
    for i, path in enumerate(paths):
        first, end = before[path].adapters["default"], after[path].adapters["default"]
        gradient = (gradients or {}).get(path)
        row, values = rows[path], learned[i]
        predicted = agrees = None
        if rates is not None and gradient is not None:
            measured = np.asarray(history["probes"]["singular_values"])[:, i, : end.rank]
            predicted = _early(gradient, first, rates, looks)
            agrees = _agrees(predicted, measured, looks)
            predicted = predicted.tolist()
        result.append(
            Insight(
                path=path,
                shape=(end.factors.shape[0], end.factors.shape[1]),
                rank=end.rank,
                scaling=float(end.scaling),
                gradient=[] if gradient is None else _values(gradient),
                learned=values.tolist(),
                used=used[i],
                stable=float((values**2).sum() / max(values[0], 1e-30) ** 2),
                **_regime(first, end),
                drift=_drift(first.factors, end.factors),
                misalignment=float("nan") if last is None else float(last[i]),
                predicted=predicted,
                agrees=agrees,
                strength=row.strength,
                threshold=row.threshold,
                intruding=row.directions,
                alpha=row.alpha,
                most=row.most,
            )
        )
    return result


def _rates(recipe: Recipe) -> Array:
    return jnp.broadcast_to(
        recipe.rate()(jnp.arange(recipe.steps, dtype=jnp.float32)), (recipe.steps,)
    )


def _factors(adapter: Any) -> tuple[np.ndarray, np.ndarray]:
    """`A` and `B` with the offset as further columns and rows, so that the update is s A B."""
    a, b = (np.asarray(x, np.float64) for x in adapter.factors)
    if (offset := adapter.offset) is not None:
        a = np.concatenate([a, np.asarray(offset.a, np.float64)], axis=1)
        b = np.concatenate([b, -np.asarray(offset.b, np.float64)], axis=0)
    return a, b


def _svd(adapter: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left vectors, singular values and right vectors (as rows) of an update."""
    a, b = _factors(adapter)
    q_a, r_a = np.linalg.qr(a)
    q_b, r_b = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(r_a @ r_b.T)
    return q_a @ u, adapter.scaling * s, vt @ q_b.T


def _learned(adapter: Any) -> np.ndarray:
    return _svd(adapter)[1][: adapter.rank]


def _used(learned: Sequence[np.ndarray]) -> list[float]:
    """Effective ranks, of all layers in one program."""
    table = np.zeros((len(learned), max(map(len, learned), default=1)), np.float32)
    for row, values in zip(table, learned, strict=True):
        row[: len(values)] = values
    return [float(x) for x in np.asarray(spectra.effective_rank(jnp.asarray(table)))]


def _regime(first: Any, end: Any) -> dict[str, float]:
    u, s, vt = _svd(end)
    if s[0] <= 0:
        return {"regime": float("nan"), "regime_law": float("nan")}
    u, v = u[:, 0], vt[0]

    def along(adapter: Any) -> tuple[np.ndarray, np.ndarray]:
        a, b = (np.asarray(x, np.float64) for x in adapter.factors)
        return a.T @ u, b @ v

    (a, b), (late_a, late_b) = along(first), along(end)
    kernel, late = a @ a + b @ b, late_a @ late_a + late_b @ late_b
    law = np.hypot(a @ a - b @ b, 2 * (late_a @ late_b))
    return {"regime": float(kernel / late), "regime_law": float(kernel / law)}


def _drift(first: Factors, end: Factors) -> float:
    pairs = [tuple(np.asarray(x, np.float64) for x in each) for each in (first, end)]
    before, after = (a.T @ a - b @ b.T for a, b in pairs)
    size = max(float((a**2).sum() + (b**2).sum()) for a, b in pairs)
    return float(np.linalg.norm(after - before)) / size


def _values(gradient: Any) -> list[float]:
    """The largest singular values, from a Gram matrix of the shorter side."""
    core = np.asarray(gradient.core if hasattr(gradient, "core") else gradient, np.float64)
    core = core if core.shape[0] <= core.shape[1] else core.T
    squares = np.linalg.eigvalsh(core @ core.T)[::-1][:MOST_VALUES]
    return np.sqrt(np.maximum(squares, 0)).tolist()


def _early(
    gradient: Any, adapter: Any, rates: Array, looks: Sequence[int]
) -> Float[np.ndarray, "looks r"]:
    """Singular values of the update by the law of early descent."""
    matrix = gradient.matrix if hasattr(gradient, "matrix") else gradient
    # Descent on the factors of s A B sees s times the gradient of the weight.
    matrix = -adapter.scaling * jnp.asarray(matrix, jnp.float32)
    start = Factors(*(x.astype(jnp.float32) for x in adapter.factors))
    at = laws.early_descent(matrix, start, rates.astype(jnp.float32), np.asarray(looks))
    a, b = np.asarray(at.a, np.float64), np.asarray(at.b, np.float64)
    if (offset := adapter.offset) is not None:
        off = [np.asarray(x, np.float64) for x in (offset.a, -offset.b)]
        a, b = (
            np.concatenate([x, np.broadcast_to(y, (len(x), *y.shape))], axis=axis)
            for x, y, axis in ((a, off[0], 2), (b, off[1], 1))
        )
    triangles = (np.linalg.qr(a)[1], np.linalg.qr(b.swapaxes(1, 2))[1].swapaxes(1, 2))
    values = np.linalg.svd(triangles[0] @ triangles[1], compute_uv=False)
    return adapter.scaling * values[:, : adapter.rank]


def _agrees(predicted: np.ndarray, measured: np.ndarray, looks: Sequence[int]) -> int:
    """The last step before the largest singular value leaves the law."""
    top, law = measured[:, 0], predicted[:, 0]
    holds = np.abs(law - top) <= AGREEMENT * np.abs(top) + 1e-6 * top.max()
    count = len(holds) if holds.all() else int(np.argmin(holds))
    return int(looks[count - 1]) if count else 0
