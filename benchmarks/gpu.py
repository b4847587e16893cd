"""What a card computes, whether it is right, and what a second of it does against torch and PEFT.

    python -m benchmarks gpu [--minutes 7.5] [--tiny] [--json FILE]

One card, no network, under eight minutes; everything but JAX and the peers is in the checkout. Each
stage runs in a process of its own with a budget of its own, and what it finds is written as it
comes (to `benchmarks/results/gpu.json`): a stage that fails or hangs is recorded, and the others
go on. A peer that is not installed is named as missing. On a machine without a card nothing is
measured; `--tiny` runs every stage there in seconds, on sizes that mean nothing.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import peers
from benchmarks.card import runs
from benchmarks.card.runs import Stage
from lorajax.environment import files

RESULT = runs.ROOT / "benchmarks" / "results" / "gpu.json"
_TORCH = ("torch", "transformers", "peft")
CARD = Stage("card", "rates.card", 60)
STAGES = (
    Stage("claims", "right.claims", 110, beside=True),
    Stage("adapters", "right.adapters", 110, beside=True),
    Stage("fixtures", "right.fixtures", 110, beside=True),
    Stage("resumed", "right.resumed", 110, beside=True),
    Stage("vit", "steps.vit", 75),
    Stage("vit_peft", "steps.vit_peft", 40, needs=_TORCH),
    Stage("llama", "steps.llama", 80),
    Stage("llama_peft", "steps.llama_peft", 40, needs=_TORCH),
    Stage("lanes", "lanes.ours", 60),
    Stage("lanes_torch", "lanes.torch_lanes", 60, needs=("torch",)),
    Stage("many", "steps.many", 60),
    Stage("bert", "steps.bert", 60),
    Stage("bert_peft", "steps.bert_peft", 40, needs=_TORCH),
    Stage("attention", "attention.attention", 40),
    Stage("profile", "trace.profile", 40),
)
"""In the order of what matters most, since what comes last may find no time left."""


def summary(name: str, found: dict[str, Any]) -> str:
    """A line on how a stage went."""
    rows = found.get("rows", ())
    wrong = sum(not row["right"] for row in rows if "right" in row)
    wrong += sum(row["verdict"] != row["recorded"] for row in rows if "verdict" in row)
    told = f"{len(rows)} rows" + (f", {wrong} WRONG" if wrong else "")
    told = found.get("error") or (", ".join(found["missing"]) if "missing" in found else told)
    return f"{name:12} {found['state']:12} {found.get('seconds', 0.0):6.1f} s  {told}"


def earlier(path: pathlib.Path, name: str) -> dict[str, Any]:
    """What an earlier run on the same card has left, for some stages that run again."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    same = not found["tiny"] and found["stages"]["card"]["name"] == name
    return {key: found[key] for key in ("stages", "seconds")} if same else {}


def measure(minutes: float, tiny: bool, path: pathlib.Path | None, only: Sequence[str]) -> int:
    """Runs the stages and writes what they find."""
    begin = time.monotonic()
    end = begin + 60 * minutes
    found: dict[str, Any] = {"tiny": tiny}

    def save(name: str, result: dict[str, Any]) -> None:
        found.setdefault("stages", {})[name] = result
        found["seconds"] = round(before + time.monotonic() - begin, 1)
        if path is not None:
            files.write(path, json.dumps(found, indent=1) + "\n")
        print(summary(name, result), flush=True)

    card = runs.run_apart(CARD, CARD.seconds, tiny)
    if card["state"] != "done":
        print(f"The card was not read: {card}")
        return 1
    if card["platform"] == "cpu" and not tiny:
        print("JAX sees no card here, so that nothing is measured; --tiny tries every stage.")
        print('A card takes pip install "jax[cuda13]" beside lorajax.')
        return 0
    if only and path is not None:
        found |= earlier(path, card["name"])
    before = found.get("seconds", 0.0)
    installed = peers.versions()
    found["missing"] = [name for name, version in installed.items() if version is None]
    save("card", card)
    chosen = [stage for stage in STAGES if not only or stage.name in only]

    def missing(stage: Stage) -> list[str]:
        return [name for name in stage.needs if installed[name] is None]

    with tempfile.TemporaryDirectory() as cache:
        # What one stage has compiled another need not; none is kept, so that every run is alike.
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
        runs.run_all(chosen, end, tiny, missing, save)
    print(f"{found['seconds']:.0f} s on {card['name']}")
    if found["missing"]:
        print(f"Not installed, and so not compared with: {', '.join(found['missing'])}")
    return int(any(stage["state"] == "failed" for stage in found["stages"].values()))


def main(argv: list[str]) -> int:
    """Runs the benchmark, or one stage of it in this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    names = [stage.name for stage in (CARD, *STAGES)]
    parser.add_argument("--minutes", type=float, default=7.5, help="after which all is stopped")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any device")
    parser.add_argument(
        "--only", nargs="+", choices=names[1:], default=(), help="some stages; others stay as found"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=pathlib.Path, help=f"{RESULT.name} of a card if not given"
    )
    parser.add_argument("--stage", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.stage:
        (stage,) = (stage for stage in (CARD, *STAGES) if stage.name == options.stage)
        return runs.run_here(stage, options.report, options.seconds, options.tiny)
    path = options.json or (None if options.tiny else RESULT)
    return measure(options.minutes, options.tiny, path, options.only)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
