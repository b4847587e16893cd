"""List the claims: statement, standing, source and the verdict on record."""

import argparse

from lorajax.cli.output import prepare_jax
from lorajax.cli.validate import check_names, load_claims, read_record
from lorajax.environment.text import filled

HELP = "list the claims with their standing and source"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument(
        "names", nargs="*", metavar="CLAIM_OR_PAPER", help="which to list; all by default"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the list."""
    check_names(args.names)
    prepare_jax()
    record = read_record()
    claims = load_claims(args.names)
    paper = None
    for claim in claims.select(args.names):
        if claim.paper != paper:
            paper = claim.paper
            print(f"\n{paper}\n{'─' * len(paper)}")
        print(f"{claim.id}  [{claim.standing}; on record: {record.get(claim.id, 'nothing')}]")
        for text in (
            claim.statement,
            f"Source: {claim.source}.",
            f"Control: {claim.control.change}.",
        ):
            print(filled(text, "    ", "    "))
    return 0
