"""`XLA_FLAGS=$(python -m lorajax.environment)`: the flags to run programs under, with the guard.

With `--brief` also those that make compiling cheap, for programs that run for seconds.
"""

import sys

from lorajax.environment import compile_fast, guard

if __name__ == "__main__":
    flags = guard()
    print(compile_fast() if "--brief" in sys.argv[1:] else flags)
