"""Holds the numbers of two `verdicts.json` against each other: `compare_verdicts.py ONE OTHER`.

The main job on both ends of the support range must say the same: every verdict, every control's,
and every error up to what the claim's own tolerance leaves to rounding.
"""

import json
import sys
from pathlib import Path
from typing import Any

# Of a claim's tolerance, or of the distance to it where that is more (a tolerance may be 0): two
# releases draw the same numbers and round differently.
ROUNDING = 0.05
# Claims say what their tolerance is made of. Where it bounds nothing but this, so does the error:
# an adaptive solver takes other steps where one rounds differently, and is as right by its bound.
OWN = ("rounding", "solver error")


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """A sentence for each thing in which two reports differ."""
    first, second = ({c["id"]: c for c in report["claims"]} for report in (one, other))
    found = [f"{name}: in one of the two only" for name in sorted({*first} ^ {*second})]
    for name in (name for name in first if name in second):
        a, b = first[name], second[name]
        if a["verdict"] != b["verdict"]:
            found.append(f"{name}: {a['verdict']} and {b['verdict']}")
        elif a["control"]["verdict"] != b["control"]["verdict"]:
            found.append(f"{name}: control {a['control']['verdict']} and {b['control']['verdict']}")
        elif a.get("error") is not None and b.get("error") is not None:
            room = max(a["tolerance"], abs(a["tolerance"] - a["error"]))
            share = 1.0 if a.get("derivation", "").startswith(OWN) else ROUNDING
            if not abs(a["error"] - b["error"]) <= share * room:
                found.append(
                    f"{name}: errors {a['error']:.3g} and {b['error']:.3g} differ by more than "
                    f"{share:.0%} of {room:.3g}, the room to the tolerance {a['tolerance']:.3g}"
                )
    return found


def main(paths: list[str]) -> int:
    """Prints what differs; 1 if something does."""
    one, other = (json.loads(Path(path).read_text(encoding="utf-8")) for path in paths)
    found = differences(one, other)
    releases = " and ".join(f"jax {r['environment']['jax']}" for r in (one, other))
    print(*found, f"{len(one['claims'])} claims on {releases}: {len(found)} differ.", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
