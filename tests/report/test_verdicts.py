"""Reports are pages that need nothing else, hold no foreign markup, and show what the JSON says."""

import json
import math
import pathlib
import re

import pytest

from lorajax import claims, report
from lorajax.report import page, verdicts

TABLE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "resolving.md"


def made(id, verdict, *, text="A statement.", **evidence):
    """An outcome of a claim that is not registered."""
    check = lambda run: None  # noqa: E731
    control = claims.Control(text, {})
    claim = claims.Claim(id, text, text, "derived", text, control, check)
    error, tolerance = {"confirmed": (0.25, 1.0), "refuted": (3.0, 1.0)}[verdict]
    found = claims.Evidence(
        {"slope": 1.2345678, "list": [0.1] * 13},
        {"slope": 1.25},
        evidence.pop("error", error),
        evidence.pop("tolerance", tolerance),
        (claims.Assumption(text, True, text),),
        caption=text,
        **evidence,
    )
    return claims.Outcome(claim, found, "refuted", 1.0)


def test_a_report_is_one_page_that_needs_nothing_else(pages):
    outcomes = [made("a.first", "confirmed"), made("b.second", "refuted")]
    text = report.to_html(outcomes, {"a.first": b"\x89PNG"}, seed=0, profile="quick")
    tree = pages.alone(text)
    assert len([*tree.iter("img")]) == 1
    # Search and choice wait for a script, and nothing else is hidden without it.
    assert [e.get("id") for e in tree.iter() if e.get("hidden")] == ["controls"]


@pytest.mark.parametrize("field", ["id", "text"])
def test_foreign_text_stays_text(pages, field):
    named = f"a.{pages.hostile}" if field == "id" else "a.b"
    outcome = made(named, "confirmed", text=pages.hostile)
    text = report.to_html([outcome], {named: b"x"}, seed=0, profile=pages.hostile)
    tree = pages.read(text)
    assert len([*tree.iter("script")]) == len([*tree.iter("style")]) == 1
    assert "alert" not in "".join(e.text or "" for e in tree.iter("script"))
    assert "<script>alert('1')</script> & \"quoted\" </style>\ufffd\ufffd" in pages.words(tree)


def test_what_was_refuted_comes_first(pages):
    outcomes = [made("a.good", "confirmed"), made("a.bad", "refuted"), made("b.good", "confirmed")]
    tree = pages.read(report.to_html(outcomes, {}, seed=0, profile="quick"))
    order = [e.get("id") for e in tree.iter("article")]
    assert order == ["a.bad", "a.good", "b.good"]
    said = pages.words(tree)
    assert said.index("a.bad (derived): A statement.") < said.index("By paper")


def test_every_number_is_that_of_the_json(pages):
    outcomes = [made("a.good", "confirmed"), made("a.bad", "refuted", error=3.000001234)]
    tree = pages.read(report.to_html(outcomes, {}, seed=0, profile="quick"))
    articles = {e.get("id"): pages.words(e) for e in tree.iter("article")}
    for entry in report.to_json(outcomes, seed=0, profile="quick")["claims"]:
        said = articles[entry["id"]]
        assert entry["verdict"] in said and entry["standing"] in said
        for value in (entry["error"], entry["tolerance"], entry["measured"]["slope"]):
            assert page.number(value) in said
    assert "Error 0.25, 25 % of its tolerance 1." in articles["a.good"]
    assert "Error 3, 3 times its tolerance 1." in articles["a.bad"]
    assert "0.1, … (13 values)" in articles["a.good"]


def widths(tree):
    return [float(e.get("style")[6:-1]) for e in tree.iter("span") if e.get("style")]


@pytest.mark.parametrize(
    ("error", "tolerance", "width"),
    [(0.25, 1.0, 100 / 6), (1.0, 1.0, 200 / 3), (9.0, 1.0, 100), (-1.0, 0.0, 0), (0.5, 0.0, 100)],
)
def test_a_bar_is_error_over_tolerance(pages, error, tolerance, width):
    outcome = made("a.b", "confirmed", error=error, tolerance=tolerance)
    tree = pages.read(report.to_html([outcome], {}, seed=0, profile="quick"))
    assert widths(tree) == [pytest.approx(width, abs=0.01)]
    over = [e for e in tree.iter("div") if "over" in (e.get("class") or "").split()]
    assert len(over) == (error > 1.5 * tolerance and error > 0)


def test_seeds_of_the_run_and_of_the_record_are_shown(pages, monkeypatch):
    known = {"record.json": {"a.b": {"verdict": "confirmed", "seeds": [0, 1, 2, 100]}}}
    known["resolving.json"] = {"a.b": 0.005}
    monkeypatch.setattr(verdicts, "_read", known.__getitem__)
    others = {2: [made("a.b", "refuted")]}
    text = report.to_html([made("a.b", "confirmed")], {}, seed=1, profile="quick", others=others)
    said = pages.words(pages.read(text))
    assert "Seeds of this run: 2 ✗ refuted; 1 ✓ confirmed; on record: confirmed at 4 seeds" in said
    assert "(0–2, 100)" in said and "1 other than on record" in said.replace("1other", "1 other")
    assert "constant by 0.5 % is refuted" in said
    assert "refuted at 1 of 2 seeds a.b" in said


def test_a_verdict_that_is_not_on_record_is_called_changed(pages):
    claim = claims.REGISTRY["gradient_flow.logistic"]
    outcome = claims.Outcome(claim, None, "inconclusive", 1.0, "ValueError: no")
    said = pages.words(pages.read(report.to_html([outcome], {}, seed=0, profile="quick")))
    assert "changed: on record confirmed" in said
    assert "The check did not finish: ValueError: no" in said
    assert "Claims about every LoRA flow" in said


def test_an_error_that_is_no_number_has_no_bar(pages):
    outcome = made("a.b", "confirmed", error=math.nan)
    tree = pages.read(report.to_html([outcome], {}, seed=0, profile="quick"))
    assert widths(tree) == [] and "which decides nothing" in pages.words(tree)


def test_resolving_powers_on_record_are_those_of_the_documented_table():
    """`lorajax validate --resolving` writes both files."""
    powers = verdicts._read("resolving.json")
    shown = {k: f"{p:.1%}" if isinstance(p, float) else p for k, p in powers.items()}
    rows = re.findall(r"^\| `(\S+)` \| (.+?) \| ", TABLE.read_text(encoding="utf-8"), re.M)
    assert shown == dict(rows)
    assert shown.keys() <= claims.REGISTRY.keys()


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([], ""), ([3], "3"), ([2, 1, 0, 5], "0–2, 5"), ([1, 1, 2], "1–2")],
)
def test_ranges(numbers, words):
    assert page.ranges(numbers) == words


def test_a_page_is_json_safe_and_utf8(pages):
    assert json.dumps(page.shell(pages.hostile, pages.hostile)).isascii()
    assert page.shell(pages.hostile).encode()
