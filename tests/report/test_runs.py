"""The page of a fine-tuning run: each number is the record's, with its source."""

import math

import pytest

from lorajax.report import charts, page, runs


def layer(path, **changes):
    found = {
        "path": path,
        "shape": [6, 4],
        "rank": 2,
        "scaling": 1.0,
        "gradient": [3.25, 1.5, 0.125],
        "learned": [1.75, 0.875],
        "used": 1.8899,
        "stable": 1.25,
        "regime": 0.123456,
        "regime_law": 0.234567,
        "drift": 0.0345678,
        "misalignment": 0.456789,
        "predicted": None,
        "agrees": None,
        "strength": 1.75,
        "threshold": 1.5,
        "intruding": 1,
        "alpha": 2.0,
        "most": 1.71429,
    }
    return found | changes


def record(**changes):
    history = {
        "step": [*range(1, 9)],
        "loss": [2.0 / i for i in range(1, 9)],
        "accuracy": [i / 9 for i in range(1, 9)],
        "test_step": [0, 4, 8],
        "test_loss": [2.0, 1.0, 0.5],
        "test_accuracy": [0.1, 0.5, 0.876543],
        "probe_step": [0, 4, 8],
        "probes": {
            "singular_values": [[[0.0, 0.0]] * 2, [[1.0, 0.5]] * 2, [[1.75, 0.875]] * 2],
            "imbalance": [[1.0, 1.0], [1.25, 0.5], [1.5, 0.25]],
        },
    }
    run = {
        "environment": {"lorajax": "0", "devices": ["cpu"]},
        "command": "lorajax finetune --seed 7",
        "model": {"name": "vit", "kind": "ViT", "parameters": 1000, "trained": 123},
        "data": {"name": "digits", "kind": "test", "unit": "images", "train": 20, "test": 30},
        "recipe": {
            "steps": 8,
            "batch_size": 5,
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "schedule": "cosine",
            "warmup": 1,
            "seed": 7,
        },
        "results": {"loss": 0.5, "accuracy": 0.876543, "f1": 0.8125},
        "seconds": 12.5,
        "per_second": 3.2,
        "law": {"why": "", "caveats": ["steps take batches of 5"]},
        "layers": [layer("a/b"), layer("c", intruding=0, regime=None)],
        "linearized": None,
    }
    return run | changes, history


LINEAR = {name: i + 0.5 for i, (name, _, _) in enumerate(runs.LINEARIZED)} | {"converged": True}


def test_the_page_needs_nothing_else_and_shows_the_record(pages):
    run, history = record(linearized=LINEAR)
    tree = pages.alone(runs.to_html(run, history))
    said = pages.words(tree)
    assert "vit on digits" in said and "87.65 %" in said and "0.8125" in said
    assert "lorajax finetune --seed 7" in said and "123" in said
    items = {e.get("id"): pages.words(e) for e in tree.iter("article")}
    for each in run["layers"]:
        text = items[f"layer-{each['path']}"]
        for quantity in runs.QUANTITIES:
            value = each[quantity.field]
            if quantity.field == "agrees" and value is None:
                continue
            assert quantity.name in text and quantity.source in text
            shown = "–" if value is None else page.number(value)
            assert shown in text, quantity
    for name, label, source in runs.LINEARIZED:
        assert label in said and source in said and page.number(LINEAR[name]) in said


def test_the_law_is_drawn_where_it_speaks_and_else_the_reason(pages):
    run, history = record()
    law = layer("a/b", predicted=[[0.0, 0.0], [0.75, 0.5], [9.0, None]], agrees=4)
    with_law = runs.to_html(run | {"layers": [law]}, history)
    assert "early law within 10 % to step 4" in with_law and 'c0 law"' in with_law
    assert "steps take batches of 5" in with_law and "Measured only" not in with_law
    why = {"why": "Adam divides", "caveats": []}
    without = pages.words(pages.read(runs.to_html(run | {"law": why}, history)))
    assert "Measured only: Adam divides, so the law says nothing" in without


def test_full_training_has_curves_and_no_layers(pages):
    run, history = record(layers=[])
    history |= {"probe_step": [], "probes": {}}
    tree = pages.alone(runs.to_html(run, history))
    assert len([*tree.iter("svg")]) >= 2 and not [*tree.iter("article")]


def test_foreign_text_stays_text(pages):
    run, history = record(command=pages.hostile, layers=[layer(pages.hostile)])
    run["data"]["name"] = run["model"]["name"] = pages.hostile
    run["law"] = {"why": pages.hostile, "caveats": []}
    tree = pages.read(runs.to_html(run, history))
    assert len([*tree.iter("script")]) == len([*tree.iter("style")]) == 1
    assert "alert" not in "".join(e.text or "" for e in tree.iter("script"))


def points(svg, kind):
    """Ends of the lines of a class, in the picture's coordinates."""
    (path,) = [e.get("d") for e in svg.iter("path") if kind in (e.get("class") or "").split()]
    return [tuple(map(float, p.split())) for p in path.replace("M", "L").split("L")[1:]]


@pytest.mark.parametrize("log", [False, True])
def test_a_line_lies_where_its_numbers_are(pages, log):
    ys = [1.0, 10.0, 100.0] if log else [0.0, 50.0, 100.0]
    lines = [charts.Series([0.0, 1.0, 2.0], ys)]
    text = charts.chart(lines, x="x", y="y", about="a", log=log)
    svg = pages.read("<!doctype html>\n" + text)
    (x0, y0), (x1, y1), (x2, y2) = points(svg, "line")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and x2 > x1 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11) and y0 > y1 > y2
    ticks = [e for e in svg.iter("text") if e.get("text-anchor") == "end"]
    named = {(e.text or ""): float(e.get("y")) - 3.5 for e in ticks}
    assert named["100"] == pytest.approx(y2, abs=0.11)


def test_gaps_are_left_open_and_what_is_empty_is_drawn(pages):
    lines = [charts.Series([0, 1, 2, 3], [1.0, None, math.nan, 2.0])]
    assert charts.chart(lines, x="x", y="y", about="a").count("M") >= 2
    for ys in ([], [None], [0.0, 0.0], [5.0]):
        text = charts.chart([charts.Series(range(len(ys)), ys)], x="x", y="y", about="a", log=True)
        assert "nan" not in text and "inf" not in text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 600, [0, 200, 400, 600]), (3, 3, [3])],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(float(low), float(high)) == pytest.approx(expected)


def test_a_long_curve_is_thinned_to_means():
    xs, ys = charts.thinned(list(range(3000)), [1.0, 3.0] * 1500)
    assert len(xs) == charts.MOST_POINTS and ys == pytest.approx([2.0] * len(ys))
