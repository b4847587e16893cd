"""Starts along a direction that the data picked: a gradient, a target, or the layer's inputs."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import POSITIVE, at_least, judged
from lorajax.factors import (
    Factors,
    any_nonzero,
    check_finite,
    check_positive,
    check_rank,
    is_traced,
)
from lorajax.initializers.units import PRNGKey, Start, resolve_scale


@judged(rank=at_least(1), directions=at_least(1))
def spectral(
    matrix: Float[Array, "m n"],
    rank: int,
    scale: float | str | Float[Array, ""] = 1e-3,
    *,
    directions: int | None = None,
) -> Factors:
    """Factors along the top singular vectors of a matrix, all with the same small weight.

    Args:
      matrix: whose singular vectors to start along, shape (m, n): the negative gradient at the
        start, or in matrix factorization the oracle update itself.
      rank: r, at least 1 and at most min(m, n).
      scale: norm of each column of A that is filled, and of each row of B. May be traced.
      directions: how many columns are filled, the others staying 0; `rank` if None.

    Returns:
      `A = scale · [u_1 … u_d 0 …]`, `B = scale · [v_1 … v_d 0 …]ᵀ`: balanced, λ = 0.

    Raises:
      ValueError: for a bad rank, scale or number of directions, or a matrix that is not finite.

    Source: Xu et al. 2025 (arXiv:2503.06982), stated; the exact form is reconstructed.
    """
    check_finite(matrix=matrix)
    check_rank(rank, matrix.shape)
    directions = rank if directions is None else directions
    if not 1 <= directions <= rank:
        raise ValueError(f"directions is {directions}; it must lie in 1 … rank = {rank}.")
    return _spectral(matrix, jnp.asarray(resolve_scale(scale), matrix.dtype), rank, directions)


@functools.partial(jax.jit, static_argnames=("rank", "directions"))
def _spectral(matrix: Array, norm: Array, rank: int, directions: int) -> Factors:
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    mask = (jnp.arange(rank) < directions).astype(matrix.dtype)
    return Factors(norm * u[:, :rank] * mask[None, :], norm * vt[:rank] * mask[:, None])


@judged(rank=at_least(1))
def nystrom(
    key: PRNGKey,
    target: Float[Array, "m n"],
    rank: int,
    scale: float | str | Float[Array, ""] = 1.0,
) -> Factors:
    """Nyström start: A is a random sketch of the target's columns, B = 0.

    Args:
      key: a PRNG key.
      target: the matrix to be approximated, shape (m, n).
      rank: r, at least 1 and at most min(m, n).
      scale: A is `scale · target Ω / √n` with Ω standard Gaussian, so that a column of A has mean
        square norm `scale² ‖target‖_F² / n`. May be traced.

    Returns:
      Factors whose A lies in the target's column space and whose B is 0.

    Raises:
      ValueError: for a bad rank or scale, or a target that is not finite.

    Source: theory section 2.5 (derived): with ScaledGD of step 1 one step is exact if r ≥ rank of
    the target.
    """
    check_finite(target=target)
    check_rank(rank, target.shape)
    return _nystrom(key, target, jnp.asarray(resolve_scale(scale), target.dtype), rank)


@functools.partial(jax.jit, static_argnames="rank")
def _nystrom(key: PRNGKey, target: Array, norm: Array, rank: int) -> Factors:
    n = target.shape[1]
    sketch = jax.random.normal(key, (n, rank), target.dtype) / jnp.sqrt(
        jnp.asarray(n, target.dtype)
    )
    return Factors(norm * (target @ sketch), jnp.zeros((rank, n), target.dtype))


@judged(rank=at_least(1), gamma=POSITIVE, scaling=POSITIVE)
def lora_one(
    gradient: Float[Array, "m n"],
    rank: int,
    *,
    gamma: float | Float[Array, ""] = 1.0,
    scaling: float | Float[Array, ""] = 1.0,
) -> Factors:
    """LoRA-One: the best rank-r step of gradient descent, shared out over both factors.

    Args:
      gradient: G = ∇_W L at the pretrained weight, shape (m, n).
      rank: r, at least 1 and at most min(m, n).
      gamma: the step γ, in the unit of weight per gradient. May be traced.
      scaling: the adapter's factor s (alpha/r, or alpha/√r for rsLoRA).

    Returns:
      `A = √(γ/s) U_r √S_r`, `B = √(γ/s) √S_r V_rᵀ` of −G, so that `s A B = −γ G_r`: the function
      moves by one step at the start. Balanced, λ = 0.

    Raises:
      ValueError: for a bad rank, gamma or scaling, or a gradient that is zero or not finite.

    Source: Zhang et al. 2025 (arXiv:2502.01235), stated; the estimate `‖A B − S‖ ≤ ε ‖S‖` holds for
    linear models with whitened inputs, where −G estimates S at γ = 1.
    """
    check_finite(gradient=gradient)
    check_rank(rank, gradient.shape)
    check_positive(gamma=gamma, scaling=scaling)
    _check_nonzero(gradient)
    u, s, vt = jnp.linalg.svd(-gradient, full_matrices=False)
    root = jnp.sqrt(s[:rank] * jnp.asarray(gamma / scaling, s.dtype))
    return Factors(u[:, :rank] * root[None, :], root[:, None] * vt[:rank])


@judged(rank=at_least(1))
def lora_ga(
    gradient: Float[Array, "m n"],
    rank: int,
    *,
    scale: float | str | Float[Array, ""] | None = None,
) -> Start:
    """LoRA-GA: A along the top r singular directions of the gradient, B along the next r.

    Args:
      gradient: G = ∇_W L at the pretrained weight, shape (m, n).
      rank: r, at least 1 and at most min(m, n)/2.
      scale: norm of A's columns and of B's rows; `n^(1/4)/4`, the paper's default γ = 16, if None.

    Returns:
      A Start with `A = scale · U[:, :r]`, `B = scale · V[:, r:2r]ᵀ` and itself as the offset.

    Raises:
      ValueError: for a rank or scale out of range, or a gradient that is zero or not finite.

    Source: Wang et al. 2024 (arXiv:2407.05000), recalled.
    """
    check_finite(gradient=gradient)
    check_rank(rank, gradient.shape)
    if 2 * rank > min(gradient.shape):
        raise ValueError(
            f"rank is {rank}; LoRA-GA takes 2 · rank singular directions, so for a gradient of "
            f"shape {gradient.shape} it must lie in 1 … {min(gradient.shape) // 2}."
        )
    _check_nonzero(gradient)
    norm = gradient.shape[1] ** 0.25 / 4 if scale is None else resolve_scale(scale)
    norm = jnp.asarray(norm, gradient.dtype)
    u, _, vt = jnp.linalg.svd(gradient, full_matrices=False)
    factors = Factors(norm * u[:, :rank], norm * vt[rank : 2 * rank])
    return Start(factors, factors)


@judged(rank=at_least(1), gamma=POSITIVE, scaling=POSITIVE)
def gora(
    key: PRNGKey,
    gradient: Float[Array, "m n"],
    rank: int,
    scale: float | str | Float[Array, ""] = 1.0,
    *,
    gamma: float | Float[Array, ""] = 1.0,
    scaling: float | Float[Array, ""] = 1.0,
) -> Factors:
    """GoRA's start: A random, and the B whose product is the gradient's step within A's columns.

    Args:
      key: a PRNG key.
      gradient: G = ∇_W L at the pretrained weight, shape (m, n).
      rank: r, at least 1 and at most min(m, n).
      scale: root-mean-square norm of a column of A. May be traced.
      gamma: the step γ, in the unit of weight per gradient. May be traced.
      scaling: the adapter's factor s (alpha/r, or alpha/√r for rsLoRA).

    Returns:
      A with Gaussian entries and `B = −(γ/s) (AᵀA)⁻¹Aᵀ G`, so that `s A B = −γ P G` with P the
      projection on A's columns: no offset, and the function moves at the start. The loss falls to
      first order by `γ ‖P G‖²`, in the mean r/m of what a full step gives.

    Raises:
      ValueError: for a bad rank, scale, gamma or scaling, or a gradient that is zero or not finite.

    Source: He et al. 2025 (arXiv:2502.12171), recalled by theory section 9, which leaves sign and
    scale open: the sign here is the one that descends, and the scale is a step γ as in `lora_one`.
    """
    check_finite(gradient=gradient)
    check_rank(rank, gradient.shape)
    check_positive(gamma=gamma, scaling=scaling)
    _check_nonzero(gradient)
    m, dtype = gradient.shape[0], gradient.dtype
    norm = jnp.asarray(resolve_scale(scale), dtype) / jnp.asarray(m, dtype) ** 0.5
    a = norm * jax.random.normal(key, (m, rank), dtype)
    q, r = jnp.linalg.qr(a)
    b = jax.scipy.linalg.solve_triangular(r, q.T @ gradient)
    return Factors(a, -jnp.asarray(gamma / scaling, dtype) * b)


@judged(rank=at_least(1), outputs=at_least(1))
def eva(
    inputs: Float[Array, "m _"],
    rank: int,
    scale: float | str | Float[Array, ""] = 1.0,
    *,
    outputs: int,
) -> Factors:
    """EVA: A along the directions in which the layer's inputs vary most, B = 0.

    Args:
      inputs: second moment `E[x xᵀ]` of the layer's inputs, symmetric, shape (m, m).
      rank: r, at least 1 and at most min(m, n).
      scale: norm of each column of A. May be traced.
      outputs: n, the number of columns of B.

    Returns:
      Factors with `A = scale · [q_1 … q_r]`, q_i the top eigenvectors, and B = 0.

    Raises:
      ValueError: for a bad rank or scale, or inputs that are zero, not square or not finite.

    Source: Paischer et al. 2024 (arXiv:2410.07170), recalled. The paper also moves ranks between
    layers by explained variance: `ranks.allocate` on the square roots of the eigenvalues.
    """
    if inputs.shape[0] != inputs.shape[1]:
        raise ValueError(f"inputs has shape {inputs.shape}; a second moment must be square.")
    check_finite(inputs=inputs)
    check_rank(rank, (inputs.shape[0], outputs))
    _check_nonzero(inputs, "inputs")
    norm = jnp.asarray(resolve_scale(scale), inputs.dtype)
    _, vectors = jnp.linalg.eigh(inputs)
    return Factors(norm * vectors[:, ::-1][:, :rank], jnp.zeros((rank, outputs), inputs.dtype))


def _check_nonzero(matrix: Array, name: str = "gradient") -> None:
    if not is_traced(matrix) and not any_nonzero(matrix):
        raise ValueError(
            f"{name} is zero everywhere, so it has no direction to start along; estimate it on "
            "data on which the model is not yet at a critical point."
        )
