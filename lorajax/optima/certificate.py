"""A certificate of global optimality for any LoRA solution of a linearized problem.

The convex problem behind LoRA with decay w is min over X of `L̂(X) + w‖X‖_*`, with
`L̂(X) = Σ c_i ℓ_i(z_i)` and z = f0 + J X. For any p, `ℓ_i(z) ≥ ⟨p_i, z⟩ − ℓ_i*(p_i)`, so

    L̂(X) + w‖X‖_* ≥ Σ c_i [⟨p_i, f0_i⟩ − ℓ_i*(p_i)] + ⟨Jᵀ(c p), X⟩ + w‖X‖_*,

and the last two terms are at least 0 for every X as soon as `‖Jᵀ(c p)‖₂ ≤ w`. What remains is a
lower bound of the global minimum, from any such p. At a solution the best p is the derivative of
the loss, for which `Jᵀ(c p) = ∇L̂`; elsewhere that is not feasible, but θ p with
`θ = min(1, w/‖∇L̂‖₂)` is: p = 0 is in the domain of every conjugate here, the domain is convex, so
it holds θ p as well. For θ = 1 the gap is `⟨∇L̂, X⟩ + w‖X‖_*` exactly (Fenchel's equality), which is
why these two numbers, ‖∇L̂‖₂ against w and this product, decide (theory §5, derived).

With a perturbation P of the factors' quadratic form, M = w I + P takes the place of w I and the
condition is `M + H(Jᵀ(c p)) ⪰ 0`, H(G) = [[0, G], [Gᵀ, 0]], on Z Zᵀ with Z = [A; Bᵀ].
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import NOT_NEGATIVE, judged
from lorajax.factors import check_finite, check_positive, is_factors
from lorajax.problems import Decayed, Linearized, updates


class Certificate(NamedTuple):
    """How far from the global minimum a point is at most.

    Attributes:
      objective: `L̂ + w‖X‖_*` of a matrix; `L̂(AB) + (w/2)(‖A‖² + ‖B‖²)`, never less, of factors.
      lower_bound: of the global minimum over all matrices, and so over factors of any rank.
      gap: their difference: the objective is within it of the global minimum. Rounding of the loss
        is not part of it: allow for 1e-15 of the objective in float64.
      gradient_norm: ‖∇L̂(X)‖₂, the largest over the weights, to be held against w: a global minimum
        has at most w. With a perturbation it is measured in the metric of w I + P, times w.
      alignment: `⟨∇L̂(X), X⟩ + w‖X‖_*`, 0 at a global minimum (and at every stationary point).
    """

    objective: Float[Array, ""]
    lower_bound: Float[Array, ""]
    gap: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    alignment: Float[Array, ""]


def batched(function: Any, matrices: list[Array]) -> list[Any]:
    """Applies `function` to matrices, those of one shape in one batch.

    Independent decompositions in one program can wait for each other on a CPU of two cores.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault(matrix.shape, []).append(i)
    results: list[Any] = [None] * len(matrices)
    for members in groups.values():
        found = function(jnp.stack([matrices[i] for i in members]))
        for place, i in enumerate(members):
            results[i] = jax.tree.map(lambda x, place=place: x[place], found)
    return results


def singular_values(tree: Any) -> list[Array]:
    """Singular values of every matrix of a tree, in decreasing order."""
    return batched(lambda x: jnp.linalg.svd(x, compute_uv=False), jax.tree.leaves(tree))


def lower_bound(
    problem: Linearized, residual: Float[Array, "N K"], shrink: Float[Array, ""]
) -> Float[Array, ""]:
    """The dual objective `Σ c_i [⟨p_i, f0_i⟩ − ℓ_i*(p_i)]` at p = shrink · residual / c.

    Args:
      problem: the problem.
      residual: `c_i ∂ℓ/∂z_i` at some outputs, (N, K).
      shrink: θ in [0, 1], so small that the pulled-back θ · residual is feasible.

    Returns:
      A lower bound of `L̂ + w‖·‖_*`; see the module.
    """
    c = problem.sample_weights
    p = shrink * residual / jnp.where(c > 0, c, 1)[:, None]
    conjugate = problem.loss_of_outputs.conjugate(p, problem.targets)
    return shrink * jnp.sum(residual * problem.outputs) - c @ conjugate


def _perturbed_norm(gradient: Array, metric: Array) -> Array:
    """The largest eigenvalue of −M^{−1/2} H(G) M^{−1/2}: at most 1 where M + H(G) ⪰ 0."""
    m, n = gradient.shape
    h = jnp.zeros((m + n, m + n), gradient.dtype).at[:m, m:].set(gradient)
    h = h.at[m:, :m].set(gradient.T)
    root = jnp.linalg.cholesky(metric)
    solve = jax.scipy.linalg.solve_triangular
    white = solve(root, solve(root, h, lower=True).T, lower=True)
    return -jnp.linalg.eigvalsh((white + white.T) / 2)[0]


@judged(decay=NOT_NEGATIVE)
def certify(
    problem: Linearized,
    update: Any,
    decay: float | Float[Array, ""],
    *,
    perturbation: Any = None,
) -> Certificate:
    """Certifies how close a solution is to the global minimum of `L̂ + w‖·‖_*`.

    Pure: fit for `jit` and `vmap`. One forward and one backward pass over the data and a singular
    value decomposition for each weight.

    Args:
      problem: a linearized problem.
      update: what was found: Factors (judged by LoRA's objective, which adds whatever imbalance the
        factors have), a matrix (judged by the nuclear norm), or a pytree of them.
      decay: w > 0, the decay of LoRA's factors.
      perturbation: P as in `Decayed`, so small that w I + P is positive definite; then `update`
        must be factors.

    Returns:
      A Certificate.

    Raises:
      ValueError: for a decay that is not positive, entries that are not finite, shapes that do not
        fit, or a perturbation without factors.

    Example:
      >>> import jax, jax.numpy as jnp, lorajax
      >>> features = jax.random.normal(jax.random.key(0), (6, 1, 5, 4))
      >>> problem = lorajax.Linearized.from_features(features, jnp.ones((6, 1)))
      >>> found = lorajax.optima.minimize(problem, 0.1)
      >>> bool(lorajax.optima.certify(problem, found.update, 0.1).gap < 1e-8)
      True

    Source: theory section 5 (derived; the duality is written out in this module). Whether a
    stationary point is the global one shows in `gradient_norm` alone; `gap` holds for any point.
    """
    check_positive(decay=decay)
    check_finite(update=update)
    leaves = jax.tree.leaves(update, is_leaf=is_factors)
    factored = all(is_factors(leaf) for leaf in leaves)
    if perturbation is not None and not factored:
        raise ValueError("update holds matrices; with a perturbation it must be factors.")
    _check_shapes(problem, update)
    return _certify(problem, update, jnp.asarray(decay, problem.dtype), perturbation)


@eqx.filter_jit
def _certify(problem: Linearized, update: Any, w: Array, perturbation: Any) -> Certificate:
    factored = all(is_factors(leaf) for leaf in jax.tree.leaves(update, is_leaf=is_factors))
    matrices = updates(update)
    outputs = problem.predict(matrices)
    residual = problem.residual(outputs)
    gradient = problem.jacobian.pull(residual)
    spectra = singular_values([jax.tree.leaves(gradient), jax.tree.leaves(matrices)])
    count = len(spectra) // 2
    nuclear = sum((jnp.sum(s) for s in spectra[count:]), jnp.zeros((), problem.dtype))
    if perturbation is None:
        norm = jnp.max(jnp.stack([s[0] for s in spectra[:count]]))
    else:
        norms = []
        for g, p in zip(jax.tree.leaves(gradient), jax.tree.leaves(perturbation), strict=True):
            metric = w * jnp.eye(sum(g.shape), dtype=g.dtype) + p
            norms.append(_perturbed_norm(g, metric))
        norm = w * jnp.max(jnp.stack(norms))
    largest = max(max(g.shape) for g in jax.tree.leaves(gradient))
    # The norm is known to rounding; a bound must not rest on the last digits.
    slack = 1 + 4 * largest * jnp.finfo(problem.dtype).eps
    shrink = jnp.minimum(1, w / jnp.maximum(slack * norm, jnp.finfo(problem.dtype).tiny))
    bound = lower_bound(problem, residual, shrink)
    if factored:
        penalty = Decayed(problem, w, perturbation).penalty(update)
    else:
        penalty = w * nuclear
    values = problem.loss_of_outputs.value(outputs, problem.targets)
    objective = problem.sample_weights @ values + penalty
    inner = jax.tree.map(lambda g, x: jnp.sum(g * x), gradient, matrices)
    alignment = jnp.sum(jnp.stack(jax.tree.leaves(inner))) + w * nuclear
    return Certificate(objective, bound, objective - bound, norm, alignment)


def _check_shapes(problem: Linearized, update: Any) -> None:
    shapes = jax.tree.map(lambda f: f.shape, update, is_leaf=is_factors)
    if shapes != problem.shape:
        raise ValueError(f"update has shape {shapes}; the problem has shape {problem.shape}.")
