"""The instances, and what a flow of two layers is looked at for."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lorajax import laws, spectra
from lorajax.claims.base import Run
from lorajax.claims.instances import SAVES
from lorajax.flows import lanes
from lorajax.initializers import small, spectral
from lorajax.problems import Target, TwoLayer, TwoLayerFactors

SOURCE = "Xu et al. 2025 (arXiv:2503.06982); theory §4"
WIDTH, RANK, STRENGTH = 16, 2, 5.0
KINDS: tuple[Target, ...] = ("top", "bottom", "generic")
LINEAR = np.linspace(0.0, 1.0, SAVES)
RTOL = 1e-9


class Observed(NamedTuple):
    """What a lane keeps of its flow, each of shape (..., t), first layer before the second.

    Attributes:
      times: in 1/s.
      losses: relative to the loss at the start.
      norms: ‖Z_i‖₂ of the stacked factors, shape (..., 2, t).
      misalignments: 1 − cos between Z_i's top left singular vector and the top eigenvector of
        H(M_i), shape (..., 2, t).
      status: int32 code of the flow.
      last: factors at the last point.
    """

    times: Array
    losses: Array
    norms: Array
    misalignments: Array
    status: Array
    last: TwoLayerFactors


def make_problem(run: Run, kind: Target, repetition: int = 0) -> TwoLayer:
    """An instance of a kind; see the docstring of the folder."""
    return TwoLayer.pretrained(run.key(1000 + repetition), WIDTH, kind, strength=STRENGTH)


_BATCH = 15
"""Lanes of one call: all claims then share one compiled program."""


@functools.partial(jax.jit, static_argnames="start")
def _starts(problem: TwoLayer, keys: Array, scales: Array, *, start: str) -> TwoLayerFactors:
    def one(key, scale):
        if start == "small":
            return problem.blind_start(functools.partial(small, rank=RANK, scale=scale), key)
        return problem.directed_start(
            functools.partial(spectral, rank=RANK, scale=scale, directions=1)
        )

    return jax.vmap(one)(keys, scales)


@jax.jit
def _flows(problem: TwoLayer, factors: TwoLayerFactors, grid, units, rtol):
    """Losses, factors and status of a batch of lanes; time t of lane l is units[l] · grid[t]."""
    found = lanes.two_layer(
        problem,
        factors,
        grid,
        observe=lambda f: {"factors": f},
        units=units,
        rtol=rtol,
        bucket=_BATCH,
    )
    return found.observed["losses"], found.observed["factors"], found.status


@jax.jit
def _look(problem: TwoLayer, losses, factors: TwoLayerFactors, status, grid, units) -> Observed:
    # Both layers have one shape here, so that one batched decomposition serves them.
    directions = jax.vmap(spectra.top_direction)(jnp.stack(problem.alignment_matrices()))
    layers = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *factors)
    vectors, norms = spectra.leading(layers)
    last = jax.tree.map(lambda x: x[:, -1], factors)
    of_layers = jax.vmap(spectra.misalignment, (1, 0), 1)
    return Observed(
        units[:, None] * grid[None],
        losses / losses[:, :1],
        norms,
        of_layers(vectors, directions),
        status,
        last,
    )


def observe(
    run: Run,
    kind: Target,
    scales,
    horizons,
    grid=LINEAR,
    *,
    start: str = "small",
    repetitions: int | None = None,
    target: int = 0,
    rtol: float = RTOL,
) -> tuple[TwoLayer, Observed]:
    """Flows of a kind for repetitions × scales, each scale with its own horizon.

    Layers and directions are drawn anew for every number of a `target`.
    """
    problem = make_problem(run, kind, target)
    count: int = run.pick(5, 30) if repetitions is None else repetitions
    scales = np.asarray(scales, float)
    horizons = np.broadcast_to(np.asarray(horizons, float), scales.shape)
    name = (kind, tuple(scales), tuple(horizons), float(grid[1]), start, count, rtol, target)

    def simulate() -> Observed:
        keys = np.asarray(jax.random.key_data(jax.random.split(run.key(2000 + target), count)))
        # Lanes (repetition, scale) in one row, filled up to whole batches with the last one.
        which = np.arange(count * len(scales))
        which = np.append(which, np.full(-which.size % _BATCH, which[-1]))
        repetition, index = np.divmod(which, len(scales))
        units, times, seen = horizons[index], jnp.asarray(grid), []
        for first in range(0, which.size, _BATCH):
            part = slice(first, first + _BATCH)
            draws = jax.random.wrap_key_data(jnp.asarray(keys[repetition[part]]))
            factors = _starts(problem, draws, scales[index[part]], start=start)
            flows = _flows(problem, factors, times, units[part], rtol)
            seen.append(_look(problem, *flows, times, units[part]))
        together = jax.tree.map(lambda *x: np.concatenate(x), *seen)
        shape = (count, len(scales))
        return jax.tree.map(
            lambda x: x[: count * len(scales)].reshape(*shape, *x.shape[1:]), together
        )

    return problem, run.once(name, simulate)


def growth(problem: TwoLayer) -> tuple[float, float, int]:
    """Faster rate, δ_w, and the index of the slow layer."""
    rates = [float(x) for x in laws.growth_rates(problem)]
    return max(rates), min(rates) / max(rates), int(np.argmin(rates))


def fit_slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slopes of the rows of y over x."""
    centered = x - x.mean()
    return (y - y.mean(axis=1, keepdims=True)) @ centered / (centered @ centered)
