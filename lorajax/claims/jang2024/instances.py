"""The runs of LoRA and the certified optima that several claims look at."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from lorajax import optima
from lorajax.claims import ntk
from lorajax.claims.base import Assumption, Run
from lorajax.factors import Factors

SOURCE = "Jang, Lee, Ryu 2024 (arXiv:2402.11867); theory §5"
CELLS = (
    *((20, rank) for rank in range(1, ntk.MOST_RANK + 1)),
    (10, 3),
    (10, 5),
    (6, 2),
    (6, 4),
    (3, 3),
)
"""(N, r) of the runs; enough ranks at N = 20 to see where stuck runs begin."""
STEPS = 1600
AT_REST = 1e-6
"""Norm of the gradient in the factors over w, below which a run rests."""
NOISE = 0.02
"""Entries of the perturbation P over w."""


def draws(run: Run, shape: tuple[int, ...], stream: int) -> np.ndarray:
    """Standard normal numbers of a stream of their own, without compiling anything."""
    return np.random.default_rng([run.seed, stream]).standard_normal(shape)


def instances(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Features (I, N, 1, m, n) and targets (I, N, 1) of a few independent problems."""
    count = run.pick(6, 16)
    features = draws(run, (count, ntk.SAMPLES, 1, ntk.SIZE, ntk.SIZE), 1)
    return features, draws(run, (count, ntk.SAMPLES, 1), 2)


@eqx.filter_jit
def _runs(features, targets, starts, samples, ranks, perturbations) -> ntk.Rest:
    """Ends of all runs: lanes (cell, instance, start)."""

    def one(features, targets, perturbation, start, samples, rank) -> ntk.Rest:
        problem = ntk.masked_problem(features, targets, samples)
        w = ntk.decay_of(problem)
        start = ntk.masked_factors(start, rank)
        return ntk.come_to_rest(problem, w, start, STEPS, w * perturbation)

    over_starts = jax.vmap(one, (None, None, None, 0, None, None))
    over_instances = jax.vmap(over_starts, (0, 0, 0, None, None, None))
    return jax.vmap(over_instances, (None, None, None, None, 0, 0))(
        features, targets, perturbations, starts, samples, ranks
    )


def ends_of(run: Run, noise: float = 0.0) -> ntk.Rest:
    """The map of runs with a perturbation of `noise` times w, simulated once."""

    def simulate() -> ntk.Rest:
        features, targets = instances(run)
        starts = run.pick(6, 16)
        a = ntk.SCALE * draws(run, (starts, ntk.SIZE, ntk.MOST_RANK), 3)
        b = ntk.SCALE * draws(run, (starts, ntk.MOST_RANK, ntk.SIZE), 4)
        p = draws(run, (len(features), 2 * ntk.SIZE, 2 * ntk.SIZE), 5)
        p = noise * (p + p.transpose(0, 2, 1)) / 2
        samples, ranks = (jnp.asarray(x) for x in zip(*CELLS, strict=True))
        begin = Factors(jnp.asarray(a), jnp.asarray(b))
        x, y, p = (jnp.asarray(each) for each in (features, targets, p))
        return _runs(x, y, begin, samples, ranks, p)

    return run.once(("jang2024", noise), simulate)


@eqx.filter_jit
def _optima(features, targets, samples, factor) -> tuple[optima.Optimum, Any]:
    """Certified global optima of lanes, and their L̂(0)."""

    def one(features, targets, samples):
        problem = ntk.masked_problem(features, targets, samples)
        found = optima.minimize(
            problem, factor * ntk.decay_of(problem), tolerance=ntk.CERTIFIED / 10
        )
        return found, problem.loss(problem.zero())

    return jax.vmap(one)(features, targets, samples)


COUNTS = (1, 3, 6, 10, 20)
DEGENERATE = (1, 3)


def solved(run: Run, factor: float = 1.0):
    """Optima of all instances at all COUNTS, and of degenerate ones: their features are g ⊗ I₄."""
    features, targets = instances(run)
    half = draws(run, (*features.shape[:3], ntk.SIZE // 4, ntk.SIZE // 4), 6)
    pairs = np.kron(half, np.eye(4))
    blocks = [(features, targets, n) for n in COUNTS] + [(pairs, targets, n) for n in DEGENERATE]

    def simulate():
        stack = [jnp.asarray(np.concatenate([b[i] for b in blocks])) for i in (0, 1)]
        samples = jnp.asarray(np.repeat([n for *_, n in blocks], len(features)))
        found, scale = _optima(stack[0], stack[1], samples, jnp.asarray(factor))
        rows = [len(features) * i for i in range(len(blocks) + 1)]
        parts = [slice(x, y) for x, y in zip(rows, rows[1:], strict=False)]
        return blocks, parts, found, np.asarray(scale)

    return run.once(("jang2024 optima", factor), simulate)


def rested(ends: ntk.Rest) -> Assumption:
    """That every run has come to rest."""
    worst = float(np.asarray(ends.residual).max())
    return Assumption("all runs rest", worst < AT_REST, f"largest residual {worst:.1e} of w")
