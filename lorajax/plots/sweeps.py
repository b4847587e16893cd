"""Figures of sweeps: curves with a band of one standard deviation, heat maps, phase diagrams."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorajax.plots import figure, save, style
from lorajax.sweeps.store import ATTRIBUTE


def _over(values: xarray.DataArray, dim: str) -> tuple[xarray.DataArray, xarray.DataArray]:
    with warnings.catch_warnings():
        # A cell whose lanes all failed, or never got there, is empty: that is what is shown.
        warnings.simplefilter("ignore", RuntimeWarning)
        return values.mean(dim), values.std(dim)


def curves(
    axes: Axes,
    values: xarray.DataArray,
    *,
    x: str = "time",
    by: str = "scale",
    over: str = "seed",
    log: bool = True,
    line: str = "-",
    prefix: str = "",
) -> None:
    """Mean curves with bands of one standard deviation.

    Args:
      axes: to draw on.
      values: with the dimensions `x`, `by` and `over`.
      x: dimension along the abscissa.
      by: dimension of which each coordinate gets a curve.
      over: dimension of the repetitions. On a logarithmic ordinate mean and deviation are those of
        the logarithm, so that the band cannot reach below 0.
      log: whether the ordinate is logarithmic.
      line: style of the lines.
      prefix: of the labels.
    """
    if log:
        values = xarray.apply_ufunc(np.log10, values.where(values > 0))
    mean, deviation = _over(values, over)
    for i in range(values.sizes[by]):
        here, spread = mean.isel({by: i}).values, deviation.isel({by: i}).values
        low, high = here - spread, here + spread
        if log:
            here, low, high = 10**here, 10**low, 10**high
        label = f"{prefix}{by} {float(values[by][i]):.0e}"
        axes.plot(values[x].values, here, line, color=f"C{i}", label=label)
        axes.fill_between(values[x].values, low, high, alpha=0.2, color=f"C{i}", lw=0)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(str(values.name))


def heat(
    axes: Axes, values: xarray.DataArray, *, x: str, y: str, over: str = "seed", label: str = ""
) -> None:
    """A heat map of the mean over repetitions; a cell without a value stays empty.

    Args:
      axes: to draw on.
      values: with the dimensions `x`, `y` and `over`.
      x: dimension along the abscissa.
      y: dimension along the ordinate.
      over: dimension of the repetitions.
      label: of the color bar.
    """
    mean = _over(values, over)[0].transpose(y, x)
    image = axes.imshow(mean.values, origin="lower", aspect="auto", cmap="viridis")
    for name, axis in ((x, axes.xaxis), (y, axes.yaxis)):
        count = mean.sizes[name]
        ticks = range(0, count, max(1, count // 8))
        axis.set_ticks(list(ticks), [_tick(mean[name].values[i]) for i in ticks])
        axis.set_label_text(name)
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, label=label or str(values.name))


def _tick(value) -> str:
    return f"{value:.0e}" if isinstance(value, float) and value < 0.01 else f"{value:.3g}"


_FEW = 4
TOGETHER = 1e-5


def init_scale_figure(found: xarray.Dataset) -> Figure:
    """Figures 1, 3 and 4 of Xu et al.: loss, alignment, and both with the norm for one scale."""
    fig, (left, middle, right) = figure(1, 3)
    target = found.attrs.get(ATTRIBUTE, {}).get("settings", {}).get("target")
    decades = np.unique(np.linspace(0, found.sizes["scale"] - 1, _FEW).round().astype(int))
    for kind, line in (("small", "-"), ("spectral", "--")):
        here = found.sel(start_kind=kind)
        if kind == "spectral":
            here = here.isel(seed=[0])  # nothing in it is drawn
        few = here.isel(scale=decades)
        curves(left, few["losses"], line=line, prefix=f"{kind}, ")
        if kind == "small":
            curves(middle, few["misalignment"], prefix=f"{kind}, ")
    near = int(np.argmin(np.abs(np.log(found["scale"].values / TOGETHER))))
    one = found.sel(start_kind="small").isel(scale=[near])
    for i, (name, label) in enumerate(
        (("losses", "loss"), ("misalignment", "1 − cos"), ("norm", "‖Z₁‖"))
    ):
        values = xarray.apply_ufunc(np.log10, one[name].where(one[name] > 0))
        mean, deviation = (x.values[0] for x in _over(values.transpose("scale", ...), "seed"))
        time = one["time"].values
        right.semilogy(time, 10**mean, color=f"C{i}", label=label)
        right.fill_between(
            time, 10 ** (mean - deviation), 10 ** (mean + deviation), color=f"C{i}", alpha=0.2, lw=0
        )
    for axes, title in (
        (left, f"loss, {target} target" if target else "loss"),
        (middle, "1 − cos(γ₁, top singular vector of Z₁)"),
        (right, f"α = {float(found['scale'].values[near]):.0e}, small start"),
    ):
        axes.set_title(title)
        axes.set_xlabel("time [1/s]")
        axes.set_ylabel("")
        axes.legend(fontsize="x-small")
    return fig


def _rank_scale(found: xarray.Dataset):
    fig, (left, right) = figure(1, 2)
    loss = found["losses"].isel(time=-1).clip(1e-32)
    loss = xarray.apply_ufunc(np.log10, loss)
    heat(left, loss, x="rank", y="scale", label="log10 of the loss at the end")
    last = found["half_times"].isel(mode=-1)
    heat(right, last, x="rank", y="scale", label="half-time of the last mode")
    left.set_title("what a rank reaches")
    right.set_title("when the last mode is learned")
    return fig


def _spectrum_gap(found: xarray.Dataset):
    fig, axes = figure()
    heat(axes, found["delay"], x="ratio", y="scale", label="delay between the half-times")
    axes.set_title("two modes, s₂/s₁ = ratio")
    return fig


def _rank_rule(found: xarray.Dataset):
    rules = ("c_over_n", "split_half", "random_signs")
    fig, panels = figure(1, len(rules))
    for axes, name in zip(panels, rules, strict=True):
        heat(axes, found[name], x="samples", y="noise", label="estimated rank")
        axes.set_title(name)
    return fig


_FIGURES: dict[str, Callable] = {
    "init-scale": init_scale_figure,
    "rank-scale": _rank_scale,
    "spectrum-gap": _spectrum_gap,
    "rank-rule": _rank_rule,
}


def draw(found: xarray.Dataset, path: str | Path) -> Path:
    """Draws the figure of a preset's sweep.

    Args:
      found: what `sweep` returned or `open_sweep` opened, complete or not.
      path: of the figure; its ending names the format.

    Returns:
      The path.

    Raises:
      ValueError: for a sweep of no preset; draw it with `curves` and `heat`.
    """
    settings = found.attrs.get(ATTRIBUTE, {}).get("settings", {})
    name = settings.get("preset")
    if name not in _FIGURES:
        raise ValueError(
            f"the sweep is of the preset {name!r}; the figures are those of {', '.join(_FIGURES)}."
        )
    with style():
        return save(_FIGURES[name](found), path)
