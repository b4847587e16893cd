"""Simulated against analytic spectra for a problem of your own: a plot, a table and the data.

The table has, for each law and mode, the sup error (in units of the target's singular value), the
error of the half-time, and the best time-warp error: what is left of the sup error when the law's
clock may run at another constant speed and start at another time. A law whose shape is right has a
small last number even where its rate or its delay is wrong.
"""

import argparse

from lorajax.cli.finetuning import MOST, bounded
from lorajax.cli.output import add_formats, output_folder, prepare_jax

HELP = "compare simulated with analytic spectra for a problem given by options"
LAWS = ("lora", "logistic", "lazy", "tanh_squared")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    add = parser.add_argument
    add("--shape", nargs=2, type=int, default=(60, 40), metavar=("M", "N"), help="of the update")
    add(
        "--singular-values",
        nargs="+",
        type=float,
        default=(4.0, 2.0, 1.0),
        metavar="S",
        help="of the oracle update, in decreasing order",
    )
    add("--rank", type=int, default=5, help="of the adapter")
    add("--start", default="lora", help="initialization by name; one that has a scale")
    add(
        "--scales",
        nargs="+",
        type=float,
        default=(1.0, 1e-1, 1e-2),
        metavar="A",
        help="root-mean-square column norms of A at the start",
    )
    add(
        "--laws",
        nargs="+",
        choices=LAWS,
        metavar="LAW",
        help=f"to compare with, of {', '.join(LAWS)} (default: that of the start's kind, and "
        "tanh_squared)",
    )
    add(
        "--until",
        type=float,
        default=None,
        help="last time in 1/s; by default until all is learned",
    )
    add("--seed", type=int, default=0, help="seed of every random draw (default 0)")
    add("--out", default="lorajax-spectra", metavar="DIR", help="folder for the results")
    add_formats(parser)


def run(args: argparse.Namespace) -> int:
    """Simulates, compares, and writes spectra.png, spectra.json and spectra.npz."""
    if min(args.shape) < 1:
        raise ValueError(f"--shape is {args.shape[0]} {args.shape[1]}; both must be at least 1.")
    bounded(args, "until", 0, above=True)
    bounded(args, "seed", 0, MOST)
    bounded(args, "rank", 1, MOST)
    for name in ("scales", "singular_values"):
        for value in getattr(args, name):
            if not 0 < value < float("inf"):
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} has {value}; each must be positive and finite.")
    folder = output_folder(args.out)
    prepare_jax()

    import json

    import numpy as np

    from lorajax import plots
    from lorajax.environment import files
    from lorajax.environment.text import filled, table
    from lorajax.studies import comparison

    result = comparison.compare_spectra(
        shape=tuple(args.shape),
        singular_values=tuple(args.singular_values),
        rank=args.rank,
        start=args.start,
        scales=tuple(args.scales),
        laws=args.laws and tuple(args.laws),
        until=args.until,
        seed=args.seed,
    )
    np.savez(folder / "spectra.npz", **result.arrays())  # pyright: ignore[reportArgumentType]
    files.write(folder / "spectra.json", json.dumps(result.to_json(), indent=2) + "\n")
    others = [f".{ending}" for ending in args.formats]
    plots.save(comparison.draw(result), folder / "spectra.png", *others)
    rows = [
        (
            f"{row.scale:g}",
            row.law,
            f"{row.mode} (s = {row.singular_value:g})",
            f"{row.sup_error:.2g}",
            f"{row.half_time_error:.2g}",
            f"{row.warp_error:.2g}",
        )
        for row in result.rows
    ]
    header = ("scale", "law", "mode", "sup error", "half-time error", "best time-warp error")
    print(table(header, rows))
    engines: dict[str, list[str]] = {}
    for scale, plan in result.plans.items():
        engines.setdefault(str(plan), []).append(f"{scale:g}")
    for plan, scales in engines.items():
        print(filled(f"scale {', '.join(scales)}: {plan}"))
    endings = ("png", *args.formats, "json", "npz")
    print(f"\nWritten to {folder}: {', '.join(f'spectra.{end}' for end in endings)}")
    return 0
