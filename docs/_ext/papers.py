"""Claims as Markdown: from the registry, the record, the resolving powers and a run's verdicts.

Nothing here is typed by hand: statements, sources, tolerances and controls are those of the
claims, verdicts and seeds those of `record.json`, numbers and figures those of `out/validate`, if
it is there.
"""

import functools
import importlib
import inspect
import json
import pathlib
import re
from typing import Any

import bibliography
import results

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUN = ROOT / "out" / "validate"
SYMBOLS = {"confirmed": "✓", "refuted": "✗", "inconclusive": "?", "vacuous": "∅"}


@functools.cache
def registry() -> dict[str, Any]:
    """All claims, those on real networks included, in the order of the record."""
    import lorajax.claims
    import lorajax.finetune.claims  # noqa: F401  adds to the registry

    order = {id: place for place, id in enumerate(record())}
    found = lorajax.claims.REGISTRY.items()
    return dict(sorted(found, key=lambda row: order.get(row[0], len(order))))


@functools.cache
def record() -> dict[str, Any]:
    """Verdicts and seeds on record, by claim."""
    path = ROOT / "lorajax" / "claims" / "record.json"
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def powers() -> dict[str, str]:
    """The smallest alteration of each claim's constant that is refuted, or why there is none."""
    path = ROOT / "lorajax" / "claims" / "resolving.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    return {id: f"{x:.1%}" if isinstance(x, float) else x for id, x in found.items()}


@functools.cache
def run() -> dict[str, Any]:
    """What `lorajax validate` last found, by claim; empty without `out/validate`."""
    path = RUN / "verdicts.json"
    if not path.exists():
        return {}
    return {row["id"]: row for row in json.loads(path.read_text(encoding="utf-8"))["claims"]}


def papers() -> list[str]:
    """The papers, in the order of the record."""
    return list(dict.fromkeys(claim.paper for claim in registry().values()))


def of_paper(paper: str) -> list[Any]:
    """A paper's claims."""
    return [claim for claim in registry().values() if claim.paper == paper]


def escaped(text: str) -> str:
    """Plain text within Markdown: what is code stays code, stars and bars stay themselves."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        p if p.startswith("`") else re.sub(r"([\\*_|<>\[\]$])", r"\\\1", p) for p in parts
    )


def verdict(name: str) -> str:
    """A verdict with its mark and color."""
    return f'<span class="verdict {name}">{SYMBOLS[name]} {name}</span>'


def on_record(claim: Any) -> str:
    """A claim's verdict on record, which a new claim does not have yet."""
    row = record().get(claim.id)
    return verdict(row["verdict"]) if row else "not on record yet"


def seeds_of(numbers: list[int]) -> str:
    """Seeds in words: `0–9, 100–134: 45 seeds`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
    return f"{shown}: {len(numbers)} seeds" if len(numbers) > 1 else f"seed {shown}"


def number(value: Any) -> str:
    """A number, or the first of several, to four digits."""
    if isinstance(value, list):
        more = f", … ({len(value)} values)" if len(value) > 8 else ""
        return ", ".join(number(x) for x in value[:8]) + more
    return "–" if value is None else f"{float(value):.4g}"


def table(paper: str) -> str:
    """A paper's claims at a glance."""
    lines = ["| claim | standing | verdict | smallest alteration refuted |", "|---|---|---|---|"]
    for claim in of_paper(paper):
        name = claim.id.partition(".")[2]
        power = powers().get(claim.id, "not measured")
        power = re.sub(r"^no constant: .*|^not asked: .*", "–", power)
        shown = on_record(claim)
        lines.append(f"| [`{name}`](#{claim.id}) | {claim.standing} | {shown} | {power} |")
    return "\n".join(lines)


def section(claim: Any, depth: int = 3) -> str:
    """One claim: statement, source, verdict, tolerance, control, numbers and figure."""
    row = record().get(claim.id)
    at = f" at {seeds_of(row['seeds'])}" if row else ""
    name = claim.id.partition(".")[2]
    parts = [
        f"({claim.id})=",
        f"{'#' * depth} {name}",
        f"\n{escaped(claim.statement)}\n",
        f"{on_record(claim)}{at}.\n" if row else "There is no verdict on record yet.\n",
        f"- **Source** ({claim.standing}): {bibliography.cited(escaped(claim.source), 'md')}.",
        f"- **Tolerance**: {escaped(claim.tolerance)}.",
        f"- **Control**, which must not be confirmed: {escaped(claim.control.change)}.",
    ]
    if claim.id in powers():
        parts.append(f"- **Smallest alteration refuted**: {escaped(powers()[claim.id])}.")
    found = run().get(claim.id)
    if found and found["error"] is not None:
        parts.append(
            f"- **Last run** (seed 0, quick): error {number(found['error'])}, tolerance "
            f"{number(found['tolerance'])}; the control is {found['control']['verdict']}."
        )
    # One that is looked at on several instances is said once.
    looked = {(a["text"], a["holds"]): a["detail"] for a in (found or {}).get("assumptions", [])}
    for (text, holds), detail in looked.items():
        more = f" ({escaped(detail)})" if detail else ""
        does = "holds" if holds else "does not hold"
        parts.append(f"- **Assumption**, which {does}: {escaped(text)}{more}.")
    on_request = " (it trains a network, and runs where it is named)" if claim.on_request else ""
    parts.append(f"- **Run it**: `lorajax validate {claim.id}`{on_request}.\n")
    figure = RUN / "figures" / f"{claim.id}.png"
    if found and figure.exists():
        parts.append(results.picture(figure, f"/generated/claims/{figure.name}", claim.statement))
    return "\n".join(parts)


def about(paper: str) -> str:
    """What a paper's module says of its instances and of how its claims came about."""
    parts = of_paper(paper)[0].check.__module__.split(".")
    if paper in parts:  # A paper of several files has its say at the folder's door.
        parts = parts[: parts.index(paper) + 1]
    text = inspect.cleandoc(importlib.import_module(".".join(parts)).__doc__ or "")
    rest = text.split("\n\n", 1)[1:]
    return "\n\n".join(bibliography.cited(part, "md") for part in rest)


def claims_of(paper: str) -> str:
    """The generated part of a paper's page."""
    parts = [table(paper), "\n## The claims\n", about(paper), ""]
    parts += [section(claim) for claim in of_paper(paper)]
    if not run():
        parts.append(
            "Figures and numbers of a run are left out here; `make validate "
            'ARGS="--out out/validate"` before `make docs` adds them.'
        )
    return "\n".join(parts)


def title_of(paper: str) -> str:
    """The heading of a paper's page."""
    text = (ROOT / "docs" / "papers" / f"{paper}.md").read_text(encoding="utf-8")
    return text.partition("\n")[0].removeprefix("# ")


def verdicts() -> str:
    """How many claims of each paper have which verdict on record."""
    lines = ["| page | claims | confirmed | otherwise | module |", "|---|---:|---:|---|---|"]
    for paper in papers():
        rows = [record()[c.id]["verdict"] for c in of_paper(paper) if c.id in record()]
        other = [v for v in rows if v != "confirmed"]
        shown = ", ".join(f"{other.count(v)} {v}" for v in dict.fromkeys(other))
        page, good = f"[{title_of(paper)}](/papers/{paper}.md)", rows.count("confirmed")
        lines.append(f"| {page} | {len(rows)} | {good} | {shown} | `{paper}` |")
    return "\n".join(lines)


def refuted() -> str:
    """Every claim that is not confirmed, with its statement."""
    lines = []
    for claim in registry().values():
        row = record().get(claim.id, {}).get("verdict", "confirmed")
        if row != "confirmed":
            link = f"[`{claim.id}`](#{claim.id})"
            lines.append(f"- {link} ({claim.standing}, {row}): {escaped(claim.statement)}")
    return "\n".join(lines)


def figures() -> list[pathlib.Path]:
    """Figures of the last run."""
    folder = RUN / "figures"
    names = [folder / f"{id}.png" for id in registry()]
    return [path for path in names if path.exists()] if run() else []
