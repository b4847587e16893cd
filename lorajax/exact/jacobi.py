"""Singular values of many small matrices at once by one-sided Jacobi, lanes on the last axis."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

MOST_UNROLLED = 8
"""Most columns for which small factorizations are written out; more of them compile too slowly."""

_SWEEPS = 30  # cyclic Jacobi is done after 2 to 8
_OFF = 1e-9  # largest squared cosine before the last sweep, which leaves about its square


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=0)


def _rotation(aa, bb, ab) -> tuple[Array, Array, Array]:
    """Cosine and sine that make two columns orthogonal, and the squared cosine between them now."""
    tiny = jnp.finfo(ab.dtype).tiny
    off = ab**2 / jnp.maximum(aa * bb, tiny)
    zeta = (bb - aa) / (2 * jnp.where(ab == 0, 1, ab))
    t = jnp.where(zeta < 0, -1, 1) / (jnp.abs(zeta) + jnp.sqrt(1 + zeta**2))
    t = jnp.where(ab == 0, 0, t)
    cos = lax.rsqrt(1 + t**2)
    return cos, cos * t, off


def _unrolled(columns: list[Array]) -> tuple[Array, Array]:
    """Norms of columns after one-sided Jacobi, the larger one first, and the sweeps taken."""
    n = len(columns)

    def sweep(carry):
        columns, _, count = carry
        columns, off = list(columns), jnp.zeros((), columns[0].dtype)
        for i in range(n):
            for j in range(i + 1, n):
                a, b = columns[i], columns[j]
                aa, bb = _dot(a, a), _dot(b, b)
                cos, sin, here = _rotation(aa, bb, _dot(a, b))
                # Sorted columns converge in half the sweeps (de Rijk).
                turn = bb > aa
                cos, sin = jnp.where(turn, sin, cos)[None], jnp.where(turn, -cos, sin)[None]
                columns[i], columns[j] = cos * a - sin * b, sin * a + cos * b
                off = jnp.maximum(off, jnp.max(here))
        return tuple(columns), off, count + 1

    def unfinished(carry):
        return (carry[1] > _OFF) & (carry[2] < _SWEEPS)

    count = jnp.zeros((), jnp.int32)
    if n > 1:
        start = (tuple(columns), jnp.ones((), columns[0].dtype), count)
        done, _, count = lax.while_loop(unfinished, sweep, start)
        columns = list(done)
    return _descending([jnp.sqrt(_dot(c, c)) for c in columns]), count


def _descending(values: list[Array]) -> Array:
    # Neighbours that are equal to rounding may still be out of order.
    for end in range(len(values) - 1, 0, -1):
        for i in range(end):
            a, b = values[i], values[i + 1]
            values[i], values[i + 1] = jnp.maximum(a, b), jnp.minimum(a, b)
    return jnp.stack(values)


def _looped(columns: Array) -> tuple[Array, Array]:
    """The same in rounds of disjoint pairs (a round robin), for any number of columns."""
    n = columns.shape[0]
    if n % 2:
        columns = jnp.concatenate([columns, jnp.zeros_like(columns[:1])])
    half = columns.shape[0] // 2

    def match(carry, _):
        top, bottom, off = carry
        aa, bb = jnp.sum(top**2, axis=1), jnp.sum(bottom**2, axis=1)
        cos, sin, here = _rotation(aa, bb, jnp.sum(top * bottom, axis=1))
        cos, sin = cos[:, None], sin[:, None]
        top, bottom = cos * top - sin * bottom, sin * top + cos * bottom
        if half > 1:  # everyone but the first moves on by one seat
            top, bottom = (
                jnp.concatenate([top[:1], bottom[:1], top[1:-1]]),
                jnp.concatenate([bottom[1:], top[-1:]]),
            )
        return (top, bottom, jnp.maximum(off, jnp.max(here))), None

    def sweep(carry):
        top, bottom, _, count = carry
        start = (top, bottom, jnp.zeros((), columns.dtype))
        (top, bottom, off), _ = lax.scan(match, start, None, length=2 * half - 1)
        return top, bottom, off, count + 1

    def unfinished(carry):
        return (carry[2] > _OFF) & (carry[3] < _SWEEPS)

    start = (columns[:half], columns[half:], jnp.ones((), columns.dtype), jnp.zeros((), jnp.int32))
    top, bottom, _, count = lax.while_loop(unfinished, sweep, start)
    norms = jnp.sqrt(jnp.sum(jnp.concatenate([top, bottom]) ** 2, axis=1))
    return -jnp.sort(-norms, axis=0)[:n], count


def counted(columns: Array | list[Array]) -> tuple[Array, Array]:
    """What `jacobi` returns, and how many sweeps it took; columns of a list are written out."""
    return _unrolled(columns) if isinstance(columns, list) else _looped(columns)


def jacobi(columns: Float[Array, "c rows *lanes"]) -> Float[Array, "c *lanes"]:
    """Singular values of many small matrices, in decreasing order, by one-sided Jacobi.

    Args:
      columns: of the matrices, lanes on the last axes.

    Returns:
      Shape (c, …). Tiny singular values of matrices with graded columns keep relative accuracy.
    """
    few = columns.shape[0] <= MOST_UNROLLED
    return counted(list(columns) if few else columns)[0]
