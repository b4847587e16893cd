"""What figures of sweeps are made of: curves with bands of one standard deviation, heat maps."""

import warnings

import numpy as np
import xarray
from matplotlib.axes import Axes

from lorajax.plots import explain


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
    label: str = "",
) -> Axes:
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
      label: of the ordinate; the variable's name if empty. Time is in 1/s.

    Returns:
      The Axes, both of its axes named; a legend says what the bands are.
    """
    if log:
        values = xarray.apply_ufunc(np.log10, values.where(values > 0))
    mean, deviation = _over(values, over)
    for i in range(values.sizes[by]):
        here, spread = mean.isel({by: i}).values, deviation.isel({by: i}).values
        low, high = here - spread, here + spread
        if log:
            here, low, high = 10**here, 10**low, 10**high
        name = f"{prefix}{by} {float(values[by][i]):.0e}"
        axes.plot(values[x].values, here, line, color=f"C{i}", label=name)
        shown = explain(axes, values.sizes[over], f"{over}s", log)
        at = values[x].values
        axes.fill_between(at, low, high, alpha=0.2, color=f"C{i}", lw=0, label=shown)
    if log:
        axes.set_yscale("log")
    axes.set(xlabel=_named(x), ylabel=label or str(values.name))
    return axes


def band(
    axes: Axes,
    values: xarray.DataArray,
    *,
    x: str = "time",
    over: str = "seed",
    color: str = "C0",
    label: str = "",
    log: bool = True,
) -> Axes:
    """One mean curve with its band of one standard deviation.

    Args:
      axes: to draw on.
      values: with the dimensions `x` and `over`, positive; others are left out.
      x: dimension along the abscissa.
      over: dimension of the repetitions.
      color: of curve and band.
      label: of the curve.
      log: whether the ordinate is logarithmic; mean and deviation are then those of the logarithm.

    Returns:
      The Axes, both of its axes named where they had no name; a legend says what the band is.
    """
    if log:
        values = xarray.apply_ufunc(np.log10, values.where(values > 0), keep_attrs=True)
    mean, deviation = (each.values for each in _over(values, over))
    curves, at = [mean, mean - deviation, mean + deviation], values[x].values
    if log:
        curves = [10**curve for curve in curves]
        axes.set_yscale("log")
    axes.plot(at, curves[0], color=color, label=label)
    shown = explain(axes, values.sizes[over], f"{over}s", log)
    axes.fill_between(at, curves[1], curves[2], color=color, alpha=0.2, lw=0, label=shown)
    axes.set_xlabel(axes.get_xlabel() or _named(x))
    axes.set_ylabel(axes.get_ylabel() or str(values.name))
    return axes


def heat(
    axes: Axes, values: xarray.DataArray, *, x: str, y: str, over: str = "seed", label: str = ""
) -> Axes:
    """A heat map of the mean over repetitions; a cell without a value stays empty.

    Args:
      axes: to draw on.
      values: with the dimensions `x`, `y` and `over`.
      x: dimension along the abscissa.
      y: dimension along the ordinate.
      over: dimension of the repetitions.
      label: of the color bar, which says as well what it is the mean over.

    Returns:
      The Axes, both of its axes named.
    """
    repeated = values.sizes[over]
    mean = _over(values, over)[0].transpose(y, x)
    image = axes.imshow(mean.values, origin="lower", aspect="auto", cmap="viridis")
    for name, axis in ((x, axes.xaxis), (y, axes.yaxis)):
        count = mean.sizes[name]
        ticks = range(0, count, max(1, count // 8))
        axis.set_ticks(list(ticks), [_tick(mean[name].values[i]) for i in ticks])
        axis.set_label_text(name)
    assert axes.figure is not None
    bar = axes.figure.colorbar(image, ax=axes)
    shown = label or str(values.name)
    bar.set_label(f"{shown}\n(mean over {repeated} {over}s)" if repeated > 1 else shown)
    return axes


def _named(dim: str) -> str:
    return "time [1/s]" if dim == "time" else dim


def _tick(value) -> str:
    return f"{value:.0e}" if isinstance(value, float) and value < 0.01 else f"{value:.3g}"
