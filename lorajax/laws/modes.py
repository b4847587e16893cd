"""Modes of the quadratic loss `½‖S − AB‖²`: exact solutions, limits, and a law under test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lorajax.environment.judging import FRACTION, POSITIVE, judged
from lorajax.factors import Factors, any_nonzero, is_traced
from lorajax.laws.base import Real, broadcast, mode_law
from lorajax.problems import MatrixFactorization


@judged
@jax.jit
def logistic(times: Real, s: Real, start: Real, *, rate: Real = 2.0) -> Float[Array, "..."]:
    """A mode of a balanced start (λ = 0): `σ(t) = s / (1 + (s/σ0 − 1) e^{−2st})`.

    Args:
      times: t ≥ 0.
      s: the target's singular value.
      start: σ0 > 0, the mode's singular value at t = 0.
      rate: the law's constant 2: the approach has the rate `rate · s`.

    Returns:
      σ(t), broadcast over the arguments.

    Source: theory section 2.2 (derived; Saxe et al. 2014).
    """
    times, s, start = broadcast(times, s, start)
    decay = jnp.exp(-rate * s * times)
    # Multiplied through by σ0, so that a tiny σ0 does not overflow s/σ0.
    return s * start / (start * (1 - decay) + s * decay)


@judged
@jax.jit
def balanced_mode(times: Real, s: Real, a: Real, b: Real) -> Float[Array, "..."]:
    """One mode from aligned factors a and b: the solution of `σ̇ = √(λ² + 4σ²)(s − σ)`.

    Args:
      times: t ≥ 0.
      s: the target's singular value, not negative.
      a: the left factor's amplitude along the mode at t = 0.
      b: the right factor's; λ = a² − b², σ(0) = a b.

    Returns:
      σ(t), broadcast over the arguments. `b = a` is `logistic`, `b = 0` is `lora_mode`, and `s = 0`
      is the decay of a superfluous direction.

    Source: theory sections 2.1, 2.2 (derived): q(t) = e^{Ft} q(0) / √(1 + q(0)ᵀ∫e^{2Fτ}dτ q(0)) in
    two dimensions, multiplied through by e^{−2κt} against overflow.
    """
    times, s, a, b = broadcast(times, s, a, b)
    half = (a**2 - b**2) / 2
    kappa = jnp.sqrt(s**2 + half**2)
    safe = jnp.where(kappa == 0, 1, kappa)
    decay = jnp.exp(-2 * kappa * times)
    cosh = (1 + decay) / 2
    sinh = jnp.where(kappa == 0, times, -jnp.expm1(-2 * kappa * times) / (2 * safe))
    f_a, f_b = half * a + s * b, s * a - half * b
    growth = cosh * sinh * (a**2 + b**2) + sinh**2 * (a * f_a + b * f_b)
    return (cosh * a + sinh * f_a) * (cosh * b + sinh * f_b) / (decay + growth)


@judged
def lora_mode(times: Real, s: Real, a: Real, *, square: float = 1.0) -> Float[Array, "..."]:
    """A mode of LoRA's default start, B = 0: exact at every scale from lazy to rich.

    Args:
      times: t ≥ 0.
      s: the target's singular value.
      a: |Aᵀu|, the start's amplitude along the left singular vector u (for several modes the
        deflated amplitude; see `deflated_amplitudes`).
      square: the law's factor 1 of a².

    Returns:
      σ(t), broadcast over the arguments.

    Source: theory section 2.2 (derived).
    """
    a = square**0.5 * jnp.asarray(a)
    return balanced_mode(times, s, a, jnp.zeros_like(a))


@judged
@jax.jit
def lazy(times: Real, s: Real, a: Real, *, rate: Real = 1.0) -> Float[Array, "..."]:
    """Lazy limit of `lora_mode`, a² ≫ s: `s (1 − e^{−a²t})`.

    Args:
      times: t ≥ 0.
      s: the target's singular value.
      a: |Aᵀu|, the start's amplitude.
      rate: the law's constant 1: the approach has the rate `rate · a²`.

    Returns:
      σ(t), broadcast over the arguments.

    Source: theory section 2.2 (derived). Relative error of order s²/a⁴.
    """
    times, s, a = broadcast(times, s, a)
    return -s * jnp.expm1(-rate * a**2 * times)


@judged
@jax.jit
def tanh_squared(times: Real, s: Real, *, rate: Real = 2**-0.5) -> Float[Array, "..."]:
    """The law of the spectral-dynamics paper, `σ(t) ≈ s tanh²(s t/√2)`: a law under test.

    Args:
      times: t ≥ 0.
      s: the target's singular value.
      rate: the law's constant 1/√2 in the argument `rate · s t` of tanh².

    Returns:
      The stated σ(t). It does not depend on the start and it solves σ̇ = √2 √(sσ)(s − σ), which is
      not the flow of the stated loss: claim `spectral_dynamics.tanh_squared` reports by how much.

    Source: OpenReview gg2Wb2HPOI, stated.
    """
    times, s = broadcast(times, s)
    return s * jnp.tanh(rate * s * times) ** 2


@judged
@jax.jit
def half_time(s: Real, a: Real, *, slope: Real = 0.5) -> Float[Array, "..."]:
    """Time at which a mode of LoRA's default start, B = 0, reaches s/2.

    Args:
      s: the target's singular value.
      a: the (deflated) amplitude |Aᵀu|, any a > 0.
      slope: the law's constant ½ before `ln E/κ`.

    Returns:
      `ln E/(2κ)` in 1/s, with κ = √(s² + a⁴/4), h = a²/2κ and
      `E = [1 + h² + √((1 + h²)² + h²(1 − h²))] / (h(1 + h))`: `ln(4s/a²)/(2s)` in the rich limit
      a² ≪ s, `ln 2/a²` in the lazy one.

    Source: derived here from theory section 2.2: `lora_mode` = s/2 is quadratic in E = e^{2κt}.
    """
    s, a = broadcast(s, a)
    kappa = jnp.sqrt(s**2 + a**4 / 4)
    h = a**2 / (2 * kappa)
    even = 1 + h**2
    growth = (even + jnp.sqrt(even**2 + h**2 * (1 - h**2))) / (h * (1 + h))
    return jnp.asarray(slope * jnp.log(growth) / kappa)


@judged
@functools.partial(jax.jit, static_argnames="deflate")
def deflated_amplitudes(
    problem: MatrixFactorization, factors: Factors, *, deflate: bool = True
) -> Float[Array, " q"]:
    """Amplitude that each mode really starts from, once the modes before it are learned.

    Args:
      problem: matrix factorization with distinct singular values, rank k.
      factors: a LoRA start (B = 0) of rank r.
      deflate: False gives |Aᵀu_i| instead.

    Returns:
      `a_i = |R_ii|` of `AᵀU = Q R`, U's columns in order of decreasing s: shape (min(k, r),).
      Taking |Aᵀu_i| instead is wrong for all modes but the first.

    Source: theory section 2.3 (derived).
    """
    projected = factors.a.T @ problem.u
    if not deflate:
        return jnp.linalg.norm(projected, axis=0)[: factors.rank]
    return jnp.abs(jnp.diagonal(jnp.linalg.qr(projected, mode="r")))


def _check_lora_start(problem: MatrixFactorization, factors: Factors) -> None:
    """Raises ValueError where the law of a LoRA start is out of its range."""
    if not is_traced(factors.b) and any_nonzero(factors.b):
        size = float(jnp.max(jnp.abs(factors.b)))
        raise ValueError(
            f"factors.b has entries up to {size:.3g}; this law is of starts with B = 0, "
            "see `logistic_modes` for others."
        )
    if not is_traced(problem.singular_values):
        s = np.asarray(problem.singular_values)
        if np.any(np.diff(s) == 0):
            raise ValueError(
                f"singular_values are {s}; this law needs distinct ones, as equal ones turn "
                "into each other."
            )


@mode_law("lora")
@judged
def lora_modes(
    problem: MatrixFactorization,
    factors: Factors,
    times: Float[Array, " t"],
    *,
    deflate: bool = True,
    square: float = 1.0,
) -> Float[Array, "t q"]:
    """All modes of a small LoRA start: `lora_mode` of each deflated amplitude.

    Args:
      problem: matrix factorization with distinct singular values, rank k.
      factors: a LoRA start (B = 0) of rank r.
      times: shape (t,).
      deflate: as in `deflated_amplitudes`.
      square: as in `lora_mode`.

    Returns:
      Shape (t, min(k, r)): the top modes, largest first; with r < k the others are never learned.

    Raises:
      ValueError: for B ≠ 0 or equal singular values, where these are concrete.

    Source: theory section 2.3 (derived). The sup error is of the order
    `max_i (a_i²/4s_i)^{1 − s_{i+1}/s_i}` times a constant of the draw, often above 1: over 24
    draws of 60×40, 0.8 % at most for the spectrum 4, 2, 1 at std 1e-2 and 38 % at 0.1; 8 % for
    2^{−i} and 6 % for a power law at 1e-2; up to 59 % for 2 and 1.999. It fails for std above about
    0.3 √s.
    """
    _check_lora_start(problem, factors)
    amplitudes = deflated_amplitudes(problem, factors, deflate=deflate)
    s = problem.singular_values[: amplitudes.shape[0]]
    return lora_mode(times[:, None], s[None, :], amplitudes[None, :], square=square)


@mode_law("logistic")
@judged
def logistic_modes(
    problem: MatrixFactorization, factors: Factors, times: Float[Array, " t"]
) -> Float[Array, "t q"]:
    """The logistic law of every mode: from u_iᵀABv_i, or the rich limit σ0 = a_i²/4 where B = 0.

    Args:
      problem: matrix factorization with distinct singular values, rank k.
      factors: a start of rank r.
      times: shape (t,).

    Returns:
      Shape (t, min(k, r)).

    Source: theory section 2.2 (derived); exact for spectral starts, a rich limit for LoRA's.
    """
    amplitudes = deflated_amplitudes(problem, factors)
    count = amplitudes.shape[0]
    inner = jnp.abs(jnp.sum((problem.u.T @ factors.a) * (factors.b @ problem.v).T, axis=1))
    start = jnp.where(jnp.any(factors.b), inner[:count], amplitudes**2 / 4)
    return logistic(times[:, None], problem.singular_values[None, :count], start[None, :])


@mode_law("lazy")
@judged
def lazy_modes(
    problem: MatrixFactorization, factors: Factors, times: Float[Array, " t"]
) -> Float[Array, "t q"]:
    """The lazy law of every mode of a LoRA start, amplitudes deflated; shape (t, min(k, r)).

    Raises:
      ValueError: as `lora_modes`.

    Source: as `lazy`.
    """
    _check_lora_start(problem, factors)
    amplitudes = deflated_amplitudes(problem, factors)
    s = problem.singular_values[None, : amplitudes.shape[0]]
    return lazy(times[:, None], s, amplitudes[None, :])


@mode_law("tanh_squared")
@judged
def tanh_squared_modes(
    problem: MatrixFactorization, factors: Factors, times: Float[Array, " t"]
) -> Float[Array, "t q"]:
    """`tanh_squared` of every mode that the rank allows; shape (t, min(k, r)).

    Source: as `tanh_squared`.
    """
    return tanh_squared(times[:, None], problem.singular_values[None, : factors.rank])


@judged
@jax.jit
def superfluous(
    times: Real, start: Real, level: Real = 0.0, *, rate: Real = 2.0
) -> Float[Array, "..."]:
    """Decay of a direction without a target: the solution of `ṁ = −√(λ² + 4m²) m`.

    Args:
      times: t ≥ 0.
      start: m0 > 0, its singular value at t = 0.
      level: λ of the direction; 0 when balanced.
      rate: the law's constant 2: `ṁ = −rate √(λ²/4 + m²) m`.

    Returns:
      `m0/(1 + 2 m0 t)` for λ = 0, else `(|λ|/2) / sinh(|λ| t + asinh(|λ|/2m0))`.

    Source: theory section 2.4; the closed form for λ ≠ 0 is derived here by m = (λ/2)/sinh θ, θ̇ =
    λ.
    """
    times, start, level = broadcast(times, start, level)
    level, passed = jnp.abs(level), rate * times
    safe = jnp.where(level == 0, 1, level)
    angle = safe * passed / 2 + jnp.arcsinh(safe / (2 * start))
    # exp(−θ) form: sinh overflows where the direction is long gone.
    unbalanced = safe * jnp.exp(-angle) / -jnp.expm1(-2 * angle)
    return jnp.where(level == 0, start / (1 + start * passed), unbalanced)


@judged
@jax.jit
def spectral_flow(times: Real, s: Real, start: Real, *, speed: Real = 1.0) -> Float[Array, "..."]:
    """A mode under spectral gradient flow (Muon): `min((√σ0 + t)², s)`.

    Args:
      times: t ≥ 0, in √s.
      s: the target's singular value.
      start: σ0 ≥ 0.
      speed: the law's constant 1, at which √σ grows.

    Returns:
      σ(t): smaller targets are reached first.

    Source: theory section 2.5 (derived).
    """
    times, s, start = broadcast(times, s, start)
    return jnp.minimum((jnp.sqrt(start) + speed * times) ** 2, s)


@judged(fraction=FRACTION)
def spectral_hit_time(
    s: Real, start: Real, fraction: float = 0.95, *, speed: Real = 1.0
) -> Float[Array, "..."]:
    """Time at which `spectral_flow` reaches a fraction of s: `√(fraction · s) − √σ0`.

    Args:
      s: the target's singular value.
      start: σ0 ≥ 0.
      fraction: in (0, 1].
      speed: as in `spectral_flow`.

    Returns:
      The time, in √s.

    Source: as `spectral_flow`.
    """
    s, start = broadcast(s, start)
    return (jnp.sqrt(fraction * s) - jnp.sqrt(start)) / speed


@judged(ratio=POSITIVE)
def lora_plus_equivalent(
    times: Real, a: Real, ratio: Real, *, exponent: float = 0.5
) -> tuple[Array, Array]:
    """LoRA+ with ratio ρ as plain flow: time times √ρ, amplitude of A times ρ^{1/4}.

    Args:
      times: t of the LoRA+ flow.
      a: amplitude of its start, or all of A.
      ratio: ρ.
      exponent: the law's constant ½, ρ's power in the time.

    Returns:
      Time and amplitude of the plain flow with the same products, each broadcast against ρ.

    Source: theory section 2.5 (derived).
    """
    (times, of_times), (a, of_a) = broadcast(times, ratio), broadcast(a, ratio)
    return of_times**exponent * times, of_a**0.25 * a
