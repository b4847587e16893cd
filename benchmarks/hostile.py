"""Are files that somebody made to do harm refused, in one sentence and without their gigabytes?

    python -m benchmarks hostile [--only TEXT] [--fresh]

Each file is loaded in a process of its own, whose memory may grow by 300 MB and which has 10
seconds. A file is refused when ValueError (or OSError) says in one sentence which file it is; the
sandbox of chat templates has no file to name. A campaign that was cut off goes on.
"""

import argparse
import contextlib
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.trust import children, pages, strangers

GROWTH, SECONDS = 300 << 20, 10.0


class Case(NamedTuple):
    """A hostile file: of which kind, how it is made, how it is loaded, and what it is called."""

    kind: str
    name: str
    make: Callable[[pathlib.Path], Any]
    load: Callable[[Any], Any]


def _module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("_hostile", pages.ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _models() -> list[Case]:
    from lorajax import models

    tests = _module("tests/models/test_hostile.py")

    def make(spoil: Any) -> Callable[[pathlib.Path], pathlib.Path]:
        def made(folder: pathlib.Path) -> pathlib.Path:
            inner = folder / "folder"
            inner.mkdir()
            spoil(inner)
            return inner / "model.npz" if (inner / "model.npz").exists() else inner

        return made

    return [Case("models", n, make(spoil), models.load) for n, spoil in tests.CASES.items()]


def _adapters(place: pathlib.Path) -> list[Case]:
    from lorajax import adapters

    tests = _module("tests/adapters/test_peft_hostile.py")

    def save() -> None:
        import jax

        adapted = adapters.adapt(tests.Model(), "layer", key=jax.random.key(0), rank=2)
        adapters.save_peft(adapted, place / "adapter")

    if "error" in (found := children.apart(save, 120.0)):
        raise RuntimeError(found)

    def make(spoil: Any) -> Callable[[pathlib.Path], pathlib.Path]:
        def made(folder: pathlib.Path) -> pathlib.Path:
            shutil.copytree(place / "adapter", folder / "adapter")
            spoil(folder / "adapter")
            return folder / "adapter"

        return made

    def load(folder: pathlib.Path) -> None:
        adapters.load_peft(tests.Model(), folder)

    return [Case("adapters (PEFT)", n, make(s), load) for n, (s, _) in tests.HOSTILE.items()]


def _stores(place: pathlib.Path) -> list[Case]:
    from lorajax import sweeps

    def save() -> None:
        sweeps.sweep(_line, {"x": [1.0, 2.0, 3.0, 4.0]}, store=place / "store", chunk=2)

    if "error" in (found := children.apart(save, 120.0)):
        raise RuntimeError(found)

    def make(spoil: Any) -> Callable[[pathlib.Path], pathlib.Path]:
        return lambda folder: spoil(shutil.copytree(place / "store", folder / "store"))

    def load(folder: pathlib.Path) -> None:
        sweeps.open_sweep(folder)

    return [Case("stores of sweeps", n, make(s), load) for n, s in strangers.STORES.items()]


def _line(x: Any) -> dict[str, Any]:
    return {"y": 2 * x}


def _template(source: str) -> None:
    from lorajax.data import text

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    shown = text.Template(source).render(messages)
    # Jinja answers a forbidden attribute with nothing at all, which is as good as a refusal.
    if shown.strip():
        raise RuntimeError(f"rendered {shown[:60]!r}")
    raise ValueError("nothing comes of it.")


def cases(place: pathlib.Path) -> list[Case]:
    """All of them; what they share is made in a folder."""
    from lorajax import data
    from lorajax.data import pictures, text

    def folder(path: pathlib.Path) -> pathlib.Path:
        return path if path.is_dir() else path.parent

    def picture(path: pathlib.Path) -> None:
        pictures.decode(path, str(path))

    def sheet(path: pathlib.Path) -> None:
        text.read_texts(path)

    def tokenizer(path: pathlib.Path) -> None:
        text.chat_template(folder(path))

    found = [*_models(), *_adapters(place), *_stores(place)]
    kinds = {
        "pictures": (strangers.PICTURES, picture),
        "texts": (strangers.TEXTS, sheet),
        "tokenizers and their settings": (strangers.TOKENIZERS, tokenizer),
        "packs of data": (strangers.PACKS, data.load),
        "IDX files": (strangers.IDX, data.read_idx),
    }
    for kind, (makers, load) in kinds.items():
        found += [Case(kind, name, make, load) for name, make in makers.items()]
    for name, source in strangers.TEMPLATES.items():
        made = lambda _, source=source: source  # noqa: E731
        found.append(Case("chat templates", f"a template that {name}", made, _template))
    return found


def judge(case: Case, folder: pathlib.Path) -> dict[str, Any]:
    """What came of one file."""
    target = case.make(folder)

    def load() -> int:
        import jax.numpy as jnp

        jnp.zeros(1).block_until_ready()
        before = children.peak()
        # Where a harmful file would leave its mark.
        with contextlib.chdir(folder), open(os.devnull, "w") as quiet:
            with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
                try:
                    case.load(target)
                    caught = None
                except BaseException as error:
                    caught = children.told(error)
        return {"caught": caught, "growth": children.peak() - before}  # type: ignore[return-value]

    found = children.apart(load, SECONDS)
    row = {"name": f"{case.kind}: {case.name}", "kind": case.kind, "seconds": found["seconds"]}
    if "value" not in found:
        return row | {"verdict": "hung" if found.get("hung") else "died", "message": str(found)}
    caught, growth = found["value"]["caught"], found["value"]["growth"]
    row |= {"growth": growth, "message": (caught or {}).get("message", "")}
    if (folder / "harmed").exists():
        return row | {"verdict": "harmed"}
    if caught is None:
        return row | {"verdict": "loaded"}
    message = caught["message"]
    if caught["error"] not in ("ValueError", "OSError") or not message.endswith("."):
        return row | {"verdict": "raw", "message": f"{caught['error']}: {message[:300]}"}
    if "\n" in message or len(message) > 800:
        return row | {"verdict": "no sentence"}
    if isinstance(target, pathlib.Path) and str(folder) not in message:
        return row | {"verdict": "nameless"}
    return row | {"verdict": "refused" if growth < GROWTH else "heavy"}


def section(rows: list[dict[str, Any]]) -> str:
    """The campaign in words and a table."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    lines = []
    for kind in kinds:
        own = [row for row in rows if row["kind"] == kind]
        refused = sum(row["verdict"] == "refused" for row in own)
        most = max((row.get("growth", 0) for row in own), default=0)
        slowest = max(row["seconds"] for row in own)
        lines.append([kind, len(own), refused, f"{most / 2**20:.0f} MB", f"{slowest:.1f} s"])
    bad = [row for row in rows if row["verdict"] != "refused"]
    head = ["what", "files", "refused", "most memory", "slowest"]
    refused = f"{len(rows) - len(bad)} refused in one sentence"
    words = f"## Hostile files\n\n{len(rows)} files, {refused}, each within 300 MB and 10 s."
    shown = pages.table(head, lines)
    listed = "".join(f"\n- {row['name']}: {row['verdict']}" for row in bad)
    return f"{words}\n\n{shown}\n" + (f"\nNot refused:\n{listed}\n" if bad else "")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks hostile", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", default="", help="files whose name has this")
    parser.add_argument("--fresh", action="store_true", help="forget what was done before")
    options = parser.parse_args(argv)
    import lorajax.adapters
    import lorajax.data.text
    import lorajax.models
    import lorajax.sweeps  # noqa: F401  before the forks

    place = pathlib.Path(tempfile.mkdtemp(prefix="lorajax-hostile-"))
    journal = pages.Journal(
        pages.ROOT / "out" / "campaigns" / "hostile.jsonl", options.fresh or bool(options.only)
    )
    rows = []
    try:
        for number, case in enumerate(cases(place)):
            name = f"{case.kind}: {case.name}"
            if options.only not in name:
                continue
            if name not in journal.done:
                folder = place / str(number)
                folder.mkdir()
                journal.add(judge(case, folder))
                shutil.rmtree(folder, ignore_errors=True)
            rows.append(journal.done[name])
            if rows[-1]["verdict"] != "refused":
                print(f"{rows[-1]['verdict']}: {name}: {rows[-1]['message'][:300]}", flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(section(rows))
    if not options.only:
        slim = [{k: v for k, v in row.items() if k != "message"} for row in rows]
        for row in slim:
            row["seconds"] = round(row["seconds"], 2)
        pages.publish("hostile", {"page": section(rows), "rows": slim})
    return int(any(row["verdict"] != "refused" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
