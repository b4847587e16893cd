"""Parts of pages that are made, not written: a line `<!-- made: NAME ARGUMENT -->` becomes them."""

import pathlib
import re
import shutil
from typing import Any

import papers
import results

MAKERS = {
    "claims": papers.claims_of,
    "verdicts": papers.verdicts,
    "refuted": papers.refuted,
    "results": results.table,
    "gallery": results.gallery,
    "bibliography": lambda: "```{bibliography}\n:all:\n```",
}
_MARK = re.compile(r"^<!-- made: (\w+)(?: (\w+))? -->$", re.MULTILINE)


def filled(text: str) -> str:
    """A page with its made parts."""
    return _MARK.sub(lambda m: MAKERS[m[1]](*([m[2]] if m[2] else [])), text)


def source_read(app: Any, docname: str, source: list[str]) -> None:
    """Fills a page in before it is parsed."""
    source[0] = filled(source[0])


def figures(app: Any) -> None:
    """Copies figures next to the pages, where Sphinx finds them."""
    folder = pathlib.Path(app.srcdir) / "generated"
    shutil.rmtree(folder, ignore_errors=True)
    for name, paths in (("claims", papers.figures()), ("gallery", results.figures())):
        (folder / name).mkdir(parents=True)
        for path in paths:
            shutil.copy(path, folder / name / results.flat(path))
    results.plot_sweeps(folder / "sweeps.png")


def outdated(app: Any, env: Any, added: Any, changed: Any, removed: Any) -> list[str]:
    """Pages with made parts are made each time: what they show lies outside of them."""
    return [name for name in env.found_docs if _MARK.search(env.doc2path(name).read_text("utf-8"))]


def setup(app: Any) -> dict[str, bool]:
    """Hooks in."""
    app.connect("builder-inited", figures)
    app.connect("env-get-outdated", outdated)
    app.connect("source-read", source_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
