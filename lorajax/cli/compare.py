"""Put finished runs side by side: means over seeds, and differences with their intervals.

Runs that differ in their seed alone are one arm. The other arms are held against the first, paired
over seeds where both have the same ones and took the samples in the same order, unpaired otherwise.
"""

import argparse
import json

from lorajax.cli.output import output_folder

HELP = "put runs of lorajax finetune side by side, with paired intervals"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    parser.add_argument(
        "--out",
        default="lorajax-compare",
        metavar="DIR",
        help="folder for compare.html and compare.json (default lorajax-compare)",
    )


def run(args: argparse.Namespace) -> int:
    """Reads the runs, prints the tables, and writes the page."""
    from lorajax.environment import files
    from lorajax.report import comparison

    found = [comparison.read(folder) for folder in dict.fromkeys(args.runs)]
    arms = comparison.arms(found)
    content = comparison.to_json(arms, comparison.metrics(found))
    folder = output_folder(args.out)
    files.write(folder / "compare.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    files.write(folder / "compare.html", comparison.to_html(arms, content))
    print(comparison.to_text(content))
    print(f"\nWritten to {folder}: compare.html, compare.json")
    return 0
