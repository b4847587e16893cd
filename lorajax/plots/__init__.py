"""Figures: one style for all of them, drawn without a display.

A figure is made by `figure`, drawn on by functions that take an Axes and return it, and saved by
`save`. A panel is as wide as a column of a paper, and no letter on it is smaller than 8 points
there. Nothing here touches matplotlib's global state or pyplot, so that importing lorajax in a
notebook leaves the notebook's own style alone; `matplotlib.style.use(plots.STYLE)` takes this one.
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

COLUMN = (3.4, 2.5)
"""Width and height of a panel in inches: a column of a paper."""
SHOWN = 120
"""Pixels of a page that an inch is shown as: letters are then as large as the page's own."""
VECTOR = ("svg", "pdf")
"""Formats of figures beside PNG."""

STYLE: dict[str, Any] = {
    "axes.prop_cycle": cycler(
        # Okabe–Ito: told apart with any color vision, and in gray.
        color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    ),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    # In points, at the size that a figure is made in: what is smaller cannot be read in print.
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.title_fontsize": 8.0,
    "figure.titlesize": 8.0,
    # In a small panel a legend may have to stand on curves: its ground keeps it readable.
    "legend.frameon": True,
    "legend.framealpha": 0.8,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.borderpad": 0.2,
    "legend.handlelength": 1.6,
    "legend.labelspacing": 0.3,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.0,
    "figure.constrained_layout.use": True,
    "figure.figsize": COLUMN,
    "savefig.dpi": 200,
    # Letters stay letters: found by a search, and in the font of whoever reads them.
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    # Names in an SVG that follow from what is drawn, so that the same data gives the same bytes.
    "svg.hashsalt": "lorajax",
}
"""Settings of matplotlib: colors told apart with any color vision, fonts to be read in print."""


@contextmanager
def style() -> Iterator[None]:
    """The style of all figures, for the duration of a block."""
    with matplotlib.rc_context(STYLE):  # pyright: ignore[reportArgumentType]
        yield


class _Shown(Figure):
    """A Figure that a notebook shows where it is a cell's last value, without pyplot."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        wide, high = (round(SHOWN * inches) for inches in self.get_size_inches())
        return _png(self), {"width": wide, "height": high}


def figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] = COLUMN
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
        fig = _Shown(figsize=(size[0] * columns, size[1] * rows))
        FigureCanvasAgg(fig)
        return fig, fig.subplots(rows, columns)


def explain(axes: Axes, count: int, what: str = "curves", log: bool = False) -> str | None:
    """What a band shows, for the first one on an Axes: its entry in the legend.

    Args:
      axes: that the band is drawn on.
      count: of repetitions.
      what: they are.
      log: whether mean and deviation are those of the logarithm.

    Returns:
      A label for the band; None where there is one already, or nothing to repeat.
    """
    text = f"± 1 sd{' of the log' if log else ''}, {count} {what}"
    there = any(artist.get_label() == text for artist in axes.collections)
    return None if there or count < 2 else text


def band(
    axes: Axes,
    x: Float[np.ndarray, " t"] | Int[np.ndarray, " t"],
    curves: Float[np.ndarray, "n t"],
    line: str = "-",
    *,
    color: str,
    label: str | None = None,
    least: float = 1e-9,
    what: str = "seeds",
) -> Axes:
    """The mean of several curves, and one standard deviation around it.

    Args:
      axes: to draw on; naming the axes is the caller's.
      x: where the curves are known.
      curves: one a row.
      line: style of the mean.
      color: of the mean and of the band.
      label: of the mean. The first band has an entry of its own, which says what it is.
      least: where the band ends below at the latest, for logarithmic axes.
      what: one row differs from the other in, for that entry.

    Returns:
      The Axes.
    """
    mean, deviation = curves.mean(0), curves.std(0)
    axes.plot(x, mean, line, color=color, label=label)
    low, shown = np.maximum(mean - deviation, least), explain(axes, len(curves), what)
    axes.fill_between(x, low, mean + deviation, color=color, alpha=0.2, lw=0, label=shown)
    return axes


def save(fig: Figure, path: str | Path, *others: str) -> Path:
    """Writes a figure to a file, and returns the path.

    Args:
      fig: what to write.
      path: of the file; its ending names the format, such as `.png`, `.svg` or `.pdf`.
      *others: endings of further files beside it.

    Returns:
      The path of the first file. The same data gives the same bytes in all three formats.
    """
    path = Path(path)
    with style():
        _thin(fig)
        for each in (path, *(path.with_suffix(ending) for ending in others)):
            fig.savefig(each, metadata=_plain(each.suffix))
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
    dates = {".png": "Software", ".svg": "Date", ".pdf": "CreationDate"}
    return {dates[suffix]: None} if suffix in dates else {}


def _png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    with style():
        _thin(fig)
        fig.savefig(buffer, format="png", metadata=_plain(".png"))
    return buffer.getvalue()


def width_on_page(png: bytes) -> int:
    """How wide a page shows a figure of `save` or `to_png`, in its pixels; PNGs have more of them.

    Args:
      png: of the house's style; the first 24 bytes are enough.

    Returns:
      The width at which the figure's letters are as large as the page's own.
    """
    pixels = int.from_bytes(png[16:20], "big")  # where a PNG has its width
    return round(pixels * SHOWN / STYLE["savefig.dpi"])


def panel(draw: Callable[[Axes], Any], *, size: tuple[float, float] = COLUMN) -> Figure:
    """A figure of a single panel that `draw` fills, such as that of a claim's evidence.

    Args:
      draw: takes the Axes.
      size: in inches.

    Returns:
      The figure.
    """
    with style():
        fig, axes = figure(size=size)
        draw(axes)
    return fig


def to_png(draw: Callable[[Axes], Any], *, size: tuple[float, float] = COLUMN) -> bytes:
    """PNG bytes of a single panel that `draw` fills."""
    return _png(panel(draw, size=size))
