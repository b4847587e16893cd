import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from lorajax import laws

S = 1.7


@pytest.mark.parametrize("modes", [1, 2, 3, 5])
def test_the_closed_form_solves_the_depth_law(modes):
    start = 0.3 ** (modes + 1)
    half = float(laws.tucker_half_time(S, 0.3, modes))
    times = np.linspace(0.0, 2 * half, 41)
    solution = scipy.integrate.solve_ivp(
        lambda _, y: (modes + 1) * y ** (2 - 2 / (modes + 1)) * (S - y),
        (0, times[-1]),
        [start],
        "DOP853",
        times,
        rtol=1e-12,
        atol=1e-16,
    )
    law = np.asarray(laws.tucker_mode(times, S, start, modes))
    np.testing.assert_allclose(law, solution.y[0], atol=1e-9)
    assert float(laws.tucker_mode(half, S, start, modes)) == pytest.approx(S / 2, rel=1e-10)
    reached = laws.tucker_time(law[1:20], S, start, modes)
    np.testing.assert_allclose(reached, times[1:20], rtol=1e-9)
    # The derivative of the closed form is the law itself.
    slope = jax.vmap(jax.grad(lambda value: laws.tucker_time(value, S, start, modes)))
    inner = jnp.asarray(law[1:20])
    np.testing.assert_allclose(1 / slope(inner), laws.tucker_rate(inner, S, modes), rtol=1e-9)


def test_one_tensor_mode_is_the_logistic_law():
    times = np.linspace(0.0, 5.0, 21)
    law = laws.tucker_mode(times, S, 0.01, 1)
    np.testing.assert_allclose(law, laws.logistic(times, S, 0.01), atol=1e-13)


@pytest.mark.parametrize("modes", [2, 3, 4])
def test_the_delay_is_a_power_of_the_scale(modes):
    scale = 1e-3 if modes == 2 else 1e-2
    limit = scale ** (1 - modes) / ((modes - 1) * S)
    assert float(laws.tucker_half_time(S, scale, modes)) == pytest.approx(limit, rel=0.02)


def test_modes_must_be_a_positive_integer():
    for modes in (0, True):
        with pytest.raises(ValueError, match="modes is"):
            laws.tucker_mode(1.0, S, 0.1, modes)
