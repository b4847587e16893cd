"""Half-times of two modes as their singular values approach one another, over scales."""

from typing import Any

from lorajax.studies.base import Parameter, Run, Study


def make(
    size: int,
    rank: int,
    ratios: tuple[float, ...],
    scales: tuple[float, ...],
    seeds: tuple[int, ...],
) -> Run:
    """The sweep; see `STUDY` for the parameters."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lorajax import initializers, spectra
    from lorajax.exact import lanes
    from lorajax.flows import STATUS
    from lorajax.flows.plan import choose
    from lorajax.problems import MatrixFactorization

    problem = MatrixFactorization.from_spectrum(jax.random.key(7), (size, size), (1.0, 0.5))
    times = jnp.linspace(0.0, 200.0, 801)

    def start(key: Any, scale: Any) -> Any:
        return initializers.orthogonal(key, problem.shape, rank, scale)

    def flow(ratio: Any, scale: Any, key: Any) -> dict[str, Any]:
        s = jnp.stack([jnp.ones_like(ratio), ratio], axis=1)
        along = jnp.einsum("mk,lmr->lkr", problem.u, jax.vmap(start)(key, scale).a)
        values = lanes.singular_values(lanes.one_sided(s, scale**2, along), times)
        values = jnp.pad(values, ((0, 0), (0, 0), (0, 2 - values.shape[-1])))
        hit = jax.vmap(lambda v, half: spectra.hitting_times(times, v, half))(values, s / 2)
        # Where the modes meet, the larger singular value belongs to neither of them for long.
        return {
            "half_times": hit,
            "delay": hit[:, 1] - hit[:, 0],
            "status": jnp.full(scale.shape, STATUS.index("converged"), jnp.int32),
        }

    engine, reason = choose(problem, start(jax.random.key(0), scales[0]))
    return Run(
        flow,
        {"ratio": np.asarray(ratios), "scale": np.asarray(scales), "seed": list(seeds)},
        {
            "key": jax.random.key(0),
            "fold": ("seed",),
            "batched": True,
            "dims": {"half_times": ("mode",)},
            "coords": {"mode": [1, 2]},
        },
        f"{engine} ({reason})",
    )


def figure(found: Any) -> Any:
    """The delay between the half-times over ratio and scale."""
    from lorajax import plots
    from lorajax.plots.sweeps import heat

    fig, axes = plots.figure()
    heat(axes, found["delay"], x="ratio", y="scale", label="delay of the half-times [1/s₁]")
    axes.set_title("two modes, s₂/s₁ = ratio")
    return fig


STUDY = Study(
    "spectrum-gap",
    "two modes whose singular values approach, from an orthogonal start",
    (
        Parameter("size", "side of the update", 64, least=2),
        Parameter("rank", "of the adapter", 4, least=1),
        Parameter(
            "ratios",
            "of the second singular value to the first, at most 1",
            (*(i * (0.9 / 18) + 0.1 for i in range(18)), 1.0),
            float,
            above=0,
        ),
        Parameter(
            "scales",
            "norms of A's columns at the start",
            (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8),
            float,
            above=0,
        ),
        Parameter("seeds", "repetitions, which differ in the start", tuple(range(10)), least=0),
    ),
    make,
    figure,
    "delay",
)
