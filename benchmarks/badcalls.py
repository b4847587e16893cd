"""Are bad arguments of every public function refused in a sentence, before anything is computed?

    python -m benchmarks badcalls [--only NAME] [--fresh] [--valid]

Every public function and class has a valid call (`benchmarks/trust/valid.py`). One argument at a
time becomes a value that is certainly wrong, by its annotation and by what it stands for
(`benchmarks/trust/domains.py`); so does every option of every command. A bad call is refused when
the package's own code raises, within 10 seconds, one sentence that names the argument. The library
runs as users run it, without the tests' checks of types. A campaign that was cut off goes on.
"""

import argparse
import collections
import functools
import inspect
import os
import pathlib
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from typing import Any

os.environ.setdefault("JAX_TRACEBACK_FILTERING", "off")

from benchmarks.trust import calls, children, domains, options, pages, valid  # noqa: E402
from benchmarks.trust.world import World  # noqa: E402

SECONDS = 10.0
REFUSALS = ("ValueError", "TypeError", "KeyError", "FileNotFoundError", "OSError", "Unstable")


class TooLong(BaseException):
    """A call that did not come back."""


def _ring(number: int, frame: Any) -> None:
    raise TooLong


def attempt(function: Any, arguments: dict[str, Any], name: str) -> tuple[str, str]:
    """What comes of a call with one bad argument: a verdict and the words."""
    signal.signal(signal.SIGALRM, _ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = function(**arguments)
            if inspect.isgenerator(found):
                next(found, None)
        return "accepted", ""
    except TooLong:
        return "hung", ""
    except (Exception, SystemExit) as error:
        said = children.told(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return judge(said, name), f"{said['error']}: {said['message'][:160]} [{said['file'][-40:]}]"


def judge(said: dict[str, Any], name: str) -> str:
    """Whether an exception is a refusal of an argument."""
    own = "/lorajax/" in said["file"].replace("\\", "/")
    if said["error"] not in REFUSALS or not own:
        return "internal"
    message = said["message"]
    if not re.search(rf"\b{name.replace('_', '[_ -]')}s?\b", message):
        return "nameless"
    return "refused" if message.rstrip("'\"").endswith(".") and "\n" not in message else "unworded"


def campaign(name: str, function: Any, folder: pathlib.Path) -> dict[str, Any]:
    """All bad calls of one function."""
    world = World(folder)
    arguments = valid.arguments(name, function, world)
    found = function(**arguments)  # what is wrong with a bad call must be the one thing altered
    if inspect.isgenerator(found):
        next(found, None)
    # A call may have consumed or written what it was given.
    arguments = valid.arguments(name, function, World(folder))
    hints = valid.hints_of(function)
    counts: dict[str, int] = {}
    examples: list[list[str]] = []
    slowest = 0.0
    for parameter in valid.parameters(function):
        hint = hints.get(parameter.name, Any)
        domain = calls.DEMANDS.get(f"{name}:{parameter.name}")
        values = domains.wrong_values(hint, parameter.name, domain)
        values += calls.worse(name, parameter.name, world)
        for value in values:
            if value is parameter.default:
                continue
            begun = time.monotonic()
            verdict, words = attempt(function, {**arguments, parameter.name: value}, parameter.name)
            slowest = max(slowest, time.monotonic() - begun)
            counts[verdict] = counts.get(verdict, 0) + 1
            if verdict != "refused" and sum(e[0] == parameter.name for e in examples) < 3:
                examples.append([parameter.name, domains.shown(value), verdict, words])
    return {"counts": counts, "examples": examples, "slowest": slowest}


def whole(name: str, function: Any, folder: pathlib.Path) -> dict[str, Any]:
    """The valid call, which must come back."""
    found = function(**valid.arguments(name, function, World(folder)))
    if inspect.isgenerator(found):
        next(found, None)
    return {"counts": {}, "examples": [], "slowest": 0.0}


def quietly(work: Any, *details: Any) -> Any:
    """Work of a child that says nothing."""
    with open(os.devnull, "w") as quiet:
        os.dup2(quiet.fileno(), 1)
    return work(*details)


def _reasons(exempt: Mapping[str, int]) -> str:
    """Why names are not called, the commonest reasons first."""
    ordered = sorted(exempt.items(), key=lambda item: (-item[1], item[0]))
    return "; ".join(f"{count} ({reason})" for reason, count in ordered)


def section(rows: list[dict[str, Any]], exempt: Mapping[str, int]) -> str:
    """The campaign in words and a table."""
    rooms: dict[str, dict[str, int]] = {}
    for row in rows:
        room = rooms.setdefault(row["room"], {"functions": 0})
        room["functions"] += 1
        for verdict, count in row["counts"].items():
            room[verdict] = room.get(verdict, 0) + count
    kinds = ("refused", "accepted", "internal", "nameless", "unworded", "hung")
    lines: list[list[Any]] = [
        [name, each["functions"], *(each.get(kind, 0) for kind in kinds)]
        for name, each in sorted(rooms.items())
    ]
    total = sum(sum(line[2:]) for line in lines)
    refused = sum(line[2] for line in lines)
    slowest = max((row["slowest"] for row in rows), default=0.0)
    words = (
        f"## Bad calls\n\n{total:,} bad calls of {len(rows)} functions, classes and commands, "
        f"{refused:,} refused as they should be; the slowest took {slowest:.1f} s. "
        f"{sum(exempt.values())} public names are not called: {_reasons(exempt)}. "
        "*accepted*: came back; *internal*: raised by something else than this package; "
        "*nameless*: does not name the argument; *unworded*: "
        "no sentence."
    )
    return f"{words}\n\n{pages.table(['room', 'functions', *kinds], lines)}\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks badcalls", description=__doc__)
    parser.add_argument("--only", metavar="NAME", default="", help="names that begin so")
    parser.add_argument("--fresh", action="store_true", help="forget what was done before")
    parser.add_argument("--valid", action="store_true", help="make the valid calls alone")
    given = parser.parse_args(argv)
    sys.setrecursionlimit(3000)
    partial = bool(given.only or given.valid)
    place = pathlib.Path(tempfile.mkdtemp(prefix="lorajax-badcalls-"))
    cache = pages.ROOT / "out" / "campaigns"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "cache"))
    os.environ.setdefault("JAX_ENABLE_X64", "1")
    file = cache / ("badcalls-partial.jsonl" if partial else "badcalls.jsonl")
    journal = pages.Journal(file, given.fresh or partial)
    rows, exempt = [], collections.Counter[str]()
    for name, function in valid.named():
        if reason := valid.exempt(name, function):
            exempt[reason] += 1
            continue
        if not name.removeprefix("lorajax.").startswith(given.only):
            continue
        if name not in journal.done:
            work = whole if given.valid else campaign
            os.chdir(place)

            found = children.apart(
                functools.partial(quietly, work, name, function, place), 240.0, room=None
            )
            value = found.get("value") or {
                "counts": {"hung" if found.get("hung") else "internal": 1},
                "examples": [["", "", "broken", str(found)[:300]]],
                "slowest": found["seconds"],
            }
            journal.add({"name": name, "room": name.split(".")[1], **value})
        rows.append(journal.done[name])
        for example in rows[-1]["examples"]:
            print(name, *example, sep=" | ", flush=True)
    if not given.valid and "cli".startswith(given.only[:3]):
        rows += options.rows(journal)
    print(section(rows, exempt))
    if not partial:
        slim = [{k: v for k, v in row.items() if k != "examples"} for row in rows]
        pages.publish("badcalls", {"page": section(rows, exempt), "rows": slim})
    return int(any(set(row["counts"]) - {"refused"} for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
