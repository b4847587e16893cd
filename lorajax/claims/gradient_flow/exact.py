"""The exact reduction and the λ-balanced propagator against the plain ODE (theory §1, §2.1)."""

import jax.numpy as jnp
import numpy as np

from lorajax.claims.base import Control, Evidence, Run, claim
from lorajax.claims.instances import SHAPE, factorization, solver_error, tight_flow, until
from lorajax.exact import balanced_core, reduce
from lorajax.factors import Factors
from lorajax.flows import Path, gradient_flow
from lorajax.initializers import orthogonal, small
from lorajax.problems import DiagonalFactorization
from lorajax.spectra import imbalance_drift


def _gap(first, second) -> np.ndarray:
    """Largest singular value of the difference of two products, over time."""
    return np.asarray(jnp.linalg.norm(first - second, ord=2, axis=(1, 2)))


@claim(
    "gradient_flow.reduction",
    source="theory §1",
    standing="derived",
    tolerance="solver error of both integrations, 2 · steps · rtol each",
    control=Control("5 % of what A has across the singular vectors is left out", {"kept": 0.95}),
)
def reduction(run: Run, kept: float = 1.0) -> Evidence:
    """A flow on m×n with a target of rank k is exactly one on (k+r)×(k+r), lifted by frames."""
    problem = factorization(run)
    start = small(run.key(5), SHAPE, 5, scale=0.5)
    times = until(8.0)
    full = run.once("reduction", lambda: tight_flow(problem, start, times, reduced=False))
    small_problem, core, frames = reduce(problem, start)
    k = problem.rank
    core = Factors(core.a.at[k:].multiply(kept), core.b)
    path = tight_flow(small_problem, core, times)
    error = _gap(frames.lift(path.core).product, full.factors.product) / 4.0
    shape = small_problem.shape

    def draw(ax):
        ax.semilogy(times, np.maximum(error, 1e-17), label="‖difference of AB‖₂ / s₁")
        ax.semilogy(times, np.asarray(full.losses / full.losses[0]), label="loss / initial loss")
        ax.set(xlabel="time [1/s]", ylabel="relative to the start")
        ax.legend()

    return Evidence(
        measured={"largest_difference": float(error.max())},
        predicted={"largest_difference": 0.0},
        error=float(error.max()),
        tolerance=solver_error(full, path),
        draw=draw,
        caption=f"A {SHAPE[0]}×{SHAPE[1]} flow and the same flow on {shape[0]}×{shape[1]}, lifted.",
    )


@claim(
    "gradient_flow.balanced_propagator",
    source="theory §2.1; Fukumizu 1998, Braun et al. 2022, Dominé et al. 2024",
    standing="derived",
    tolerance="solver error of the reference, 2 · steps · rtol at rtol = 1e-12",
    control=Control("the propagator's singular values are 5 % too large", {"told": 1.05}),
)
def balanced_propagator(run: Run, told: float = 1.0) -> Evidence:
    """A λ-balanced flow of any rank is a matrix exponential and a small inverse square root, from
    scale 1 down to 1e-8, with ranks below, at and above that of the target."""
    problem = factorization(run)
    times = until(20.0)
    scales = [1.0, 1e-2, 1e-5, 1e-8]
    ranks = run.pick([2, 3, 5], [1, 2, 3, 4, 5, 8])

    def simulate():
        found = {}
        for rank in ranks:
            for scale in scales:
                start = orthogonal(run.key(6), SHAPE, rank, scale)
                found[rank, scale] = start, gradient_flow(problem, start, times, rtol=1e-12)
        return found

    errors, drifts, tolerance = {}, [], 0.0
    for (rank, scale), (start, reference) in run.once("propagator", simulate).items():
        diagonal, core, frames = reduce(problem, start)
        altered = DiagonalFactorization(told * diagonal.singular_values, diagonal.shape)
        path = balanced_core(altered, core, jnp.asarray(times))
        whole = Path(reference.times, path.core, altered, frames, reference.status, path.steps)
        gap = _gap(path.core.product, reference.core.product)
        errors[rank, scale] = gap / 4.0
        drifts.append(float(imbalance_drift(whole)))
        tolerance = max(tolerance, solver_error(reference, rtol=1e-12))

    def draw(ax):
        for (rank, scale), error in errors.items():
            if rank == ranks[-1]:
                ax.semilogy(times[1:], np.maximum(error[1:], 1e-17), label=f"scale {scale:g}")
        ax.axhline(tolerance, color="0.5", linestyle=":", label="solver error of the reference")
        ax.set(xlabel="time [1/s]", ylabel="‖difference of AB‖₂ / s₁")
        ax.legend()

    worst = max(float(e.max()) for e in errors.values())
    return Evidence(
        measured={"largest_difference": worst, "drift_of_imbalance": max(drifts)},
        predicted={"largest_difference": 0.0, "drift_of_imbalance": 0.0},
        error=worst,
        tolerance=tolerance,
        draw=draw,
        caption=f"Closed form against Dopri8 at rtol 1e-12, rank {ranks[-1]}, target of rank 3.",
    )
