"""Points where a LoRA run comes to rest: their gradient, their curvature, and how many there are.

With decay w a stationary point has balanced factors, AᵀA = BBᵀ, so `X = L Σ Rᵀ` with
`A = L Σ^½ Q`, `B = Qᵀ Σ^½ Rᵀ`, and its gradient is `∇f(X) = −w L Rᵀ + T` with LᵀT = 0 and T R = 0
(theory §5). It is a global minimum of a convex f + w‖·‖_* exactly if ‖T‖₂ ≤ w.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from lorajax.environment.judging import NOT_NEGATIVE, POSITIVE, at_least, judged
from lorajax.factors import Factors
from lorajax.problems import Linearized


class Structure(NamedTuple):
    """The gradient at a stationary point, taken apart.

    Attributes:
      singular_values: of X = A B, the r largest, in decreasing order.
      outer: ‖T‖₂, the gradient's norm across X's singular spaces: at most w at a global minimum.
      leakage: the larger of ‖LᵀT‖_F and ‖T R‖_F: 0 at a stationary point.
      imbalance: ‖AᵀA − BBᵀ‖_F: 0 at a stationary point.
    """

    singular_values: Float[Array, " r"]
    outer: Float[Array, ""]
    leakage: Float[Array, ""]
    imbalance: Float[Array, ""]


@judged(decay=NOT_NEGATIVE, floor=NOT_NEGATIVE)
def structure(
    gradient: Float[Array, "m n"],
    factors: Factors,
    decay: float | Float[Array, ""],
    *,
    floor: float = 1e-6,
) -> Structure:
    """Splits the gradient at a stationary point as `∇f(X) = −w L Rᵀ + T`.

    Args:
      gradient: ∇f(X), without the decay, e.g. `problem.full_gradient(factors)`.
      factors: where the run came to rest, of one matrix.
      decay: w > 0.
      floor: singular values up to `floor · σ_1` are no part of L and R.

    Returns:
      A Structure. Pure: fit for `jit` and `vmap`.

    Source: Kim, Kim, Ryu 2025 (arXiv:2502.09376), stated; theory section 5.
    """
    return _structure(gradient, factors, jnp.asarray(decay, gradient.dtype), floor)


@eqx.filter_jit
def _structure(gradient: Array, factors: Factors, decay: Array, floor: float) -> Structure:
    u, s, vt = jnp.linalg.svd(factors.product, full_matrices=False)
    inside = (s > floor * s[0]).astype(s.dtype)
    left, right = u * inside[None, :], vt * inside[:, None]
    rest = gradient + decay * (left @ right)
    leak = jnp.maximum(jnp.linalg.norm(left.T @ rest), jnp.linalg.norm(rest @ right.T))
    return Structure(
        s[: factors.rank],
        jnp.linalg.norm(rest, 2),
        leak,
        jnp.linalg.norm(factors.a.T @ factors.a - factors.b @ factors.b.T),
    )


@judged
@eqx.filter_jit
def lowest_curvature(problem: Any, factors: Any) -> Float[Array, ""]:
    """The smallest eigenvalue of the loss's Hessian in the factors, by forming it.

    Args:
      problem: anything with `loss` and `gradient`, its decay included.
      factors: at a stationary point: not below 0, up to rounding, exactly where it is of second
        order. Rotations of the factors always give eigenvalues 0.

    Returns:
      A scalar. Costs the square of the number of parameters; for small problems.
    """
    flat, back = ravel_pytree(factors)
    hessian = jax.jacfwd(lambda x: ravel_pytree(problem.gradient(back(x)))[0])(flat)
    return jnp.linalg.eigvalsh((hessian + hessian.T) / 2)[0]


@judged(equations=at_least(1))
def sufficient_rank(equations: int, *, factor: float = 1.0) -> int:
    """The least rank with `r(r+1)/2 > KN`, from which on there are no spurious local minima.

    Args:
      equations: KN, the number of outputs of the data (`Linearized.equations`).
      factor: multiplies KN; 1 in the theorem.

    Returns:
      The rank. It is sufficient, for almost every small perturbation, and conservative.

    Example:
      >>> from lorajax.optima import existing_rank, sufficient_rank
      >>> sufficient_rank(20), existing_rank(20)
      (6, 5)

    Source: Jang, Lee, Ryu 2024 (arXiv:2402.11867), stated.
    """
    rank = 1
    while rank * (rank + 1) / 2 <= factor * equations:
        rank += 1
    return rank


@judged(equations=at_least(1))
def existing_rank(equations: int) -> int:
    """The largest rank with `r(r+1)/2 ≤ KN`: some global minimizer has at most that rank.

    Args:
      equations: KN.

    Returns:
      The rank. `reduce_rank` finds such a minimizer.

    Source: Jang, Lee, Ryu 2024 (arXiv:2402.11867), stated.
    """
    return sufficient_rank(equations) - 1


@judged(equations=at_least(1))
def manifold_rank(equations: int, shape: tuple[int, int], *, constant: float = 1.35) -> int | None:
    """The least rank with `r(m + n) − r² > 1.35 KN`: counting on the manifold of rank r.

    Args:
      equations: KN.
      shape: (m, n) of the update.
      constant: 1.35 in the source.

    Returns:
      The rank; None where not even the full one has so many dimensions.

    Source: Park 2026 (arXiv:2605.03724); theory section 5 gives the count and not its proof.
    """
    m, n = shape
    for rank in range(1, min(shape) + 1):
        if rank * (m + n) - rank**2 > constant * equations:
            return rank
    return None


@eqx.filter_jit
def _pushed(problem: Linearized, updates: Float[Array, "p m n"]) -> Float[Array, "p N K"]:
    return jax.lax.map(problem.jacobian.push, updates)


@judged(tolerance=POSITIVE)
def reduce_rank(
    problem: Linearized, factors: Factors, *, tolerance: float = 1e-9
) -> tuple[Factors, list[int]]:
    """Moves a global minimizer along others to one of rank r with `r(r+1)/2 ≤ KN`.

    With Z = [A; Bᵀ] any symmetric S with `⟨G_ik, A S B⟩ = 0` for all data leaves every output as it
    is along `Z (I + tS) Zᵀ`, and the decay too, since at a minimum its slope is a combination of
    those. There is such an S ≠ 0 as long as r(r+1)/2 > KN, and at the t where I + tS turns singular
    a rank is gone.

    Args:
      problem: a linearized problem of one weight.
      factors: balanced factors of a global minimizer, concrete.
      tolerance: directions of Z up to `tolerance` of its largest singular value are dropped.

    Returns:
      The factors, and the ranks passed on the way, the first one and the last included.

    Source: Jang, Lee, Ryu 2024 (arXiv:2402.11867) state that such a minimizer exists; this argument
    is Pataki's and Barvinok's (recalled), written out for this problem (derived).
    """
    a, b = (np.asarray(x) for x in factors)
    split, ranks = a.shape[0], []
    active = np.flatnonzero(np.asarray(problem.sample_weights))
    most = min(a.shape[1], sum(problem.shape))
    z = np.concatenate([a, b.T])
    while True:
        u, s, _ = np.linalg.svd(z, full_matrices=False)
        keep = s > tolerance * s[0]
        z = u[:, keep] * s[keep]
        r = z.shape[1]
        ranks.append(r)
        if r * (r + 1) // 2 <= problem.equations:
            return Factors(jnp.asarray(z[:split]), jnp.asarray(z[split:].T)), ranks
        rows, columns = np.triu_indices(r)
        left, right = z[:split].T, z[split:].T
        basis = left[rows][:, :, None] * right[columns][:, None, :]
        basis = basis + left[columns][:, :, None] * right[rows][:, None, :]
        # Always as many as at first, so that one program serves all ranks.
        missing = most * (most + 1) // 2 - len(basis)
        basis = jnp.asarray(np.pad(basis, ((0, missing), (0, 0), (0, 0))))
        outputs = np.asarray(_pushed(problem, basis))[: len(rows), active].reshape(len(rows), -1)
        # On the diagonal both halves are one and the same entry of S.
        outputs = np.where((rows == columns)[:, None], outputs / 2, outputs)
        null = np.linalg.svd(outputs.T)[2][-1]
        symmetric = np.zeros((r, r))
        symmetric[rows, columns] = symmetric[columns, rows] = null
        values, vectors = np.linalg.eigh(symmetric)
        extreme = values[np.argmax(np.abs(values))]
        scale = 1 - values / extreme
        scale[np.argmax(np.abs(values))] = 0
        z = (z @ vectors) * np.sqrt(np.maximum(scale, 0))[None, :]
