"""The faults that are named, the survivors that are explained, and the tables of a campaign."""

import collections
import json
import pathlib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.mutation.alterations import Mutant, mutants

HERE = pathlib.Path(__file__).parent


def named(sources: Mapping[str, str]) -> list[Mutant]:
    """The faults of named.toml, each of which has to be found exactly once in its function.

    Raises:
      ValueError: for one that is not there any more, or more than once.
    """
    rows = tomllib.loads((HERE / "named.toml").read_text(encoding="utf-8"))["fault"]
    return [_locate(row, sources[row["module"]]) for row in rows]


def _locate(row: Mapping[str, str], source: str) -> Mutant:
    import ast

    first, last = 0, len(source.splitlines())
    body = 0
    for name in row["function"].split(".") if row["function"] != "<module>" else ():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                assert node.end_lineno is not None
                if first < node.lineno and node.end_lineno <= last:
                    first, last, body = node.lineno - 1, node.end_lineno, node.body[0].lineno
                    break
    lines = source.splitlines(keepends=True)
    before = "".join(lines[:first])
    text = "".join(lines[first:last])
    if text.count(row["before"]) != 1:
        raise ValueError(
            f"{row['module']}:{row['function']} has {row['before']!r} {text.count(row['before'])} "
            "times; an entry of named.toml needs it once."
        )
    at = text.index(row["before"])
    start = len((before + text[:at]).encode())
    end = start + len(row["before"].encode())
    return Mutant(
        row["module"],
        row["function"],
        "named",
        row["before"],
        row["after"],
        0,
        start,
        end,
        (body, last) if body else (0, last),
        named=True,
    )


def equivalent() -> dict[str, str]:
    """Alterations that change nothing that is promised, by name, and why."""
    rows = tomllib.loads((HERE / "equivalent.toml").read_text(encoding="utf-8"))["mutant"]
    return {row["name"]: row["reason"] for row in rows}


def hints(root: pathlib.Path) -> dict[str, str]:
    """Which test caught an alteration when the table was last made: it is asked first, no more."""
    place = root / "benchmarks" / "results" / "mutants.json"
    if not place.exists():
        return {}
    found = json.loads(place.read_text(encoding="utf-8"))
    return {row["name"]: row["by"] for row in found["mutants"] + found["checks"] if row["by"]}


def summary(rows: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]) -> dict[str, Any]:
    """What a campaign found: a survivor is equivalent only where a reason stands against its name.

    Args:
      rows: one for each alteration.
      reasons: of the equivalent ones, by name; those of caught ones are left out.

    Returns:
      The rows, and the names of equivalent and unexplained ones; those of checks apart.
    """
    checks = [row for row in rows if row["of_check"]]
    theory = [row for row in rows if not row["of_check"]]
    survivors = [row["name"] for row in theory if not row["caught"]]
    return {
        "rows": theory,
        "checks": checks,
        "caught": [row["name"] for row in theory if row["caught"]],
        "equivalent": {name: reasons[name] for name in survivors if name in reasons},
        "unexplained": [name for name in survivors if name not in reasons],
    }


def by_value(row: Mapping[str, Any]) -> bool:
    """Whether a number or an answer was wrong: else the altered code did not run at all."""
    return row["reason"].lower().startswith("assert") or "Expected:" in row["reason"]


def figures(found: Mapping[str, Any]) -> str:
    """The numbers of a campaign in a few sentences."""
    total, caught, equal = (len(found[x]) for x in ("rows", "caught", "equivalent"))
    share = caught / max(total - equal, 1)
    told = (
        f"{total} alterations of the theory: {caught} caught, {equal} equivalent, "
        f"{len(found['unexplained'])} missed; {share:.1%} of those that alter what is promised are "
        f"caught, {caught / max(total, 1):.1%} of all. Of the caught ones "
        f"{sum(row['caught'] and by_value(row) for row in found['rows'])} gave a wrong answer; the "
        "others did not run, for shapes, types or time."
    )
    if found["checks"]:
        seen = sum(row["caught"] for row in found["checks"])
        told += f" Of {len(found['checks'])} alterations of the claims' checks {seen} are noticed."
    return told


def room_of(module: str) -> str:
    """The room of a module of the package."""
    return module.split(".")[1]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Caught of all, by operator and room, as lines of Markdown."""
    counts: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for row in rows:
        for operator in (row["operator"], "all"):
            for room in (room_of(row["module"]), "all"):
                cell = counts[operator, room]
                cell[0] += row["caught"]
                cell[1] += 1
    operators = [*sorted({o for o, _ in counts} - {"all"}), "all"]
    rooms = [*dict.fromkeys(room_of(row["module"]) for row in rows), "all"]
    lines = ["| | " + " | ".join(rooms) + " |", "|---" * (len(rooms) + 1) + "|"]
    for operator in operators:
        cells = [counts[operator, room] for room in rooms]
        told = [str(b or "") if a == b else f"{a}/{b}" for a, b in cells]
        lines.append(f"| {operator} | " + " | ".join(told) + " |")
    return lines


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"


def shown(name: str) -> str:
    """The name of an alteration as Markdown that breaks between its parts: where, before, after."""
    where, _, change = name.partition(": ")
    before, _, after = change.partition(" → ")
    module, _, function = where.partition(":")
    parts = f"{_code(module.removeprefix('lorajax.'))} {_code(function)}: {_code(before)}"
    return f"{parts} → {_code(after)}" if after else parts


HEAD = """\
# Do the tests notice when the theory's code is wrong?

Made by `make mutants` (`python -m benchmarks mutants`), which alters one constant, sign, exponent,
comparison, transpose or argument at a time and runs the tests and claims that execute the altered
line. No result here is typed by hand.

{figures}

The sample holds {count} of {candidates} possible alterations, by module and by seed {seed}, and
the faults that tests once missed (`named`). Not altered are docstrings, annotations, messages,
checks of input that only raise, drawing, and the stand-ins that `where` discards.

How many, by kind of alteration and room, and where some were not caught, caught/all:

{table}
"""

CHECKS = """\
## Checks of claims

A claim's check is a test itself. What it claims by number is part of the table above (`claimed
constant`); the rest of it is altered here, and only its verdict and its own control can see that.
An alteration of an instance (its size, scale or noise) is as right as what it replaces, and one of
how several errors become one shows only where just one of them is wrong. So these are counted
apart, and most of those that nothing notices are of these two kinds.

| alteration | noticed |
|---|---|
"""


def write(
    root: pathlib.Path, found: Mapping[str, Any], candidates: int, seed: int, left: int
) -> None:
    """docs/mutants.md and benchmarks/results/mutants.json.

    Args:
      root: the repository.
      found: as `summary` returns it.
      candidates: how many alterations there could be.
      seed: of the sample.
      left: alterations of the sample that have not been judged.
    """
    rows, count = found["rows"], sum(not row["named"] for row in found["rows"])
    text = HEAD.format(
        figures=figures(found),
        count=count,
        candidates=candidates,
        seed=seed,
        table="\n".join(table(rows)),
    )
    if left:
        text += f"\n{left} more of the sample have not been judged yet: `make mutants` goes on.\n"
    if found["unexplained"]:
        text += "\n## Missed\n\n"
        text += "".join(f"- {shown(name)}\n" for name in found["unexplained"])
    text += "\n## Equivalent\n\nSurvivors that change nothing that is promised, and why.\n\n"
    text += "| alteration | why nothing can catch it |\n|---|---|\n"
    text += "".join(f"| {shown(name)} | {why} |\n" for name, why in found["equivalent"].items())
    text += "\n## Named faults\n\n| fault | caught by |\n|---|---|\n"
    for row in rows:
        if row["named"]:
            by = " ".join(map(_code, str(row["by"]).split("::")))
            text += f"| {shown(row['name'])} | {by} |\n"
    text += "\n" + CHECKS
    for row in found["checks"]:
        text += f"| {shown(row['name'])} | {'yes' if row['caught'] else 'no'} |\n"
    (root / "docs" / "mutants.md").write_text(text, encoding="utf-8")
    keep = ("name", "operator", "named", "caught", "by", "reason", "left_out")
    data = {
        "seed": seed,
        "candidates": candidates,
        "not_judged": left,
        "figures": figures(found),
        "equivalent": found["equivalent"],
        "missed": found["unexplained"],
        "mutants": [{k: row[k] for k in keep} for row in rows],
        "checks": [{k: row[k] for k in keep} for row in found["checks"]],
    }
    place = root / "benchmarks" / "results" / "mutants.json"
    place.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def unknown(reasons: Mapping[str, str], sources: Mapping[str, str]) -> list[str]:
    """Explanations of alterations that the sources do not have any more."""
    names = {m.name for name, text in sources.items() for m in mutants(name, text)}
    return [name for name in reasons if name not in names]
