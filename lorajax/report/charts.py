"""Line charts as SVG inside a page: dozens in some milliseconds, in the page's own colors.

They follow light, dark and print, and stay sharp at any width, which embedded pixels do not.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lorajax.report.page import Html, element, short

WIDTH, HEIGHT = 320, 196
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 20, 32
MOST_POINTS = 300
COLORS = 6


class Series(NamedTuple):
    """One line of a chart.

    Attributes:
      x: abscissas, increasing.
      y: ordinates; NaN and None are gaps.
      kind: classes: a color `c0` … `c5` or `k`, and `law` (dashed), `faint`.
      label: for the key; empty for none.
      points: whether each number has a dot, for few of them.
    """

    x: Sequence[float | int]
    y: Sequence[float | int | None]
    kind: str = "c0"
    label: str = ""
    points: bool = False


def color(i: int) -> str:
    """The class of the i-th color, from the first again after the last."""
    return f"c{i % COLORS}"


def thinned(x: Sequence[float | int], y: Sequence[float | int]) -> tuple[list[float], list[float]]:
    """At most 300 points of a long curve, each the mean of its neighborhood."""
    count = len(x)
    if count <= MOST_POINTS:
        return [float(v) for v in x], [float(v) for v in y]
    parts = np.array_split(np.arange(count), MOST_POINTS)
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    return [float(xs[p].mean()) for p in parts], [float(ys[p].mean()) for p in parts]


def ticks(low: float | int, high: float | int, most: int = 5) -> list[float]:
    """Round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Logarithms of round numbers: of powers of ten, or of 1, 2, 5 within a decade or two."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    every = max(1, math.ceil((last - first + 1) / 5))
    found = [float(i) for i in range(first, last + 1) if (i - first) % every == 0]
    if len(found) > 2:
        return found
    fine = [i + math.log10(m) for i in range(first - 1, last + 1) for m in (1, 2, 5)]
    fine = [each for each in fine if low <= each <= high]
    return fine if len(fine) > 1 else [math.log10(t) for t in ticks(10**low, 10**high, 3) if t > 0]


def _extent(values: np.ndarray, log: bool) -> tuple[float, float]:
    if not values.size:
        return (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if not log:
        low = min(low, 0.0) if low < 0.4 * high or low < 0 else low
    if high - low < 1e-12 * max(abs(high), 1e-300):
        pad = 0.5 if log else (abs(high) / 2 or 1.0)
        return low - pad, high + pad
    pad = 0.04 * (high - low)
    return (low if low == 0 else low - pad), high + pad


def chart(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    about: str,
    log: bool = False,
    level: float | None = None,
) -> Html:
    """A chart of lines.

    Args:
      series: the lines, those at the back first.
      x: the abscissa's label, with its unit.
      y: the ordinate's.
      about: what is seen, for those who hear the page.
      log: whether the ordinate is logarithmic; values that are not positive are gaps then.
      level: a value that a thin horizontal line marks, if it lies in view.

    Returns:
      An SVG element.
    """
    lines = [(s, np.asarray(s.x, float), _ordinates(s.y, log)) for s in series]
    xs = np.concatenate([a for _, a, _ in lines] or [np.zeros(0)])
    ys = np.concatenate([b[np.isfinite(b)] for _, _, b in lines] or [np.zeros(0)])
    left, right = (float(xs.min()), float(xs.max())) if xs.size else (0.0, 1.0)
    right = right if right > left else left + 1
    low, high = _extent(ys, log)

    def across(value: float) -> float:
        return LEFT + (value - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def down(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    base = HEIGHT - BOTTOM
    parts = [element("text", y, x=2, y=11, class_="title")]
    parts.append(element("text", x, x=WIDTH - RIGHT, y=HEIGHT - 3, text_anchor="end"))
    for tick in _decades(low, high) if log else ticks(low, high):
        at = f"{down(tick):.1f}"
        parts.append(element("path", d=f"M{LEFT} {at}H{WIDTH - RIGHT}", class_="grid"))
        shown = short(10**tick if log else tick)
        place = {"x": LEFT - 5, "y": f"{down(tick) + 3.5:.1f}", "text_anchor": "end"}
        parts.append(element("text", shown, **place))
    for tick in ticks(left, right):
        place = {"x": f"{across(tick):.1f}", "y": base + 13, "text_anchor": "middle"}
        parts.append(element("text", short(tick), **place))
    if level is not None:
        height = math.log10(level) if log and level > 0 else level
        if low <= height <= high:
            at = f"{down(height):.1f}"
            parts.append(element("path", d=f"M{LEFT} {at}H{WIDTH - RIGHT}", class_="level"))
    parts.append(element("path", d=f"M{LEFT} {TOP}V{base}H{WIDTH - RIGHT}", class_="axis"))
    for each, a, b in lines:
        path = _path([across(float(v)) for v in a], [down(float(v)) for v in b])
        if path:
            parts.append(element("path", d=path, class_=f"line {each.kind}"))
        for u, v in zip(a, b, strict=True) if each.points else ():
            if math.isfinite(v):
                at = {"cx": f"{across(float(u)):.1f}", "cy": f"{down(float(v)):.1f}", "r": 2.5}
                parts.append(element("circle", **at, class_=f"dot {each.kind}"))
    box = f"0 0 {WIDTH} {HEIGHT}"
    return element("svg", parts, viewBox=box, role="img", aria_label=about)


def _ordinates(values: Sequence[float | int | None], log: bool) -> np.ndarray:
    found = np.asarray([np.nan if v is None else v for v in values], float)
    found[~np.isfinite(found)] = np.nan
    if log:
        found[~(found > 0)] = np.nan
        return np.log10(found)
    return found


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    words, down = [], False
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            words.append(f"{'L' if down else 'M'}{x:.1f} {y:.1f}")
        down = math.isfinite(y)
    return "".join(words)


def key(series: Sequence[Series]) -> Html | None:
    """What the lines of a chart are; None where none has a label."""
    found = {s.label: s for s in series if s.label}
    if not found:
        return None
    entries = [
        element(
            "span",
            element(
                "svg",
                element("path", d="M0 6H28", class_=f"line {s.kind}"),
                viewBox="0 0 28 12",
                aria_hidden="true",
            ),
            label,
        )
        for label, s in found.items()
    ]
    return element("div", entries, class_="key")


def figure(series: Sequence[Series], *, caption: str = "", **options: object) -> Html:
    """A chart with its key and a caption; options as for `chart`."""
    return element(
        "figure",
        chart(series, **options),  # pyright: ignore[reportArgumentType]
        key(series),
        element("figcaption", caption) if caption else None,
    )


def forest(rows: Sequence[tuple[float, float | None, str]], *, x: str, about: str) -> Html:
    """Differences with their intervals, one below the other, and a line at 0.

    Args:
      rows: mean, half the interval (None for none) and class of each.
      x: the abscissa's label.
      about: what is seen.

    Returns:
      An SVG element.
    """
    ends = [0.0, *(mean + sign * (half or 0) for mean, half, _ in rows for sign in (-1, 1))]
    low, high = min(ends), max(ends)
    pad = 0.06 * (high - low) or 1.0
    low, high = low - pad, high + pad
    base = TOP + 18 * len(rows) + 8

    def across(value: float) -> float:
        return RIGHT + (value - low) / (high - low) * (WIDTH - 2 * RIGHT)

    parts = [element("text", x, x=2, y=11, class_="title")]
    for tick in ticks(low, high):
        at = f"{across(tick):.1f}"
        parts.append(element("path", d=f"M{at} {TOP}V{base}", class_="grid"))
        parts.append(element("text", short(tick), x=at, y=base + 13, text_anchor="middle"))
    parts.append(element("path", d=f"M{across(0.0):.1f} {TOP}V{base}", class_="axis"))
    for i, (mean, half, kind) in enumerate(rows):
        y = TOP + 18 * i + 13
        if half is not None:
            left, right = across(mean - half), across(mean + half)
            whole = f"M{left:.1f} {y}H{right:.1f}M{left:.1f} {y - 3}v6M{right:.1f} {y - 3}v6"
            parts.append(element("path", d=whole, class_=f"line {kind}"))
        parts.append(element("circle", cx=f"{across(mean):.1f}", cy=y, r=3.5, class_=f"dot {kind}"))
    box = f"0 0 {WIDTH} {base + 18}"
    return element("svg", parts, viewBox=box, role="img", aria_label=about)
