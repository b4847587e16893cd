"""What figures of sweeps are made of: curves with a band of one standard deviation, heat maps."""

import warnings

import numpy as np
import xarray
from matplotlib.axes import Axes


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


def band(
    axes: Axes,
    values: xarray.DataArray,
    *,
    x: str = "time",
    over: str = "seed",
    color: str = "C0",
    label: str = "",
) -> None:
    """One mean curve with its band, on a logarithmic ordinate.

    Args:
      axes: to draw on.
      values: with the dimensions `x` and `over`, positive; others are left out.
      x: dimension along the abscissa.
      over: dimension of the repetitions; mean and deviation are those of the logarithm.
      color: of curve and band.
      label: of the curve.
    """
    logs = xarray.apply_ufunc(np.log10, values.where(values > 0))
    mean, deviation = (each.values for each in _over(logs, over))
    axes.semilogy(values[x].values, 10**mean, color=color, label=label)
    axes.fill_between(
        values[x].values,
        10 ** (mean - deviation),
        10 ** (mean + deviation),
        color=color,
        alpha=0.2,
        lw=0,
    )


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
