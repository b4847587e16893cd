"""Laws of one line: curvatures of saddles, shares of projections, gaps of blends."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lorajax.environment.judging import POSITIVE, is_traced, judged
from lorajax.laws.base import Real, broadcast


@judged
def saddle_curvature(
    singular_values: Float[Array, " k"], kept: Bool[Array, " k"], *, constant: float = 1.0
) -> Float[Array, ""]:
    """The lowest curvature of `½‖S − AB‖²` at a balanced critical point with AB a part of S.

    Args:
      singular_values: of S, all different.
      kept: which of its modes AB is made of, as many as the rank.
      constant: the law's factor 1.

    Returns:
      The least eigenvalue of the Hessian, `min(0, s_kept − s_left)` with the least of those kept
      and the largest of those left out: negative, a saddle, unless the top modes are kept. The zero
      is of the directions (A R, R⁻¹B), along which nothing changes.

    Raises:
      ValueError: for arrays of different lengths, or values no mode of which is kept.

    Source: theory section 1 (derived): along `u_left e_kᵀ` and `e_k v_leftᵀ` at once the loss bends
    by s_kept − s_left.
    """
    kept = jnp.asarray(kept)
    if kept.shape != singular_values.shape:
        raise ValueError(
            f"kept has shape {kept.shape}; singular_values have {singular_values.shape}, and both "
            "must be the same."
        )
    if not is_traced(kept) and not bool(kept.any()):
        raise ValueError("kept names no mode; at AB = 0 another law holds, so name at least one.")
    low = jnp.min(jnp.where(kept, singular_values, jnp.inf))
    high = jnp.max(jnp.where(kept, 0, singular_values))
    return constant * jnp.minimum(0, low - high)


@judged(rank=POSITIVE, inputs=POSITIVE)
def projected_share(rank: Real, inputs: Real, *, constant: float = 1.0) -> Float[Array, "..."]:
    """The share of a gradient's energy within the columns of a random A: `r/m` in the mean.

    Args:
      rank: r.
      inputs: m, the rows of A.
      constant: the law's factor 1.

    Returns:
      E ‖P G‖²/‖G‖² with P the projection on the columns of a Gaussian A, for any G.

    Source: derived here: E P = (r/m) I, as no direction is singled out. GoRA's start
    (arXiv:2502.12171; theory section 9) takes the step −γ P G.
    """
    rank, inputs = broadcast(rank, inputs)
    return constant * rank / inputs


@judged
def guidance_gap(second: Real, gamma: Real, *, constant: float = 0.5) -> Float[Array, "..."]:
    """What a blend of weights differs by from the blend of outputs: `½ γ (γ − 1) f''`.

    Args:
      second: `D²f[Δ, Δ]`, the outputs' second derivative along the update.
      gamma: γ, the share of the adapter.
      constant: the law's factor ½.

    Returns:
      `f(W + γΔ) − [f(W) + γ (f(W + Δ) − f(W))]` up to third order in Δ; 0 for γ of 0 or 1 and for
      outputs that are linear in the weight.

    Source: derived here (Taylor). AutoLoRA guidance, theory section 9 (recalled), blends outputs.
    """
    second, gamma = broadcast(second, gamma)
    return constant * gamma * (gamma - 1) * second
