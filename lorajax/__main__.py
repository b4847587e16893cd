"""`python -m lorajax` is the `lorajax` command."""

import sys

from lorajax.cli import main

if __name__ == "__main__":
    sys.exit(main())
