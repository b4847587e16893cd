"""What makes the site: its links are followed, and what it shows of claims is what they say."""

import importlib
import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture
def site(monkeypatch):
    """Imports a module of docs/_ext."""
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    return importlib.import_module


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ('<a href="b.html#there">', None),
        ('<a href="#here">', None),
        ('<a href="https://example.org/c.html">', None),
        ('<link rel="canonical" href="https://example.org/">', None),
        ('<a href="c.html">', "links to c.html, which is not there"),
        ('<a href="b.html#gone">', "links to b.html#gone, where no such anchor is"),
        ('<a href="#gone">', "links to #gone, where no such anchor is"),
        ('<img src="c.png">', "links to c.png, which is not there"),
        ('<script src="https://example.org/x.js">', "loads https://example.org/x.js"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "loads //example.org/x.css"),
    ],
)
def test_a_broken_link_and_a_page_that_needs_the_network_are_caught(site, tmp_path, link, fault):
    (tmp_path / "a.html").write_text(f'<p id="here">{link}</p>', encoding="utf-8")
    (tmp_path / "b.html").write_text('<a href="a.html"><p id="there">', encoding="utf-8")
    found, inner, outer = site("links").faults(tmp_path)
    assert found == ([f"a.html {fault}"] if fault else [])
    assert inner >= 1 and outer == ("example.org" in link)


def test_a_style_sheet_that_needs_the_network_is_caught(site, tmp_path):
    (tmp_path / "a.css").write_text("@import url('https://example.org/x.css');", encoding="utf-8")
    found, _, _ = site("links").faults(tmp_path)
    assert found == ["a.css loads https://example.org/x.css"]


def test_seeds_are_told_in_ranges(site):
    papers = site("papers")
    assert papers.seeds_of([3, 0, 1, 2, 100, 105, 106]) == "0–3, 100, 105–106: 7 seeds"
    assert papers.seeds_of([7]) == "seed 7"


def test_formulas_are_no_markup(site):
    papers = site("papers")
    assert papers.escaped("r* and |X*|_F of `a*b`") == r"r\* and \|X\*\|\_F of `a*b`"


def test_every_made_part_has_a_maker(site):
    generated = site("generated")
    marks = [
        mark
        for page in [*DOCS.glob("*.md"), *DOCS.glob("*/*.md")]
        for mark in re.findall(r"^<!-- made: (\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(marks) > 20
    assert set(marks) == set(generated.MAKERS)
    text = generated.filled("<!-- made: results stores -->\n\n<!-- made: gallery -->")
    assert "| 1,000,000 |" in text and "lorajax spectra" in text


def test_the_cost_of_a_lane_is_drawn_from_the_result(site, tmp_path):
    site("results").plot_sweeps(tmp_path / "sweeps.png")
    assert (tmp_path / "sweeps.png").stat().st_size > 20_000


def test_a_benchmark_has_a_table_of_what_it_measured(site):
    results = site("results")
    for name in results.TABLES:
        lines = [x for x in results.table(name).splitlines() if x.startswith("|")]
        assert len(lines) > 3, name
        assert len({line.count("|") for line in lines}) == 1, name
    tables = site("tables")
    assert tables.time_of(0.0123) == "12.3 ms" and tables.size_of(2.5e9) == "2.50 GB"
