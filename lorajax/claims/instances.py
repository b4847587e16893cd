"""Instances that several claims share, so that they also share what is compiled for them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from lorajax.claims.base import Evidence, Run
from lorajax.factors import Factors, orthonormal_frame
from lorajax.flows import Metric, Path, gradient_flow
from lorajax.initializers import lora
from lorajax.problems import MatrixFactorization, Problem

SAVES = 401
SHAPE = (60, 40)
SPECTRUM = (4.0, 2.0, 1.0)
RANK = 5
RTOL = 1e-10
"""Relative tolerance of a solver step wherever a claim integrates."""
FINE_RTOL = 3e-13
"""That of the claims that hold to 1e-9, see `landed_flow`. At 1e-12, with errors as small, their
bounds came out above 1e-9: chosen after that was seen."""


def factorization(run: Run, spectrum: tuple[float, ...] = SPECTRUM) -> MatrixFactorization:
    """The 60×40 problem of most claims."""
    return run.once(
        ("factorization", spectrum),
        lambda: MatrixFactorization.from_spectrum(run.key(0), SHAPE, spectrum),
    )


def lora_start(run: Run, std: float, rank: int = RANK, index: int = 1) -> Factors:
    """LoRA's default start with entries of standard deviation `std` (theory's unit)."""
    return lora(run.key(index), SHAPE, rank, scale=std * SHAPE[0] ** 0.5)


def tight_flow(
    problem: Problem, start: Any, times: Float[Array, " t"] | Float[np.ndarray, " t"], **options
) -> Path:
    """Gradient flow at the tolerance of the claims."""
    return gradient_flow(problem, start, times, rtol=RTOL, **options)


def refactored(run: Run, spread: float = 3.0) -> tuple[Factors, Factors]:
    """Generic factors of rank 3 away from 0, and others of the same product, (A R, R⁻¹B).

    The singular values of R are `spread`, 1 and its inverse, so that its condition is known.
    """
    keys = [run.key(index) for index in (80, 81, 82, 83)]
    a = 0.1 * jax.random.normal(keys[0], (SHAPE[0], 3))
    b = 0.1 * jax.random.normal(keys[1], (3, SHAPE[1]))
    left, right = (orthonormal_frame(key, (3, 3), a.dtype) for key in keys[2:])
    sizes = np.array([spread, 1.0, 1 / spread])
    turn, back = (left * sizes[None]) @ right.T, (right / sizes[None]) @ left.T
    return Factors(a, b), Factors(a @ turn, back @ b)


def landed_flow(problem: Problem, start: Any, last: float, **options: Any) -> Path:
    """A flow to 3e-13 a step at 101 times from 0 to `last`, each the end of a step.

    Between the ends of its steps the solver interpolates, to about 1e-9 only.
    """
    times = np.linspace(0.0, last, 101)
    return gradient_flow(problem, start, times, rtol=FINE_RTOL, interpolate=False, **options)


@functools.cache
def metric_of(formula: Callable[..., Factors], exponent: float) -> Metric:
    """A metric with another exponent; one function for each, as flows are compiled for it."""
    return functools.partial(formula, exponent=exponent)


def product_error(*paths: Path, rtol: float = FINE_RTOL) -> float:
    """Bound of what integration adds to products, over s_1: 2 · rtol · ‖A‖ ‖B‖ for each step.

    Each step is off by at most rtol relative to each factor, which need not be balanced.
    """
    total = 0.0
    for path in paths:
        sizes = [np.linalg.norm(np.asarray(x), ord=2, axis=(1, 2)) for x in path.core]
        total += 2 * rtol * int(path.steps) * float((sizes[0] * sizes[1]).max())
    return total / SPECTRUM[0]


def solver_error(*paths: Path, rtol: float = RTOL) -> float:
    """Bound of what integration adds to a product, relative to its size: 2 · steps · rtol.

    Each step is off by at most rtol relative to each factor (growth is resolved relative to the
    start's own amplitude), such errors add up in the logarithm of an amplitude, a mode's value
    depends on that logarithm with slope at most 1 relative to s, and a product has two factors.
    """
    return 2.0 * rtol * sum(int(path.steps) for path in paths)


def until(last: float) -> np.ndarray:
    """Evenly spaced times from 0: always as many, so that flows of one size compile once."""
    return np.linspace(0.0, last, SAVES)


def log_times(first: float, last: float) -> np.ndarray:
    """0, then times with equal ratios from `first` to `last`; as many as `until` gives."""
    return np.concatenate([[0.0], np.geomspace(first, last, SAVES - 1)])


def order_in_step(
    run: Run,
    name: str,
    measure: Callable[[float, int], float],
    exponent: float,
    *,
    quantity: str,
    caption: str,
) -> Evidence:
    """Evidence that what `measure(step, count)` returns at a fixed time scales as step^exponent.

    The tolerance is the order of the next term, step · s_1 at the coarsest step of the fit.
    """
    horizon, counts = 2.0, (800, 1600, 3200, 6400)
    steps = horizon / np.array(counts)
    sizes = run.once(
        name,
        lambda: np.array([measure(horizon / count, count) for count in counts]),
    )
    slope = float(np.polyfit(np.log(steps), np.log(sizes), 1)[0])

    def draw(ax):
        ax.loglog(steps, sizes, "o", label="simulated")
        law = sizes[-1] * (steps / steps[-1]) ** exponent
        ax.loglog(steps, law, "--", label=f"step^{exponent:g}")
        ax.set(xlabel="step [1/s]", ylabel=f"{quantity} at t = {horizon:g}")
        ax.legend()

    return Evidence(
        measured={"exponent": slope},
        predicted={"exponent": exponent},
        error=abs(slope - exponent),
        tolerance=float(steps[0] * SPECTRUM[0]),
        draw=draw,
        caption=caption,
    )
