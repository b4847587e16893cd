"""The λ-balanced propagator: one flow at any time in one step without discretization error.

`Q(t) = e^{Ft} Q C^{−1/2}` with `C = I + Qᵀ (∫₀ᵗ e^{2Fs} ds) Q` (theory section 2.1) loses all
digits at large t as it stands, because the top mode swamps all others. It keeps them once the
columns of Q follow the modes (`exact.lanes`): rotate Q from the right, which is free, until what
it has along the growing eigenvectors of the modes is in echelon form, and divide column j by
e^{κ_j t}.
What is left is bounded whatever t is, and so are its derivatives.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lorajax.environment.judging import judged
from lorajax.exact.lanes import along_modes, echelon, without_rounding
from lorajax.factors import Factors, is_traced
from lorajax.problems import DiagonalFactorization


@judged
def balance(factors: Factors) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How close a start is to `AᵀA − BBᵀ = λ I`.

    Args:
      factors: any start.

    Returns:
      λ, the mean of the diagonal of `Λ = AᵀA − BBᵀ`, and the relative deviation
      `‖Λ − λI‖_F / (‖A‖_F² + ‖B‖_F²)`, 0 for a start that `balanced_flow` solves exactly.
    """
    gram_a, gram_b = factors.a.T @ factors.a, factors.b @ factors.b.T
    imbalance = gram_a - gram_b
    level = jnp.trace(imbalance) / factors.rank
    deviation = jnp.linalg.norm(imbalance - level * jnp.eye(factors.rank, dtype=imbalance.dtype))
    return level, deviation / (jnp.trace(gram_a) + jnp.trace(gram_b))


class BalancedPath(NamedTuple):
    """A λ-balanced flow in the frames, and the steps it took.

    Attributes:
      core: factors in the frames at the times, shapes (t, p, r) and (t, r, q), each exact up to a
        rotation of the r columns that is the same for both (the product is exact).
      steps: propagator steps in all, int32: one a time, however late it is.
    """

    core: Factors
    steps: Int[Array, ""]


class _Turned(NamedTuple):
    """A start with the columns of Q in echelon form; λ ≥ 0, the factors in places to suit."""

    level: Array
    kappa: Array
    rates: Array
    growing: Array
    decaying: Array
    rest_a: Array
    rest_b: Array


def _turned(s: Array, core: Factors, level: Array, turn: Array) -> _Turned:
    k, r = s.shape[0], core.rank
    x, rest_a, y, rest_b = core.a[:k], core.a[k:], core.b[:, :k].T, core.b[:, k:].T
    most = max(rest_a.shape[0], rest_b.shape[0])
    rest_a, rest_b = (jnp.pad(z, ((0, most - z.shape[0]), (0, 0))) for z in (rest_a, rest_b))
    x, y = jnp.where(turn, y, x), jnp.where(turn, x, y)
    rest_a, rest_b = jnp.where(turn, rest_b, rest_a), jnp.where(turn, rest_a, rest_b)
    level = jnp.where(turn, -level, level)
    kappa, growing, decaying = along_modes(s, level, x, y)
    # Unit vectors at the end complete the basis where the modes do not span it.
    rows = jnp.concatenate([growing, jnp.eye(r, dtype=s.dtype)])
    slow = jnp.broadcast_to(level / 2, (r,))
    basis, coordinates, rates = echelon(rows, jnp.concatenate([kappa, slow]), r)
    rests = (decaying @ basis.T, rest_a @ basis.T, rest_b @ basis.T)
    return _Turned(level, kappa, rates, coordinates[:, :k].T, *rests)


def _mean_decay(x: Array) -> Array:
    """`(1 − e^{−x}) / x`, also at and next to 0."""
    near = jnp.abs(x) < 1e-4
    safe = jnp.where(near, 1, x)
    return jnp.where(near, 1 - x / 2 + x**2 / 6, -jnp.expm1(-safe) / safe)


def _propagate(s: Array, start: _Turned, t: Array) -> tuple[Array, Array]:
    """A and Bᵀ at one time, in echelon columns that are divided by e^{rate t} and by their size."""
    level, kappa, rates, growing, decaying, rest_a, rest_b = start
    cos = jnp.sqrt((1 + level / (2 * kappa)) / 2)
    sin = s / (2 * kappa * cos)
    gap = kappa[:, None] - rates[None]
    plain, shrink = jnp.exp(-rates * t), jnp.exp((level / 2 - rates) * t)
    # A column may have any scale: this one keeps its square in range, from 1e-38 of a start on.
    scale = jnp.maximum(jnp.max(jnp.abs(growing), axis=0), shrink)
    plain, shrink = (x / jax.lax.stop_gradient(scale) for x in (plain, shrink))
    grown = growing * jnp.exp(jnp.where(gap > 0, 0, gap) * t)
    grown = grown / jax.lax.stop_gradient(scale)[None]
    faded = decaying * plain[None]
    rest_a, still_b = rest_a * shrink[None], rest_b * plain[None]
    half = (t * _mean_decay(2 * kappa * t))[:, None]
    mild = t * _mean_decay(level * t)
    gram = grown.T @ (half * grown) + faded.T @ (half * faded)
    gram = gram + mild * (rest_a.T @ rest_a + still_b.T @ still_b) + jnp.diag(plain**2)
    fade = jnp.exp(-kappa * t)[:, None]
    a = [cos[:, None] * grown - sin[:, None] * fade * faded, rest_a]
    b = [sin[:, None] * grown + cos[:, None] * fade * faded, jnp.exp(-level * t / 2) * still_b]
    stacked = jnp.concatenate([*a, *b])
    # Slow columns have nothing along faster modes; finished first, they keep their zeros.
    root = jnp.linalg.cholesky(gram[::-1, ::-1], symmetrize_input=True)
    stacked = jax.scipy.linalg.solve_triangular(root, stacked[:, ::-1].T, lower=True).T
    half_way = stacked.shape[0] // 2
    return stacked[:half_way], stacked[half_way:]


@judged
@eqx.filter_jit
def balanced_core(
    problem: DiagonalFactorization, core: Factors, times: Float[Array, " t"], level=None
) -> BalancedPath:
    """`balanced_flow` of a reduced problem, staying in the frames.

    Args:
      problem: a diagonal problem, as `reduce` returns it.
      core: a λ-balanced start of it, shapes (p, r) and (r, q).
      times: from 0 on, in units of 1/s; same dtype.
      level: λ; the mean of the diagonal of `AᵀA − BBᵀ` if None.

    Returns:
      A BalancedPath. Its first derivatives, forward and reverse, are those of the flow for every
      change of the start that leaves it balanced to first order.
    """
    level = balance(core)[0] if level is None else jnp.asarray(level, core.a.dtype)
    s, turn = problem.singular_values, level < 0
    start = _turned(s, core, level, turn)
    a, b = jax.vmap(lambda t: _propagate(s, start, t))(times)
    a, b = jnp.where(turn, b, a), jnp.where(turn, a, b)
    p, q = problem.shape
    path = Factors(a[:, :p], jnp.swapaxes(b[:, :q], 1, 2))
    at_start = (times == 0)[:, None, None]
    # Not the start itself, whose columns are turned against the path's and its derivatives'.
    path = jax.tree.map(lambda x, x0: without_rounding(x, at_start & ~jnp.any(x0)), path, core)
    return BalancedPath(path, jnp.asarray(times.shape[0], jnp.int32))


def _allowed(factors: Factors) -> float:
    # Orthonormal frames come out of a QR with errors of a few times m·eps in their Gram matrix.
    return 100 * max(factors.shape) ** 0.5 * float(jnp.finfo(factors.a.dtype).eps)


@judged
def is_balanced(factors: Factors) -> Bool[Array, "*lanes"]:
    """Whether starts are λ-balanced to the rounding of their dtype.

    Args:
      factors: shapes (..., m, r) and (..., r, n).

    Returns:
      One boolean a lane.
    """
    test = balance
    for _ in range(factors.a.ndim - 2):
        test = jax.vmap(test)
    return test(factors)[1] <= _allowed(factors)


@judged
def check_balanced(factors: Factors) -> None:
    """Raises ValueError unless a start is λ-balanced to the rounding of its dtype."""
    if is_traced(factors):
        return
    # A concrete start may meet a trace, where its balance would be staged instead of known.
    with jax.ensure_compile_time_eval():
        _, deviation = balance(factors)
    allowed = _allowed(factors)
    if float(deviation) > allowed:
        raise ValueError(
            f"factors have AᵀA − BBᵀ off a multiple of the identity by {float(deviation):.1e} "
            f"(relative); the closed form needs at most {allowed:.0e}: start from "
            "initializers.orthogonal, spectral or balanced, or use gradient_flow."
        )
