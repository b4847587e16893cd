"""Intruders: when an update puts a new singular direction on top of a weight's own.

`W + θ u vᵀ` with u and v generic has a singular value outside W's bulk iff θ is above a threshold,
which the spectrum of W alone says (Benaych-Georges, Nadakuditi 2012). What the spectrum enters by
is `D(z) = φ(z) (c φ(z) + (1 − c)/z)`, `φ(z) = mean z/(z² − t²)` over W's singular values t, and
c ≤ 1 the ratio of the shape's sides.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import brentq

from lorajax.environment.judging import is_traced, judged

Values = Any
"""Singular values, shape (k,), an array or a sequence of numbers, k the shorter side."""


def _checked(singular_values: Values, shape: Sequence[int]) -> tuple[np.ndarray, float]:
    if is_traced(singular_values):
        raise ValueError(
            "singular_values are being traced, and the equation for them is solved on the host; "
            "call this outside of jit, vmap and grad."
        )
    if np.iscomplexobj(singular_values):
        raise ValueError("singular_values are complex; they must be real numbers.")
    values = np.sort(np.asarray(singular_values, np.float64))[::-1]
    short, long = sorted(shape)
    if values.shape != (short,):
        raise ValueError(
            f"singular_values have shape {values.shape}; a matrix of shape {tuple(shape)} has "
            f"{short} of them, zeros included."
        )
    if not np.all(np.isfinite(values)) or values[-1] < 0 or not values[0] > 0:
        raise ValueError(
            "singular_values must be finite, none negative, and at least one positive."
        )
    return values, short / long


def _transform(z: float, values: np.ndarray, c: float, count: int) -> tuple[float, float, float]:
    """D, its derivative and φ at z, of `count` singular values in all."""
    phi = float(np.sum(z / (z**2 - values**2))) / count
    slope = -float(np.sum((z**2 + values**2) / (z**2 - values**2) ** 2)) / count
    other = c * phi + (1 - c) / z
    return phi * other, slope * other + phi * (c * slope - (1 - c) / z**2), phi


@judged
def intruder_threshold(singular_values: Values, shape: Sequence[int]) -> float:
    """The strength above which an update's direction leaves the bulk of a weight: `1/√D(b⁺)`.

    Args:
      singular_values: all of W's, shape (min(m, n),).
      shape: (m, n) of W.

    Returns:
      θ in the unit of W. The edge b is W's largest singular value, and D there is taken over the
      others: the limit of large matrices has no atom at its edge.

    Raises:
      ValueError: for values that no matrix of this shape has.

    Source: Benaych-Georges, Nadakuditi 2012 (arXiv:1103.2221), recalled; theory section 9. For
    large Gaussian matrices `laws.gaussian_threshold`; of a single 200×400 one within about 11 %
    (one standard deviation), because the gap below the largest value is random, and 2 % too high in
    the mean. Where W's largest value stands far above the rest, an update must exceed it.
    """
    values, c = _checked(singular_values, shape)
    below = values[1:][values[1:] < values[0]]
    if not below.size:
        return 0.0
    return _transform(float(values[0]), below, c, len(values))[0] ** -0.5


@judged
def intruder_value(
    singular_values: Values, shape: Sequence[int], strength: float, *, power: float = 2.0
) -> float:
    """The top singular value of `W + θ u vᵀ`: where `D(z) = 1/θ²`, above all of W's.

    Args:
      singular_values: all of W's, shape (min(m, n),).
      shape: (m, n) of W.
      strength: θ > 0, in the unit of W.
      power: the law's constant 2.

    Returns:
      z in the unit of W; below the threshold just above W's largest value.

    Raises:
      ValueError: for a strength that is not positive, or values that no such matrix has.

    Source: as `intruder_threshold`; u and v are uniformly random, independent of W and of one
    another, and what is left out is of order 1/√n for a single pair.
    """
    values, c = _checked(singular_values, shape)
    if not 0 < strength < float("inf"):
        raise ValueError(f"strength is {strength}; it must be positive and finite.")
    goal, top = strength**-power, float(values[0])
    high = 2 * (top + strength)  # the sum alone bounds the norm; twice of it, rounding as well
    low = top * (1 + 1e-13)
    if _transform(low, values, c, len(values))[0] < goal:
        return low
    find = lambda z: _transform(z, values, c, len(values))[0] - goal  # noqa: E731
    found: Any = brentq(find, low, high, xtol=1e-13 * top)
    return float(found)


@judged
def intruder_overlaps(
    singular_values: Values, shape: Sequence[int], strength: float, *, constant: float = 2.0
) -> tuple[float, float]:
    """How much of u and of v the top singular vectors of `W + θ u vᵀ` have.

    Args:
      singular_values: all of W's, shape (min(m, n),).
      shape: (m, n) of W.
      strength: θ > 0, in the unit of W.
      constant: the law's constant 2.

    Returns:
      Squared cosines for the shorter side and for the longer one, `−2 φ(z)/(θ² D'(z))` and
      `−2 (c φ(z) + (1 − c)/z)/(θ² D'(z))`. Below the threshold of the order of 1/(2k) for k values,
      as much as chance gives any direction: 0 in the limit of large matrices.

    Raises:
      ValueError: as `intruder_value`.

    Source: as `intruder_threshold`.
    """
    z = intruder_value(singular_values, shape, strength)
    values, c = _checked(singular_values, shape)
    _, slope, phi = _transform(z, values, c, len(values))
    scale = -constant / (strength**2 * slope)
    return scale * phi, scale * (c * phi + (1 - c) / z)
