"""Hold the theory against simulation: run claims, print verdicts, write a report with figures.

Exit status: 0 when every verdict is the one on record in the package, 1 when one changed, 2 for bad
usage.
"""

import argparse
import dataclasses
import json
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from lorajax.cli.finetuning import MOST, bounded
from lorajax.cli.interrupts import saying
from lorajax.cli.output import Progress, add_formats, output_folder, prepare_jax
from lorajax.cli.resuming import NOTHING, Kept, kept

HELP = "check the theory of LoRA against simulation and write a report"
PROFILES = ("quick", "full")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument(
        "names",
        nargs="*",
        metavar="CLAIM_OR_PAPER",
        help="claims or papers to run (see `lorajax claims`); all of them by default",
    )
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        default="quick",
        help="quick: about a minute on two cores; full: the papers' number of repetitions",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="claims that run at once (default: one a core, at most 4)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every random draw (default 0)")
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="repeat at N seeds from --seed on, each with its report in a folder seed-S of DIR, "
        "and one report of all of them in DIR",
    )
    parser.add_argument(
        "--resolving",
        action="store_true",
        help="measure also the smallest alteration of each claim's constant that is refuted, "
        "and write it to resolving.json and, as a table, to resolving.md",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the verdicts in DIR, which the same command has left there",
    )
    parser.add_argument(
        "--out",
        default="lorajax-report",
        metavar="DIR",
        help="folder for verdicts.json, report.html and figures/ (default lorajax-report)",
    )
    add_formats(parser)


def read_record() -> dict[str, str]:
    """The verdicts on record in the package, by claim; the rows hold their seeds as well."""
    # Through the top package: naming lorajax.claims would import it, and jax with it.
    text = resources.files("lorajax").joinpath("claims", "record.json").read_text(encoding="utf-8")
    return {claim: row["verdict"] for claim, row in json.loads(text).items()}


def check_names(names: list[str]) -> None:
    """Raises ValueError for a name that is neither a claim nor a paper; needs no jax."""
    import difflib

    record = read_record()
    known = [*record, *dict.fromkeys(claim.partition(".")[0] for claim in record)]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else "see `lorajax claims`."
            raise ValueError(f"claim is {name!r}, which is neither a claim nor a paper; {hint}")


def load_claims(names: list[str]) -> Any:
    """`lorajax.claims`; with those on real networks, which import flax, only where asked for."""
    from lorajax import claims

    if not names or any(name.partition(".")[0] == "finetuning" for name in names):
        import lorajax.finetune.claims  # noqa: F401  adds to the registry
    return claims


def run(args: argparse.Namespace) -> int:
    """Runs the claims asked for."""
    check_names(args.names)
    bounded(args, "seed", 0, MOST)
    bounded(args, "jobs", 1, 1024)
    bounded(args, "seeds", 1, 10_000)
    folder = output_folder(args.out)
    if args.jobs > 1:
        # Claims already fill the cores, and the threads of a small product only wait for each
        # other: a fifth of all processor time. Read when NumPy is first imported.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Hundreds of programs, most of which run for less than they are compiled; not so networks.
    networks = any(name.partition(".")[0] == "finetuning" for name in args.names)
    prepare_jax(brief=args.profile == "quick" and not networks)
    claims = load_claims(args.names)
    chosen = claims.select(args.names)
    if args.profile == "quick":
        left = [c.id for c in chosen if c.on_request and not {c.id, c.paper} & {*args.names}]
        chosen = [c for c in chosen if c.id not in left]
        if left:
            print(f"Left out, as they train networks: {', '.join(left)}; name them to run them.")
    seeds = range(args.seed, args.seed + args.seeds)
    places = {
        seed: folder if args.seeds == 1 else output_folder(str(folder / f"seed-{seed}"))
        for seed in seeds
    }
    runs = {seed: claims.Run(seed, args.profile) for seed in seeds}
    # All of them before any: what cannot be gone on with is said before long work.
    there = {s: kept(places[s], chosen, runs[s]) if args.resume else NOTHING for s in seeds}
    found, settings = {}, {}
    for seed, place in places.items():
        # Taken out: what a seed has simulated is not kept longer than it is needed.
        found[seed], here = run_seed(claims, chosen, runs.pop(seed), args, place, there[seed])
        settings = settings or here
        if args.seeds > 1:
            forget_programs()
    if args.seeds > 1:
        print(seed_table(found))
        others = {seed: found[seed] for seed in seeds[1:]}
        write_report(folder, found[args.seed], seed=args.seed, others=others, **settings)
        print(f"\nReport of all seeds: {folder / 'report.html'}")
    return compare(found)


def forget_programs() -> None:
    """Drops compiled programs where there are too many: most belong to one seed's instances."""
    import gc

    import jax

    from lorajax.environment import memory

    if memory.crowded():
        jax.clear_caches()
        gc.collect()
        memory.release()


def write_report(
    folder: Path, outcomes: list[Any], figures: dict[str, bytes], **settings: Any
) -> None:
    """Writes `report.html` of outcomes with their figures."""
    from lorajax import report
    from lorajax.environment import files

    files.write(folder / "report.html", report.to_html(outcomes, figures, **settings))


def write_resolving(
    claims: Any, chosen: list[Any], run: Any, folder: Path, there: Kept
) -> dict[str, float | str]:
    """Resolving powers, measured, printed, and written to `resolving.json` and `resolving.md`."""
    from lorajax.environment import files
    from lorajax.environment.text import filled

    powers: dict[str, float | str] = {}
    rows = [
        "# Resolving powers",
        "",
        f"Made by `lorajax validate --resolving` (seed {run.seed}, profile {run.profile}): the "
        "smallest",
        "relative alteration of a claim's constant, of "
        + ", ".join(f"{x:.1%}" for x in claims.ALTERATIONS)
        + ", that its check",
        "refutes; and the alteration of its negative control.",
        "",
        "| claim | smallest alteration refuted | its control |",
        "|---|---|---|",
    ]
    for claim in chosen:
        try:
            power = there.powers.get(claim.id) or claims.resolving_power(claim, run)
        except Exception as error:  # As in `examine`: one broken check costs only itself.
            power = f"{type(error).__name__}: {error}"
        # JSON has no infinity.
        power = "none of those tried" if power == float("inf") else power
        powers[claim.id] = power
        files.write(folder / "resolving.json", json.dumps(powers, indent=2) + "\n")
        shown = f"{power:.1%}" if isinstance(power, float) else power
        print(filled(f"{claim.id:<38}  {shown}", rest=40 * " "))
        change = claim.control.change.replace("|", r"\|")
        rows.append(f"| `{claim.id}` | {shown} | {change} |")
    files.write(folder / "resolving.md", "\n".join(rows) + "\n")
    return powers


def run_seed(
    claims: Any, chosen: list[Any], run: Any, args: argparse.Namespace, folder: Path, there: Kept
) -> tuple[list[Any], dict[str, Any]]:
    """Outcomes of the chosen claims at one seed, in their order, and what else its report holds."""
    from lorajax import plots, report
    from lorajax.environment import files

    figures_folder = folder / "figures"
    figures_folder.mkdir(exist_ok=True)
    outcomes, figures = there.outcomes, dict(there.figures)
    settings: dict[str, Any] = {"profile": run.profile}
    order = {claim.id: i for i, claim in enumerate(chosen)}
    done = {outcome.claim.id for outcome in outcomes}
    if done:
        print(f"Going on with the verdicts in {folder} ({len(done)} were there).")
    else:
        # Of an earlier run: its figures and powers would stand beside verdicts of this one.
        (folder / "resolving.json").unlink(missing_ok=True)
    left_to_do = [claim for claim in chosen if claim.id not in done]
    progress = Progress(len(chosen), "claim", len(done))

    def left() -> str:
        if not outcomes:
            return "no verdict was reached yet, and the same command begins anew."
        write_report(folder, outcomes, figures, seed=run.seed, **settings)
        return (
            f"{len(outcomes)} of {len(chosen)} verdicts and their report are in {folder}, and the "
            "same command with --resume goes on from there."
        )

    with saying(left):
        for outcome in claims.examine_all(left_to_do, run, args.jobs):
            claim, evidence = outcome.claim, outcome.evidence
            if evidence is not None and evidence.draw is not None:
                figures[claim.id] = plots.to_png(evidence.draw)
                files.write(figures_folder / f"{claim.id}.png", figures[claim.id])
                for ending in args.formats:
                    plots.save(plots.panel(evidence.draw), figures_folder / f"{claim.id}.{ending}")
                # What draws the figure holds all that was simulated for it.
                evidence = dataclasses.replace(evidence, draw=None)
                outcome = dataclasses.replace(outcome, evidence=evidence)
            outcomes = sorted([*outcomes, outcome], key=lambda o: order[o.claim.id])
            report.write_json(
                folder / "verdicts.json", outcomes, figures, seed=run.seed, profile=run.profile
            )
            trouble = f": {outcome.problem}" if outcome.problem else ""
            progress.update()
            progress.say(f"{claim.id}: {outcome.verdict}{trouble}")
    progress.close()
    write_report(folder, outcomes, figures, seed=run.seed, **settings)
    print(report.verdict_table(outcomes))
    if args.resolving:
        with saying(left):
            settings["powers"] = write_resolving(claims, chosen, run, folder, there)
        write_report(folder, outcomes, figures, seed=run.seed, **settings)
    print(f"\nReport: {folder / 'report.html'}")
    return outcomes, {"figures": figures, **settings}


def seed_table(found: dict[int, list[Any]]) -> str:
    """Verdicts by claim and seed; one that is not on record stands in capitals."""
    record = read_record()
    width = max(len(o.claim.id) for o in next(iter(found.values())))
    lines = ["claim".ljust(width) + "".join(f"  {f'seed {seed}':<12}" for seed in found)]
    for row in zip(*found.values(), strict=True):
        name = row[0].claim.id
        cells = [o.verdict if o.verdict == record.get(name) else o.verdict.upper() for o in row]
        lines.append(name.ljust(width) + "".join(f"  {cell:<12}" for cell in cells))
    return "\n" + "\n".join(line.rstrip() for line in lines)


def compare(found: dict[int, list[Any]]) -> int:
    """Prints what differs from the record, by seed; 0 if nothing does, 1 otherwise."""
    record = read_record()
    changed = [
        f"{o.claim.id}: {o.verdict}, on record {record.get(o.claim.id, 'nothing')} (seed {seed})"
        for seed, outcomes in found.items()
        for o in outcomes
        if record.get(o.claim.id) != o.verdict
    ]
    for line in changed:
        print(f"changed: {line}", file=sys.stderr)
    if not changed:
        count = sum(len(outcomes) for outcomes in found.values())
        print(f"All {count} verdicts are those on record.")
    return 1 if changed else 0
