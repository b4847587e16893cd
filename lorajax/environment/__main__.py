"""`XLA_FLAGS=$(python -m lorajax.environment)`: the flags to run programs under, with the guard.

Programs get loops as wide as the processor has them; with `--brief` those that make compiling cheap
in their place, for programs that run for seconds.
"""

import sys

from lorajax.environment import compile_fast, guard, wide

if __name__ == "__main__":
    guard()
    print(compile_fast() if "--brief" in sys.argv[1:] else wide())
