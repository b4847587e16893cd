"""Notebooks as pages, with the outputs that `make notebooks` left, or as text and code alone."""

import pathlib
import re
from typing import Any

import jupytext
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = ROOT / "notebooks"
EXECUTED = ROOT / "out" / "notebooks"
WITHOUT = "*Outputs are left out here; `make notebooks` before `make docs` adds them.*"
_LINK = re.compile(r"\]\((\.\./docs/|)([\w/]+)\.(md|py)(#[\w-]+)?\)")


def names() -> list[str]:
    """The notebooks."""
    return sorted(path.stem for path in SOURCES.glob("[a-z]*.py"))


def linked(text: str) -> str:
    """Text whose links lead to pages: in `notebooks/` they lead to the files that pages are of."""

    def page(match: re.Match) -> str:
        inside, path, ending, anchor = match.groups()
        where = "../" if inside else ""
        return f"]({where}{path}.{'ipynb' if ending == 'py' else ending}{anchor or ''})"

    return _LINK.sub(page, text)


def code_of(notebook: Any) -> list[Any]:
    """The cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def notebook(name: str, executed: pathlib.Path = EXECUTED) -> Any:
    """A notebook for its page.

    Args:
      name: of the file in `notebooks/`.
      executed: folder of notebooks with outputs.

    Returns:
      The notebook; with outputs where those of the very same code are there, else without.
    """
    found = jupytext.read(SOURCES / f"{name}.py")
    path = executed / f"{name}.ipynb"
    if path.exists():
        done = nbformat.read(path, as_version=4)
        pairs = list(zip(code_of(found), code_of(done), strict=False))
        same = len(code_of(found)) == len(code_of(done))
        if same and all(new.source == old.source for new, old in pairs):
            for new, old in pairs:
                new.outputs, new.execution_count = old.outputs, old.execution_count
    if not any(cell.get("outputs") for cell in found.cells):
        found.cells.insert(1, nbformat.v4.new_markdown_cell(WITHOUT, id="without"))
    # What a notebook that was never executed does not say, and highlighting asks for.
    found.metadata["language_info"] = {"name": "python", "pygments_lexer": "python"}
    for cell in found.cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source)
        for output in cell.get("outputs", []):
            width = output.get("metadata", {}).get("image/png", {}).get("width")
            if width:  # in pixels of the page, of which the picture has more
                cell.metadata["mystnb"] = {"image": {"width": f"{width}px"}}
    return found


def write(app: Any) -> None:
    """Writes the pages; those that are as they were keep their time, so that builds stay short."""
    folder = pathlib.Path(app.srcdir) / "notebooks"
    for old in folder.glob("*.ipynb"):
        if old.stem not in names():
            old.unlink()
    for name in names():
        text, path = nbformat.writes(notebook(name)), folder / f"{name}.ipynb"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Writes the pages before anything is read."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
