"""The pages of docs/extending and the README's first examples run as they stand."""

import pathlib
import re

import pytest

from lorajax import claims

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "extending").glob("*.md"))
EXTENSIONS = {"start", "law", "claim", "rank_rule", "study", "adapter", "task", "model"}
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


def test_every_extension_runs_in_few_lines(subtests, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        with subtests.test(page.name):
            code = blocks(page.read_text(encoding="utf-8"))
            assert code, f"{page.name} has no example."
            assert lines_of_code(code) < LONGEST
            run(page, code)


def test_the_first_examples_of_the_readme_run_and_print_what_it_says(capsys):
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    run(path, blocks(text)[:2])
    stated = re.search(r"abs\(simulated - predicted\)\.max\(\)\)  # (\S+)", text)
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(float(stated[1]), rel=0.05)


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
