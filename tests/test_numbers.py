"""Entries that are no numbers are counted from their bits as NumPy counts them."""

import jax.numpy as jnp
import numpy as np
import pytest

from lorajax.environment.numbers import not_finite

FLOATS = ("float64", "float32", "float16", "bfloat16")


def every(dtype):
    """Numbers of every size that a type has, and of every kind."""
    size = 8 * jnp.dtype(dtype).itemsize
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**16, 40_000, dtype=np.uint64) << np.uint64(size - 16)
    low = rng.integers(0, 2**size, 40_000, dtype=np.uint64) if size < 64 else bits
    edges = np.asarray([0, 1, 2**15 - 1], np.uint64) << np.uint64(size - 16)
    return np.concatenate([bits, low, edges]).astype(f"u{size // 8}").view(jnp.dtype(dtype))


@pytest.mark.parametrize("wanted", FLOATS)
@pytest.mark.parametrize("held", FLOATS)
def test_they_are_those_that_a_cast_makes_infinite(held, wanted):
    array = every(held)
    with np.errstate(all="ignore"):
        expected = np.count_nonzero(~np.isfinite(array.astype(jnp.dtype(wanted))))
    assert not_finite(array, jnp.dtype(wanted)) == expected > 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_edge_of_a_type_is_that_of_a_cast(dtype):
    for wanted in ("float16", "bfloat16", "float32"):
        largest = float(jnp.finfo(wanted).max)
        around = np.asarray([largest, largest * 1.001, largest * 1.01], "float64")
        with np.errstate(all="ignore"):
            held = around.astype(jnp.dtype(dtype))
            expected = np.count_nonzero(~np.isfinite(held.astype(jnp.dtype(wanted))))
        assert not_finite(held, wanted) == expected, wanted


def test_shapes_orders_and_bytes_make_no_difference():
    array = np.ones((5, 7, 3), "float32")
    array[1, 2, 0], array[4, 6, 2] = np.nan, np.inf
    for each in (array, array.T, array[::2], np.asfortranarray(array), array.astype(">f4")):
        assert not_finite(each) == np.count_nonzero(~np.isfinite(each))
    assert not_finite(np.zeros((0, 3), "float32")) == not_finite(np.float32(1)[None][0:0]) == 0
    assert not_finite(np.asarray(np.nan, "float32")) == 1


def test_large_arrays_are_read_to_their_end():
    array = np.ones(3 * 2**18 + 5, "float16")
    array[-1] = array[0] = np.inf
    assert not_finite(array) == 2
