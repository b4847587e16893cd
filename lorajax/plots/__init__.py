"""Figures: one style for all of them, drawn without a display.

A figure is made by `figure`, drawn on by a function that takes its Axes, and saved by `save`.
Nothing here touches matplotlib's global state or pyplot, so that importing lorajax in a notebook
leaves the notebook's own style alone.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

STYLE: dict[str, Any] = {
    "axes.prop_cycle": cycler(
        # Okabe–Ito: told apart with any color vision, and in gray.
        color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    ),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": "medium",
    "font.size": 9.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 110,
}


@contextmanager
def style() -> Iterator[None]:
    """The style of all figures, for the duration of a block."""
    with matplotlib.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        yield


def figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (5.2, 3.4)
) -> tuple[Figure, Any]:
    """A figure with a grid of panels in the house's style.

    Args:
      rows: panels downwards.
      columns: panels across.
      size: of one panel, in inches.

    Returns:
      The Figure and its Axes (an array of them where there is more than one).
    """
    with style():
        fig = Figure(figsize=(size[0] * columns, size[1] * rows))
        FigureCanvasAgg(fig)
        return fig, fig.subplots(rows, columns)


def band(
    axes: Axes,
    x: Float[np.ndarray, " t"] | Int[np.ndarray, " t"],
    curves: Float[np.ndarray, "n t"],
    line: str = "-",
    *,
    color: str,
    label: str | None = None,
    least: float = 1e-9,
) -> None:
    """The mean of several curves, and one standard deviation around it.

    Args:
      axes: to draw on.
      x: where the curves are known.
      curves: one a row.
      line: style of the mean.
      color: of the mean and of the band.
      label: of the mean.
      least: where the band ends below at the latest, for logarithmic axes.
    """
    mean, deviation = curves.mean(0), curves.std(0)
    axes.plot(x, mean, line, color=color, label=label)
    low = np.maximum(mean - deviation, least)
    axes.fill_between(x, low, mean + deviation, color=color, alpha=0.2)


def save(fig: Figure, path: str | Path) -> Path:
    """Writes a figure to a file whose ending names the format, and returns the path."""
    path = Path(path)
    with style():
        _thin(fig)
        fig.savefig(path, metadata=_plain(path.suffix))
    return path


def _thin(fig: Figure) -> None:
    """Keeps the labels of logarithmic axes apart: powers of ten, or 1, 2, 5 within a decade."""
    for axes in fig.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() != "log":
                continue
            low, high = sorted(axis.get_view_interval())
            if sum(low <= tick <= high for tick in axis.get_majorticklocs()) < 2:
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())


def _plain(suffix: str) -> dict[str, Any]:
    # Without dates and versions, so that the same data gives the same bytes.
    return {"Software": None} if suffix == ".png" else {"Date": None} if suffix == ".svg" else {}


def to_png(draw: Callable[[Axes], None], *, size: tuple[float, float] = (5.2, 3.4)) -> bytes:
    """PNG bytes of a single panel that `draw` fills."""
    buffer = io.BytesIO()
    with style():
        fig, axes = figure(size=size)
        draw(axes)
        _thin(fig)
        fig.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
