"""The rank rules that have a name: each public function of this file is one.

A rule takes the singular values of a gradient, shape (..., k) in decreasing order, and by keyword
whatever it needs of these facts:

* `shape`, (m, n) of the gradient; `samples`, how many it is the mean of;
* `halves`, the top singular value of the half-difference over two halves of the data, shape (...);
* `signs`, that of the gradient of the randomly signed losses, shape (...);
* `whitened`, that of the half-difference whitened by the layer's inputs; asking for it, the rule
  gets the singular values of the whitened gradient `C^{−½} G` as well, C = E[x xᵀ].

Every other keyword is an option, with its default. It returns a RankEstimate, or the counts alone.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.factors import check_positive
from lorajax.ranks import estimates
from lorajax.ranks.estimates import RankEstimate, above, edge_margin, noise_constant

Number = float | int


def _over(values: Array, floor: Array, raised: Number) -> RankEstimate:
    floor = floor * (1 + raised) ** 0.5
    return RankEstimate(above(values, floor), values, floor)


def _margin(margin: Number | None, shape: tuple[int, int]) -> Number:
    if margin is not None and margin < 0:
        raise ValueError(f"margin is {margin}; it must be at least 0.")
    return edge_margin(shape) if margin is None else margin


def split_half(
    singular_values: Float[Array, "*batch k"],
    *,
    halves: Float[Array, "*batch"],
    shape: tuple[int, int],
    margin: Number | None = None,
) -> RankEstimate:
    """What stands above the noise that two halves of the data disagree by.

    Args:
      singular_values: of the gradient, in decreasing order.
      halves: top singular value of the half-difference.
      shape: (m, n) of the gradient.
      margin: δ by which floor² is raised; `edge_margin` of the shape if None.

    Returns:
      A RankEstimate.

    Raises:
      ValueError: for a negative margin.

    Source: theory section 3 (derived); see `ranks.split_half`.
    """
    return _over(singular_values, halves, _margin(margin, shape))


def random_signs(
    singular_values: Float[Array, "*batch k"],
    *,
    signs: Float[Array, "*batch"],
    shape: tuple[int, int],
    margin: Number | None = None,
) -> RankEstimate:
    """What stands above the gradient of the randomly signed losses.

    Args:
      singular_values: of the gradient, in decreasing order.
      signs: top singular value of the signed gradient.
      shape: (m, n) of the gradient.
      margin: δ by which floor² is raised; `edge_margin` of the shape if None.

    Returns:
      A RankEstimate.

    Raises:
      ValueError: for a negative margin.

    Source: theory section 3 (derived); see `ranks.random_signs`.
    """
    return _over(singular_values, signs, _margin(margin, shape))


def whitened(
    singular_values: Float[Array, "*batch k"],
    *,
    whitened: Float[Array, "*batch"],
    shape: tuple[int, int],
    margin: Number | None = None,
) -> RankEstimate:
    """What stands above the noise once the gradient is whitened by the layer's inputs.

    Args:
      singular_values: of `C^{−½} G`, in decreasing order.
      whitened: top singular value of the whitened half-difference.
      shape: (m, n) of the gradient.
      margin: δ by which floor² is raised; `edge_margin` of the shape if None.

    Returns:
      A RankEstimate. For inputs of covariance ∝ I it is that of `split_half`; for others it finds
      directions that the noise along strong inputs would hide, and none that strong inputs make up.

    Raises:
      ValueError: for a negative margin.

    Source: Lin 2026, theory section 9 (report read), with the floor of theory section 3 (derived).
    As an allocator over layers it is a null result in small transformers (same report).
    """
    return _over(singular_values, whitened, _margin(margin, shape))


def c_over_n(
    singular_values: Float[Array, "*batch k"],
    *,
    samples: int,
    shape: tuple[int, int],
    constant: Number | None = None,
    noise: Number | None = None,
    margin: Number | None = None,
) -> RankEstimate:
    """The rule `σ² ≥ C/n`, with C given or derived from the labels' noise.

    Args:
      singular_values: of the gradient, in decreasing order.
      samples: n.
      shape: (m, n) of the gradient.
      constant: C.
      noise: standard deviation of the labels' noise, instead of C.
      margin: δ by which floor² is raised; if None `edge_margin` of the shape where C is derived,
        and 0 where it is given.

    Returns:
      A RankEstimate.

    Raises:
      ValueError: unless exactly one of `constant` and `noise` is given, and positive; for a
        negative margin.

    Source: OpenReview gg2Wb2HPOI (stated); C from the noise: theory section 3 (derived).
    """
    if (constant is None) == (noise is None):
        raise ValueError("rule 'c_over_n' needs either constant or noise, and not both.")
    if margin is None and constant is not None:
        margin = 0.0
    raised = _margin(margin, shape)
    c = constant if noise is None else noise_constant(shape, float(noise))
    check_positive(samples=samples, constant=c)
    assert c is not None
    floor = jnp.full(singular_values.shape[:-1], (c / samples) ** 0.5, singular_values.dtype)
    return _over(singular_values, floor, raised)


def energy(singular_values: Float[Array, "*batch k"], *, fraction: Number = 0.9) -> RankEstimate:
    """The smallest rank that holds a fraction of `Σσ²`; it knows no noise.

    Args:
      singular_values: of the gradient, in decreasing order.
      fraction: in (0, 1].

    Returns:
      A RankEstimate with floor 0.

    Raises:
      ValueError: if the fraction is outside (0, 1].
    """
    counts = estimates.energy(singular_values, float(fraction))
    return RankEstimate(counts, singular_values, jnp.zeros_like(singular_values[..., 0]))
