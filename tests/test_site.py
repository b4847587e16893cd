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


def test_what_a_lane_s_time_goes_to_stands_below_its_table(site):
    row = {"lanes": 10, "seconds": 1.0, "peak_bytes": 2**20, "failed": 0}
    found = {"few": row, "many": row, "parts": {"start": 2.44, "flow": 5.08}}
    table, said = site("results").stores(found).split("\n\n")
    assert table.count("| 10 |") == 2 and said.endswith("nothing written: start 2.4, flow 5.1.")


def test_the_cost_of_a_lane_is_drawn_from_the_result(site, tmp_path):
    site("results").plot_sweeps(tmp_path / "sweeps.png")
    assert (tmp_path / "sweeps.png").stat().st_size > 20_000


NOTEBOOKS = sorted((DOCS.parent / "notebooks").glob("[a-z]*.py"))


def cells(path):
    """Cells of a notebook as text: whether each is Markdown, and what it says."""
    parts = re.split(r"^# %%(.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    kinds, bodies = parts[1::2], parts[2::2]
    marked = [kind.strip() == "[markdown]" for kind in kinds]
    return [
        (text, re.sub(r"^# ?", "", body, flags=re.MULTILINE) if text else body)
        for text, body in zip(marked, bodies, strict=True)
    ]


def lacks(path):
    """What a notebook for students lacks."""
    found, parts = [], cells(path)
    title = parts[0][1].splitlines()[0]
    if not (parts[0][0] and re.fullmatch(r"# .+\?", title)):
        found.append("a question for a title")
    drawing = [body for text, body in parts if not text and "plots.figure(" in body]
    if not drawing:
        found.append("a figure")
    found += [
        f"names of the axes in {body.splitlines()[0]!r}"
        for body in drawing
        if "xlabel=" not in body or "ylabel=" not in body
    ]
    words = "\n".join(body for text, body in parts if text)
    if not re.search(r"prediction|\*\*Predict", words):
        found.append("a prediction")
    exercises = words.rpartition("## Exercises")[2]
    if re.findall(r"^(\d)\. ", exercises, re.MULTILINE) != ["1", "2"]:
        found.append("two exercises")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", words)
    found += [f"the file {link}" for link in links if not (path.parent / link).exists()]
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_before_it_computes(path):
    assert lacks(path) == []


def test_a_notebook_that_only_tells_is_caught(tmp_path):
    path = tmp_path / "x.py"
    figure = "fig, ax = plots.figure()\nax.set(xlabel='t')\n"
    path.write_text(f"# %% [markdown]\n# # Spectra\n# [a](b.md)\n\n# %%\n{figure}")
    assert lacks(path) == [
        "a question for a title",
        "names of the axes in 'fig, ax = plots.figure()'",
        "a prediction",
        "two exercises",
        "the file b.md",
    ]


def test_every_notebook_is_in_the_list():
    text = (DOCS / "notebooks" / "index.md").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 7
    for path in NOTEBOOKS:
        assert f"]({path.stem}.ipynb)" in text and f"\n{path.stem}\n" in text


def test_a_page_shows_outputs_of_its_own_cells_alone(site, tmp_path):
    pytest.importorskip("jupytext", reason="the extra `notebooks` is not installed")
    import nbformat

    notebooks = site("notebooks")
    assert notebooks.names() == [path.stem for path in NOTEBOOKS]
    name = "spectra"
    bare = notebooks.notebook(name, tmp_path)
    assert bare.cells[1].source == notebooks.WITHOUT
    done = notebooks.jupytext.read(notebooks.SOURCES / f"{name}.py")
    code = next(cell for cell in done.cells if cell.cell_type == "code")
    code.outputs = [nbformat.v4.new_output("stream", text="seen")]
    nbformat.write(done, tmp_path / f"{name}.ipynb")
    shown = notebooks.notebook(name, tmp_path)
    assert any(cell.get("outputs") for cell in shown.cells)
    assert "](../papers/spectral_dynamics.md)" in nbformat.writes(shown)
    code.source += "\nchanged = 1"
    nbformat.write(done, tmp_path / f"{name}.ipynb")
    assert not any(cell.get("outputs") for cell in notebooks.notebook(name, tmp_path).cells)


def test_a_benchmark_has_a_table_of_what_it_measured(site):
    results = site("results")
    for name in results.TABLES:
        lines = [x for x in results.table(name).splitlines() if x.startswith("|")]
        assert len(lines) > 3, name
        assert len({line.count("|") for line in lines}) == 1, name
    tables = site("tables")
    assert tables.time_of(0.0123) == "12.3\u00a0ms" and tables.size_of(2.5e9) == "2.50\u00a0GB"
    assert tables.time_of(1.47e-7) == "147\u00a0ns"
