"""Do the tests and the claims notice when the theory's code is wrong?

    python -m benchmarks mutants [--count 280] [--limit N] [--module TEXT] [--only TEXT] [--again]

Alters one constant, sign, exponent, comparison, transpose or argument at a time in the modules that
hold the theory (`ROOMS`), and runs the tests and claims that execute the altered line, the cheapest
first, until one fails. The alterations are a sample by module that depends on the seed alone, and
every fault that tests once missed (benchmarks/mutation/named.toml). A survivor counts as equivalent
only where benchmarks/mutation/equivalent.toml gives the reason.

A campaign that was ended goes on where it stopped; `--again` tries the survivors anew. The table
goes to docs/mutants.md and benchmarks/results/mutants.json once every alteration is decided.
"""

import argparse
import functools
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.mutation import processes, tables
from benchmarks.mutation.alterations import Mutant, instrumented, mutants

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROOMS = (
    "laws",
    "exact",
    "flows",
    "ranks",
    "spectra",
    "optima",
    "initializers",
    "problems",
    "claims",
)
TESTS = (
    (
        *(f"lorajax/{room}" for room in ROOMS if room != "spectra"),
        "lorajax/spectra.py",
        "tests/laws",
        "tests/test_spectra.py",
        "tests/test_ranks.py",
        "tests/test_ranks_intruders.py",
        "tests/test_initializers.py",
        "tests/test_problems.py",
        "tests/test_optima.py",
        "tests/test_exact.py",
        "tests/test_linearized.py",
        "tests/test_flows.py",
        "tests/test_flows_lanes.py",
        "tests/test_preconditioned.py",
        "tests/test_sweep_flows.py",
    ),
    ("tests/test_claims.py",),
    ("tests/adapters/test_linearization.py", "tests/adapters/test_selection.py"),
)
"""Tests and doctests that may catch an alteration: its own, then every claim, then its users'."""


class Campaign:
    """A repository under test, and what is known about it.

    Args:
      root: the repository.
      package: the folder that is altered, below the root.
      rooms: folders and files of it.
      tests: arguments of pytest, in tiers: the next one is asked about what survives the last.
      work: the folder of caches and of the results so far.
    """

    def __init__(
        self,
        root: pathlib.Path,
        package: str,
        rooms: Sequence[str],
        tests: Sequence[Sequence[str]],
        work: pathlib.Path,
    ) -> None:
        self.root, self.tests, self.work = root, tests, work
        files = []
        for room in rooms:
            place = root / package / room
            files += sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        self.sources = {
            ".".join(f.relative_to(root).with_suffix("").parts): f.read_text(encoding="utf-8")
            for f in files
            if f.name != "__init__.py" or f.parent.name == "claims"
        }
        # Claims take long to import, and nothing but their own tests needs them.
        self.explained: set[str] = set()
        self.packages = [f"{package}.{room}" for room in rooms if room != "claims"]
        self.hints: dict[str, str] = {}
        work.mkdir(parents=True, exist_ok=True)
        (work / "tests").mkdir(exist_ok=True)
        self.results_file = work / "results.jsonl"

    def candidates(self) -> list[Mutant]:
        """Every alteration of every module."""
        return [m for name, text in self.sources.items() for m in mutants(name, text)]

    def sample(self, count: int, seed: int, checks: bool = False) -> list[Mutant]:
        """Alterations of every module, more of a larger one: by the root of their number.

        Args:
          count: about how many.
          seed: which.
          checks: of the checks of claims instead of all the rest.
        """
        by_module: dict[str, list[Mutant]] = {}
        for mutant in self.candidates():
            if mutant.of_check == checks:
                by_module.setdefault(mutant.module, []).append(mutant)
        weights = {name: len(found) ** 0.5 for name, found in by_module.items()}
        share = count / max(sum(weights.values()), 1.0)
        chosen = []
        for name, found in by_module.items():
            # By a digest of content: other alterations of the module do not move these.
            found.sort(key=lambda m: hashlib.sha256(f"{seed} {m.name}".encode()).digest())
            chosen += found[: max(1, round(share * weights[name]))]
        return chosen

    def observe(self, tests: Sequence[str], fresh: bool) -> dict[str, dict[str, Any]]:
        """What each test executes, from one unaltered run of each file.

        Args:
          tests: arguments of pytest.
          fresh: run again what has changed since.
        """
        found: dict[str, dict[str, Any]] = {}
        names = list(self.sources)
        with_calls = {
            name: instrumented(text, names.index(name), processes.ROOM)
            for name, text in self.sources.items()
        }
        for test in tests:
            kept, pattern = self.place_of(test)
            if not fresh:
                # A campaign goes on with what it knows while tests are added.
                kept = next(iter(kept.parent.glob(pattern)), kept)
            if not kept.exists():
                begin = time.perf_counter()
                task = functools.partial(
                    processes.record,
                    with_calls,
                    [test, "-m", "not slow", "--rootdir", "."],
                    self.packages,
                )
                rows, end = processes.in_child(task, self.work / "observe.log", 3600)
                if rows is None:
                    raise SystemExit(f"{test}: {end}; see {self.work / 'observe.log'}")
                kept.write_text(json.dumps(rows), encoding="utf-8")
                seconds = time.perf_counter() - begin
                print(f"observed {test}: {len(rows)} tests in {seconds:.0f} s", flush=True)
            found |= json.loads(kept.read_text(encoding="utf-8"))
        bad = [name for name, row in found.items() if row["outcome"] == "failed"]
        if bad:
            print(f"left out, as they fail unaltered: {', '.join(bad)}", flush=True)
        return {k: v for k, v in found.items() if v["outcome"] == "passed" and v.get("hits")}

    def place_of(self, test: str) -> tuple[pathlib.Path, str]:
        """Where what a test executes is kept, and the pattern of it for other texts of the test."""
        place = self.root / test
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
        digests = [
            hashlib.sha256("".join(texts).encode()).hexdigest()[:12]
            for texts in (self.sources.values(), [f.read_text(encoding="utf-8") for f in files])
        ]
        start = f"{test.replace('/', '-')}-{digests[0]}"
        return self.work / "tests" / f"{start}-{digests[1]}.json", f"{start}-*.json"

    def tests_of(
        self, mutant: Mutant, observed: dict[str, dict[str, Any]], budget: float
    ) -> tuple[dict[str, float], int]:
        """The tests that execute the altered lines, in order, and how many cost too much."""
        names = list(self.sources)
        if mutant.function == "<module>":
            # What a module defines is used wherever its room is.
            room = mutant.module.rpartition(".")[0]
            spans = [
                (i * processes.ROOM, (i + 1) * processes.ROOM)
                for i, name in enumerate(names)
                if name == mutant.module or name.rpartition(".")[0] == room
            ]
        else:
            start = names.index(mutant.module) * processes.ROOM
            spans = [(start + mutant.lines[0], start + mutant.lines[1])]
        seconds = {
            name: row["seconds"]
            for name, row in observed.items()
            if any(first <= line <= last for line in row["hits"] for first, last in spans)
        }
        chosen, spent = {}, 0.0
        room = mutant.module.split(".")[1]
        # Those of its own room are the likeliest to see it.
        rank = {x: t * (0.2 if room in x.partition("::")[0] else 1.0) for x, t in seconds.items()}
        for name in sorted(seconds, key=rank.__getitem__):
            spent += seconds[name]
            if spent <= budget or not chosen:
                chosen[name] = seconds[name]
        return chosen, len(seconds) - len(chosen)

    def judge(
        self, mutant: Mutant, observed: dict[str, dict[str, Any]], budget: float
    ) -> dict[str, Any]:
        """Whether any test catches it, and which."""
        tests, left_out = self.tests_of(mutant, observed, budget)
        begin = time.perf_counter()
        found: dict[str, Any] = {"by": None, "reason": "no test executes it"}
        if tests:
            source = mutant.apply(self.sources[mutant.module])
            task = functools.partial(processes.judge, mutant.module, source, tests, self.packages)
            # CPU time ends what runs for ever; this one ends what waits for ever.
            limit = 240 + 20 * sum(tests.values())
            log = self.work / "mutant.log"
            result, end = processes.in_child(task, log, limit)
            if result is None and "no test failed" in log.read_text(errors="replace"):
                raise SystemExit(f"{mutant.name}: pytest could not run; see {log}")
            found = result or {"by": end, "reason": f"the process was {end}"}
        return {
            "name": mutant.name,
            **{
                k: getattr(mutant, k) for k in ("module", "function", "operator", "before", "after")
            },
            "named": mutant.named,
            "of_check": mutant.of_check,
            "caught": found["by"] is not None,
            **found,
            "tests": len(tests),
            "left_out": left_out,
            "seconds": round(time.perf_counter() - begin, 1),
        }

    def judge_by_hint(self, mutant: Mutant) -> dict[str, Any] | None:
        """The result of the one test that is said to catch it; None unless a test fails.

        A test that did not end in time says nothing here: how long it may take is not known.
        """
        test = self.hints.get(mutant.name, "")
        if "::" not in test or test.startswith("import"):
            return None
        # As if the test executed every line, and took ten seconds unaltered.
        row = self.judge(mutant, {test: {"seconds": 10.0, "hits": range(10**9)}}, 1.0)
        return row if row["by"] == test else None

    def results(self) -> dict[str, dict[str, Any]]:
        """The last result of each alteration."""
        if not self.results_file.exists():
            return {}
        lines = self.results_file.read_text(encoding="utf-8").splitlines()
        return {row["name"]: row for row in map(json.loads, lines)}

    def run(self, chosen: Sequence[Mutant], budget: float, again: bool) -> list[dict[str, Any]]:
        """Judges what has not been judged, or survived and is tried again; all results."""
        known = self.results()
        if again:
            # Nothing but its control sees a check, so that new tests change nothing there.
            stay = {m.name for m in chosen if m.of_check or m.name in self.explained}
            known = {name: row for name, row in known.items() if row["caught"] or name in stay}
        for mutant in chosen:
            if mutant.name not in known and (row := self.judge_by_hint(mutant)):
                self.keep(known, mutant, row | {"tier": 0}, "by hint")
        for tier, tests in enumerate(self.tests):
            # Only the claims themselves, the second tier, run their checks.
            left = [
                m
                for m in chosen
                if m.name not in known
                or (
                    undecided(known[m.name], tier)
                    and m.name not in self.explained
                    and not (m.of_check and tier > 1)
                )
            ]
            observed = self.observe(tests, again) if left else {}
            for i, mutant in enumerate(left, 1):
                row = self.judge(mutant, observed, budget)
                row["tier"] = tier
                row["tests"] += known.get(mutant.name, {}).get("tests", 0)
                row["left_out"] += known.get(mutant.name, {}).get("left_out", 0)
                self.keep(known, mutant, row, f"tier {tier + 1}, {i}/{len(left)}")
        return [{**known[m.name], "of_check": m.of_check, "named": m.named} for m in chosen]

    def keep(
        self, known: dict[str, dict[str, Any]], mutant: Mutant, row: dict[str, Any], place: str
    ) -> None:
        """Adds a result to those that are known, in memory and in the file."""
        known[mutant.name] = row
        with open(self.results_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        verdict = "caught" if row["caught"] else "SURVIVED"
        print(f"{place} {verdict} in {row['seconds']} s: {row['name']}", flush=True)


def undecided(row: dict[str, Any], tier: int) -> bool:
    """Whether the tests of a tier are still to be asked about a survivor."""
    return not row["caught"] and row["tier"] < tier


def main(argv: list[str]) -> int:
    """Runs the campaign; 1 if a survivor is neither caught nor explained."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=280, help="alterations in the sample")
    parser.add_argument("--seed", type=int, default=0, help="which alterations the sample holds")
    parser.add_argument("--limit", type=int, help="judge only the first N, and write no table")
    parser.add_argument("--module", default="", help="only modules whose name has this text")
    parser.add_argument("--only", default="", help="only alterations whose name has this text")
    parser.add_argument("--named", action="store_true", help="only those of named.toml")
    parser.add_argument("--so-far", action="store_true", help="judge none; the table of the known")
    parser.add_argument("--again", action="store_true", help="try survivors again")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds of tests for each")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "out" / "mutants")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--package", default="lorajax", help=argparse.SUPPRESS)
    parser.add_argument("--rooms", nargs="+", default=ROOMS, help=argparse.SUPPRESS)
    parser.add_argument("--tests", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    campaign = Campaign(
        options.root,
        options.package,
        options.rooms,
        [options.tests] if options.tests else TESTS,
        options.work.absolute(),
    )
    own = options.root == ROOT
    reasons = tables.equivalent() if own else {}
    campaign.explained = set(reasons)
    campaign.hints = tables.hints(ROOT) if own else {}
    named = tables.named(campaign.sources) if own else []
    chosen = list(named)
    if not options.named:
        chosen += campaign.sample(options.count, options.seed)
        chosen += campaign.sample(options.count // 6, options.seed, checks=True) if own else []
    chosen = list({m.name: m for m in reversed(chosen)}.values())[::-1]
    part = [m for m in chosen if options.module in m.module and options.only in m.name]
    part = part[: options.limit]
    if options.so_far:
        known = campaign.results()
        part = [
            m
            for m in part
            if m.name in known and (m.name in reasons or not undecided(known[m.name], 1))
        ]
        rows = [{**known[m.name], "of_check": m.of_check, "named": m.named} for m in part]
    else:
        if own:
            processes.preload(options.work.absolute() / "programs")
        rows = campaign.run(part, options.budget, options.again)
    summary = tables.summary(rows, reasons)
    print(tables.figures(summary))
    if own and not options.named and (options.so_far or len(part) == len(chosen)):
        possible = sum(not m.of_check for m in campaign.candidates())
        tables.write(ROOT, summary, possible, options.seed, len(chosen) - len(part))
    return int(bool(summary["unexplained"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
