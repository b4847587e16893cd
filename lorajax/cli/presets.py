"""The sweeps that `lorajax sweep` knows by name: a function, its axes, and what to draw of it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorajax import initializers, ranks, spectra
from lorajax.exact import lanes as exact_lanes
from lorajax.factors import Factors
from lorajax.flows import STATUS, lanes
from lorajax.problems import MatrixFactorization, TwoLayer, TwoLayerFactors


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


def misaligned_layers(size: int, component: str = "top") -> TwoLayer:
    """Xu et al.'s two layers of one size: `Y_ft = W2 W1 + 5 u vᵀ` along a principal pair.

    W1 and W2 are Gaussian and so unbalanced; balanced ones along a principal pair would make both
    layers grow at one rate. The draw is fixed: repetitions differ in the start alone.
    """
    rng = np.random.default_rng(0)
    w1, w2 = (rng.standard_normal((size, size)) / size**0.5 for _ in range(2))
    u, _, vt = np.linalg.svd(w2 @ w1)
    i = 0 if component == "top" else size - 1
    return TwoLayer(jnp.asarray(w1), jnp.asarray(w2), jnp.asarray(5 * np.outer(u[:, i], vt[i])))


def init_scale(size: int, rank: int, seeds: int, scales: int) -> Preset:
    """Loss, alignment and norm over time for several scales and both starts (Xu, Fig. 1)."""
    problem = misaligned_layers(size)
    first, second = problem.alignment_matrices()
    growing = spectra.top_direction(first)
    times = jnp.linspace(0.0, 12.0, 121)

    def observe(factors: TwoLayerFactors) -> dict[str, jax.Array]:
        return {
            "misalignment": spectra.top_misalignment(factors.first, growing),
            "norm": spectra.factor_norm(factors.first),
        }

    def start(kind: str, scale: jax.Array, key: jax.Array) -> TwoLayerFactors:
        if kind == "spectral":
            make = functools.partial(initializers.spectral, rank=rank, scale=scale, directions=1)
            return TwoLayerFactors(make(first), make(second))
        one, two = jax.random.split(key)
        shapes = problem.shape
        return TwoLayerFactors(
            initializers.small(one, shapes[0], rank, scale),
            initializers.small(two, shapes[1], rank, scale),
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
        {"preset": "init-scale", "size": size, "rank": rank},
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
