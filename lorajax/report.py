"""Verdicts for people and for programs: the terminal's table, `verdicts.json`, `report.html`.

The report is one file with its figures inside; it opens offline and needs nothing else.
"""

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorajax import environment
from lorajax.claims import Outcome
from lorajax.environment import files
from lorajax.environment.text import table

SCHEMA = 1
SYMBOLS = {"confirmed": "✓", "refuted": "✗", "inconclusive": "?", "vacuous": "∅"}


def to_json(outcomes: Sequence[Outcome], *, seed: int, profile: str) -> dict[str, Any]:
    """The content of `verdicts.json`."""
    return {
        "schema": SCHEMA,
        "environment": environment.versions(),
        "seed": seed,
        "profile": profile,
        "claims": [outcome.to_json() for outcome in outcomes],
    }


def write_json(path: Path, outcomes: Sequence[Outcome], *, seed: int, profile: str) -> None:
    """Writes `verdicts.json`; called after every claim, so that a run that dies loses nothing."""
    content = to_json(outcomes, seed=seed, profile=profile)
    files.write(path, json.dumps(content, indent=2, ensure_ascii=False, default=float) + "\n")


def verdict_table(outcomes: Sequence[Outcome]) -> str:
    """The table that the command ends with."""
    rows = []
    for outcome in outcomes:
        evidence = outcome.evidence
        rows.append(
            (
                outcome.claim.id,
                outcome.claim.standing,
                f"{SYMBOLS[outcome.verdict]} {outcome.verdict}",
                f"{evidence.error:.2g}" if evidence else "–",
                f"{evidence.tolerance:.2g}" if evidence else "–",
                f"{SYMBOLS[outcome.control]} {outcome.control}",
                f"{outcome.seconds:.1f} s",
            )
        )
    header = ("claim", "standing", "verdict", "error", "tolerance", "altered law", "time")
    return table(header, rows)


CSS = """
:root { color-scheme: light dark; --line: #8884; --good: #00795a; --bad: #b8400a; --open: #8a6d00; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
         vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; }
section { border-top: 1px solid var(--line); margin-top: 2.5rem; }
h2 { font: 600 1.05rem ui-monospace, monospace; margin-bottom: .2rem; }
img { max-width: 100%; background: white; border-radius: 4px; }
figure { margin: 1rem 0; } figcaption { font-size: .85rem; opacity: .8; }
code { font: .85rem ui-monospace, monospace; background: #8882; padding: .1rem .3rem;
       border-radius: 3px; }
.verdict { font-weight: 600; } .confirmed { color: var(--good); } .refuted { color: var(--bad); }
.inconclusive, .vacuous { color: var(--open); } .meta { font-size: .85rem; opacity: .8; }
.scroll { overflow-x: auto; }
"""


def _number(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_number(x) for x in value[:12])
        return shown + (f", … ({len(value)} values)" if len(value) > 12 else "")
    return f"{float(value):.6g}"


def _verdict(verdict: str) -> str:
    return f'<span class="verdict {verdict}">{SYMBOLS[verdict]} {verdict}</span>'


def _row(cells: Iterable[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def _numbers(outcome: Outcome) -> str:
    evidence = outcome.evidence
    if evidence is None:
        return f"<p>The check did not finish: {html.escape(outcome.problem)}</p>"
    names = [*evidence.measured, *(k for k in evidence.predicted if k not in evidence.measured)]
    rows = [
        _row(
            (
                html.escape(name.replace("_", " ")),
                _number(evidence.measured[name]) if name in evidence.measured else "",
                _number(evidence.predicted[name]) if name in evidence.predicted else "",
            )
        )
        for name in names
    ]
    head = _row(("quantity", "measured", "predicted"), "th")
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _section(outcome: Outcome, png: bytes | None, command: str) -> str:
    claim, evidence = outcome.claim, outcome.evidence
    parts = [
        f'<section id="{claim.id}"><h2>{claim.id}</h2>',
        f"<p>{html.escape(claim.statement)}</p>",
        f'<p class="meta">{html.escape(claim.source)} · {claim.standing}</p>',
        f"<p>{_verdict(outcome.verdict)}",
    ]
    if evidence is not None:
        parts.append(
            f": error {_number(evidence.error)}, tolerance {_number(evidence.tolerance)} "
            f"({html.escape(claim.tolerance)})."
        )
    parts.append("</p>")
    if png is not None:
        data = base64.b64encode(png).decode("ascii")
        caption = html.escape(evidence.caption if evidence else "")
        parts.append(
            f'<figure><img alt="{html.escape(claim.id)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    parts.append(_numbers(outcome))
    for assumption in evidence.assumptions if evidence else ():
        mark = "holds" if assumption.holds else "does not hold"
        detail = f" ({assumption.detail})" if assumption.detail else ""
        parts.append(
            f'<p class="meta">Assumption {mark}: {html.escape(assumption.text + detail)}</p>'
        )
    parts.append(
        f'<p class="meta">Negative control: {html.escape(claim.control.change)} → '
        f"{_verdict(outcome.control)}</p>"
        f'<p class="meta">Rerun: <code>{html.escape(command)}</code></p></section>'
    )
    return "".join(parts)


def to_html(
    outcomes: Sequence[Outcome],
    figures: Mapping[str, bytes],
    *,
    seed: int,
    profile: str,
) -> str:
    """The content of `report.html`."""
    counts = ", ".join(f"{sum(o.verdict == name for o in outcomes)} {name}" for name in SYMBOLS)
    rows = [
        _row(
            (
                f'<a href="#{o.claim.id}">{o.claim.id}</a>',
                o.claim.standing,
                _verdict(o.verdict),
                _number(o.evidence.error) if o.evidence else "",
                _number(o.evidence.tolerance) if o.evidence else "",
                _verdict(o.control),
            )
        )
        for o in outcomes
    ]
    head = _row(("claim", "standing", "verdict", "error", "tolerance", "altered law"), "th")
    versions = ", ".join(f"{k} {v}" for k, v in environment.versions().items() if k != "devices")
    sections = "".join(
        _section(
            o,
            figures.get(o.claim.id),
            f"lorajax validate {o.claim.id} --profile {profile} --seed {seed}",
        )
        for o in outcomes
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>lorajax: {counts}</title><style>{CSS}</style></head><body>"
        "<h1>The theory of LoRA against simulation</h1>"
        f"<p>{counts}. Profile {profile}, seed {seed}.</p>"
        "<p>Each claim is held against a simulation with a tolerance that is derived, "
        "not fitted. The "
        "last column is its negative control, the same check with an altered law, "
        "which must not be "
        f'confirmed.</p><p class="meta">{html.escape(versions)}</p>'
        f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>{sections}</body></html>\n'
    )
