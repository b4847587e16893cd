"""Draw a sweep's figures again from its store, without running anything."""

import argparse

HELP = "draw a sweep's figures from its store"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    parser.add_argument("store", metavar="STORE", help="that `lorajax sweep` has written")
    parser.add_argument("--out", metavar="FILE", help="figure (default beside the store, as PNG)")


def run(args: argparse.Namespace) -> int:
    """Draws and says where."""
    from lorajax import studies, sweeps

    found = sweeps.open_sweep(args.store)
    missing = int((found["status"] == sweeps.NOT_RUN).sum())
    if missing:
        print(f"{missing} of {found['status'].size} lanes have not been run yet")
    path = args.out or f"{args.store.removesuffix('/').removesuffix('.zarr')}.png"
    print(f"figure: {studies.draw(found, path)}")
    return 0
