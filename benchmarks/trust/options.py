"""Wrong values of every option of every command: refused by the parser, or before JAX starts."""

import argparse
import contextlib
import io
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.trust import children

WORDS = ("", " ", "x", "1.5.2", "--", "١٢x", "None", "[1]", "0x10", "1,5", "a b")
WHOLE = ("1.5", "nan", "inf", "-1", "-5", "1e3", "99999999999999999999", "-99999999999999999999")
REAL = ("nan", "inf", "-inf", "1e400", "-1", "-1e30")
ZERO_IS_FINE = {
    "--seed", "--hold-out", "--warmup", "--weight-decay", "--smoothing", "--noises",
    "--process", "--seeds", "--mixup",
}  # fmt: skip
PATHS = {"--out", "--store", "--plot", "--peft", "--data-folder"}


def _commands() -> Iterator[tuple[list[str], argparse.ArgumentParser]]:
    """Every command with its parser, those within commands too."""
    from lorajax import cli

    todo: list[tuple[list[str], argparse.ArgumentParser]] = [([], cli.build_parser())]
    while todo:
        words, parser = todo.pop(0)
        inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in inner:
            todo += [([*words, name], sub) for name, sub in action.choices.items()]
        if words and not inner:
            yield words, parser


def _kind(action: argparse.Action, words: list[str]) -> Any:
    """What an option's value is: int, float or str; those of studies are taken apart later."""
    if words[0] == "sweep":
        from lorajax import studies

        for parameter in studies.find(words[1]).parameters:
            if parameter.option in action.option_strings:
                return parameter.kind
    return action.type or str


def _bad(action: argparse.Action, words: list[str]) -> list[list[str]]:
    """Wrong values of an option, as words of the command line."""
    option = action.option_strings[-1] if action.option_strings else ""
    if action.nargs == 0:
        return [[f"{option}={value}"] for value in ("yes", "0", "x")] if option else []
    kind, found = _kind(action, words), []
    if action.choices is not None:
        found = ["", "nonsense", str(next(iter(action.choices))).upper() + "X", "0", "-"]
    elif kind is int:
        found = [*WORDS, *WHOLE, *(() if option in ZERO_IS_FINE else ("0",))]
    elif kind is float:
        found = [*WORDS, *REAL, *(() if option in ZERO_IS_FINE else ("0",))]
    elif option in PATHS:
        return [[f"{option}={value}"] for value in ("/dev/null/x", "/proc/x/y", "/proc/self/x/")]
    elif action.option_strings:
        return []
    return [[f"{option}={value}"] if option else [value] for value in found]


class Reached(BaseException):
    """The options were judged, and the work would begin."""


def _stop(*args: Any, **kwargs: Any) -> None:
    raise Reached


@contextlib.contextmanager
def _without_work() -> Iterator[None]:
    import importlib

    from lorajax.cli import COMMANDS

    changed: list[tuple[Any, Any]] = []
    for name in (*COMMANDS, "planning", "processes"):
        module: Any = importlib.import_module(f"lorajax.cli.{name}")
        if hasattr(module, "prepare_jax"):
            changed.append((module, module.prepare_jax))
            module.prepare_jax = _stop
    try:
        yield
    finally:
        for module, old in changed:
            module.prepare_jax = old


def _call(argv: list[str]) -> tuple[str, str]:
    """Runs the command up to its work: a verdict, and what it says."""
    from lorajax import cli

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = cli.main(argv)
    except SystemExit as error:
        status = error.code
    except Reached:
        return "reached", ""
    except BaseException as error:
        return "internal", f"{type(error).__name__}: {error}"
    return ("refused" if status == 2 else "accepted"), said.getvalue()


def _judged(argv: list[str], option: str, value: str) -> tuple[str, str]:
    with _without_work():
        verdict, said = _call(argv)
    if verdict == "reached":  # what needs the files, the names or the devices is judged later
        found = children.apart(lambda: list(_call(argv)), 10.0, room=None)
        verdict, said = found.get("value") or ("hung" if found.get("hung") else "internal", "")
    if verdict == "refused" and option and option not in said and value not in said:
        return "nameless", said
    return verdict, said


def command(words: list[str], parser: argparse.ArgumentParser, place: pathlib.Path) -> Any:
    """All wrong options of a command."""
    counts: dict[str, int] = {}
    examples, slowest = [], 0.0
    os.chdir(place)
    lines = [(a.option_strings[-1] if a.option_strings else "", v)
             for a in parser._actions for v in _bad(a, words)]  # fmt: skip
    lines += [(o + "x", [o + "x", "1"]) for a in parser._actions for o in a.option_strings]
    lines += [
        (o, [o]) for a in parser._actions for o in a.option_strings[-1:] if a.nargs != 0
        and a.nargs not in ("*", "?")
    ]  # fmt: skip
    for option, value in lines:
        begun = time.monotonic()
        verdict, said = _judged([*words, *value], option, value[0].partition("=")[2])
        slowest = max(slowest, time.monotonic() - begun)
        counts[verdict] = counts.get(verdict, 0) + 1
        if verdict != "refused":
            examples.append([option, " ".join(value), verdict, said.strip()[-160:]])
    return {"counts": counts, "examples": examples, "slowest": slowest}


def rows(journal: Any) -> list[dict[str, Any]]:
    """A row for each command."""
    found = []
    place = pathlib.Path(tempfile.mkdtemp(prefix="lorajax-options-"))
    for words, parser in _commands():
        name = "lorajax " + " ".join(words)
        if name not in journal.done:
            each = children.apart(lambda: command(words, parser, place), 600.0, room=None)  # noqa: B023
            value = each.get("value") or {
                "counts": {"internal": 1}, "examples": [["", "", "broken", str(each)[:300]]],
                "slowest": each["seconds"],
            }  # fmt: skip
            journal.add({"name": name, "room": "cli", **value})
        found.append(journal.done[name])
        for example in found[-1]["examples"]:
            print(name, *example, sep=" | ", flush=True)
    return found
