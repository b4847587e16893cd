"""Flows of a matrix factorization over starts, scales, ranks and seeds of your own."""

from typing import Any

from lorajax.studies.base import Parameter, Run, Study

SCALES = (1e-1, 1e-2, 1e-3)


def make(
    starts: tuple[str, ...],
    scales: tuple[float, ...],
    ranks: tuple[int, ...],
    shape: tuple[int, ...],
    singular_values: tuple[float, ...],
    seeds: tuple[int, ...],
    until: float | None,
    observe: tuple[str, ...],
) -> Run:
    """The sweep; see `STUDY` for the parameters."""
    import math

    import jax
    import numpy as np

    from lorajax import initializers
    from lorajax.flows.sweeping import plan_flows
    from lorajax.problems import MatrixFactorization

    if len(shape) != 2:
        raise ValueError(f"shape is {shape}; give two numbers, rows and columns of the update.")
    asked = [initializers.asks_for(name) for name in starts]
    if not scales and all("scale" in each for each in asked):
        scales = SCALES
    m, n = map(int, shape)
    problem = MatrixFactorization.from_spectrum(jax.random.key(7), (m, n), singular_values)
    if until is None:
        # A mode grows as e^{st} from the scale of the start; as long again for what comes after.
        last, least = min(singular_values), min((*scales, 1.0))
        until = 2 * (max(math.log(last**0.5 / least), 0.0) + 4) / last
    axes: dict[str, Any] = {"scale": list(scales)} if scales else {}
    axes |= {"rank": list(ranks), "seed": list(seeds)}
    planned = plan_flows(
        problem,
        starts[0] if len(starts) == 1 else starts,
        axes,
        np.linspace(0.0, until, 401),
        observe=observe,
    )
    return Run(planned.function, planned.axes, planned.options, str(planned))


def figure(found: Any) -> Any:
    """The first observable over time (or over the axes), a curve a scale, start and rank."""
    from lorajax import plots
    from lorajax.plots.sweeps import band

    name = next(n for n in found.data_vars if n != "status")
    fig, axes = plots.figure()
    values = found[name]
    inner = next((d for d in values.dims if d in ("mode", "target_mode")), None)
    if inner is not None:
        values = values.isel({inner: 0})
    over = next(d for d in ("time", "scale", "rank") if d in values.dims)
    curves = [d for d in values.dims if d not in (over, "seed")]
    stacked = values.stack(lane=curves) if curves else values.expand_dims("lane")
    for i in range(stacked.sizes["lane"]):
        here = stacked.isel(lane=i)
        label = ", ".join(
            f"{d} {here[d].item() if d in ('start', 'rank') else format(here[d].item(), '.0e')}"
            for d in curves
        )
        band(axes, here, x=over, color=f"C{i % 7}", label=label)
    axes.set(ylabel=name.replace("_", " "), title=f"{name.replace('_', ' ')} over {over}")
    if over == "scale":
        axes.set_xscale("log")
    fig.legend(loc="outside lower center", ncols=2)
    return fig


STUDY = Study(
    "flow",
    "flows from any start over scales, ranks and seeds, for a spectrum of your own",
    (
        Parameter("starts", "by name, such as lora, orthogonal, small, spectral", ("lora",), str),
        Parameter(
            "scales",
            "root-mean-square norms of A's columns at the start (1e-1 1e-2 1e-3 if none are given "
            "and the starts have a scale)",
            (),
            float,
            above=0,
        ),
        Parameter("ranks", "of the adapter", (4,), least=1),
        Parameter("shape", "rows and columns of the update", (60, 40), least=1),
        Parameter("singular_values", "of the target, decreasing", (4.0, 2.0, 1.0), float, above=0),
        Parameter("seeds", "repetitions, which differ in the start", tuple(range(10)), least=0),
        Parameter("until", "last time in 1/s (default until all is learned)", None, float, above=0),
        Parameter(
            "observe",
            "what to look at",
            ("losses", "singular_values"),
            str,
            choices=(
                "losses",
                "singular_values",
                "effective_rank",
                "half_times",
                "misalignment",
                "factor_norm",
            ),
        ),
    ),
    make,
    figure,
    "losses",
)
