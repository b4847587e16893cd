"""The `lorajax` command: one module a subcommand.

A subcommand's module has `HELP` (a line), `configure(parser)` and `run(args) -> int`, the exit
status. It imports jax only inside `run`, so that help and usage errors answer at once.
"""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence

from lorajax import __version__
from lorajax.cli.interrupts import interruptible

COMMANDS = (
    "validate",
    "claims",
    "spectra",
    "sweep",
    "plot",
    "finetune",
    "compare",
    "rank",
    "doctor",
)

DESCRIPTION = """\
The theory of low-rank adaptation (LoRA), made executable: simulate its training dynamics, hold the
theory about it against the simulation, and carry what holds into real fine-tuning.
"""


WELCOME = f"""\
lorajax {__version__}: the theory of low-rank adaptation (LoRA), made executable in JAX.
It simulates training dynamics, holds theory against them, and fine-tunes with what holds.

Try next:
  lorajax doctor      whether everything it needs is here and computes right
  lorajax validate    check the theory against simulation: verdicts, figures, a report
  lorajax spectra     simulated and analytic singular values over time, of a problem of yours
  lorajax sweep       a paper's experiment over scales, ranks and seeds
  lorajax finetune    fine-tune the small model that comes along, its ranks chosen by theory

Each explains itself with --help; `lorajax --help` lists all of them.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command with all its subcommands; imports no jax."""
    parser = argparse.ArgumentParser(prog="lorajax", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"lorajax {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"lorajax.cli.{name}")
        sub = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        module.configure(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: arguments without the program's name; those of the process if None.

    Returns:
      0 when all went as on record, 1 when a result changed, 2 for bad usage, 130 when interrupted,
      143 when terminated.
    """
    with interruptible():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    try:
        argv = sys.argv[1:] if argv is None else argv
        if not argv:
            print(WELCOME, end="")
            return 0
        for word in argv:
            # Python's parser takes "--seed=--" for a seed of no words.
            if word.startswith("--") and word.endswith("=--"):
                raise ValueError(f"{word[:-3]} is '--'; it must have a value.")
        args = build_parser().parse_args(argv)
        if args.command is None:
            raise ValueError("no command is given; `lorajax --help` lists them.")
        args.given = ["lorajax", *argv]
        return args.run(args)
    except ValueError as error:
        print(f"lorajax: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"lorajax: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        how = error.args or ("nothing is left to keep, and the same command begins anew.",)
        print(f"lorajax: interrupted; {'; '.join(map(str, how))}", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
