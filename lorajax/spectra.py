"""Observables: what is looked at along a flow.

Every function takes factors (with any leading axes) or a `Path`; of a path it uses the reduced
core, where spectra, norms and losses are the same as at full size.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax.environment.judging import judged
from lorajax.factors import Factors


def _core(path: Any) -> Factors:
    core = getattr(path, "core", path)
    if not isinstance(core, Factors):
        raise ValueError(
            f"path holds a {type(core).__name__}; give a pair of factors (for two layers, "
            "path.core.first or path.core.second)."
        )
    return core


@judged
def singular_values(path: Any) -> Float[Array, "*lanes k"]:
    """Singular values of the product `A B`, in decreasing order.

    Args:
      path: a Path, or Factors of shapes (..., m, r) and (..., r, n).

    Returns:
      Shape (..., min(m, r, n)): the singular values that a product of rank r can have. Accurate to
      the dtype's rounding relative to the largest one; no m×n matrix is formed.
    """
    return _singular_values(*_core(path))


@jax.custom_jvp
def _triangle(x: Array) -> Array:
    """R of x = Q R, with the frame held still: dR = Qᵀdx is right for any rank of x."""
    return jnp.linalg.qr(x, mode="r")


@_triangle.defjvp
def _triangle_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    q, upper = jnp.linalg.qr(primals[0])
    return upper, jnp.swapaxes(q, -1, -2) @ tangents[0]


@jax.jit
def _singular_values(a: Array, b: Array) -> Array:
    m, r, n = a.shape[-2], a.shape[-1], b.shape[-1]
    if min(m, n) > r:
        # Both factors in one batched call, padded with zero rows: two independent LAPACK calls can
        # wait for each other forever in XLA's thread pool on two cores (seen with jaxlib 0.10.1).
        rows = max(m, n)
        pads = [(0, 0)] * (a.ndim - 2)
        left = jnp.pad(a, [*pads, (0, rows - m), (0, 0)])
        right = jnp.pad(jnp.swapaxes(b, -1, -2), [*pads, (0, rows - n), (0, 0)])
        triangles = _triangle(jnp.stack([left, right]))
        a, b = triangles[0], jnp.swapaxes(triangles[1], -1, -2)
    return jnp.linalg.svd(a @ b, compute_uv=False)[..., :r]


@judged
def singular_vectors(path: Any) -> tuple[Array, Array, Array]:
    """Thin singular value decomposition of `A B` through its factors.

    Args:
      path: Factors of shapes (..., m, r) and (..., r, n) with r ≤ min(m, n), or a Path.

    Returns:
      u (..., m, r), s (..., r) and v (..., n, r), at full size for a Path.
    """
    a, b = path.factors if hasattr(path, "factors") else path
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    u, s, vt = jnp.linalg.svd(r_a @ jnp.swapaxes(r_b, -1, -2), full_matrices=False)
    return q_a @ u, s, q_b @ jnp.swapaxes(vt, -1, -2)


@judged
def imbalance(path: Any) -> Float[Array, "*lanes r r"]:
    """`Λ = AᵀA − BBᵀ`, which gradient flow of any differentiable loss conserves.

    Args:
      path: a Path or Factors.

    Returns:
      Shape (..., r, r), symmetric.

    Source: theory section 1 (derived). Weight decay w makes it `e^{−2wt} Λ(0)`; LoRA+ conserves
    `ρ AᵀA − BBᵀ` instead; momentum, Adam and ALLoRA break it.
    """
    a, b = _core(path)
    a_t, b_t = jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2)
    return a_t @ a - b @ b_t


@judged
def imbalance_drift(path: Any) -> Float[Array, ""]:
    """Largest change of Λ along a path, relative to the size of its terms: a free error estimate.

    Args:
      path: a Path or Factors with one leading axis of times.

    Returns:
      `max_t ‖Λ(t) − Λ(0)‖_F / max_t (‖A‖² + ‖B‖²)`.
    """
    return _imbalance_drift(_core(path))


@jax.jit
def _imbalance_drift(core: Factors) -> Array:
    a, b = core
    drift = imbalance(core)
    change = jnp.linalg.norm(drift - drift[:1], axis=(-2, -1))
    size = jnp.sum(a**2, axis=(-2, -1)) + jnp.sum(b**2, axis=(-2, -1))
    return jnp.max(change) / jnp.max(size)


@judged
def stacked(path: Any) -> Float[Array, "*lanes mn r"]:
    """`Z = [A; Bᵀ]`, the stacked factors, shape (..., m + n, r)."""
    a, b = _core(path)
    return jnp.concatenate([a, jnp.swapaxes(b, -1, -2)], axis=-2)


@judged
def factor_norm(path: Any) -> Float[Array, "*lanes"]:
    """`‖Z‖₂` with `Z = [A; Bᵀ]`, the spectral norm of the stacked factors."""
    return jnp.linalg.svd(stacked(path), compute_uv=False)[..., 0]


@judged
def leading(path: Any) -> tuple[Float[Array, "*lanes mn"], Float[Array, "*lanes"]]:
    """Top left singular vector and singular value of the stacked factors `Z = [A; Bᵀ]`.

    Args:
      path: a Path or Factors of shapes (..., m, r) and (..., r, n).

    Returns:
      Unit vectors of shape (..., m + n), of either sign, and ‖Z‖₂ of shape (...).
    """
    return _leading(stacked(path))


@jax.jit
def _leading(z: Array) -> tuple[Array, Array]:
    u, s, _ = jnp.linalg.svd(z, full_matrices=False)
    return u[..., 0], s[..., 0]


@judged
@jax.jit
def misalignment(
    vectors: Float[Array, "*lanes n"], direction: Float[Array, " n"]
) -> Float[Array, "*lanes"]:
    """`1 − |cos γ|` of the angle between vectors and a direction, accurate far below rounding.

    Args:
      vectors: shape (..., n); any norm.
      direction: shape (n,); any norm.

    Returns:
      Numbers in [0, 1]. From the sine, since 1 − cos of a small angle is lost to rounding: values
      down to 1e-30 are meaningful in float64.
    """
    unit = direction / jnp.linalg.norm(direction)
    vectors = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    cosine = vectors @ unit
    sine_squared = jnp.sum((vectors - jnp.multiply.outer(cosine, unit)) ** 2, axis=-1)
    return sine_squared / (1 + jnp.abs(cosine))


@judged
def top_misalignment(path: Any, direction: Float[Array, " mn"]) -> Float[Array, "*lanes"]:
    """`1 − |cos|` between the top left singular vector of `Z = [A; Bᵀ]` and a direction.

    Args:
      path: a Path or Factors.
      direction: shape (m + n,), e.g. the top eigenvector of `H(M)`; see `top_direction`.

    Returns:
      One number a time. Where several singular values share the top to rounding, as those of an
      orthonormal start do, the angle to the space of all their vectors; 1 where Z is 0, which
      has no part along any direction.

    Source: Xu et al. 2025 (arXiv:2503.06982), figures 1, 3, 4, stated.
    """
    return _top_misalignment(stacked(path), direction)


@jax.jit
def _top_misalignment(z: Array, direction: Array) -> Array:
    u, s, _ = jnp.linalg.svd(z, full_matrices=False)
    top = s[..., :1]
    tied = s >= top * (1 - 1e3 * jnp.finfo(s.dtype).eps)
    shadow = jnp.einsum("...ij,...j->...i", u, jnp.where(tied, direction @ u, 0))
    several = (tied.sum(-1) > 1) & (shadow != 0).any(-1)
    vector = jnp.where(several[..., None], shadow, u[..., 0])
    return jnp.where(top[..., 0] > 0, misalignment(vector, direction), 1)


@judged
@jax.jit
def top_direction(matrix: Float[Array, "m n"]) -> Float[Array, " mn"]:
    """Top eigenvector of `H(M) = [[0, M], [Mᵀ, 0]]`: `[u_1; v_1]/√2`, shape (m + n,)."""
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return jnp.concatenate([u[:, 0], vt[0]]) / jnp.sqrt(jnp.asarray(2.0, matrix.dtype))


@judged
@jax.jit
def effective_rank(values: Float[Array, "*lanes k"]) -> Float[Array, "*lanes"]:
    """Exponential of the entropy of the normalized singular values; 0 for a spectrum of zeros.

    Args:
      values: singular values, not negative.

    Returns:
      A real number between 1 and k.

    Source: Roy, Vetterli 2007, recalled.
    """
    total = jnp.sum(values, axis=-1, keepdims=True)
    share = values / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0), -1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)


@judged
@jax.jit
def hitting_times(
    times: Float[Array, " t"],
    values: Float[Array, "t *lanes"],
    levels: float | Float[Array, ""] | Float[Array, "*lanes"],
) -> Float[Array, "*lanes"]:
    """First times at which quantities cross levels, from either side, linear between samples.

    Args:
      times: shape (t,), increasing.
      values: shape (t, ...).
      levels: what to cross, shape (...), or a scalar.

    Returns:
      Shape (...); NaN where a level is not crossed. The error of the interpolation is of the order
      of the squared spacing of the times.
    """
    levels = jnp.broadcast_to(jnp.asarray(levels, values.dtype), values.shape[1:])
    side = values >= levels[None]
    crossed = side != side[:1]
    after = jnp.argmax(crossed, axis=0)
    before = jnp.maximum(after - 1, 0)
    low = jnp.take_along_axis(values, before[None], axis=0)[0]
    high = jnp.take_along_axis(values, after[None], axis=0)[0]
    gap = high - low
    share = (levels - low) / jnp.where(gap == 0, 1, gap)
    found = times[before] + share * (times[after] - times[before])
    return jnp.where(jnp.any(crossed, axis=0), found, jnp.nan)


@judged
def rank_correlation(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Spearman's ρ of two samples: Pearson's of their ranks, ties in order of appearance."""
    first, second = (np.argsort(np.argsort(each, kind="stable"), kind="stable") for each in (x, y))
    return float(np.corrcoef(first, second)[0, 1])


@judged
@jax.jit
def alignment_subspace(
    first: Float[Array, "m r"], second: Float[Array, "m s"]
) -> Float[Array, " q"]:
    """Cosines of the principal angles between two column spaces, in decreasing order.

    Args:
      first: shape (m, r), full column rank.
      second: shape (m, s), full column rank.

    Returns:
      Shape (min(r, s),), in [0, 1].
    """
    q_first, q_second = jnp.linalg.qr(first)[0], jnp.linalg.qr(second)[0]
    return jnp.clip(jnp.linalg.svd(q_first.T @ q_second, compute_uv=False), 0, 1)


@judged
def losses(problem: Any, factors: Any) -> Float[Array, " t"]:
    """The loss of factors with one leading axis of times, shape (t,)."""
    return _losses(problem, factors)


@eqx.filter_jit
def _losses(problem: Any, factors: Any) -> Array:
    return jax.vmap(problem.loss)(factors)
