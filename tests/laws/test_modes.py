import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from lorajax import laws

TIMES = np.linspace(0.0, 6.0, 61)


def integrate(rate, start):
    """An independent solution of a scalar equation."""
    solution = scipy.integrate.solve_ivp(
        lambda _, y: rate(y), (0, TIMES[-1]), [start], "DOP853", TIMES, rtol=1e-12, atol=1e-15
    )
    return solution.y[0]


# Each law with the equation it must solve, and its start.
S, A, B, LEVEL = 1.5, 0.3, 0.1, 0.3**2 - 0.1**2
EQUATIONS = {
    "logistic": (lambda t: laws.logistic(t, S, 0.01), lambda y: 2 * y * (S - y), 0.01),
    "balanced_mode": (
        lambda t: laws.balanced_mode(t, S, A, B),
        lambda y: np.sqrt(LEVEL**2 + 4 * y**2) * (S - y),
        A * B,
    ),
    "lora_mode": (
        lambda t: laws.lora_mode(t, S, A),
        lambda y: np.sqrt(A**4 + 4 * y**2) * (S - y),
        0.0,
    ),
    "tanh_squared": (
        lambda t: laws.tanh_squared(t + 0.5, S),
        lambda y: np.sqrt(2 * S * y) * (S - y),
        S * np.tanh(S * 0.5 / 2**0.5) ** 2,
    ),
    "superfluous": (lambda t: laws.superfluous(t, 0.4), lambda y: -2 * y**2, 0.4),
    "superfluous_unbalanced": (
        lambda t: laws.superfluous(t, 0.4, 0.2),
        lambda y: -np.sqrt(0.2**2 + 4 * y**2) * y,
        0.4,
    ),
    "lazy": (lambda t: laws.lazy(t, S, 2.0), lambda y: 4.0 * (S - y), 0.0),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_law_solves_its_equation(name):
    law, rate, start = EQUATIONS[name]
    np.testing.assert_allclose(law(TIMES), integrate(rate, start), atol=1e-10)


@pytest.mark.parametrize("name", EQUATIONS)
def test_an_equation_five_per_cent_off_is_told_apart(name):
    law, rate, start = EQUATIONS[name]
    altered = integrate(lambda y: 1.05 * rate(y), start)
    assert np.abs(np.asarray(law(TIMES)) - altered).max() > 1e-3


def test_special_cases_meet():
    np.testing.assert_allclose(
        laws.balanced_mode(TIMES, S, 0.2, 0.2), laws.logistic(TIMES, S, 0.04), atol=1e-12
    )
    np.testing.assert_allclose(
        laws.balanced_mode(TIMES, 0.0, 0.4, 0.4), laws.superfluous(TIMES, 0.16), atol=1e-12
    )
    np.testing.assert_allclose(
        laws.balanced_mode(TIMES, 0.0, 0.4, 0.2), laws.superfluous(TIMES, 0.08, 0.12), atol=1e-12
    )


def test_laws_do_not_overflow():
    late = jnp.array([0.0, 1e3, 1e6])
    for law in (
        laws.logistic(late, 4.0, 1e-300),
        laws.lora_mode(late, 4.0, 1e-150),
        laws.superfluous(late, 1e-3, 0.5),
        laws.lora_mode(late, 4.0, 30.0),
    ):
        assert bool(jnp.all(jnp.isfinite(law)))


@pytest.mark.parametrize("a", [1e-8, 1e-2, 0.5, 1.0, 3.0, 30.0])
def test_half_time_is_where_the_mode_is_half_learned(a):
    half = laws.half_time(S, a)
    assert float(half) > 0
    assert float(laws.lora_mode(half, S, a)) == pytest.approx(S / 2, rel=1e-10)


def test_half_time_has_its_two_limits():
    assert float(laws.half_time(S, 1e-5)) == pytest.approx(np.log(4 * S / 1e-10) / (2 * S))
    assert float(laws.half_time(S, 1e3)) == pytest.approx(np.log(2) / 1e6)


def test_spectral_hit_times_of_the_table():
    """Hit times 1.949, 1.688, 1.379, 0.975 for s = 4, 3, 2, 1 (theory section 2.5)."""
    found = laws.spectral_hit_time(jnp.array([4.0, 3.0, 2.0, 1.0]), 0.0)
    np.testing.assert_allclose(found, [1.949, 1.688, 1.379, 0.975], atol=1e-3)
    law = laws.spectral_flow(found, jnp.array([4.0, 3.0, 2.0, 1.0]), 0.0)
    np.testing.assert_allclose(law, 0.95 * np.array([4.0, 3.0, 2.0, 1.0]), rtol=1e-12)
    # From σ0 = 0.04 on it is √σ0 = 0.2 earlier.
    np.testing.assert_allclose(laws.spectral_hit_time(4.0, 0.04), 1.949 - 0.2, atol=1e-3)
