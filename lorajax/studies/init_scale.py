"""Loss, alignment and norm of two frozen layers over time, for several scales and starts."""

from typing import Any

from lorajax.studies.base import Parameter, Run, Study

FEW = 4
TOGETHER = 1e-5


def make(
    size: int,
    rank: int,
    target: str,
    starts: tuple[str, ...],
    scales: tuple[float, ...],
    seeds: tuple[int, ...],
) -> Run:
    """The sweep of Xu et al., figures 1, 3 and 4; see `STUDY` for the parameters."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from lorajax import initializers, laws, spectra
    from lorajax.flows import lanes, start_of
    from lorajax.problems import TwoLayer

    problem = TwoLayer.pretrained(jax.random.key(7), size, target)
    growing = spectra.top_direction(problem.alignment_matrices()[0])
    # Until the smallest start has escaped, and as long again for what comes after.
    fast = max(float(x) for x in laws.growth_rates(problem))
    decades = max(-np.log10(min(scales)), 0.0)
    times = jnp.linspace(0.0, 2 * (decades * np.log(10) + 8) / fast, 601)
    # The paper's spectral start fills one direction.
    resolved = {name: initializers.resolve(name) for name in starts}
    if "spectral" in resolved:
        resolved["spectral"] = functools.partial(initializers.spectral, directions=1)

    def observe(factors: Any) -> dict[str, Any]:
        return {
            "misalignment": spectra.top_misalignment(factors.first, growing),
            "norm": spectra.factor_norm(factors.first),
        }

    def flow(start: str, scale: Any, key: Any) -> dict[str, Any]:
        def one(scale: Any, key: Any) -> Any:
            return start_of(problem, resolved[start], key=key, rank=rank, scale=scale)

        factors = jax.vmap(one)(scale, key)
        found = lanes.two_layer(problem, factors, times, observe=observe, rtol=1e-9)
        return {**found.observed, "status": found.status}

    for name in starts:  # what does not fit is said before anything is compiled
        start_of(problem, resolved[name], key=jax.random.key(0), rank=rank, scale=scales[0])
    return Run(
        flow,
        {"start": list(starts), "scale": np.asarray(scales), "seed": list(seeds)},
        {
            "key": jax.random.key(0),
            "fold": ("seed",),
            "static": ("start",),
            "batched": True,
            "dims": dict.fromkeys(("losses", "misalignment", "norm"), ("time",)),
            "coords": {"time": np.asarray(times)},
        },
        "two-layer ODE (two frozen layers have no reduction; their products fold all lanes)",
    )


def statements(found: Any) -> dict[str, Any]:
    """What the figures of Xu et al. show, in numbers.

    Args:
      found: the sweep's data set, with the starts "small" and "spectral".

    Returns:
      Medians over the repetitions, one entry a scale, by name: "escape" (time at which the loss
      falls below 0.9 of its start), "least misalignment" and "final loss" of the small start;
      "spectral final loss" and "spectral steadiness" of the spectral one. Losses are relative to
      the start's. Steadiness is the slope of ln loss in the later half of its fall from 1e-3 to
      1e-13 over that in the earlier half: 1 for an exponential, less for a power of the time, NaN
      where the loss does not get there.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lorajax import spectra

    small, directed = found.sel(start="small"), found.sel(start="spectral").isel(seed=0)
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
        "spectral steadiness": np.array([steadiness(times, x) for x in fallen]),
    }


def steadiness(times: Any, losses: Any) -> float:
    """Slope of ln loss in the later half of its fall over that in the earlier half.

    Args:
      times: shape (t,).
      losses: relative to the start's, shape (t,).

    Returns:
      1 for an exponential, less for a power of the time, NaN where the loss stays above 1e-13.
    """
    import numpy as np

    inside = np.flatnonzero((losses < 1e-3) & (losses > 1e-13))
    if inside.size < 8 or losses.min() > 1e-13:
        return float("nan")
    early, late = np.array_split(inside, 2)
    slopes = [np.polyfit(times[part], np.log(losses[part]), 1)[0] for part in (early, late)]
    return float(slopes[1] / slopes[0])


def figure(found: Any) -> Any:
    """Loss and alignment for a few scales, and both with the norm for one."""
    import numpy as np

    from lorajax import plots
    from lorajax.plots.sweeps import band, curves
    from lorajax.sweeps.store import ATTRIBUTE

    fig, (left, middle, right) = plots.figure(1, 3, size=(3.4, 2.9))
    target = found.attrs.get(ATTRIBUTE, {}).get("settings", {}).get("target")
    decades = np.unique(np.linspace(0, found.sizes["scale"] - 1, FEW).round().astype(int))
    kinds = [str(kind) for kind in found["start"].values]
    for kind, line in zip(kinds, ("-", "--", ":", "-."), strict=False):
        here = found.sel(start=kind)
        if kind == "spectral":
            here = here.isel(seed=[0])  # nothing in it is drawn
        few = here.isel(scale=decades)
        curves(left, few["losses"], line=line, prefix=f"{kind}, ", label="loss")
        if kind == kinds[0]:
            curves(middle, few["misalignment"], prefix=f"{kind}, ", label="1 − cos")
    near = int(np.argmin(np.abs(np.log(found["scale"].values / TOGETHER))))
    one = found.sel(start=kinds[0]).isel(scale=near)
    labels = {"losses": "loss", "misalignment": "1 − cos", "norm": "‖Z₁‖"}
    for i, (name, label) in enumerate(labels.items()):
        band(right, one[name], color=f"C{i}", label=label)
    for axes, title in (
        (left, f"loss, {target} target" if target else "loss"),
        (middle, "angle of γ₁ and the top vector of Z₁"),
        (right, f"α = {float(found['scale'].values[near]):.0e}, {kinds[0]} start"),
    ):
        axes.set_title(title)
    low, high = right.get_ylim()
    right.set(ylabel="loss, 1 − cos, ‖Z₁‖", ylim=(low / 1e3, high))  # room for the legend
    right.legend()
    # The curves of the two other panels have the same names.
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


STUDY = Study(
    "init-scale",
    "two frozen layers over the initialization scale (Xu et al. 2025, Fig. 1, 3, 4)",
    (
        Parameter("size", "side of both layers", 32, least=1),
        Parameter("rank", "of both adapters", 4, least=1),
        Parameter(
            "target",
            "what the new target adds: along random vectors (Fig. 1), the top (Fig. 3) or the "
            "bottom (Fig. 4) principal component",
            "generic",
            str,
            choices=("generic", "top", "bottom"),
        ),
        Parameter("starts", "by name; those with a scale", ("small", "spectral"), str),
        Parameter(
            "scales",
            "root-mean-square norms of A's columns at the start",
            (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
            float,
            above=0,
        ),
        Parameter("seeds", "repetitions, which differ in the start", tuple(range(30)), least=0),
    ),
    make,
    figure,
    "losses",
    statements,
)
