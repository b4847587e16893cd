"""What rank rules are made of: floors, counts above them, and ranks of many layers at once.

The rules that need a noise level take it from theory (`noise_constant`), from two halves of the
data (`split_half`) or from random signs on the per-sample losses (`random_signs`). They act on
spectra and gradients alone, so that a matrix-factorization problem and a ViT layer go through the
same function.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lorajax.environment.judging import FRACTION, NOT_NEGATIVE, at_least, judged
from lorajax.factors import check_finite, check_positive, unfold


class RankEstimate(NamedTuple):
    """A rank with the spectrum and the floor it was read from.

    Attributes:
      rank: number of singular values above the floor, int32.
      singular_values: of the mean gradient, in decreasing order.
      floor: the noise level in the unit of the singular values.
    """

    rank: Int[Array, "*batch"]
    singular_values: Float[Array, "*batch k"]
    floor: Float[Array, "*batch"]


@judged(floor=NOT_NEGATIVE)
def above(
    singular_values: Float[Array, "*batch k"],
    floor: float | Float[Array, ""] | Float[Array, "*batch"],
) -> Int[Array, "*batch"]:
    """Number of singular values at or above a floor.

    Args:
      singular_values: any order, same unit as the floor.
      floor: scalar, or one a batch entry.

    Returns:
      int32 counts, 0 where nothing stands above the floor. A singular value of 0 never does, not
      even above a floor of 0.
    """
    floor = jnp.asarray(floor, singular_values.dtype)
    floor = jnp.broadcast_to(floor, singular_values.shape[:-1])
    counted = (singular_values >= floor[..., None]) & (singular_values > 0)
    return jnp.sum(counted, axis=-1, dtype=jnp.int32)


@judged
def rounding_floor(
    singular_values: Float[Array, "*batch k"], size: int | None = None
) -> Float[Array, "*batch"]:
    """What rounding alone leaves of singular values that are 0: `size · ε · σ_1`.

    Args:
      singular_values: in any order, not negative.
      size: the larger side of the matrix; the number of singular values if None.

    Returns:
      Same dtype, one number a spectrum; 0 for a spectrum of zeros.
    """
    size = singular_values.shape[-1] if size is None else size
    eps = jnp.asarray(size * jnp.finfo(singular_values.dtype).eps, singular_values.dtype)
    # An empty spectrum, of a layer that was given no rank, has nothing to round.
    return eps * jnp.max(singular_values, axis=-1, initial=0)


@judged
def noise_constant(
    shape: tuple[int, int], noise: float | Float[Array, ""], *, margin: float = 0.0
) -> float | Float[Array, ""]:
    """The constant C of the rule `σ_r(G0)² ≥ C/n` for linear regression with known noise.

    Args:
      shape: (m, n_out) of the gradient.
      noise: standard deviation σ of the label noise, in the unit of the labels.
      margin: δ ≥ 0; the floor is raised by the factor √(1 + δ).

    Returns:
      `C = σ² (√m + √n_out)² (1 + δ)`.

    Raises:
      ValueError: if the noise is not positive or the margin negative.

    Source: theory section 3 (derived): G0 = −(S + N) with ‖N‖ ≈ σ(√m + √n_out)/√n for whitened
    inputs. It stops being true where the noise varies by sample; use `split_half` there.
    """
    check_positive(noise=noise)
    if margin < 0:
        raise ValueError(f"margin is {margin}; it must be at least 0.")
    return noise**2 * (shape[0] ** 0.5 + shape[1] ** 0.5) ** 2 * (1.0 + margin)


@judged
def edge_margin(shape: tuple[int, int], width: float | int = 6.0) -> float:
    """How far the top singular value of one noise matrix may exceed that of another by chance.

    The measured floors compare two draws of the same noise: without a signal, the top singular
    value of the gradient is above that of the noise in half of all cases. This is the margin that
    makes it rare.

    Args:
      shape: (m, n) of the gradient.
      width: in units of the edge's fluctuation; 4.6 lets 1 in 100 exceed it, 6.0 about 1 in 1000.

    Returns:
      δ such that `σ_1² > (1 + δ) floor²` is rare: `exp(width · w) − 1` with
      `w = (1/√m + 1/√n)^(1/3) / (√m + √n)`.

    Raises:
      ValueError: if the width is negative.

    Example:
      >>> from lorajax import ranks
      >>> round(ranks.edge_margin((768, 768)), 3), round(ranks.edge_margin((18, 18)), 3)
      (0.046, 0.734)

    Source: w is the scale of the Tracy–Widom law over its mean (Johnstone 2001, recalled); the
    widths are measured, for Gaussian noise of 8×8 to 200×10 (tests/test_ranks.py). It stops being
    right where the noise is dominated by a few samples.
    """
    if width < 0:
        raise ValueError(f"width is {width}; it must be at least 0.")
    m, n = shape
    scale = (m**-0.5 + n**-0.5) ** (1 / 3) / (m**0.5 + n**0.5)
    return math.expm1(width * scale)


TRACY_WIDOM_MEAN = -1.2065335745820
"""Mean of the Tracy–Widom law of real matrices."""


@judged
def edge_mean(shape: tuple[int, int]) -> float:
    """Mean of the top singular value's square of pure noise, in units of `noise_constant`.

    Args:
      shape: (m, n) of the gradient.

    Returns:
      E σ_1² · samples / C without a margin, a little below 1: so much room the rule has by itself.
      `(μ − 1.2065 s)/(√m + √n)²` with `μ = M²`, `s = M (1/√(m−½) + 1/√(n−½))^(1/3)` and
      `M = √(m−½) + √(n−½)`, for Gaussian noise.

    Example:
      >>> from lorajax import ranks
      >>> round(ranks.edge_mean((60, 40)), 3), round(ranks.edge_mean((768, 768)), 3)
      (0.933, 0.99)

    Source: Johnstone 2001, with the centering of Ma 2012 (recalled), whose law differs from that of
    noise by the order min(m, n)^(−2/3) in units of s.
    """
    m, n = shape
    root = (m - 0.5) ** 0.5 + (n - 0.5) ** 0.5
    scale = root * ((m - 0.5) ** -0.5 + (n - 0.5) ** -0.5) ** (1 / 3)
    return (root**2 + TRACY_WIDOM_MEAN * scale) / (m**0.5 + n**0.5) ** 2


@judged(samples=at_least(1))
def c_over_n(
    singular_values: Float[Array, "*batch k"],
    samples: int,
    constant: float | Float[Array, ""],
) -> Int[Array, "*batch"]:
    """The rank rule of the spectral-dynamics paper: `r̂ = max{r : σ_r(G0)² ≥ C/n}`.

    Args:
      singular_values: of the gradient G0 at the pretrained weight, in decreasing order.
      samples: n, the number of samples the gradient is averaged over.
      constant: C; the paper gives none, `noise_constant` derives one.

    Returns:
      int32 rank, 0 where no singular value passes.

    Raises:
      ValueError: if samples or the constant are not positive.

    Source: OpenReview gg2Wb2HPOI, stated.
    """
    check_positive(samples=samples, constant=constant)
    return above(singular_values, jnp.sqrt(jnp.asarray(constant / samples, singular_values.dtype)))


@judged
def split_half(first: Float[Array, "m n"], second: Float[Array, "m n"]) -> RankEstimate:
    """Rank from the gradients of two random halves of the data, no noise level needed.

    The half-difference of the two has the noise of their mean and none of its signal, so its top
    singular value is the floor.

    Args:
      first: mean gradient over one half of the data.
      second: mean gradient over the other, of the same size and shape.

    Returns:
      A RankEstimate: singular values of the mean above the top one of the half-difference.

    Raises:
      ValueError: if the shapes differ or an entry is not finite.

    Source: theory section 3 (derived). Conservative where samples are few.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"second has shape {second.shape}; it must have the shape of first, {first.shape}."
        )
    check_finite(first=first, second=second)
    return random_signs((first + second) / 2, (first - second) / 2)


@judged
def random_signs(gradient: Float[Array, "m n"], signed: Float[Array, "m n"]) -> RankEstimate:
    """Rank from the gradient and the gradient of the randomly signed losses, at full sample size.

    Args:
      gradient: mean gradient of the per-sample losses ℓ_i.
      signed: gradient of the mean of ε_i ℓ_i with independent random signs ε_i; `split_half` is the
        case in which exactly half of the signs are +1.

    Returns:
      A RankEstimate: singular values of the gradient above the top one of the signed gradient, and
      above what rounding leaves of zeros. A gradient of zeros has rank 0.

    Raises:
      ValueError: if the shapes differ or an entry is not finite.

    Source: theory section 3 (derived).
    """
    if gradient.shape != signed.shape:
        raise ValueError(
            f"signed has shape {signed.shape}; it must have the shape of gradient, "
            f"{gradient.shape}."
        )
    check_finite(gradient=gradient, signed=signed)
    values = jnp.linalg.svd(gradient, compute_uv=False)
    floor = jnp.linalg.svd(signed, compute_uv=False)[..., 0]
    floor = jnp.maximum(floor, rounding_floor(values, max(gradient.shape)))
    return RankEstimate(above(values, floor), values, floor)


UNFOLDED_WIDTH = 6.0
"""How far above the floor counts as signal in `split_half_modes`, in widths of `edge_margin`."""


@judged
def split_half_modes(
    first: Float[Array, "..."], second: Float[Array, "..."]
) -> tuple[RankEstimate, ...]:
    """The rank of every mode of a Tucker update, from the unfoldings of two halves' gradients.

    Args:
      first: mean gradient of a tensor over one half of the data, shape (n_1, …, n_p).
      second: mean gradient over the other, of the same size and shape.

    Returns:
      A RankEstimate for each mode. The floor is the top singular value of the half-difference's
      unfolding, raised by `edge_margin`: an unfolding is so wide that the top of the noise that is
      left across the signal hardly falls below the top of another draw of all of it.

    Raises:
      ValueError: if the shapes differ or an entry is not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lorajax import ranks
      >>> signal = jnp.zeros((8, 6, 5)).at[0, 0, 0].set(9.0)
      >>> noise = 0.1 * jax.random.normal(jax.random.key(0), (2, 8, 6, 5))
      >>> halves = signal + noise[0], signal + noise[1]
      >>> [int(mode.rank) for mode in ranks.split_half_modes(*halves)]
      [1, 1, 1]

    Source: theory section 3 (derived), `split_half` mode by mode.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"second has shape {second.shape}; it must have the shape of first, {first.shape}."
        )
    found = []
    for mode in range(first.ndim):
        estimate = split_half(unfold(first, mode), unfold(second, mode))
        n = first.shape[mode]
        margin = edge_margin((n, first.size // n), UNFOLDED_WIDTH)
        floor = (1 + margin) ** 0.5 * estimate.floor
        found.append(
            RankEstimate(above(estimate.singular_values, floor), estimate.singular_values, floor)
        )
    return tuple(found)


@judged(fraction=FRACTION)
def energy(
    singular_values: Float[Array, "*batch k"], fraction: float = 0.9
) -> Int[Array, "*batch"]:
    """Smallest rank whose squared singular values hold a fraction of the total.

    Args:
      singular_values: in decreasing order.
      fraction: in (0, 1].

    Returns:
      int32 rank; 0 for a spectrum of zeros. Singular values within rounding of 0 hold nothing.

    Raises:
      ValueError: if the fraction is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must lie in (0, 1].")
    within = singular_values <= rounding_floor(singular_values)[..., None]
    squares = jnp.where(within, 0, singular_values) ** 2
    tails = jnp.cumsum(squares[..., ::-1], axis=-1)[..., ::-1]
    # Counting tails, not heads, keeps rounding of the large head out of the comparison.
    total = tails[..., :1]
    return jnp.sum(tails > (1 - fraction) * total, axis=-1, dtype=jnp.int32)


@judged
def stable_rank(singular_values: Float[Array, "*batch k"]) -> Float[Array, "*batch"]:
    """Stable rank `Σ σ_i² / σ_1²`, a real number between 0 (for zeros) and the rank.

    Args:
      singular_values: in any order, not negative.

    Returns:
      Same dtype, one number a spectrum.
    """
    squares = singular_values**2
    top = jnp.max(squares, axis=-1)
    return jnp.where(top > 0, jnp.sum(squares, axis=-1) / jnp.where(top > 0, top, 1), 0)


@judged
def effective_rank(singular_values: Float[Array, "*batch k"]) -> Float[Array, "*batch"]:
    """Effective rank `exp(−Σ p ln p)` with `p = σ / Σ σ`, the exponential of a spectrum's entropy.

    Args:
      singular_values: in any order, not negative.

    Returns:
      Same dtype, one number a spectrum: between 1 (one direction) and their count (all equal), 0
      for zeros.

    Source: Roy, Vetterli 2007, recalled; RaLoRA's measure of a gradient, theory section 9.
    """
    total = jnp.sum(singular_values, axis=-1, keepdims=True)
    share = singular_values / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)


@judged(budget=at_least(0))
def allocate(
    spectra: Mapping[str, Float[Array, " k"]],
    costs: Mapping[str, int],
    budget: int,
    *,
    floors: Mapping[str, float | Float[Array, ""]] | None = None,
    first: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Ranks over layers that capture the most spectral energy within a budget of parameters.

    Directions are taken in the order of `σ² / cost`, each layer's own in the order of its singular
    values, until the next one would exceed the budget; cheaper ones behind it may still fit.

    Args:
      spectra: singular values of each layer in decreasing order, all in the same unit.
      costs: parameters that one rank costs, m + n of the layer.
      budget: parameters in all, at least 0.
      floors: noise level of each layer; directions below it, or within rounding of 0, are left
        out.
      first: how many of each layer's directions are taken before all others.

    Returns:
      A rank of 0 or more for each layer.

    Raises:
      ValueError: for a negative budget, a spectrum that is not finite or not decreasing, a cost
        that is not positive, or layers that differ between the arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> from lorajax import ranks
      >>> spectra = {"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 0.5])}
      >>> ranks.allocate(spectra, {"a": 10, "b": 10}, budget=20)
      {'a': 1, 'b': 1}

    Source: derived. The greedy choice is optimal where all costs are equal; otherwise it is short
    of the optimum by at most the energy of one direction, as for every knapsack of this kind.
    """
    if budget < 0:
        raise ValueError(f"budget is {budget}; it must be at least 0.")
    given = {"costs": costs, "floors": floors, "first": first}
    for name, other in ((name, each) for name, each in given.items() if each is not None):
        if missing := sorted(set(spectra) ^ set(other)):
            raise ValueError(f"{name} and spectra differ in the layer {missing[0]!r}.")
    candidates = []
    for order, (layer, values) in enumerate(spectra.items()):
        check_finite(**{f"the spectrum of {layer!r}": values})
        check_positive(**{f"the cost of {layer!r}": costs[layer]})
        numbers = np.asarray(values, np.float64)
        if np.any(np.diff(numbers) > 0):
            raise ValueError(f"the spectrum of {layer!r} increases; it must be sorted.")
        floor = 0.0 if floors is None else float(floors[layer])
        rounding = float(rounding_floor(jnp.asarray(values)))
        for index, value in enumerate(numbers):
            if value > rounding and value >= floor:
                behind = first is not None and index >= first[layer]
                candidates.append((behind, -(value**2) / costs[layer], order, index, layer))
    chosen = dict.fromkeys(spectra, 0)
    left = budget
    for *_, index, layer in sorted(candidates):
        # A direction only counts behind the stronger ones of its own layer.
        if chosen[layer] == index and costs[layer] <= left:
            chosen[layer] += 1
            left -= costs[layer]
    return chosen
