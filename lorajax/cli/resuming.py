"""What runs that were cut short have left in their folders, of this version or of one before.

Verdicts of `lorajax validate`, and the settings that older runs of `lorajax finetune` lack.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

SINCE: dict[str, tuple[str, Any]] = {
    "accumulate": ("2026-11-25", 1),
    "kind": ("2026-11-25", None),
    "label": ("2026-11-25", None),
    "max_length": ("2026-11-25", None),
    "metric": ("2026-11-25", []),
    "pack": ("2026-11-25", False),
    "pool": ("2026-11-25", None),
    "test": ("2026-11-25", None),
    "text": ("2026-11-25", None),
    "tokenizer": ("2026-11-25", None),
    "window": ("2026-11-29", None),
    "mixup": ("2026-11-29", 0.0),
    "fill": ("2026-11-30", False),
}
"""Options of `lorajax finetune` that older runs do not have: the day they came (all of them before
0.1.0), and the value with which a run is what it was without them. An option that no value leaves
out stays out of here, and older runs are then refused."""


def neutral() -> dict[str, Any]:
    """The options that older runs do not have, with the values that change nothing."""
    return {name: value for name, (_, value) in SINCE.items()}


def assumed(names: dict[str, Any]) -> str:
    """In words that a run was begun before some options came; empty where there is none.

    Args:
      names: of the options, with the values that it counts as having.
    """
    if not names:
        return ""
    values = ", ".join(f"{name} = {value!r}" for name, value in sorted(names.items()))
    return f"this run was begun before some options came, and goes on with {values}"


class Kept(NamedTuple):
    """What need not be done again.

    Attributes:
      outcomes: of claims, all but their drawing.
      figures: their figures as PNG, by claim.
      powers: resolving powers by claim, where they are numbers.
    """

    outcomes: list[Any]
    figures: dict[str, bytes]
    powers: dict[str, float]


NOTHING = Kept([], {}, {})
DAMAGED = "is damaged, and what it held is done again."


def kept(folder: Path, chosen: list[Any], run: Any) -> Kept:
    """The verdicts in a folder, with their figures, where the same command has made them.

    A claim whose check raised, or whose figure is not the one it had, is not among them.

    Args:
      folder: of the report.
      chosen: the claims that are asked for.
      run: seed and profile.

    Raises:
      ValueError: for verdicts of another seed, profile, machine or code, or of claims that are not
        asked for now.
    """
    from lorajax import environment
    from lorajax.claims import Outcome

    path = folder / "verdicts.json"
    there = read(path)
    if there is None:
        return NOTHING
    now = {
        "seed": run.seed,
        "profile": run.profile,
        "environment": environment.versions(),
        "code": environment.code(),
    }
    for name, value in now.items():
        if there.get(name) != value:
            shown = f"{name} {there[name]!r}, not {value!r}"
            what = shown if name in ("seed", "profile") and name in there else f"another {name}"
            raise ValueError(
                f"--resume goes on where the same command was; {path} was made with {what}: give "
                "the same options, another --out, or no --resume to begin anew."
            )
    try:
        entries = {entry["id"]: entry for entry in there["claims"]}
        asked = {claim.id: claim for claim in chosen}
        if others := [name for name in entries if name not in asked]:
            raise ValueError(
                f"--resume goes on where the same command was; {path} has {', '.join(others)} as "
                "well: name the same claims, another --out, or give no --resume to begin anew."
            )
        outcomes = [Outcome.from_json(asked[name], entry) for name, entry in entries.items()]
        digests = {name: entry["figure"] for name, entry in entries.items()}
    except (KeyError, TypeError, AttributeError):
        print(f"{path} {DAMAGED}")
        return NOTHING
    drawn = [name for name, digest in digests.items() if digest is not None]
    figures = {name: _bytes(folder / "figures" / f"{name}.png") for name in drawn}
    lost = {n for n in drawn if hashlib.sha256(figures[n]).hexdigest() != digests[n]}
    outcomes = [o for o in outcomes if not o.problem and o.claim.id not in lost]
    whole = {outcome.claim.id for outcome in outcomes}
    powers = read(folder / "resolving.json") or {}
    return Kept(
        outcomes,
        {name: png for name, png in figures.items() if name in whole},
        # The others are words that cost nothing, or an exception's.
        {k: v for k, v in powers.items() if k in whole and isinstance(v, float)},
    )


def read(path: Path) -> dict[str, Any] | None:
    """What a file of JSON holds; None where there is none, or only a part of one."""
    try:
        found = json.loads(_bytes(path) or b"null")
    except ValueError:
        print(f"{path} {DAMAGED}")
        return None
    return found if isinstance(found, dict) else None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
