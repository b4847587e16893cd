"""`python -m benchmarks NAME [arguments]` runs benchmarks/NAME.py."""

import importlib
import pathlib
import sys


def main(argv: list[str]) -> int:
    """Runs the benchmark that the first argument names with the others; lists them without one."""
    here = pathlib.Path(__file__).parent
    names = sorted(p.stem for p in here.glob("[a-z]*.py"))
    if not argv or argv[0] not in names:
        print(f"usage: python -m benchmarks NAME [arguments]; NAME is one of {', '.join(names)}")
        return 0 if argv in (["-h"], ["--help"]) else 2
    return importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
