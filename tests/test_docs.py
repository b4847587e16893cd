"""The pages and the README's examples run as they stand, and say what the package says."""

import collections
import importlib
import inspect
import json
import pathlib
import re

import pytest

from lorajax import claims

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in (DOCS / "extending").glob("*.md") if path.stem != "index")
GUIDES = [DOCS / "tutorial.md", *sorted((DOCS / "howto").glob("*.md"))]
EXTENSIONS = {
    *(
        "experiment",
        "problem",
        "start",
        "law",
        "claim",
        "rank_rule",
        "study",
        "adapter",
        "task",
        "model",
    ),
}
LONGEST = 40


def blocks(text: str) -> list[str]:
    """The ```python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def lines_of_code(blocks: list[str]) -> int:
    """Lines that are neither empty nor a comment."""
    lines = (line.strip() for block in blocks for line in block.splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def run(path: pathlib.Path, blocks: list[str]) -> None:
    """Runs blocks in one namespace; a traceback names the page."""
    namespace: dict[str, object] = {"__name__": path.stem.replace("-", "_")}
    for block in blocks:
        exec(compile(block, str(path), "exec"), namespace)


def test_every_extension_has_a_page():
    assert {page.stem for page in PAGES} == EXTENSIONS


@pytest.fixture(autouse=True)
def no_claims_stay():
    """What a page adds to the registry is gone after it: other tests count the claims."""
    before = dict(claims.REGISTRY)
    yield
    claims.REGISTRY.clear()
    claims.REGISTRY.update(before)


@pytest.mark.apart
def test_every_extension_runs_in_few_lines(subtests, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        with subtests.test(page.name):
            code = blocks(page.read_text(encoding="utf-8"))
            assert code, f"{page.name} has no example."
            assert lines_of_code(code) < LONGEST
            run(page, code)


@pytest.mark.apart
@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_guides_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, blocks(page.read_text(encoding="utf-8")))


def test_guides_have_examples():
    with_code = [page.stem for page in GUIDES if blocks(page.read_text(encoding="utf-8"))]
    assert {"tutorial", "rank", "start", "sweep", "peft"} <= set(with_code)


def test_the_examples_of_the_readme_run_and_print_what_it_says(capsys):
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    sweep, law, finetune = blocks(text)
    # As it stands but for its size: 40 digits and one step in place of 5,000 and 600.
    small = finetune.replace('"mnist-sample").train', '"mnist-sample").train.take(slice(60))')
    small = small.replace("steps=600", "steps=1")
    assert small.count("slice(60)") == small.count("steps=1") == 1
    run(path, [sweep, law])
    stated = re.search(r"abs\(simulated - predicted\)\.max\(\)\)  # (\S+)", text)
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(float(stated[1]), rel=0.05)
    run(path, ["import jax", small])


def verdicts_by_paper():
    """How many claims of each paper have which verdict on record."""
    record = json.loads((ROOT / "lorajax/claims/record.json").read_text(encoding="utf-8"))
    found = collections.defaultdict(collections.Counter)
    for claim, row in record.items():
        found[claim.partition(".")[0]][row["verdict"]] += 1
    return record, found


def test_the_readme_counts_verdicts_as_the_record_does():
    record, papers = verdicts_by_paper()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .+? \| (\d+) \| (\d+) \| ?(.*?) ?\|$", text, re.MULTILINE)
    shown = {name: (int(count), int(good), rest) for name, count, good, rest in rows}
    told = {}
    for name, counts in papers.items():
        rest = ", ".join(
            f"{n} {verdict}" for verdict, n in counts.items() if verdict != "confirmed"
        )
        told[name] = (counts.total(), counts["confirmed"], rest)
    assert shown == told
    for claim, row in record.items():
        assert row["verdict"] == "confirmed" or f"`{claim}`" in text, f"{claim} is not named."
    count = sum(not claim.startswith("finetuning.") for claim in record)
    for page in (text, (DOCS / "index.md").read_text(encoding="utf-8")):
        assert f"# {count} claims of theory" in page


def test_every_paper_has_a_page_with_its_claims():
    papers = {claim.paper for claim in claims.REGISTRY.values()} | {"finetuning"}
    index = (DOCS / "papers" / "index.md").read_text(encoding="utf-8")
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (DOCS / "papers").glob("*.md")}
    assert set(pages) - {"index"} == papers
    for paper in papers:
        assert f"\n{paper}\n" in index, f"{paper} is not in the list of pages."
        assert f"<!-- made: claims {paper} -->" in pages[paper]


def test_every_cited_paper_is_in_the_references(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    bibliography = importlib.import_module("bibliography")
    texts = [*(ROOT / "lorajax").rglob("*.py"), *DOCS.glob("*.md"), *DOCS.glob("*/*.md")]
    cited = {
        number
        for path in texts
        if not {"api", "generated"} & set(path.parts)
        for number in re.findall(r"arXiv:(\d{4}\.\d{4,5})", path.read_text(encoding="utf-8"))
    }
    assert len(cited) > 20
    assert not cited - set(bibliography.keys())
    entries = set(re.findall(r"^@\w+\{(\w+),", bibliography.BIB.read_text("utf-8"), re.MULTILINE))
    assert set(bibliography.BY_NAME.values()) <= entries
    line = bibliography.cited(
        "Source: Xu et al. 2025 (arXiv:2503.06982), theory section 2.2.", "md"
    )
    assert "arXiv:2503.06982 {cite:labelpar}`xu2025`" in line and "(#theory-2-2)" in line


ROOMS = (
    *(
        "adapters",
        "data",
        "exact",
        "factors",
        "finetune",
        "flows",
        "initializers",
        "laws",
        "models",
    ),
    *("optima", "problems", "ranks", "spectra", "sweeps", "tasks"),
)
# A dtype may be anything that JAX takes for one, and is described where it is not annotated.
WITHOUT_ANNOTATION = {"dtype", "level"}


def silences(function, with_source: bool = False) -> list[str]:
    """What the signature and the docstring of a function leave unsaid."""
    text = inspect.getdoc(function) or ""
    parameters = inspect.signature(function).parameters
    unsaid = [
        f"{name} has no annotation"
        for name, parameter in parameters.items()
        if parameter.annotation is inspect.Parameter.empty and name not in WITHOUT_ANNOTATION
    ]
    if inspect.signature(function).return_annotation is inspect.Signature.empty:
        unsaid.append("the result has no annotation")
    listed = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^  ([*\w, ]+):", listed[1], re.MULTILINE) if listed else []
    named = {name.strip(" *") for head in heads for name in head.split(",")}
    if listed:
        unsaid += [f"{name} is not described" for name in parameters if name not in named]
    elif parameters and len(text.splitlines()) > LONGEST // 4:
        unsaid.append("a long docstring without Args")
    if with_source and "Source:" not in text:
        unsaid.append("no source")
    return unsaid


def public_functions(room: str) -> dict[str, object]:
    """What a room exports and defines itself."""
    module = importlib.import_module(f"lorajax.{room}")
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    found = {name: getattr(module, name) for name in names}
    home = f"lorajax.{room}"
    return {
        n: f for n, f in found.items() if inspect.isfunction(f) and f.__module__.startswith(home)
    }


@pytest.mark.parametrize("room", ROOMS)
def test_public_functions_say_what_they_take_and_return(room):
    functions = public_functions(room)
    assert functions
    # A law says where it is from; `mode_law` is none.
    laws = set(functions) - {"mode_law"} if room == "laws" else set()
    found = {name: silences(function, name in laws) for name, function in functions.items()}
    assert {name: unsaid for name, unsaid in found.items() if unsaid} == {}


def test_an_argument_that_is_not_described_is_caught():
    def law(times: float, rate, *, scale: float = 1.0):
        return times, rate, scale

    law.__doc__ = "A law.\n\nArgs:\n  times: in 1/s.\n  rate: in s.\n\nReturns:\n  A number."
    assert silences(law, with_source=True) == [
        "rate has no annotation",
        "the result has no annotation",
        "scale is not described",
        "no source",
    ]


def test_a_page_that_fails_is_caught():
    text = "```python\n# a comment\n\nx = 1\n```\ntext\n```python\nassert x == 2\n```\n"
    code = blocks(text)
    assert lines_of_code(code) == 2
    with pytest.raises(AssertionError):
        run(ROOT / "page.md", code)


def test_tests_and_files_that_a_page_names_are_there():
    """What the pages of docs/ point to exists; a name that nobody defines is found."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    defined = {name for text in sources for name in re.findall(r"def (test_\w+)\(", text)}
    named, files = set(), set()
    for page in (ROOT / "docs").glob("*.md"):
        quoted = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        named |= {name for name in quoted if re.fullmatch(r"test_\w+", name)}
        files |= {n for n in quoted if re.fullmatch(r"(tests|benchmarks|lorajax|docs)/[\w/.]+", n)}
    assert len(named) > 10 and len(files) > 5
    assert not named - defined
    assert not {name for name in files if not (ROOT / name).exists()}
