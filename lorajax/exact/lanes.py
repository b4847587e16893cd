"""Many λ-balanced flows at once: every lane and every time on its own, without steps.

Stepping (`balanced_core`) keeps C = I + Qᵀ(∫e^{2Fs}ds)Q near I. One shot to any time is as accurate
once the columns of Q follow the modes: rotate Q from the right (which is free) until the growing
coordinates g of the modes are in echelon form, mode 1 first, and divide column j by e^{κ_j t}. Then
the scaled C is a sum of positive semidefinite terms that stay bounded whatever t is, and what is
left for a lane and a time is a Cholesky factor of it and the singular values of a small matrix.
Source: derived here from theory section 2.1. The arithmetic runs with lanes on the last axis.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from lorajax.exact.jacobi import MOST_UNROLLED, counted
from lorajax.factors import Factors
from lorajax.problems import DiagonalFactorization

_CACHE = 2**19  # bytes of one block of lanes and times: what stays in a core's own cache


class NormalForm(NamedTuple):
    """Starts of many λ-balanced flows in the frames of their modes, lanes on the last axis.

    Column j of the factors (after the free rotation) grows as mode j does. Where λ < 0 the factors
    have changed places, which changes neither singular values nor losses.

    Attributes:
      singular_values: of the targets, in decreasing order.
      level: |λ|.
      growing: coordinates along the growing eigenvectors of the modes' 2×2 blocks, in echelon form.
      decaying: coordinates along the decaying ones.
      gram_a: Gram matrix of what A has across the modes.
      gram_b: Gram matrix of what B has across the modes.
      rest_b: rows with `gram_b` as their Gram matrix.
      rates: what each column is divided by is e^{rate t}.
      nothing: where a factor is 0 at the start, and so the product.
    """

    singular_values: Float[Array, "k lanes"]
    level: Float[Array, " lanes"]
    growing: Float[Array, "c k lanes"]
    decaying: Float[Array, "c k lanes"]
    gram_a: Float[Array, "c c lanes"]
    gram_b: Float[Array, "c c lanes"]
    rest_b: Float[Array, "c q lanes"]
    rates: Float[Array, "c lanes"]
    nothing: Bool[Array, " lanes"]


def _unit(vector: Array) -> Array:
    """A vector at norm 1, or zero; of any size, with a derivative wherever it has one."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(vector)))
    vector = vector / jnp.where(largest > 0, largest, 1)
    square = jnp.sum(vector**2)
    return vector / jnp.sqrt(jnp.where(square > 0, square, 1))


def echelon(
    rows: Float[Array, "n r"], rates: Float[Array, " n"], columns: int
) -> tuple[Float[Array, "c r"], Float[Array, "c n"], Float[Array, " c"]]:
    """Rows in an orthonormal basis in which they are in echelon form.

    Args:
      rows: in the order in which they may start a column.
      rates: one a row.
      columns: how many to find.

    Returns:
      The basis, one vector a row; the coordinates, one column a row; and for each column the rate
      of the row it first appears in. Rows that are 0, or that earlier ones span to rounding, start
      no column.
    """
    n, r = rows.shape
    spent = 8 * jnp.finfo(rows.dtype).eps * jnp.max(jnp.abs(rows), axis=1)

    def step(j, carry):
        rows, basis, coordinates, found = carry
        pivot = jnp.argmax(jnp.max(jnp.abs(rows), axis=1) > spent)
        q = _unit(rows[pivot])
        # Nearly dependent rows lose orthogonality in the first pass.
        q = _unit(q - (basis @ q) @ basis)
        along = rows @ q
        rows = (rows - jnp.multiply.outer(along, q)).at[pivot].set(0)
        return (
            rows,
            basis.at[j].set(q),
            coordinates.at[j].set(along),
            found.at[j].set(rates[pivot]),
        )

    zeros = (jnp.zeros((columns, size), rows.dtype) for size in (r, n))
    start = (rows, *zeros, jnp.zeros((columns,), rows.dtype))
    _, basis, coordinates, found = lax.fori_loop(0, columns, step, start)
    return basis, coordinates, found


def without_rounding(values: Array, nothing: Array) -> Array:
    """Exactly 0 where there is nothing, as what rounding leaves has a spectrum and a rank.

    Derivatives stay those of the values.
    """
    return values - lax.stop_gradient(jnp.where(nothing, values, 0))


def along_modes(
    s: Float[Array, " k"],
    level: Float[Array, ""],
    x: Float[Array, "k r"],
    y: Float[Array, "k r"],
) -> tuple[Float[Array, " k"], Float[Array, "k r"], Float[Array, "k r"]]:
    """Coordinates along the eigenvectors of the modes' 2×2 blocks `[[λ/2, s], [s, −λ/2]]`.

    Args:
      s: singular values.
      level: λ.
      x: what A has along the modes.
      y: what Bᵀ has along them.

    Returns:
      The eigenvalues κ, and the coordinates along the growing and along the decaying eigenvectors.
    """
    kappa = jnp.sqrt(s**2 + (level / 2) ** 2)
    cos = jnp.sqrt((1 + level / (2 * kappa)) / 2)
    sin = s / (2 * kappa * cos)
    return kappa, cos[:, None] * x + sin[:, None] * y, cos[:, None] * y - sin[:, None] * x


def _one_sided(s, level, x) -> NormalForm:
    """A lane with B = 0: columns beyond the modes never learn anything and are left out."""
    columns = min(x.shape)
    kappa, growing, decaying = along_modes(s, level, x, jnp.zeros_like(x))
    basis, coordinates, rates = echelon(growing, kappa, columns)
    along = x @ basis.T
    # AᵀA = λI leaves λI − xᵀx for what A has across the modes.
    gram_a = level * (basis @ basis.T) - along.T @ along
    zeros = jnp.zeros((columns, columns), s.dtype)
    rest_b = jnp.zeros((columns, 0), s.dtype)
    faded = (decaying @ basis.T).T
    nothing = jnp.ones((), bool)
    return NormalForm(s, level, coordinates, faded, gram_a, zeros, rest_b, rates, nothing)


def _two_sided(s, level, a, b) -> NormalForm:
    """A lane with anything in B: all r columns take part."""
    k, r = s.shape[0], a.shape[1]
    nothing = ~(jnp.any(a) & jnp.any(b))
    x, rest_a, y, rest_b = a[:k], a[k:], b[:, :k].T, b[:, k:].T
    most = max(rest_a.shape[0], rest_b.shape[0])
    rest_a, rest_b = (jnp.pad(z, ((0, most - z.shape[0]), (0, 0))) for z in (rest_a, rest_b))
    # σ = b√(b² + λ) of the smaller factor's singular values b is accurate; make B the smaller one.
    turn = level < 0
    x, y = jnp.where(turn, y, x), jnp.where(turn, x, y)
    rest_a, rest_b = jnp.where(turn, rest_b, rest_a), jnp.where(turn, rest_a, rest_b)
    level = jnp.abs(level)
    kappa, growing, decaying = along_modes(s, level, x, y)
    # Unit vectors at the end complete the basis where the modes do not span it.
    rows = jnp.concatenate([growing, jnp.eye(r, dtype=s.dtype)])
    slow = jnp.broadcast_to(level / 2, (r,))
    basis, coordinates, rates = echelon(rows, jnp.concatenate([kappa, slow]), r)
    rest_a, rest_b = rest_a @ basis.T, rest_b @ basis.T
    return NormalForm(
        s,
        level,
        coordinates[:, :k],
        (decaying @ basis.T).T,
        rest_a.T @ rest_a,
        rest_b.T @ rest_b,
        rest_b.T,
        rates,
        nothing,
    )


def one_sided(
    singular_values: Float[Array, "lanes k"],
    level: Float[Array, " lanes"],
    along: Float[Array, "lanes k r"],
) -> NormalForm:
    """Normal form of LoRA starts: B = 0 and AᵀA = λI.

    Args:
      singular_values: of the targets, in decreasing order.
      level: λ > 0.
      along: `UᵀA`, what A has along the targets' left singular vectors. What it has across them
        enters only by λ, so that no larger matrix than this is ever looked at.

    Returns:
      A NormalForm of min(k, r) columns.
    """
    return jax.vmap(_one_sided, out_axes=-1)(singular_values, level, along)


def two_sided(
    problem: DiagonalFactorization, core: Factors, level: Float[Array, " lanes"]
) -> NormalForm:
    """Normal form of any λ-balanced starts, from reduced problems with a leading axis of lanes.

    Args:
      problem: as a vmapped `reduce` returns it.
      core: starts in the frames, shapes (lanes, p, r) and (lanes, r, q).
      level: λ, of either sign.

    Returns:
      A NormalForm of r columns.
    """
    return jax.vmap(_two_sided, out_axes=-1)(problem.singular_values, level, core.a, core.b)


def _whiten_unrolled(gram: list[list[Array]], columns: list[Array]) -> list[Array]:
    """`Z U^{−T}` with gram = U Uᵀ, U upper triangular: the last column is finished first."""
    n = len(columns)
    upper: list[list[Any]] = [[None] * n for _ in range(n)]
    for j in reversed(range(n)):
        upper[j][j] = jnp.sqrt(gram[j][j] - sum(upper[j][m] ** 2 for m in range(j + 1, n)))
        for i in range(j):
            inner = sum(upper[i][m] * upper[j][m] for m in range(j + 1, n))
            upper[i][j] = (gram[i][j] - inner) / upper[j][j]
    done: list[Any] = [None] * n
    for j in reversed(range(n)):
        inner = sum(done[m] * upper[j][m][None] for m in range(j + 1, n))
        done[j] = (columns[j] - inner) / upper[j][j][None]
    return done


def _whiten_looped(gram: Array, columns: Array) -> Array:
    """The same as a loop over columns, for any number of them."""
    n = gram.shape[0]

    def step(i, carry):
        gram, columns = carry
        j = n - 1 - i
        root = jnp.sqrt(gram[j, j])
        column = jnp.where(jnp.arange(n).reshape(-1, *[1] * (gram.ndim - 2)) <= j, gram[:, j], 0)
        column = column / root[None]
        done = columns[j] / root[None]
        gram = gram - column[:, None] * column[None]
        columns = (columns - column[:, None] * done[None]).at[j].set(done)
        return gram, columns

    return lax.fori_loop(0, n, step, (gram, columns))[1]


class _Point(NamedTuple):
    """Scaled factors at a block of times and lanes, which are the last two axes."""

    a: Float[Array, "c k t lanes"]
    b: Float[Array, "c k t lanes"]
    rest_b: Float[Array, "c q t lanes"]
    gram: Any  # C: nested lists for few columns, an array of shape (c, c, t, lanes) for many
    gram_a: Float[Array, "c c t lanes"]


def _scaled(form: NormalForm, times: Array) -> _Point:
    """The scaled factors and their C at a block of times; every term of C is bounded and ≥ 0."""
    columns, _, lanes = form.growing.shape
    s, t = form.singular_values[:, None], times[None, :, None]  # (k, 1, lanes), (1, t, 1)
    level, rates = form.level[None, None], form.rates[:, None]  # (1, 1, lanes), (c, 1, lanes)
    kappa = jnp.sqrt(s**2 + (level / 2) ** 2)
    cos = jnp.sqrt((1 + level / (2 * kappa)) / 2)
    sin = s / (2 * kappa * cos)
    fade, half = jnp.exp(-kappa * t), -jnp.expm1(-2 * kappa * t) / (2 * kappa)
    safe = jnp.where(level == 0, 1, level)
    mild = jnp.where(level == 0, t, -jnp.expm1(-level * t) / safe)
    past = jnp.exp(-level * t)
    shrink = jnp.exp((level / 2 - rates) * t)
    gap = jnp.minimum(kappa[None] - rates[:, None], 0)
    grown = form.growing[:, :, None] * jnp.exp(gap * t[None])
    faded = form.decaying[:, :, None] * (shrink * jnp.exp(-level * t / 2))[:, None]
    gram_a = (shrink[:, None] * shrink[None]) * form.gram_a[:, :, None]
    half_grown, half_faded = half[None] * grown, half[None] * faded
    with_rest = form.rest_b.shape[1] > 0

    def entry(i: int, j: int) -> Array:
        found = jnp.sum(half_grown[i] * grown[j], axis=0)
        found = found + jnp.sum(half_faded[i] * faded[j], axis=0)
        found = found + mild[0] * gram_a[i, j]
        scale = shrink[i] * shrink[j] * past[0]
        if with_rest:
            found = found + scale * mild[0] * form.gram_b[i, j][None]
        return found + scale if i == j else found

    if columns <= MOST_UNROLLED:
        gram: Any = [[None] * columns for _ in range(columns)]
        for i in range(columns):
            for j in range(i, columns):
                gram[i][j] = gram[j][i] = entry(i, j)
    else:

        def add(i, total):
            outer = half_grown[:, None, i] * grown[None, :, i]
            return total + outer + half_faded[:, None, i] * faded[None, :, i]

        scale = (shrink[:, None] * shrink[None]) * past[None]
        identity = jnp.eye(columns, dtype=s.dtype)[:, :, None, None]
        total = scale * (identity + mild[None] * form.gram_b[:, :, None]) + mild[None] * gram_a
        gram = lax.fori_loop(0, s.shape[0], add, total)
    return _Point(
        a=cos[None] * grown - (sin * fade)[None] * faded,
        b=sin[None] * grown + (cos * fade)[None] * faded,
        rest_b=form.rest_b[:, :, None] * (shrink * past)[:, None],
        gram=gram,
        gram_a=gram_a,
    )


def _whiten(gram: Any, columns: Array) -> Array | list[Array]:
    if isinstance(gram, list):
        return _whiten_unrolled(gram, [columns[j] for j in range(len(gram))])
    return _whiten_looped(gram, columns)


def _spectrum(form: NormalForm, times: Array) -> tuple[Array, Array]:
    point = _scaled(form, times)
    rows = jnp.concatenate([point.b, point.rest_b], axis=1) if point.rest_b.shape[1] else point.b
    columns = _whiten(point.gram, rows)
    b, sweeps = counted(columns)
    return b * jnp.sqrt(b**2 + form.level[None, None]), sweeps


def _loss(form: NormalForm, times: Array) -> Array:
    point = _scaled(form, times)
    c, k = form.growing.shape[:2]
    # One pass for all rows that C^{−1/2} acts on: both factors, and the Gram matrix of A's rest.
    rows = jnp.concatenate([point.a, point.b, point.rest_b, point.gram_a], axis=1)
    done = jnp.asarray(_whiten(point.gram, rows))
    a, b, inner = done[:, :k], done[:, k : done.shape[1] - c], done[:, done.shape[1] - c :]
    inner = jnp.asarray(_whiten(point.gram, jnp.swapaxes(inner, 0, 1)))
    product = jnp.einsum("ci...,cj...->ij...", a, b)
    target = jnp.eye(k, b.shape[1], dtype=b.dtype)[:, :, None, None]
    residual = target * form.singular_values[:, None, None] - product
    across = jnp.einsum("ci...,cd...,di...->...", b, inner, b)
    return 0.5 * (jnp.sum(residual**2, axis=(0, 1)) + jnp.maximum(across, 0))


def _over_blocks(of_block, form: NormalForm, times: Array) -> Array:
    """Applies a function of (form, times) in blocks that fit the cache; lanes and times lead."""
    columns, k, lanes = form.growing.shape
    entries = columns * (4 * k + 2 * form.rest_b.shape[1] + 2 * columns) + 4 * k
    width = max(64, _CACHE // (entries * form.growing.dtype.itemsize))
    lane_blocks = math.ceil(lanes / width)
    wide = math.ceil(lanes / lane_blocks)
    long = max(1, min(times.shape[0], width // wide))
    time_blocks = math.ceil(times.shape[0] / long)
    extra = lane_blocks * wide - lanes

    def split(x):
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)], mode="edge")
        return jnp.moveaxis(x.reshape(*x.shape[:-1], lane_blocks, wide), -2, 0)

    padded = jnp.pad(times, (0, time_blocks * long - times.shape[0]), mode="edge")

    def lanes_block(part):
        found = lax.map(lambda t: of_block(part, t), padded.reshape(time_blocks, long))
        # (time blocks, …, times, lanes) → (lanes, times, …)
        found = jnp.moveaxis(found, (-1, 0, -2), (0, 1, 2))
        return found.reshape(wide, time_blocks * long, *found.shape[3:])[:, : times.shape[0]]

    found = lax.map(lanes_block, jax.tree.map(split, form))
    return found.reshape(lane_blocks * wide, *found.shape[2:])[:lanes]


def singular_values(form: NormalForm, times: Float[Array, " t"]) -> Float[Array, "lanes t c"]:
    """Singular values of the products at all times, in decreasing order.

    Args:
      form: from `one_sided` or `two_sided`.
      times: t ≥ 0 in 1/s, in any order.

    Returns:
      Shape (lanes, t, c). With B = 0 and r > k the r − k values that are left out are exactly 0.

    Source: the module's; with P = QQᵀ known, σ = b√(b² + λ) for the singular values b of B.
    """
    found = _over_blocks(lambda *block: _spectrum(*block)[0], form, times)
    return without_rounding(found, form.nothing[:, None, None] & (times == 0)[None, :, None])


def jacobi_sweeps(form: NormalForm, times: Float[Array, " t"]) -> Float[Array, ""]:
    """Mean number of Jacobi sweeps that `singular_values` takes, for a count of operations."""

    def count(form: NormalForm, times: Array) -> Array:
        shape = (times.shape[0], form.level.shape[0])
        return jnp.broadcast_to(_spectrum(form, times)[1], shape).astype(form.level.dtype)

    return jnp.mean(_over_blocks(count, form, times))


def losses(form: NormalForm, times: Float[Array, " t"]) -> Float[Array, "lanes t"]:
    """The losses ½‖S − AB‖² at all times.

    Args:
      form: from `one_sided` or `two_sided`.
      times: t ≥ 0 in 1/s, in any order.

    Returns:
      Shape (lanes, t). Losses below the rounding unit times λ² are rounding.
    """
    return _over_blocks(_loss, form, times)
