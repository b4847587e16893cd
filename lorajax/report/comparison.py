"""Finished runs side by side: means and differences with intervals, as a table and as a page.

Nothing here needs JAX: a run is what its `run.json` and `history.json` say.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from lorajax.environment import files
from lorajax.environment.text import table
from lorajax.report import charts, page, runs
from lorajax.report.charts import Series
from lorajax.report.page import Html, element

LEVEL = 0.95
LARGEST = 2**28
"""Bytes of a file of a run that is read."""
NEEDED = ("command", "settings", "model", "data", "recipe", "results", "seconds", "layers")


class Finished(NamedTuple):
    """A run that has ended.

    Attributes:
      folder: that holds it.
      run: the content of its `run.json`.
      history: that of its `history.json`.
    """

    folder: str
    run: Mapping[str, Any]
    history: Mapping[str, Any]

    @property
    def seed(self) -> int:
        """Of every random draw."""
        return self.run["settings"]["seed"]


class Arm(NamedTuple):
    """Runs that differ in their seed alone.

    Attributes:
      label: the settings in which it differs from the other arms.
      runs: by seed.
    """

    label: str
    runs: Mapping[int, Finished]

    def values(self, metric: str) -> dict[int, float]:
        """A metric by seed."""
        return {seed: each.run["results"][metric] for seed, each in self.runs.items()}


class Interval(NamedTuple):
    """A mean with a confidence interval of Student's t.

    Attributes:
      mean: of a metric over seeds, or of its difference between two arms.
      half: half the interval's width; None where one run leaves none.
      count: numbers, or pairs, that it is of.
      paired: whether it is of differences at shared seeds.
    """

    mean: float
    half: float | None
    count: int
    paired: bool = False

    @property
    def verdict(self) -> str:
        """What a difference comes to."""
        if self.half is None:
            return "no interval: it takes two seeds"
        if abs(self.mean) <= self.half:
            return "not told apart"
        return "higher" if self.mean > 0 else "lower"


def _content(path: Path) -> Any:
    """A file of strict JSON of a run."""
    try:
        return json.loads(files.regular(path, LARGEST).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON that can be read ({error}).") from error


def read(folder: str) -> Finished:
    """A finished run of `lorajax finetune`.

    Args:
      folder: that it was written to.

    Returns:
      The run.

    Raises:
      ValueError: for a folder without `run.json` and `history.json`, or with others than
        `lorajax finetune` writes.
    """
    place = Path(folder)
    if not place.is_dir():
        what = "is no folder" if place.exists() else "does not exist"
        raise ValueError(f"RUN is {folder!r}, which {what}; name folders of `lorajax finetune`.")
    if not (place / "run.json").is_file():
        raise ValueError(
            f"RUN is {folder!r}, which holds no run.json; name a folder that `lorajax finetune` "
            "has finished in."
        )
    run, history = _content(place / "run.json"), _content(place / "history.json")
    missing = [name for name in NEEDED if not isinstance(run, dict) or name not in run]
    if missing or run.get("schema") != runs.SCHEMA or not isinstance(history, dict):
        lacks = f" without {missing[0]!r}" if missing else ""
        raise ValueError(
            f"{place / 'run.json'} is no record of schema {runs.SCHEMA}{lacks}; finish the run "
            "again with this version."
        )
    return Finished(folder, run, history)


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_said, value)) or "none"
    return "default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def differing(found: Sequence[Finished]) -> list[str]:
    """Settings, the seed aside, in which some runs differ from others."""
    names = dict.fromkeys(name for each in found for name in each.run["settings"])
    return [
        name
        for name in names
        if name != "seed"
        and len({_said(each.run["settings"].get(name)) for each in found}) > 1
    ]  # fmt: skip


def arms(found: Sequence[Finished]) -> list[Arm]:
    """Runs by what they have in common, in the order of their first ones.

    Args:
      found: at least two runs on the same data.

    Returns:
      An arm for each combination of settings.

    Raises:
      ValueError: for fewer than two runs, runs that were measured on different data, or two of the
        same settings and seed.
    """
    if len(found) < 2:
        raise ValueError(f"RUN is given {len(found)} times; name at least two to compare.")
    first = found[0]
    for each in found[1:]:
        for name in ("name", "kind", "test"):
            one, other = first.run["data"][name], each.run["data"][name]
            if one != other:
                raise ValueError(
                    f"{first.folder} was measured on {one!r}, {each.folder} on {other!r}; compare "
                    "runs that were measured on the same data."
                )
    names, grouped = differing(found), {}
    for each in found:
        label = ", ".join(
            f"{name.replace('_', '-')} {_said(each.run['settings'].get(name))}" for name in names
        )
        members = grouped.setdefault(label or "same settings", {})
        if each.seed in members:
            raise ValueError(
                f"{members[each.seed].folder} and {each.folder} have the same settings and seed "
                f"{each.seed}; give one of them."
            )
        members[each.seed] = each
    return [Arm(label, members) for label, members in grouped.items()]


def metrics(found: Sequence[Finished]) -> list[str]:
    """The results that all runs have."""
    return [
        name for name in found[0].run["results"] if all(name in f.run["results"] for f in found)
    ]


def interval(values: Sequence[float | int]) -> Interval:
    """Mean and 95 % interval by Student's t, exact for independent normal numbers."""
    x = np.asarray(values, float)
    if len(x) < 2:
        return Interval(float(x.mean()), None, len(x))
    half = stdtrit(len(x) - 1, (1 + LEVEL) / 2) * x.std(ddof=1) / math.sqrt(len(x))
    return Interval(float(x.mean()), float(half), len(x))


def _order(each: Finished) -> tuple[Any, ...]:
    """What the order of samples follows from, beside the seed."""
    recipe, data = each.run["recipe"], each.run["data"]
    return data["name"], data["train"], recipe["batch_size"], recipe["window"]


def difference(arm: Arm, reference: Arm, metric: str) -> Interval:
    """How much higher a metric is in one arm than in another, with a 95 % interval.

    Args:
      arm: the one.
      reference: the other.
      metric: of both.

    Returns:
      Paired over the seeds that both have, where these also gave both the same order of samples;
      of all runs by Welch's t otherwise. Both are Student's t: exact (paired) or close (Welch)
      for normal numbers, and of one comparison, however many are made.
    """
    one, other = arm.values(metric), reference.values(metric)
    shared = [s for s in one if s in other and _order(arm.runs[s]) == _order(reference.runs[s])]
    if len(shared) > 1 or len(shared) == len(one) == len(other):
        return interval([one[s] - other[s] for s in shared])._replace(paired=True)
    x, y = np.asarray([*one.values()]), np.asarray([*other.values()])
    mean, count = float(x.mean() - y.mean()), min(len(x), len(y))
    if count < 2:
        return Interval(mean, None, count)
    a, b = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    if a + b == 0:
        return Interval(mean, 0.0, count)
    freedom = (a + b) ** 2 / (a**2 / (len(x) - 1) + b**2 / (len(y) - 1))
    half = stdtrit(freedom, (1 + LEVEL) / 2) * math.sqrt(a + b)
    return Interval(mean, float(half), count)


def to_json(found: Sequence[Arm], names: Sequence[str]) -> dict[str, Any]:
    """The content of `compare.json`: arms, and differences of each to the first."""
    reference = found[0]
    return {
        "level": LEVEL,
        "arms": [
            {
                "label": arm.label,
                "seeds": sorted(arm.runs),
                "folders": [each.folder for each in arm.runs.values()],
                "trained": _one(arm, lambda run: run["model"]["trained"]),
                "seconds": float(np.mean([f.run["seconds"] for f in arm.runs.values()])),
                **_layers(arm),
                "metrics": {name: interval([*arm.values(name).values()])._asdict()
                            for name in names},
            }
            for arm in found
        ],
        "differences": [
            {"arm": arm.label, "reference": reference.label, "metric": name,
             **(gap := difference(arm, reference, name))._asdict(), "verdict": gap.verdict}
            for name, arm in itertools.product(names, found[1:])
        ],
    }  # fmt: skip


def _one(arm: Arm, of: Any) -> Any:
    """A number of the runs of an arm: one, or where they differ their mean."""
    values = [of(each.run) for each in arm.runs.values()]
    return values[0] if len({*values}) == 1 else float(np.mean(values))


def _layers(arm: Arm) -> dict[str, float | None]:
    """Means over the layers and seeds of an arm of what `finetune.insights` found."""
    layers = [layer for each in arm.runs.values() for layer in each.run["layers"]]
    found: dict[str, float | None] = {}
    for name in ("rank", "used", "regime", "drift"):
        values = [layer[name] for layer in layers if layer[name] is not None]
        found[name] = float(np.mean(values)) if values else None
    share = [layer["intruding"] > 0 for layer in layers]
    found["intruding"] = float(np.mean(share)) if share else None
    return found


def shown(mean: float | int, half: float | int | None) -> str:
    """A mean with its interval, to the digits that the interval leaves."""
    if half is None:
        return f"{mean:.4f}".replace("-", "−")
    digits = 4 if half >= 1e-3 or half == 0 else min(9, 1 - math.floor(math.log10(half)))
    return f"{mean:.{digits}f} ± {half:.{digits}f}".replace("-", "−")


def _how(entry: Mapping[str, Any]) -> str:
    if entry["half"] is None:
        return "too few runs"
    return f"paired over {entry['count']} seeds" if entry["paired"] else "unpaired (Welch)"


def to_text(content: Mapping[str, Any]) -> str:
    """The table that `lorajax compare` prints, from `to_json`."""
    names = [*content["arms"][0]["metrics"]]
    rows = [
        (
            f"{'ABCDEFGHIJKLMNOPQRSTUVWXYZ'[i % 26]}{i // 26 or ''}",
            page.ranges(arm["seeds"]),
            *(shown(arm["metrics"][name]["mean"], arm["metrics"][name]["half"]) for name in names),
            f"{arm['trained']:,.0f}",
            f"{arm['seconds']:,.1f} s",
        )
        for i, arm in enumerate(content["arms"])
    ]
    head = ("arm", "seeds", *names, "trained", "time")
    letters = {arm["label"]: row[0] for arm, row in zip(content["arms"], rows, strict=True)}
    text = "\n".join(f"{letter}: {label}" for label, letter in letters.items())
    text += "\n\n" + table(head, rows, right=range(2, len(head)))
    if not content["differences"]:
        return text
    gaps = [
        (
            e["metric"],
            f"{letters[e['arm']]} − {letters[e['reference']]}",
            shown(e["mean"], e["half"]),
            _how(e),
            e["verdict"],
        )
        for e in content["differences"]
    ]
    level = f"difference, {100 * content['level']:g} %"
    return text + "\n\n" + table(("metric", "arms", level, "how", "verdict"), gaps, right=(2,))


SOURCE = (
    "Intervals are Student's t over seeds, exact for independent normal numbers, and of one "
    "comparison each, however many are made. A difference is paired where runs share seed and "
    "order of samples, since they then share what chance gave them; else it is Welch's "
    "(report.comparison; recalled). ± is half the interval."
)


def to_html(found: Sequence[Arm], content: Mapping[str, Any]) -> str:
    """The page that `lorajax compare` writes.

    Args:
      found: the arms.
      content: of `to_json`.

    Returns:
      One page that opens offline.
    """
    names = [*content["arms"][0]["metrics"]]
    data = next(iter(found[0].runs.values())).run["data"]
    head = ("arm", "seeds", *(f"{data['kind']} {name}" for name in names), "trained", "rank",
            "used rank", "regime", "intruding", "seconds")  # fmt: skip
    rows = [
        (
            _marked(i, arm["label"]),
            page.ranges(arm["seeds"]),
            *(shown(arm["metrics"][name]["mean"], arm["metrics"][name]["half"]) for name in names),
            f"{arm['trained']:,.0f}",
            *("–" if arm[name] is None else page.short(arm[name])
              for name in ("rank", "used", "regime")),
            "–" if arm["intruding"] is None else f"{100 * arm['intruding']:.0f} %",
            page.short(arm["seconds"]),
        )
        for i, arm in enumerate(content["arms"])
    ]  # fmt: skip
    runs_of = [each for arm in found for each in arm.runs.values()]
    note = "Ranks, regime and intruding layers are means over layers (finetune.insights, each "
    note += "run's report.html has their sources)."
    return page.shell(
        f"lorajax: {len(runs_of)} runs on {data['name']}",
        element("h1", f"{len(runs_of)} runs on {data['name']}"),
        page.table(head, rows, numbers=range(2, len(head)), dense=True),
        element("p", note, class_="meta"),
        *_differences(content),
        element("p", SOURCE, class_="meta"),
        *_curves(found),
        element("h2", "The runs"),
        [
            element("p", element("code", each.folder), ": ", element("code", each.run["command"]))
            for each in runs_of
        ],
    )


def _marked(i: int, label: str) -> Html:
    line = element("path", d="M0 6H28", class_=f"line {charts.color(i)}")
    mark = element("svg", line, viewBox="0 0 28 12", aria_hidden="true")
    return element("span", mark, label, class_="key")


def _differences(content: Mapping[str, Any]) -> list[Html]:
    if not content["differences"]:
        return []
    reference = content["arms"][0]["label"]
    rows = [
        (e["arm"], e["metric"], shown(e["mean"], e["half"]), _how(e), e["verdict"])
        for e in content["differences"]
    ]
    colors = {arm["label"]: charts.color(i) for i, arm in enumerate(content["arms"])}
    figures = []
    for name, entries in page.grouped(content["differences"], lambda e: e["metric"]).items():
        marks = [(e["mean"], e["half"], colors[e["arm"]]) for e in entries]
        about = f"differences of {name} to the reference with their intervals"
        figures.append(element("figure", charts.forest(marks, x=f"Δ {name}", about=about)))
    level = f"difference, {100 * content['level']:g} %"
    return [
        element("h2", "Against the first"),
        element("p", "Differences to ", element("b", reference), "."),
        element("div", figures, class_="charts"),
        page.table(("arm", "metric", level, "how", "verdict"), rows, numbers=(2,), dense=True),
    ]


def _curves(found: Sequence[Arm]) -> list[Html]:
    figures = []
    for name, label, log in (("loss", "loss [nats]", True), ("accuracy", "accuracy", False)):
        lines = [
            Series(each.history["test_step"], each.history[f"test_{name}"], charts.color(i))
            for i, arm in enumerate(found)
            for each in arm.runs.values()
        ]
        figures.append(charts.figure(lines, x="step", y=label, log=log, about=f"{name} over steps"))
    return [element("h2", "Curves of every run"), element("div", figures, class_="charts")]
