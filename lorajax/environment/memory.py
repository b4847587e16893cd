"""Freed memory given back to the system, which a process's peak counts otherwise."""

import ctypes
import pathlib

MOST_MAPS = 20_000
"""Memory maps of a process above which compiled programs had better go.

Each program holds several maps, Linux grants 65,530 a process, and XLA crashes beyond that.
"""


def crowded(most: int = MOST_MAPS) -> bool:
    """Whether this process holds more memory maps than some; false where none are told of."""
    maps = pathlib.Path("/proc/self/maps")
    return maps.exists() and maps.read_bytes().count(b"\n") > most


def release() -> None:
    """Returns freed memory that the C library of Linux has kept; elsewhere nothing.

    It keeps freed blocks of a few megabytes for later. The tensors of a checkpoint leave nearly a
    second model behind, and compiling a large program some hundred megabytes.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass  # another C library, which has other habits


class Returning:
    """Counts what is freed, and returns it to the system from time to time.

    Args:
      every: bytes between two times.
    """

    def __init__(self, every: int = 2**26):
        self._every, self._freed = every, 0

    def __call__(self, size: int) -> None:
        """After so many bytes were freed."""
        self._freed += size
        if self._freed >= self._every:
            release()
            self._freed = 0
