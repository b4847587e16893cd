"""One mode of a Tucker update: the depth law, its solution, and the delay that it means."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lorajax.environment.judging import POSITIVE, at_least, judged
from lorajax.laws.base import Real, broadcast


def _check_modes(modes: int) -> None:
    if isinstance(modes, bool) or not isinstance(modes, int) or modes < 1:
        raise ValueError(f"modes is {modes!r}; it must be an integer of at least 1.")


@judged(modes=at_least(1))
def tucker_rate(value: Real, s: Real, modes: int, *, power: float = 1.0) -> Float[Array, "..."]:
    """The depth law: `σ̇ = (p + 1) σ^{2 − 2/(p+1)} (s − σ)` of an aligned, balanced mode.

    Args:
      value: σ ≥ 0.
      s: the target's singular value.
      modes: p, the number of tensor modes; p + 1 factors (the core is one) share the growth.
      power: the law's factor 1 of the exponent.

    Returns:
      dσ/dt. p = 1 is the logistic equation of a matrix with balanced factors.

    Raises:
      ValueError: if modes is not a positive integer.

    Source: theory section 3 (derived).
    """
    _check_modes(modes)
    value, s = broadcast(value, s)
    return (modes + 1) * value ** (power * 2 * modes / (modes + 1)) * (s - value)


@judged(modes=at_least(1))
def tucker_time(value: Real, s: Real, start: Real, modes: int) -> Float[Array, "..."]:
    """Time at which an aligned, balanced mode of a Tucker update reaches a value, in closed form.

    Args:
      value: σ in (0, s).
      s: the target's singular value.
      start: σ0 in (0, s), the mode's value at t = 0.
      modes: p, the number of tensor modes.

    Returns:
      t in 1/s^{2 − 2/(p+1)}, negative where σ < σ0.

    Raises:
      ValueError: if modes is not a positive integer.

    Source: derived here from the depth law (theory section 3). With N = p + 1 and q = (σ/s)^{1/N},
    `s^{2−2/N} t = ∫ dq / (q^{N−1} (1 − q^N))`: a power of q and, by partial fractions over the N-th
    roots of unity, logarithms.
    """
    _check_modes(modes)
    value, s, start = broadcast(value, s, start)
    count = modes + 1
    ends = (value / s) ** (1 / count), (start / s) ** (1 / count)
    grown = _antiderivative(ends[0], count) - _antiderivative(ends[1], count)
    return grown / s ** (2 * modes / count)


def _antiderivative(q: Array, count: int) -> Array:
    """`∫ dq / (q^{N−1} (1 − q^N))` = power + `∫ q/(1 − q^N) dq`, N = `count`."""
    power = jnp.log(q) if count == 2 else -(q ** (2 - count)) / (count - 2)
    total = power
    for j in range(count):
        angle = 2 * math.pi * j / count
        # ln(1 − ωq) by parts; the j = 0 term is the approach to the target.
        real, imaginary = 1 - math.cos(angle) * q, -math.sin(angle) * q
        log = 0.5 * jnp.log(real**2 + imaginary**2)
        turn = jnp.arctan2(imaginary, real)
        total = total - (math.cos(2 * angle) * log + math.sin(2 * angle) * turn) / count
    return total


@judged(modes=at_least(1))
def tucker_mode(times: Real, s: Real, start: Real, modes: int) -> Float[Array, "..."]:
    """An aligned, balanced mode of a Tucker update over time: the inverse of `tucker_time`.

    Args:
      times: t ≥ 0.
      s: the target's singular value.
      start: σ0 in (0, s); a start of scale a in every factor and the core has σ0 = a^{p+1}.
      modes: p, the number of tensor modes.

    Returns:
      σ(t), broadcast over the arguments, to the dtype's rounding relative to s: the closed form of
      the time is inverted by bisection.

    Raises:
      ValueError: if modes is not a positive integer.

    Source: theory section 3 (derived): σ̇ = (p + 1) σ^{2 − 2/(p+1)} (s − σ).
    """
    _check_modes(modes)
    times, s, start = broadcast(times, s, start)
    times, s, start = (x.astype(jnp.result_type(times, s, start)) for x in (times, s, start))
    count = modes + 1
    target = times * s ** (2 * modes / count)
    low = (start / s) ** (1 / count)
    begin = _antiderivative(low, count)

    def halve(_, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = ends
        middle = (below + above) / 2
        early = _antiderivative(middle, count) - begin < target
        return jnp.where(early, middle, below), jnp.where(early, above, middle)

    steps = jnp.finfo(low.dtype).nmant + 4
    low, high = jax.lax.fori_loop(0, steps, halve, (low, jnp.ones_like(low)))
    return s * ((low + high) / 2) ** count


@judged(scale=POSITIVE, modes=at_least(1))
def tucker_half_time(s: Real, scale: Real, modes: int) -> Float[Array, "..."]:
    """Time at which a mode that starts with `scale` in every factor and the core reaches s/2.

    Args:
      s: the target's singular value.
      scale: a with a^{p+1} < s/2.
      modes: p, at least 2; for p = 1 see `half_time`.

    Returns:
      The half-time: for a → 0 it grows as `a^{1−p} / ((p − 1) s)`, a power of the scale where a
      matrix has its logarithm.

    Raises:
      ValueError: if modes is not a positive integer.

    Source: theory section 3 (derived).
    """
    s, scale = broadcast(s, scale)
    return tucker_time(s / 2, s, scale ** (modes + 1), modes)


@judged(modes=at_least(1))
def tucker_delay_exponent(modes: int, *, order: float = 1.0) -> float:
    """Power of 1/scale at which the delay of small Tucker factors grows: p − 1.

    Args:
      modes: p, the number of tensor modes.
      order: the law's constant 1 in p − 1.

    Returns:
      The exponent; 0 for p = 1, where the delay is a logarithm.

    Raises:
      ValueError: if modes is not a positive integer.

    Source: theory section 3 (derived); the limit of `tucker_half_time`.
    """
    _check_modes(modes)
    return modes - order
