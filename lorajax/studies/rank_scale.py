"""Losses and half-times of every mode over rank and scale: what extra rank costs and gains."""

from typing import Any

from lorajax.studies.base import Parameter, Run, Study


def make(
    size: int,
    ranks: tuple[int, ...],
    start: str,
    singular_values: tuple[float, ...],
    scales: tuple[float, ...],
    seeds: tuple[int, ...],
) -> Run:
    """The sweep; see `STUDY` for the parameters."""
    import jax
    import jax.numpy as jnp

    from lorajax.flows.sweeping import plan_flows
    from lorajax.problems import MatrixFactorization

    problem = MatrixFactorization.from_spectrum(jax.random.key(7), (size, size), singular_values)
    found = plan_flows(
        problem,
        start,
        {"rank": list(ranks), "scale": list(scales), "seed": list(seeds)},
        jnp.linspace(0.0, 40.0 / min(singular_values), 401),
        observe=("half_times", "losses", "effective_rank"),
    )
    return Run(found.function, found.axes, found.options, str(found))


def figure(found: Any) -> Any:
    """Final losses, and the half-times of the last mode, over rank and scale."""
    import numpy as np
    import xarray

    from lorajax import plots
    from lorajax.plots.sweeps import heat

    fig, (left, right) = plots.figure(1, 2)
    loss = xarray.apply_ufunc(np.log10, found["losses"].isel(time=-1).clip(1e-32))
    heat(left, loss, x="rank", y="scale", label="log₁₀ of the loss at the end")
    last = found["half_times"].isel(target_mode=-1)
    heat(right, last, x="rank", y="scale", label="half-time of the last mode [1/s]")
    left.set_title("what a rank reaches")
    right.set_title("when the last mode is learned")
    return fig


STUDY = Study(
    "rank-scale",
    "ranks against initialization scales",
    (
        Parameter("size", "side of the update", 128, least=1),
        Parameter("ranks", "of the adapter", tuple(range(1, 9)), least=1),
        Parameter("start", "by name; one with a scale", "orthogonal", str),
        Parameter(
            "singular_values", "of the target, decreasing", (4.0, 3.0, 2.0, 1.0), float, above=0
        ),
        Parameter(
            "scales",
            "root-mean-square norms of A's columns at the start",
            (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8),
            float,
            above=0,
        ),
        Parameter("seeds", "repetitions, which differ in the start", tuple(range(10)), least=0),
    ),
    make,
    figure,
    "losses",
)
