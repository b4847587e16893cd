"""Ranks that the rules estimate from regression gradients, over label noise and samples."""

from typing import Any

from lorajax.studies.base import Parameter, Run, Study

RULES = ("c_over_n", "split_half", "random_signs")


def make(
    size: int,
    rank: int,
    samples: tuple[int, ...],
    noises: tuple[float, ...],
    seeds: tuple[int, ...],
) -> Run:
    """The sweep; see `STUDY` for the parameters."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lorajax import ranks
    from lorajax.problems import MatrixFactorization

    outputs = max(2, 2 * size // 3)
    target = MatrixFactorization.from_spectrum(
        jax.random.key(7), (size, outputs), tuple(np.linspace(2.0, 1.0, rank))
    ).target

    def estimate(samples: int, noise: Any, key: Any) -> dict[str, Any]:
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

    return Run(
        estimate,
        {"samples": list(samples), "noise": np.asarray(noises), "seed": list(seeds)},
        {"key": jax.random.key(0), "static": ("samples",), "chunk": 64},
        "gradients of linear regression (no flow is run)",
    )


def figure(found: Any) -> Any:
    """Estimated ranks over samples and noise, one map a rule."""
    from lorajax import plots
    from lorajax.plots.sweeps import heat

    fig, panels = plots.figure(1, len(RULES))
    for axes, name in zip(panels, RULES, strict=True):
        heat(axes, found[name], x="samples", y="noise", label="estimated rank")
        axes.set_title(name)
    return fig


STUDY = Study(
    "rank-rule",
    "rank rules over label noise and samples",
    (
        Parameter("size", "number of inputs; two thirds as many outputs", 60, least=2),
        Parameter("rank", "of the target", 5, least=1),
        Parameter("samples", "of the regression", (250, 500, 1000, 2000, 4000), least=2),
        Parameter(
            "noises",
            "standard deviations of the labels' noise",
            tuple(0.25 * i for i in range(1, 9)),
            float,
            least=0,
        ),
        Parameter("seeds", "repetitions with other data and noise", tuple(range(20)), least=0),
    ),
    make,
    figure,
    "split_half",
)
