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


def summary(rows: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]) -> dict[str, Any]:
    """What a campaign found: a survivor is equivalent only where a reason stands against its name.

    Args:
      rows: one for each alteration.
      reasons: of the equivalent ones, by name; those of caught ones are left out.

    Returns:
      The rows, and the names of caught, equivalent and unexplained ones.
    """
    caught = [row["name"] for row in rows if row["caught"]]
    survivors = [row["name"] for row in rows if not row["caught"]]
    return {
        "rows": list(rows),
        "caught": caught,
        "equivalent": {name: reasons[name] for name in survivors if name in reasons},
        "unexplained": [name for name in survivors if name not in reasons],
    }


def figures(found: Mapping[str, Any]) -> str:
    """The numbers of a campaign in one sentence."""
    total, caught, equal = (len(found[x]) for x in ("rows", "caught", "equivalent"))
    share = caught / max(total - equal, 1)
    return (
        f"{total} alterations: {caught} caught, {equal} equivalent, "
        f"{len(found['unexplained'])} missed; {share:.1%} of those that alter anything are caught "
        f"({caught / max(total, 1):.1%} of all)."
    )


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
        shown = [f"{a} of {b}" if b else "" for a, b in cells]
        lines.append(f"| {operator} | " + " | ".join(shown) + " |")
    return lines


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"


def write(root: pathlib.Path, found: Mapping[str, Any], candidates: int, seed: int) -> None:
    """docs/mutants.md and benchmarks/results/mutants.json."""
    rows = found["rows"]
    lines = [
        "# Do the tests notice when the theory's code is wrong?",
        "",
        "Made by `make mutants` (`python -m benchmarks mutants`), which alters one constant, sign,",
        "exponent, comparison, transpose or argument at a time and runs the tests and claims that",
        "execute the altered line. No result here is typed by hand.",
        "",
        figures(found),
        "",
        f"The sample is one of {candidates} alterations, by module and by seed {seed}; `named` are",
        "faults that the tests once missed. In claims no number is altered: any size, seed or time",
        "of an instance is right.",
        "",
        *table(rows),
        "",
    ]
    names = {row["name"]: row for row in rows}
    if found["unexplained"]:
        lines += ["## Missed", ""]
        lines += [f"- {_code(name)}" for name in found["unexplained"]] + [""]
    lines += ["## Equivalent", "", "Survivors that change nothing that is promised, and why.", ""]
    lines += ["| alteration | why nothing can catch it |", "|---|---|"]
    lines += [f"| {_code(name)} | {why} |" for name, why in found["equivalent"].items()]
    lines += ["", "## Named faults", "", "| fault | caught by |", "|---|---|"]
    lines += [
        f"| {_code(name)} | {_code(str(row['by']))} |"
        for name, row in names.items()
        if row["named"]
    ]
    (root / "docs" / "mutants.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    keep = ("name", "operator", "named", "caught", "by", "reason")
    data = {
        "seed": seed,
        "candidates": candidates,
        "figures": figures(found),
        "equivalent": found["equivalent"],
        "missed": found["unexplained"],
        "mutants": [{k: row[k] for k in keep} for row in rows],
    }
    text = json.dumps(data, indent=1, ensure_ascii=False)
    (root / "benchmarks" / "results" / "mutants.json").write_text(text + "\n", encoding="utf-8")


def unknown(reasons: Mapping[str, str], sources: Mapping[str, str]) -> list[str]:
    """Explanations of alterations that the sources do not have any more."""
    names = {m.name for name, text in sources.items() for m in mutants(name, text)}
    return [name for name in reasons if name not in names]
