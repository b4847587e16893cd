"""Intruders of a Gaussian weight: when an update of rank one stands out of it, and how far.

W is n×m with n ≤ m and entries of variance 1/m, so that its singular values fill 1 ± √c, c = n/m;
`W + θ u vᵀ` with unit u and v. For any other spectrum: `lorajax.ranks.intruders`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import judged
from lorajax.laws.base import Real, broadcast


def _ratio(c: Array) -> Array:
    return jnp.where((c > 0) & (c <= 1), c, jnp.nan)


@judged
def gaussian_threshold(
    c: Real, *, exponent: float = 0.25, constant: float = 1.0
) -> Float[Array, "..."]:
    """The strength θ above which a direction stands out: `c^{1/4}`.

    Args:
      c: n/m in (0, 1].
      exponent: the law's constant ¼.
      constant: its factor 1.

    Returns:
      θ, in the unit in which entries have variance 1/m; NaN for another c.

    Source: Benaych-Georges, Nadakuditi 2012 (arXiv:1103.2221), recalled; theory section 9.
    """
    return constant * _ratio(jnp.asarray(c)) ** exponent


@judged
def gaussian_intruder(strength: Real, c: Real, *, constant: float = 1.0) -> Float[Array, "..."]:
    """The top singular value: `√((1 + θ²)(c + θ²))/θ` above the threshold, else the edge.

    Args:
      strength: θ.
      c: n/m in (0, 1].
      constant: the law's factor 1 of θ.

    Returns:
      The value; up to `gaussian_threshold` the edge 1 + √c. NaN for another c.

    Source: as `gaussian_threshold`.
    """
    strength, c = broadcast(strength, c)
    c = _ratio(c)
    out = constant * strength > c**0.25
    strength = jnp.where(out, constant * strength, 1)
    value = jnp.sqrt((1 + strength**2) * (c + strength**2)) / strength
    return jnp.where(out, value, 1 + jnp.sqrt(c))


@judged
def gaussian_intruder_overlap(
    strength: Real, c: Real, *, constant: float = 1.0
) -> Float[Array, "..."]:
    """Squared cosine of the top left singular vector with u: `1 − c(1 + θ²)/(θ²(θ² + c))`.

    Args:
      strength: θ.
      c: n/m in (0, 1].
      constant: the law's factor 1 of θ.

    Returns:
      In [0, 1); u is on the shorter side, of n entries. Up to `gaussian_threshold` it is 0, the
      limit of large matrices. NaN for another c.

    Source: as `gaussian_threshold`.
    """
    strength, c = broadcast(strength, c)
    c = _ratio(c)
    out = constant * strength > c**0.25
    strength = jnp.where(out, constant * strength, 1)
    overlap = 1 - c * (1 + strength**2) / (strength**2 * (strength**2 + c))
    return jnp.where(out, overlap, jnp.where(jnp.isnan(c), c, 0))
