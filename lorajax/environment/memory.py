"""Freed memory given back to the system, which a process's peak counts otherwise."""

import ctypes


def release() -> None:
    """Returns freed memory that the C library of Linux has kept; elsewhere nothing.

    It keeps freed blocks of a few megabytes for later. The tensors of a checkpoint leave nearly a
    second model behind, and compiling a large program some hundred megabytes.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass  # another C library, which has other habits
