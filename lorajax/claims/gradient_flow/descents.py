"""Other descents: ScaledGD, spectral flow, LoRA+ as a change of time (theory §2.5)."""

import jax
import jax.numpy as jnp
import numpy as np

from lorajax import laws
from lorajax.claims.base import Control, Evidence, Run, claim
from lorajax.claims.instances import (
    SHAPE,
    factorization,
    lora_start,
    solver_error,
    tight_flow,
    until,
)
from lorajax.factors import Factors
from lorajax.flows import descend, scaled_gradient, spectral_descent
from lorajax.initializers import nystrom, spectral
from lorajax.problems import SymmetricFactorization
from lorajax.spectra import hitting_times, singular_values

EPS = float(np.finfo(np.float64).eps)


@claim(
    "gradient_flow.scaled_gd_one_step",
    source="theory §2.5; ScaledGD: Tong, Ma, Chi 2021 (arXiv:2005.08898)",
    standing="derived",
    tolerance="rounding of the normal equations: eps · κ(AᵀA), κ over the target's rank",
    control=Control("the step 1 becomes 1.05", {"step": 1.05}),
)
def scaled_gd_one_step(run: Run, step: float = 1.0) -> Evidence:
    """ScaledGD of step 1 from the Nyström start reaches the target in one step if r ≥ k."""
    problem = factorization(run)
    errors, tolerance, histories = {}, 0.0, {}
    for rank in (3, 5):
        start = nystrom(run.key(12), problem.target, rank)
        path = descend(problem, start, scaled_gradient(step), 3)
        losses = np.asarray(path.losses)
        histories[rank] = np.sqrt(2 * losses) / np.linalg.norm(problem.singular_values)
        errors[f"rank_{rank}"] = float(histories[rank][1])
        spectrum = np.linalg.svd(start.a, compute_uv=False)[:3]
        tolerance = max(tolerance, EPS * float(spectrum[0] / spectrum[-1]) ** 2)
    error = max(errors.values())

    def draw(ax):
        for rank, history in histories.items():
            ax.semilogy(np.maximum(history, 1e-17), "o-", label=f"r = {rank}")
        ax.set(xlabel="step", ylabel="‖S − AB‖ / ‖S‖")
        ax.legend()

    return Evidence(
        measured=errors,
        predicted=dict.fromkeys(errors, 0.0),
        error=error,
        tolerance=tolerance,
        draw=draw,
        caption="Target of rank 3; one step is enough, and further steps keep what it reached.",
    )


@claim(
    "gradient_flow.scaled_gd_quadratic",
    source="theory §2.5",
    standing="derived",
    tolerance="rounding of the normal equations: eps · n · κ(XXᵀ), relative to the target",
    control=Control("the step ½ becomes 0.525", {"step": 0.525}),
)
def scaled_gd_quadratic(run: Run, step: float = 0.5) -> Evidence:
    """Symmetric ScaledGD of step ½ converges quadratically from near the target, within its column
    space: each error is a quarter of the last one's square, E' = −¼ E (XXᵀ)^{-1} E."""
    n, rank = 30, 3
    basis = jnp.linalg.qr(jax.random.normal(run.key(13), (n, rank)))[0]
    values = jnp.array([4.0, 2.0, 1.0])
    target = (basis * values[None, :]) @ basis.T
    problem = SymmetricFactorization(target)
    # Across the column space a step only halves the factor, X⊥ ← X⊥/2: from outside it the
    # convergence would be linear with that factor.
    noise = jax.random.normal(run.key(14), (rank, rank))
    noise = noise + noise.T
    near = jnp.eye(rank) + 0.02 * noise / jnp.linalg.norm(noise)
    start = (basis * jnp.sqrt(values)[None, :]) @ near
    path = descend(problem, start, scaled_gradient(step), 12)
    errors = np.sqrt(4 * np.asarray(path.losses)) / float(jnp.linalg.norm(values))
    inner = jnp.swapaxes(basis, 0, 1) @ path.core
    gram = inner @ jnp.swapaxes(inner, 1, 2)
    gaps = jnp.diag(values)[None] - gram
    law = laws.scaled_gd_error(gaps[:-1], gram[:-1])
    missed = np.linalg.norm(np.asarray(gaps[1:] - law), axis=(1, 2))
    missed = missed / float(jnp.linalg.norm(values))
    worst = float(np.linalg.cond(np.asarray(gram)).max())

    def draw(ax):
        ax.semilogy(np.maximum(errors, 1e-17), "o-", label=f"step {step:g}")
        ax.set(xlabel="step", ylabel="‖S − XXᵀ‖ / ‖S‖")
        ax.legend()

    return Evidence(
        measured={"errors": errors.tolist(), "off_the_law": missed.tolist()},
        predicted={"off_the_law": [0.0] * len(missed)},
        error=float(missed.max()),
        tolerance=EPS * n * worst,
        draw=draw,
        caption="The number of correct digits doubles with every step.",
    )


@claim(
    "gradient_flow.spectral_flow",
    source="theory §2.5; Muon: Jordan et al. 2024",
    standing="derived",
    tolerance="one step of the descent, the resolution in time",
    control=Control("the speed 1 of √σ becomes 1/1.05: times 5 % longer", {"speed": 1 / 1.05}),
)
def spectral_flow(run: Run, speed: float = 1.0) -> Evidence:
    """Under spectral gradient flow a mode grows as (√σ0 + t)² up to s: times of reaching 95 % are
    √(0.95 s) − √σ0, the smaller targets first."""
    spectrum = (4.0, 3.0, 2.0, 1.0)
    problem = factorization(run, spectrum)
    step, scale = 1e-3, 1e-3
    start = spectral(problem.target, 4, scale=scale)
    path = run.once(
        "spectral_flow",
        lambda: descend(
            problem, start, spectral_descent(step), 2200, learning_rate=step, every=1, reduced=True
        ),
    )
    values = singular_values(path)
    s = problem.singular_values
    found = np.asarray(hitting_times(path.times, values, 0.95 * s))
    law = np.asarray(laws.spectral_hit_time(s, scale**2, speed=speed))
    times = np.asarray(path.times)

    def draw(ax):
        for i, value in enumerate(spectrum):
            ax.plot(times, np.asarray(values)[:, i], color=f"C{i}", label=f"s = {value:g}")
            prediction = np.asarray(laws.spectral_flow(times, value, scale**2))
            ax.plot(times, prediction, "--", color="black")
        ax.set(xlabel="time [√s]", ylabel="singular value of AB", title="dashed: law")
        ax.legend()

    return Evidence(
        measured={"hit_times": found.tolist()},
        predicted={"hit_times": law.tolist()},
        error=float(np.abs(found - law).max()),
        tolerance=step,
        draw=draw,
        caption="Spectral descent with step 1e-3 from spectral initialization.",
    )


@claim(
    "gradient_flow.lora_plus_equivalent",
    source="theory §2.5",
    standing="derived",
    tolerance="solver error of both integrations, 2 · steps · rtol each",
    control=Control("the exponent ½ of ρ in time becomes 0.525", {"exponent": 0.525}),
)
def lora_plus_equivalent(run: Run, exponent: float = 0.5) -> Evidence:
    """LoRA+ with ratio ρ is plain gradient flow with time multiplied by √ρ and A by ρ^{1/4}."""
    problem, ratio = factorization(run), 16.0
    start = lora_start(run, 0.02, index=15)
    times = until(5.0)
    plus = run.once("lora_plus", lambda: tight_flow(problem, start, times, b_rate=ratio))
    rescaled, a = laws.lora_plus_equivalent(times, start.a, ratio, exponent=exponent)
    plain = run.once(
        ("lora_plus_plain", exponent),
        lambda: tight_flow(problem, Factors(a, start.b), np.asarray(rescaled)),
    )
    simulated, law = np.asarray(singular_values(plus)), np.asarray(singular_values(plain))
    error = float(np.abs(simulated - law).max() / 4.0)

    def draw(ax):
        for i in range(3):
            ax.plot(times, simulated[:, i], color=f"C{i}", label=f"mode {i + 1}, LoRA+")
            ax.plot(times, law[:, i], "--", color="black", label=None if i else "plain, rescaled")
        ax.set(xlabel="time of LoRA+ [1/s]", ylabel="singular value of AB")
        ax.legend()

    return Evidence(
        measured={"sup_error": error},
        predicted={"sup_error": 0.0},
        error=error,
        tolerance=solver_error(plus, plain),
        draw=draw,
        caption=f"ρ = {ratio:g} on a {SHAPE[0]}×{SHAPE[1]} problem.",
    )
