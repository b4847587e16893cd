"""`lorajax compare`: arms, intervals as SciPy's, pages, and what it refuses."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from lorajax.cli import main
from lorajax.report import comparison


def record(seed, accuracy, **settings):
    """A run's record, of which only what is compared matters."""
    layer = {"rank": 4, "used": 2.5, "regime": 0.25, "drift": None, "intruding": 1}
    run = {
        "schema": 1,
        "command": f"lorajax finetune --seed {seed}",
        "settings": {"seed": seed, "optimizer": "sgd", "targets": None} | settings,
        "model": {"name": "m", "kind": "ViT", "parameters": 100, "trained": 10},
        "data": {"name": "d", "kind": "test", "unit": "images", "train": 20, "test": 30},
        "recipe": {"batch_size": settings.get("batch_size", 5), "window": 0},
        "results": {"loss": 1 - accuracy, "accuracy": accuracy},
        "seconds": 2.0,
        "layers": [layer],
    }
    history = {"test_step": [0, 4], "test_loss": [2.0, 1.0], "test_accuracy": [0.1, accuracy]}
    return run, history


@pytest.fixture
def write(tmp_path):
    def write(name, run, history):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(run))
        (folder / "history.json").write_text(json.dumps(history))
        return str(folder)

    return write


@pytest.fixture
def arms(write):
    """Two arms of five seeds each, in one order of samples."""
    draw = np.random.default_rng(0).normal(0.9, 0.02, (2, 5))
    folders = [
        write(f"{optimizer}-{seed}", *record(seed, float(draw[i, seed]), optimizer=optimizer))
        for i, optimizer in enumerate(("sgd", "adam"))
        for seed in range(5)
    ]
    return folders, draw


def content(out):
    return json.loads((out / "compare.json").read_text())


def test_paired_intervals_are_those_of_scipy(arms, tmp_path, capsys):
    folders, draw = arms
    assert main(["compare", *folders, "--out", str(tmp_path / "out")]) == 0
    found = content(tmp_path / "out")
    (gap,) = [e for e in found["differences"] if e["metric"] == "accuracy"]
    test = scipy.stats.ttest_rel(draw[1], draw[0])
    low, high = test.confidence_interval(0.95)
    assert gap["paired"] and gap["count"] == 5
    assert gap["mean"] - gap["half"] == pytest.approx(low, rel=1e-9)
    assert gap["mean"] + gap["half"] == pytest.approx(high, rel=1e-9)
    assert (gap["verdict"] == "not told apart") == (test.pvalue > 0.05)
    for arm, values in zip(found["arms"], draw, strict=True):
        spread = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        mine = arm["metrics"]["accuracy"]
        assert mine["mean"] + mine["half"] == pytest.approx(spread.high, rel=1e-9)
    printed = capsys.readouterr().out
    assert "A: optimizer sgd\nB: optimizer adam\n" in printed and "paired over 5 seeds" in printed


def test_runs_of_another_order_are_not_paired(write, tmp_path, capsys):
    draw = np.random.default_rng(1).normal(0.9, 0.02, (2, 4))
    folders = [
        write(f"{size}-{seed}", *record(seed, float(draw[i, seed]), batch_size=size))
        for i, size in enumerate((5, 10))
        for seed in range(4 - i)
    ]
    assert main(["compare", *folders, "--out", str(tmp_path / "out")]) == 0
    gap = content(tmp_path / "out")["differences"][1]
    test = scipy.stats.ttest_ind(draw[1, :3], draw[0], equal_var=False)
    low, high = test.confidence_interval(0.95)
    assert gap["metric"] == "accuracy" and not gap["paired"]
    assert gap["mean"] - gap["half"] == pytest.approx(low, rel=1e-9)
    assert gap["mean"] + gap["half"] == pytest.approx(high, rel=1e-9)
    assert "unpaired (Welch)" in capsys.readouterr().out


def test_one_run_each_has_no_interval(write, tmp_path, capsys):
    folders = [write(name, *record(0, 0.5 + i / 10, start=name)) for i, name in enumerate("ab")]
    assert main(["compare", *folders, "--out", str(tmp_path / "out")]) == 0
    gap = content(tmp_path / "out")["differences"][1]
    assert gap["half"] is None and gap["mean"] == pytest.approx(0.1)
    assert "no interval: it takes two seeds" in capsys.readouterr().out


def test_the_page_says_what_the_json_says(pages, arms, tmp_path):
    assert main(["compare", *arms[0], "--out", str(tmp_path / "out")]) == 0
    tree = pages.alone((tmp_path / "out" / "compare.html").read_text(encoding="utf-8"))
    said = pages.words(tree)
    found = content(tmp_path / "out")
    for entry in found["differences"]:
        assert comparison.shown(entry["mean"], entry["half"]) in said
        assert entry["verdict"] in said
    for arm in found["arms"]:
        for each in arm["metrics"].values():
            assert comparison.shown(each["mean"], each["half"]) in said
    assert len([*tree.iter("circle")]) == len(found["differences"])


def test_a_difference_is_shown_to_the_digits_of_its_interval():
    assert comparison.shown(0.94723, 0.0123) == "0.9472 ± 0.0123"
    assert comparison.shown(0.947234567, 0.0000123) == "0.947235 ± 0.000012"
    assert comparison.shown(0.5, None) == "0.5000" and comparison.shown(0.5, 0.0).endswith("0.0000")


def test_foreign_text_stays_text(pages, write, tmp_path):
    hostile = pages.hostile.replace("\x00", "").replace("/", "-").replace("\ud800", "")
    folders = []
    for i in range(2):
        run, history = record(0, 0.5, start=f"{pages.hostile}{i}")
        run["command"] = run["data"]["name"] = pages.hostile
        folders.append(write(f"{hostile}{i}", run, history))
    assert main(["compare", *folders, "--out", str(tmp_path / "out")]) == 0
    tree = pages.read((tmp_path / "out" / "compare.html").read_text(encoding="utf-8"))
    assert len([*tree.iter("script")]) == 1
    assert "alert" not in "".join(e.text or "" for e in tree.iter("script"))


def refused(arguments, capsys):
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lorajax: error: ") and error.count("\n") == 1
    return error


def test_what_is_no_run_is_refused_in_a_sentence(write, tmp_path, capsys):
    run, history = record(0, 0.5)
    good = write("good", run, history)
    (tmp_path / "empty").mkdir()
    broken = write("broken", run, history)
    (tmp_path / "broken" / "run.json").write_text("{")
    old = write("old", {"schema": 1}, history)
    other = write("other", run | {"data": run["data"] | {"test": 31}}, history)
    twin = write("twin", run, history)
    assert "named at least two" in refused([good], capsys).replace("name at", "named at")
    assert "does not exist" in refused([good, str(tmp_path / "none")], capsys)
    assert "is no folder" in refused([good, good + "/run.json"], capsys)
    assert "holds no run.json" in refused([good, str(tmp_path / "empty")], capsys)
    assert "is no JSON" in refused([good, broken], capsys)
    assert "without 'command'" in refused([good, old], capsys)
    assert "measured on the same data" in refused([good, other], capsys)
    assert "the same settings and seed 0" in refused([good, twin], capsys)
    (tmp_path / "file").write_text("")
    two = [good, write("two", *record(1, 0.6))]
    assert "--out is" in refused([*two, "--out", str(tmp_path / "file")], capsys)


def test_it_needs_no_jax(arms, tmp_path):
    code = (
        "import sys; from lorajax.cli import main; main(sys.argv[1:]); print('jax' in sys.modules)"
    )
    given = ["compare", *arms[0], "--out", str(tmp_path / "out")]
    run = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True)
    assert run.stdout.strip().endswith("False"), run.stderr
    assert re.search(r"accuracy +B − A", run.stdout)
