"""Simulated against analytic spectra for one problem: the numbers, the table and the figure."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lorajax import plots, spectra
from lorajax.factors import check_rank
from lorajax.flows import solve, start_of
from lorajax.initializers import name_of
from lorajax.laws import MODE_LAWS, deflated_amplitudes, half_time
from lorajax.problems import MatrixFactorization

TIMES = 801
COLUMNS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One law against one simulated mode.

    Attributes:
      scale: of the start.
      law: name in `laws.MODE_LAWS`.
      mode: 1 for the largest singular value.
      singular_value: s of the target.
      sup_error: sup over time of |σ − law| / s.
      half_time_error: difference of the times at which s/2 is reached, relative to the simulated
      one. warp_error: least sup error over rescaled and shifted time; see `warp_error`.
    """

    scale: float
    law: str
    mode: int
    singular_value: float
    sup_error: float
    half_time_error: float
    warp_error: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare_spectra` found.

    Attributes:
      times: shape (t,).
      singular_values: the target's, shape (k,).
      simulated: by scale, shape (t, min(r, k)).
      predicted: by scale and law, same shape.
      rows: the table.
      plans: how each scale was solved.
      settings: the arguments.
    """

    times: np.ndarray
    singular_values: np.ndarray
    simulated: dict[float, np.ndarray]
    predicted: dict[tuple[float, str], np.ndarray]
    rows: list[Row]
    plans: dict[float, str]
    settings: dict[str, Any]

    def arrays(self) -> dict[str, np.ndarray]:
        """Named arrays for a file."""
        named = {"times": self.times, "singular_values": self.singular_values}
        for scale, values in self.simulated.items():
            named[f"simulated_{scale:g}"] = values
        for (scale, law), values in self.predicted.items():
            named[f"{law}_{scale:g}"] = values
        return named

    def to_json(self) -> dict[str, Any]:
        """Settings, plans and the table."""
        return {
            "settings": self.settings,
            "plans": {f"{scale:g}": plan for scale, plan in self.plans.items()},
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }


def _crossing(times: np.ndarray, values: np.ndarray, level: float) -> float:
    """First time at a level; NaN if never."""
    above = np.nonzero(values >= level)[0]
    if len(above) == 0 or above[0] == 0:
        return float("nan")
    i = above[0]
    share = (level - values[i - 1]) / (values[i] - values[i - 1])
    return float(times[i - 1] + share * (times[i] - times[i - 1]))


def warp_error(times: np.ndarray, simulated: np.ndarray, predicted: np.ndarray, s: float) -> float:
    """Least `sup_t |σ(t) − law(c (t − t½) + t½')| / s` over the speed c, half-times matched.

    Args:
      times: shape (t,), increasing.
      simulated: shape (t,).
      predicted: shape (t,), the law on the same times.
      s: the target's singular value.

    Returns:
      The error, NaN where either curve does not reach s/2.
    """
    half, half_law = (_crossing(times, curve, s / 2) for curve in (simulated, predicted))
    if not np.isfinite(half + half_law):
        return float("nan")

    def error(log_speed: float) -> float:
        warped = np.interp(np.exp(log_speed) * (times - half) + half_law, times, predicted)
        return float(np.abs(warped - simulated).max() / s)

    grid = np.linspace(np.log(1e-2), np.log(1e2), 161)
    best = int(np.argmin([error(x) for x in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    # Golden section: the error is continuous and has one valley between neighbors of the best.
    ratio = (5**0.5 - 1) / 2
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return error((low + high) / 2)


def compare_spectra(
    *,
    shape: tuple[int, int],
    singular_values: tuple[float, ...],
    rank: int,
    start: str | Callable[..., Any],
    scales: tuple[float, ...],
    laws: tuple[str, ...] | None = None,
    until: float | None = None,
    seed: int = 0,
) -> Comparison:
    """Simulates a problem from several scales and holds laws against every mode.

    Args:
      shape: (m, n) of the update.
      singular_values: of the oracle update, in decreasing order.
      rank: of the adapter.
      start: name of a start that has a scale, or a function; see `flows.start_of`.
      scales: of the start.
      laws: names in `laws.MODE_LAWS`; if None the published tanh² beside the law of the start's
        kind: "lora" where B is 0, "logistic" where it is not.
      until: last time in 1/s; by default 1.5 times the largest half-time that theory predicts.
      seed: of every random draw.

    Returns:
      A Comparison.

    Raises:
      ValueError: for anything that does not fit, before any simulation.
    """
    check_rank(rank, shape)
    key_problem, key_start = jax.random.split(jax.random.key(seed))
    problem = MatrixFactorization.from_spectrum(key_problem, shape, singular_values)
    starts = {a: start_of(problem, start, key=key_start, rank=rank, scale=a) for a in scales}
    if laws is None:
        own = "logistic" if any(np.any(f.b) for f in starts.values()) else "lora"
        laws = own, "tanh_squared"
    s = np.asarray(problem.singular_values)
    count = min(rank, problem.rank)
    if until is None:
        halves = [
            np.asarray(half_time(s[:count], deflated_amplitudes(problem, f)[:count]))
            for f in starts.values()
        ]
        until = 1.5 * float(max(np.max(h) for h in halves)) + 3 / float(s[count - 1])
    times = np.linspace(0.0, until, TIMES)
    simulated, predicted, plans, rows = {}, {}, {}, []
    for scale, factors in starts.items():
        path, plan = solve(problem, factors, times)
        simulated[scale] = np.asarray(spectra.singular_values(path))[:, :count]
        plans[scale] = str(plan)
        for name in laws:
            law = np.asarray(MODE_LAWS[name](problem, factors, path.times))[:, :count]
            predicted[scale, name] = law
            for i in range(count):
                curve = simulated[scale][:, i]
                half = _crossing(times, curve, s[i] / 2)
                gap = _crossing(times, law[:, i], s[i] / 2) - half
                rows.append(
                    Row(
                        scale,
                        name,
                        i + 1,
                        float(s[i]),
                        float(np.abs(curve - law[:, i]).max() / s[i]),
                        float(gap / half),
                        warp_error(times, curve, law[:, i], float(s[i])),
                    )
                )
    settings = {
        "shape": list(shape),
        "singular_values": list(singular_values),
        "rank": rank,
        "start": name_of(start),
        "scales": list(scales),
        "laws": list(laws),
        "until": until,
        "seed": seed,
    }
    return Comparison(times, s, simulated, predicted, rows, plans, settings)


@plots.style()
def draw(result: Comparison):
    """One panel a scale: simulated modes in color, laws in black."""
    columns = min(COLUMNS, len(result.simulated))
    count = -(-len(result.simulated) // columns)
    fig, grid = plots.figure(count, columns)
    axes = np.atleast_1d(np.asarray(grid, dtype=object)).ravel()
    dashes = ("--", ":", "-.", (0, (1, 3)))
    names = result.settings["laws"]
    for ax, (scale, values) in zip(axes, result.simulated.items(), strict=False):
        for i, s in enumerate(result.singular_values[: values.shape[1]]):
            ax.plot(result.times, values[:, i], color=f"C{i % 6}", label=f"s = {s:g}")
        for name, dash in zip(names, dashes, strict=False):
            law = result.predicted[scale, name]
            for i in range(law.shape[1]):
                label = f"law: {name}" if i == 0 else None
                ax.plot(result.times, law[:, i], linestyle=dash, color="black", lw=1, label=label)
        ax.set(title=f"start {result.settings['start']}, scale {scale:g}", xlabel="time [1/s]")
        ax.set_ylabel("singular value of AB")
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3 * columns))
    for ax in axes[len(result.simulated) :]:
        ax.set_visible(False)
    return fig
