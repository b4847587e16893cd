"""The sweeps that the papers make, by name: a function, its axes, and what to look at first."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorajax import initializers, laws, ranks, spectra
from lorajax.exact import lanes as exact_lanes
from lorajax.factors import Factors
from lorajax.flows import STATUS, lanes
from lorajax.problems import MatrixFactorization, Target, TwoLayer, TwoLayerFactors


@dataclasses.dataclass(frozen=True)
class Preset:
    """A sweep that is ready to run.

    Attributes:
      function: what is swept.
      axes: its axes.
      options: of `sweep`: key, static, dims, coords and so on.
      settings: numbers that the function's name does not tell, for the store.
      engine: what runs a lane.
      reason: why.
      headline: the variable of the summary.
    """

    function: Callable[..., Any]
    axes: Mapping[str, Any]
    options: Mapping[str, Any]
    settings: Mapping[str, Any]
    engine: str
    reason: str
    headline: str


def _converged(count: jax.Array) -> jax.Array:
    return jnp.full(count.shape, STATUS.index("converged"), jnp.int32)


def init_scale(
    size: int, rank: int, seeds: int, scales: int, *, target: Target = "generic"
) -> Preset:
    """Loss, alignment and norm over time for several scales and both starts (Xu, Fig. 1).

    Args:
      size: side of both layers.
      rank: of both adapters.
      seeds: repetitions, which differ in the start; a spectral start has no randomness.
      scales: how many, one a decade from 1e-1 on.
      target: "generic" (Fig. 1), "top" (Fig. 3) or "bottom" (Fig. 4); see `TwoLayer.pretrained`.
    """
    problem = TwoLayer.pretrained(jax.random.key(7), size, target)
    growing = spectra.top_direction(problem.alignment_matrices()[0])
    # Until the smallest start has escaped, and as long again for what comes after.
    fast = max(float(x) for x in laws.growth_rates(problem))
    times = jnp.linspace(0.0, 2 * (scales * np.log(10) + 8) / fast, 601)

    def observe(factors: TwoLayerFactors) -> dict[str, jax.Array]:
        return {
            "misalignment": spectra.top_misalignment(factors.first, growing),
            "norm": spectra.factor_norm(factors.first),
        }

    def start(kind: str, scale: jax.Array, key: jax.Array) -> TwoLayerFactors:
        if kind == "spectral":
            return problem.directed_start(
                functools.partial(initializers.spectral, rank=rank, scale=scale, directions=1)
            )
        return problem.blind_start(
            functools.partial(initializers.small, rank=rank, scale=scale), key
        )

    def flow(start_kind: str, scale: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        factors = jax.vmap(functools.partial(start, start_kind))(scale, key)
        found = lanes.two_layer(problem, factors, times, observe=observe, rtol=1e-9)
        return {**found.observed, "status": found.status}

    engine, reason = lanes.choose(problem, None)
    return Preset(
        flow,
        {
            "start_kind": ["small", "spectral"],
            "scale": np.logspace(-1, -scales, scales),
            "seed": range(seeds),
        },
        {
            "key": jax.random.key(0),
            "fold": ("seed",),
            "static": ("start_kind",),
            "batched": True,
            "dims": dict.fromkeys(("losses", "misalignment", "norm"), ("time",)),
            "coords": {"time": np.asarray(times)},
        },
        {"preset": "init-scale", "size": size, "rank": rank, "target": target},
        engine,
        f"{reason}; its products fold all lanes",
        "losses",
    )


def _orthogonal(problem: MatrixFactorization, rank: int, scale: Any, key: Any) -> Factors:
    return jax.vmap(lambda k, a: initializers.orthogonal(k, problem.shape, rank, a))(key, scale)


def rank_scale(size: int, rank: int, seeds: int, scales: int) -> Preset:
    """Losses and half-times of every mode over rank and scale: what extra rank costs and gains."""
    spectrum = (4.0, 3.0, 2.0, 1.0)
    problem = MatrixFactorization.from_spectrum(jax.random.key(7), (size, size), spectrum)
    times = jnp.linspace(0.0, 40.0, 401)

    def flow(rank: int, scale: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        found = lanes.closed_form(
            problem,
            _orthogonal(problem, rank, scale, key),
            times,
            one_sided=True,
            observe=("singular_values", "losses"),
        )
        values = found.observed["singular_values"]
        values = jnp.pad(values, ((0, 0), (0, 0), (0, len(spectrum) - values.shape[-1])))
        half = jnp.asarray(spectrum) / 2
        hit = jax.vmap(lambda v: spectra.hitting_times(times, v, half))(values)
        status = found.status
        return {
            "half_times": hit,
            "losses": found.observed["losses"],
            "effective_rank": spectra.effective_rank(values),
            "status": status,
        }

    engine, reason = lanes.choose(
        problem, initializers.orthogonal(jax.random.key(0), problem.shape, rank, 1e-2)
    )
    over_time = dict.fromkeys(("losses", "effective_rank"), ("time",))
    return Preset(
        flow,
        {
            "rank": list(range(1, rank + 1)),
            "scale": np.logspace(0, -8, scales),
            "seed": range(seeds),
        },
        {
            "key": jax.random.key(0),
            "fold": ("seed",),
            "static": ("rank",),
            "batched": True,
            "dims": {"half_times": ("mode",), **over_time},
            "coords": {"time": np.asarray(times), "mode": np.arange(1, len(spectrum) + 1)},
        },
        {"preset": "rank-scale", "size": size},
        engine,
        reason,
        "losses",
    )


def spectrum_gap(size: int, rank: int, seeds: int, scales: int) -> Preset:
    """Half-times of two modes as their singular values approach one another, over scales."""
    problem = MatrixFactorization.from_spectrum(jax.random.key(7), (size, size), (1.0, 0.5))
    times = jnp.concatenate([jnp.linspace(0.0, 200.0, 801)])

    def flow(ratio: jax.Array, scale: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        s = jnp.stack([jnp.ones_like(ratio), ratio], axis=1)
        factors = _orthogonal(problem, rank, scale, key)
        along = jnp.einsum("mk,lmr->lkr", problem.u, factors.a)
        values = exact_lanes.singular_values(exact_lanes.one_sided(s, scale**2, along), times)
        values = jnp.pad(values, ((0, 0), (0, 0), (0, 2 - values.shape[-1])))
        hit = jax.vmap(lambda v, half: spectra.hitting_times(times, v, half))(values, s / 2)
        # Where the modes meet, the larger singular value belongs to neither of them for long.
        return {
            "half_times": hit,
            "delay": hit[:, 1] - hit[:, 0],
            "status": _converged(scale),
        }

    engine, reason = lanes.choose(
        problem, initializers.orthogonal(jax.random.key(0), problem.shape, rank, 1e-2)
    )
    return Preset(
        flow,
        {
            "ratio": np.linspace(0.1, 1.0, 19),
            "scale": np.logspace(-1, -8, scales),
            "seed": range(seeds),
        },
        {
            "key": jax.random.key(0),
            "fold": ("seed",),
            "batched": True,
            "dims": {"half_times": ("mode",)},
            "coords": {"mode": [1, 2]},
        },
        {"preset": "spectrum-gap", "size": size, "rank": rank},
        engine,
        reason,
        "delay",
    )


def rank_rule(size: int, rank: int, seeds: int, scales: int) -> Preset:
    """Ranks that the rules estimate from regression gradients, over label noise and samples."""
    outputs = max(2, 2 * size // 3)
    target = MatrixFactorization.from_spectrum(
        jax.random.key(7), (size, outputs), tuple(np.linspace(2.0, 1.0, rank))
    ).target

    def estimate(samples: int, noise: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (samples, size))
        y = x @ target + noise * jax.random.normal(keys[1], (samples, outputs))
        half = samples // 2
        first, second = -(x[:half].T @ y[:half]) / half, -(x[half:].T @ y[half:]) / half
        gradient = -(x.T @ y) / samples
        signs = jax.random.rademacher(keys[2], (samples, 1), x.dtype)
        signed = -(x.T @ (signs * y)) / samples
        values = jnp.linalg.svd(gradient, compute_uv=False)
        constant = ranks.noise_constant((size, outputs), noise)
        return {
            "c_over_n": ranks.c_over_n(values, samples, constant),
            "split_half": ranks.split_half(first, second).rank,
            "random_signs": ranks.random_signs(gradient, signed).rank,
        }

    return Preset(
        estimate,
        {
            "samples": [250, 500, 1000, 2000, 4000],
            "noise": np.linspace(0.25, 0.25 * scales, scales),
            "seed": range(seeds),
        },
        {"key": jax.random.key(0), "static": ("samples",), "chunk": 64},
        {"preset": "rank-rule", "size": size, "rank": rank},
        "gradients of linear regression",
        "no flow is run",
        "split_half",
    )


PRESETS: dict[str, Callable[[int, int, int, int], Preset]] = {
    "init-scale": init_scale,
    "rank-scale": rank_scale,
    "spectrum-gap": spectrum_gap,
    "rank-rule": rank_rule,
}


def init_scale_statements(found: Any) -> dict[str, np.ndarray]:
    """What the figures of Xu et al. show, in numbers, from a sweep of `init_scale`.

    Args:
      found: the sweep's data set.

    Returns:
      Medians over the repetitions, one entry a scale, by name: "escape" (time at which the loss
      falls below 0.9 of its start), "least misalignment" and "final loss" of the small start;
      "spectral final loss" and "spectral steadiness" of the spectral one. Losses are relative to
      the start's. Steadiness is the slope of ln loss in the later half of its fall from 1e-3 to
      1e-13 over that in the earlier half: 1 for an exponential, less for a power of the time, NaN
      where the loss does not get there.
    """
    small, directed = found.sel(start_kind="small"), found.sel(start_kind="spectral").isel(seed=0)
    times, losses = found["time"].values, small["losses"].values
    clock = jnp.asarray(times)
    relative = losses / losses[..., :1]
    # 1 − loss grows exponentially before the escape, so its logarithm interpolates well.
    grown = np.log(np.maximum(1 - relative, 1e-300))
    hit = jax.vmap(jax.vmap(lambda x: spectra.hitting_times(clock, x, np.log(0.1))))
    fallen = directed["losses"].values / directed["losses"].values[..., :1]
    return {
        "escape": np.median(np.asarray(hit(jnp.asarray(grown))), axis=1),
        "least misalignment": np.median(small["misalignment"].values.min(axis=-1), axis=1),
        "final loss": np.median(relative[..., -1], axis=1),
        "spectral final loss": fallen[:, -1],
        "spectral steadiness": np.array([_steadiness(times, x) for x in fallen]),
    }


def _steadiness(times: np.ndarray, losses: np.ndarray) -> float:
    inside = np.flatnonzero((losses < 1e-3) & (losses > 1e-13))
    if inside.size < 8 or losses.min() > 1e-13:
        return float("nan")
    early, late = np.array_split(inside, 2)
    slopes = [np.polyfit(times[part], np.log(losses[part]), 1)[0] for part in (early, late)]
    return float(slopes[1] / slopes[0])
