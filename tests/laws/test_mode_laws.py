"""Laws of all modes: each is its law of one mode, and a new one is found by its name."""

import jax.numpy as jnp
import numpy as np
import pytest

from lorajax import MatrixFactorization, initializers, laws

TIMES = jnp.linspace(0.0, 4.0, 9)


@pytest.fixture(scope="module")
def instance():
    import jax

    key = jax.random.key(3)
    problem = MatrixFactorization.from_spectrum(key, (7, 6), (3.0, 2.0, 1.0))
    return problem, initializers.lora(key, problem.shape, 2, 0.1)


def test_laws_of_all_modes_are_those_of_each(instance):
    problem, start = instance
    a = np.asarray(laws.deflated_amplitudes(problem, start))
    top = np.abs(np.linalg.norm(np.asarray(start.a.T @ problem.u[:, 0])))
    assert a[0] == pytest.approx(top)
    for i, s in enumerate((3.0, 2.0)):
        for found, law in (
            (laws.lora_modes, laws.lora_mode(TIMES, s, a[i])),
            (laws.lazy_modes, s * (1 - np.exp(-(a[i] ** 2) * TIMES))),
            (laws.logistic_modes, laws.logistic(TIMES, s, a[i] ** 2 / 4)),
            (laws.tanh_squared_modes, s * np.tanh(s * TIMES / 2**0.5) ** 2),
        ):
            np.testing.assert_allclose(found(problem, start, TIMES)[:, i], law, atol=1e-12)


def test_the_logistic_law_of_a_start_with_both_factors_takes_its_modes(instance):
    problem, _ = instance
    start = initializers.spectral(problem.target, 2, scale=0.2)
    found = laws.logistic_modes(problem, start, TIMES)
    for i, s in enumerate((3.0, 2.0)):
        np.testing.assert_allclose(found[:, i], laws.logistic(TIMES, s, 0.04), atol=1e-12)


def test_a_mode_law_is_found_by_a_name_of_its_own():
    with pytest.raises(ValueError, match="'lora'"):
        laws.mode_law("lora")(laws.lora_modes)
    assert laws.MODE_LAWS["lazy"] is laws.lazy_modes


def test_spectral_flow_grows_as_a_square():
    found = laws.spectral_flow(jnp.array([0.0, 0.5, 5.0]), 2.0, 0.04)
    np.testing.assert_allclose(found, [0.04, 0.49, 2.0], atol=1e-12)


def test_lora_plus_is_plain_flow_in_another_clock():
    times, a = laws.lora_plus_equivalent(TIMES, jnp.ones((3, 2)), 16.0)
    np.testing.assert_allclose(times, 4 * TIMES, atol=1e-12)
    np.testing.assert_allclose(a, 2 * np.ones((3, 2)), atol=1e-12)


@pytest.mark.parametrize("law", [laws.lora_modes, laws.lazy_modes])
def test_a_law_of_lora_starts_says_where_it_does_not_hold(instance, law):
    problem, start = instance
    with pytest.raises(ValueError, match=r"factors\.b has entries up to 1"):
        law(problem, start._replace(b=jnp.ones_like(start.b)), TIMES)
    equal = MatrixFactorization(problem.u, jnp.array([2.0, 2.0, 1.0]), problem.v)
    with pytest.raises(ValueError, match="distinct"):
        law(equal, start, TIMES)
