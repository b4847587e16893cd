"""Say whether what lorajax stands on is here and computes right, with a remedy for what is not.

Versions, devices, precision, flags, known faults of JAX, threads and folders, in a few seconds.
Exit status: 0 when nothing is wrong, 1 when something is.
"""

import argparse

from lorajax.cli.output import prepare_jax

HELP = "check versions, devices, flags, known faults of JAX, threads and folders"
MARKS = {"ok": "✓", "note": "·", "wrong": "✗"}


def configure(parser: argparse.ArgumentParser) -> None:
    """The subcommand has no arguments."""
    del parser


def run(args: argparse.Namespace) -> int:
    """Prints what is found."""
    del args
    from lorajax.environment import doctor

    before = doctor.surroundings()
    prepare_jax()
    findings = [*before, *doctor.computations()]
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{MARKS[finding.state]} {finding.subject:<{width}}  {finding.found}")
        if finding.remedy:
            print(f"  {'':<{width}}  → {finding.remedy}")
    wrong = sum(finding.state == "wrong" for finding in findings)
    print(f"\n{wrong} wrong: see the arrows above." if wrong else "\nNothing is wrong.")
    return 1 if wrong else 0
