"""Whether the numbers of a file are numbers, at a small part of the cost of reading them."""

from typing import Any

import numpy as np

_BLOCK = 1 << 18
"""Entries looked at together: what is made of them stays in the processor's cache."""


def _bits(value: float, dtype: np.dtype) -> int:
    return int(np.asarray(value, dtype).view(f"u{dtype.itemsize}"))


def _number(bits: int, dtype: np.dtype) -> float:
    return float(np.asarray(bits, f"u{dtype.itemsize}").view(dtype))


def _first_outside(held: np.dtype, wanted: np.dtype) -> int:
    """Bits of the least number of one type that rounds to infinity in another."""
    infinity = _bits(np.inf, wanted)
    largest, below = (_number(infinity - i, wanted) for i in (1, 2))
    with np.errstate(over="ignore"):
        first = largest + (largest - below) / 2
        bits = _bits(first, held)
    return bits + (_number(bits, held) < first)


def not_finite(array: np.ndarray, dtype: Any = None) -> int:
    """How many entries are NaN or infinite, or will be in another type.

    Args:
      array: of floats in the formats of IEEE 754 or in bfloat16, of any shape and byte order.
      dtype: that they are to be stored in; their own if None.

    Returns:
      The count.

    Without a sign, the bits of such numbers are ordered as the numbers are, infinity and NaN above
    all others, and integers are compared at the same speed for every type, bfloat16 among them.
    """
    held = array.dtype.newbyteorder("=")
    limit = _first_outside(held, held if dtype is None else np.dtype(dtype))
    unsigned = np.dtype(f"u{held.itemsize}").newbyteorder(array.dtype.byteorder)
    magnitude = (1 << (8 * held.itemsize - 1)) - 1
    flat, count = array.ravel(order="K"), 0
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK].view(unsigned) & magnitude
        if part.max() >= limit:
            count += int(np.count_nonzero(part >= limit))
    return count


def sentence(count: int, size: int, dtype: Any) -> str:
    """In words what `not_finite` has counted, and why it matters.

    Args:
      count: of the entries.
      size: of the array.
      dtype: as there.

    Returns:
      The middle of a sentence that names the file and the tensor before it.
    """
    what = f"that are NaN or infinite in {np.dtype(dtype).name}"
    return f"{count:,} of {size:,} entries {what}, and spoil what is computed with them"
