"""Verdicts for people and for programs: the terminal's table, `verdicts.json`, `report.html`."""

import hashlib
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from lorajax import environment
from lorajax.claims import Claim, Outcome
from lorajax.environment import files
from lorajax.environment.text import table
from lorajax.report import page
from lorajax.report.page import Html, element

SCHEMA = 1
SYMBOLS = {"confirmed": "✓", "refuted": "✗", "inconclusive": "?", "vacuous": "∅"}


def to_json(
    outcomes: Sequence[Outcome], figures: Mapping[str, bytes] = {}, *, seed: int, profile: str
) -> dict[str, Any]:
    """The content of `verdicts.json`, which `lorajax validate --resume` goes on from."""
    digests = {name: hashlib.sha256(png).hexdigest() for name, png in figures.items()}
    return {
        "schema": SCHEMA,
        "environment": environment.versions(),
        "code": environment.code(),
        "seed": seed,
        "profile": profile,
        "claims": [o.to_json() | {"figure": digests.get(o.claim.id)} for o in outcomes],
    }


def write_json(
    path: Path,
    outcomes: Sequence[Outcome],
    figures: Mapping[str, bytes] = {},
    *,
    seed: int,
    profile: str,
) -> None:
    """Writes `verdicts.json`; called after every claim, so that a run that dies loses nothing."""
    content = to_json(outcomes, figures, seed=seed, profile=profile)
    files.write(path, json.dumps(content, indent=2, ensure_ascii=False, default=float) + "\n")


def verdict_table(outcomes: Sequence[Outcome]) -> str:
    """The table that the command ends with; it fits a terminal, and the report has the rest."""
    rows = []
    for outcome in outcomes:
        evidence = outcome.evidence
        rows.append(
            (
                outcome.claim.id,
                f"{SYMBOLS[outcome.verdict]} {outcome.verdict}",
                f"{evidence.error:.2g}" if evidence else "–",
                f"{evidence.tolerance:.2g}" if evidence else "–",
                outcome.control,
            )
        )
    header = ("claim", "verdict", "error", "tolerance", "control")
    return table(header, rows, right=(2, 3))


ORDER = ("refuted", "inconclusive", "vacuous", "confirmed")
"""Verdicts, those that ask for a look first."""


def _read(name: str) -> dict[str, Any]:
    """A file of records that comes with the claims.

    `resolving.json` is what `lorajax validate --resolving` writes; its table is docs/resolving.md.
    """
    return json.loads(resources.files("lorajax.claims").joinpath(name).read_text("utf-8"))


def _title(claim: Claim) -> str:
    """What a paper's module says of itself."""
    parts = claim.check.__module__.split(".")
    if claim.paper in parts:  # A paper of several files has its title at the folder's door.
        parts = parts[: parts.index(claim.paper) + 1]
    text = (importlib.import_module(".".join(parts)).__doc__ or claim.paper).strip()
    return text.split("\n\n")[0].split("\n")[0].rstrip(".:,")


def _badge(verdict: str) -> Html:
    return element("span", f"{SYMBOLS[verdict]} {verdict}", class_=f"badge {verdict}")


def _values(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_values(x) for x in value[:12])
        return shown + (f", … ({len(value)} values)" if len(value) > 12 else "")
    return page.number(value)


def _share(error: float, tolerance: float) -> float:
    """Error over tolerance; of a tolerance of 0 all or nothing."""
    if error <= 0:
        return 0.0
    return error / tolerance if tolerance > 0 else math.inf


def _in_words(share: float) -> str:
    if share == math.inf:
        return "more than its tolerance"
    if share > 1.5:
        return f"{page.short(share)} times its tolerance"
    return f"{page.short(100 * share)} % of its tolerance"


def _error(outcome: Outcome) -> Html:
    """The error as a bar over the tolerance, and in numbers."""
    evidence = outcome.evidence
    if evidence is None:
        return element("p", f"The check did not finish: {outcome.problem}")
    if not math.isfinite(evidence.error):
        return element("p", f"The error is {evidence.error}, which decides nothing.")
    share = _share(evidence.error, evidence.tolerance)
    relation = _in_words(share) if evidence.error > 0 else "tolerance"
    words = f"error {_values(evidence.error)}, {relation} {_values(evidence.tolerance)}"
    return page.join(
        [
            page.bar(share, words, outcome.verdict),
            element("p", words[0].upper() + words[1:], ".", class_="meta"),
        ]
    )


def _numbers(outcome: Outcome) -> Html | None:
    evidence = outcome.evidence
    if evidence is None:
        return None
    names = [*evidence.measured, *(k for k in evidence.predicted if k not in evidence.measured)]
    rows = [
        (
            name.replace("_", " "),
            *(_values(found[name]) if name in found else "" for found in
              (evidence.measured, evidence.predicted)),
        )
        for name in names
    ]  # fmt: skip
    return page.table(("quantity", "measured", "predicted"), rows, numbers=(1, 2))


def _power(power: Any) -> str:
    """The resolving power in a sentence."""
    if power is None:
        return "not measured"
    if isinstance(power, str):
        return power
    return f"an alteration of the law's constant by {100 * power:g} % is refuted"


def _seeds(
    claim: Claim, verdicts: Mapping[int, str], record: Mapping[str, Any], power: Any
) -> Html:
    """Verdicts of this run and of those on record, by seed, and what the check can tell apart."""
    row = record.get(claim.id)
    here = [
        page.join([f"{page.ranges(seeds)} ", _badge(verdict), "; "])
        for verdict in ORDER
        if (seeds := [seed for seed, found in verdicts.items() if found == verdict])
    ]
    there = "nothing"
    if row is not None:
        seeds = row.get("seeds", [])
        there = f"{row['verdict']} at {len(seeds)} seeds ({page.ranges(seeds)})"
    return element(
        "p",
        "Seeds of this run: ",
        *here,
        f"on record: {there}. Resolving power: {_power(power)}.",
        class_="meta",
    )


def _item(
    outcome: Outcome,
    png: bytes | None,
    verdicts: Mapping[int, str],
    record: Mapping[str, Any],
    power: Any,
    command: str,
) -> Html:
    claim, evidence = outcome.claim, outcome.evidence
    known = record.get(claim.id, {}).get("verdict")
    changed = f" changed: on record {known or 'nothing'}" if known != outcome.verdict else ""
    details = [
        None if png is None else page.picture(png, f"figure of {claim.id}", _caption(outcome)),
        _numbers(outcome),
        element("p", f"Tolerance: {claim.tolerance}.", class_="meta"),
        *(
            element(
                "p",
                f"Assumption {'holds' if each.holds else 'does not hold'}: {each.text}"
                + (f" ({each.detail})" if each.detail else ""),
                class_="meta",
            )
            for each in (evidence.assumptions if evidence else ())
        ),
        element("p", f"Negative control: {claim.control.change}: ", _badge(outcome.control),
                ". It must not be confirmed.", class_="meta"),
        element("p", "Again: ", element("code", command), class_="meta"),
    ]  # fmt: skip
    return page.item(
        element(
            "header",
            element("h3", element("a", claim.id, href=page.anchor(claim.id)), class_="id"),
            _badge(outcome.verdict),
            element("span", changed, class_="badge refuted") if changed else None,
        ),
        element("p", claim.statement),
        element("p", f"{claim.source} · {claim.standing}", class_="meta"),
        _error(outcome),
        _seeds(claim, verdicts, record, power),
        page.fold("figure, numbers, control", *details),
        text=f"{claim.id} {claim.statement} {claim.source} {claim.standing} {outcome.verdict}",
        kind=outcome.verdict,
        id=claim.id,
        class_=outcome.verdict,
    )


def _caption(outcome: Outcome) -> str:
    return outcome.evidence.caption if outcome.evidence else ""


def _overview(papers: Mapping[str, Sequence[Outcome]]) -> Html:
    """A mark for every claim, by paper, which leads to it."""
    rows = []
    for paper, members in papers.items():
        marks = [
            element(
                "a",
                SYMBOLS[o.verdict],
                href=page.anchor(o.claim.id),
                class_=o.verdict,
                title=f"{o.claim.id}: {o.verdict}",
            )
            for o in members
        ]
        count = sum(o.verdict == "confirmed" for o in members)
        rows.append(
            element(
                "li",
                element("a", paper, href=page.anchor(f"paper-{paper}")),
                element("div", marks, class_="marks"),
                element("span", f"{count} of {len(members)}"),
            )
        )
    return element("ul", rows, class_="papers")


def to_html(
    outcomes: Sequence[Outcome],
    figures: Mapping[str, bytes],
    *,
    seed: int,
    profile: str,
    powers: Mapping[str, Any] | None = None,
    others: Mapping[int, Sequence[Outcome]] | None = None,
) -> str:
    """The content of `report.html`.

    Args:
      outcomes: at the seed, which the numbers and figures are of.
      figures: PNG bytes by claim.
      seed: of the run.
      profile: of the run.
      powers: resolving powers by claim, if this run measured them; those on record if None.
      others: outcomes of the same run at further seeds.

    Returns:
      One page that opens offline.
    """
    record, powers = _read("record.json"), _read("resolving.json") if powers is None else powers
    verdicts: dict[str, dict[int, str]] = {}
    for each, found in {seed: outcomes, **(others or {})}.items():
        for outcome in found:
            verdicts.setdefault(outcome.claim.id, {})[each] = outcome.verdict
    papers = page.grouped(outcomes, lambda o: o.claim.paper)
    counts = {name: sum(o.verdict == name for o in outcomes) for name in SYMBOLS}
    changed = [
        claim
        for claim, seeds in verdicts.items()
        if {*seeds.values()} != {record.get(claim, {}).get("verdict")}
    ]
    tiles = [
        element("li", element("b", f"{SYMBOLS[name]} {count}"), name, class_=name)
        for name, count in counts.items()
    ]
    tiles.append(element("li", element("b", str(len(changed))), "other than on record"))
    seeds = page.ranges([seed, *(others or {})])
    again = f"lorajax validate {{}} --profile {profile} --seed {seed}"
    sections = []
    for paper, members in papers.items():
        members = sorted(members, key=lambda o: ORDER.index(o.verdict))
        items = [
            _item(o, figures.get(o.claim.id), verdicts[o.claim.id], record,
                  powers.get(o.claim.id), again.format(o.claim.id))
            for o in members
        ]  # fmt: skip
        title = element("h2", _title(members[0].claim), id=f"paper-{paper}")
        name = element("p", element("code", paper), class_="meta")
        sections.append(element("section", title, name, items, class_="group"))
    versions = ", ".join(f"{k} {v}" for k, v in environment.versions().items() if k != "devices")
    return page.shell(
        "lorajax: " + ", ".join(f"{n} {name}" for name, n in counts.items()),
        element("h1", "The theory of LoRA against simulation"),
        element("ul", tiles, class_="tiles"),
        element(
            "p",
            "Each claim is held against a simulation within a tolerance that is derived, not "
            "fitted. A bar is the error, its mark the tolerance. The same check with an altered "
            "law, the negative control, must not be confirmed.",
        ),
        element("p", f"Profile {profile}, seed {seeds}. {versions}.", class_="meta"),
        _not_confirmed(outcomes, verdicts),
        element("h2", "By paper, with how many were confirmed"),
        _overview(papers),
        page.controls([name for name in ORDER if counts[name]], "claims"),
        *sections,
    )


def _not_confirmed(
    outcomes: Sequence[Outcome], verdicts: Mapping[str, Mapping[int, str]]
) -> Html | None:
    """What was refuted, and what was left open, at any seed, in words."""
    worst = {
        o.claim.id: min(verdicts[o.claim.id].values(), key=ORDER.index)
        for o in outcomes
    }  # fmt: skip
    found = [o for o in outcomes if worst[o.claim.id] != "confirmed"]
    rows = [element("h2", "Not confirmed")]
    for outcome in sorted(found, key=lambda o: ORDER.index(worst[o.claim.id])):
        claim, seeds = outcome.claim, verdicts[outcome.claim.id]
        count = sum(each == worst[claim.id] for each in seeds.values())
        where = f" at {count} of {len(seeds)} seeds" if len(seeds) > 1 else ""
        link = element("a", claim.id, href=page.anchor(claim.id), class_="id")
        rows.append(
            element("p", _badge(worst[claim.id]), f"{where} ", link,
                    f" ({claim.standing}): {claim.statement}")
        )  # fmt: skip
    return page.join(rows) if found else None
