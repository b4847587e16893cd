"""What a LoRA flow conserves, and how descent breaks it (theory section 1)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorajax import laws
from lorajax.claims.base import Control, Evidence, Run, claim
from lorajax.claims.instances import (
    SHAPE,
    factorization,
    order_in_step,
    solver_error,
    tight_flow,
    until,
)
from lorajax.flows import Path, descend
from lorajax.initializers import small
from lorajax.problems import ProductLoss, TwoLayer, TwoLayerFactors
from lorajax.spectra import imbalance, imbalance_drift

SOURCE = "theory §1; Saxe et al. 2014, Du et al. 2018 (arXiv:1806.00900) for deep linear networks"
TIMES = until(8.0)


def _log_cosh(product, target):
    return jnp.sum(jnp.logaddexp(product - target, target - product))


def _unbalanced(run: Run):
    return small(run.key(2), SHAPE, 5, scale=1.0)._replace(
        b=0.3 * small(run.key(3), SHAPE, 5, 1.0).b
    )


def _quadratic(run: Run, **rule) -> Path:
    problem = factorization(run)
    name = ("conservation", *sorted(rule.items()))
    return run.once(name, lambda: tight_flow(problem, _unbalanced(run), TIMES, **rule))


def _relative(change, path) -> np.ndarray:
    """Norms of a change of Λ over time, relative to the size of its terms."""
    a, b = path.core
    size = float(jnp.max(jnp.sum(a**2, axis=(1, 2)) + jnp.sum(b**2, axis=(1, 2))))
    return np.asarray(jnp.linalg.norm(change, axis=(1, 2))) / size


@claim(
    "gradient_flow.conservation",
    source=SOURCE,
    standing="derived",
    tolerance="solver error, 2 · steps · rtol; Λ's terms are quadratic in the factors "
    "like a product",
    control=Control("Ḃ is multiplied by 1.05, which breaks the symmetry", {"b_rate": 1.05}),
)
def conservation(run: Run, b_rate: float = 1.0) -> Evidence:
    """Λ = AᵀA − BBᵀ stays constant along gradient flow of any differentiable loss of the product:
    the quadratic one, log-cosh, and each adapter of two frozen layers."""
    keys = jax.random.split(run.key(4), 5)
    n = 12
    layers = TwoLayer(
        jax.random.normal(keys[0], (n, n)) / n**0.5,
        jax.random.normal(keys[1], (n, n)) / n**0.5,
        jax.random.normal(keys[2], (n, n)),
    )
    both = TwoLayerFactors(small(keys[3], (n, n), 2, 0.5), small(keys[4], (n, n), 2, 0.3))
    target = factorization(run).target
    drifts, bounds, curves = {}, [], {}
    for name, problem, start in (
        ("log_cosh", ProductLoss(_log_cosh, SHAPE, (target,)), _unbalanced(run)),
        ("two_layers", layers, both),
    ):
        path = run.once(
            ("conservation", name, b_rate),
            lambda problem=problem, start=start: tight_flow(problem, start, TIMES, b_rate=b_rate),
        )
        pairs = path.core if isinstance(path.core, TwoLayerFactors) else (path.core,)
        drifts[name] = max(float(imbalance_drift(pair)) for pair in pairs)
        bounds.append(solver_error(path))
    path = _quadratic(run, b_rate=b_rate)
    drifts["quadratic"] = float(imbalance_drift(path))
    bounds.append(solver_error(path))
    level = imbalance(path)
    curves["drift of Λ"] = _relative(level - level[:1], path)

    def draw(ax):
        ax.semilogy(TIMES[1:], np.maximum(curves["drift of Λ"][1:], 1e-18), label="drift of Λ")
        ax.semilogy(TIMES, np.asarray(path.losses / path.losses[0]), label="loss / initial loss")
        ax.set(xlabel="time [1/s]", ylabel="relative to the start")
        ax.legend()

    return Evidence(
        measured=drifts,
        predicted=dict.fromkeys(drifts, 0.0),
        error=max(drifts.values()),
        tolerance=max(bounds),
        draw=draw,
        caption="The loss falls while Λ = AᵀA − BBᵀ stays where it was, up to the solver's error.",
    )


@claim(
    "gradient_flow.weight_decay",
    source=SOURCE,
    standing="derived",
    tolerance="solver error, 2 · steps · rtol",
    control=Control("the exponent's 2 becomes 2.1", {"rate": 2.1}),
)
def weight_decay(run: Run, rate: float = 2.0) -> Evidence:
    """With weight decay w on both factors Λ(t) = e^{−2wt} Λ(0)."""
    w = 0.2
    path = _quadratic(run, weight_decay=w)
    level = imbalance(path)
    share = laws.imbalance_decay(path.times, w, rate=rate)
    error = _relative(level - share[:, None, None] * level[:1], path)
    norms = np.asarray(jnp.linalg.norm(level, axis=(1, 2)))

    def draw(ax):
        ax.semilogy(TIMES, norms, label="‖Λ(t)‖, simulated")
        ax.semilogy(TIMES, norms[0] * np.asarray(share), "--", label=f"e^(−{rate:g}wt) ‖Λ(0)‖")
        ax.set(xlabel="time [1/s]", ylabel="‖Λ‖ [s]")
        ax.legend()

    found = float(np.polyfit(TIMES, np.log(norms), 1)[0])
    law = float(-jnp.log(laws.imbalance_decay(1.0, w, rate=rate)))
    return Evidence(
        measured={"decay_rate": -found},
        predicted={"decay_rate": law},
        error=float(error.max()),
        tolerance=solver_error(path),
        draw=draw,
        caption=f"The imbalance decays at twice the weight decay (w = {w}).",
    )


@claim(
    "gradient_flow.lora_plus_conservation",
    source="theory §1; LoRA+: Hayou et al. 2024 (arXiv:2402.12354)",
    standing="derived",
    tolerance="solver error, 2 · steps · rtol, times ρ, the larger weight of the two terms",
    control=Control("ρ in the law becomes 1.05 ρ", {"constant": 1.05}),
)
def lora_plus_conservation(run: Run, constant: float = 1.0) -> Evidence:
    """Under LoRA+ (Ḃ multiplied by ρ) it is ρ AᵀA − BBᵀ that stays constant."""
    ratio = 4.0
    path = _quadratic(run, b_rate=ratio)
    law = laws.lora_plus_level(path.core, ratio, constant=constant)
    error, plain = _relative(law - law[:1], path), imbalance(path)
    plain_drift = _relative(plain - plain[:1], path)

    def draw(ax):
        ax.semilogy(TIMES[1:], np.maximum(error[1:], 1e-18), label="ρ AᵀA − BBᵀ")
        ax.semilogy(TIMES[1:], np.maximum(plain_drift[1:], 1e-18), "--", label="AᵀA − BBᵀ")
        ax.set(xlabel="time [1/s]", ylabel="relative drift")
        ax.legend()

    return Evidence(
        measured={
            "drift": float(error.max()),
            "drift_of_plain_imbalance": float(plain_drift.max()),
        },
        predicted={"drift": 0.0},
        error=float(error.max()),
        tolerance=ratio * solver_error(path),
        draw=draw,
        caption=f"LoRA+ with ρ = {ratio:g} conserves the weighted imbalance, not the plain one.",
    )


@claim(
    "gradient_flow.descent_drift",
    source=SOURCE,
    standing="derived",
    tolerance="order of the next term: step · s_1 at the coarsest step of the fit",
    control=Control("the exponent 1 becomes 1.05", {"exponent": 1.05}),
)
def descent_drift(run: Run, exponent: float = 1.0) -> Evidence:
    """Gradient descent drifts off the conserved Λ in proportion to its step, at fixed time."""
    problem, start = factorization(run), _unbalanced(run)

    def drift(step: float, count: int) -> float:
        path = descend(
            problem, start, optax.sgd(step), count, learning_rate=step, every=count, reduced=True
        )
        return float(imbalance_drift(path))

    return order_in_step(
        run,
        "descent_drift",
        drift,
        exponent,
        quantity="relative drift of Λ",
        caption="Halving the step halves the drift: Λ is conserved by the flow, not "
        "by the descent.",
    )
