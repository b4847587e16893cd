"""The law of early descent, against descent with a gradient that does not move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorajax import Factors, laws


@pytest.mark.parametrize("step", [0.03, 0.4])  # the larger one oscillates along some modes
def test_early_descent_is_descent_on_a_linear_loss(step):
    keys = jax.random.split(jax.random.key(0), 3)
    matrix = jax.random.normal(keys[0], (6, 4))
    start = Factors(jax.random.normal(keys[1], (3, 6, 2)), jax.random.normal(keys[2], (3, 2, 4)))
    steps = np.array([0, 1, 5, 40])
    found = laws.early_descent(matrix, start, step, steps)
    assert found.a.shape == (3, 4, 6, 2) and found.b.shape == (3, 4, 2, 4)
    a, b = start
    for k in range(41):
        if k in steps:
            at = list(steps).index(k)
            np.testing.assert_allclose(found.a[:, at], a, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(found.b[:, at], b, rtol=1e-9, atol=1e-9)
        a, b = (
            a + step * matrix @ jnp.swapaxes(b, 1, 2),
            b + step * jnp.swapaxes(a, 1, 2) @ matrix,
        )


def test_steps_of_their_own_are_taken_one_after_the_other():
    keys = jax.random.split(jax.random.key(1), 3)
    matrix = jax.random.normal(keys[0], (6, 4))
    start = Factors(jax.random.normal(keys[1], (6, 2)), jax.random.normal(keys[2], (2, 4)))
    rates = jnp.array([0.0, 0.1, 0.5, 0.2, 0.0])
    steps = np.array([0, 1, 3, 5])
    found = laws.early_descent(matrix, start, rates, steps)
    a, b = start
    for k in range(6):
        if k in steps:
            at = list(steps).index(k)
            np.testing.assert_allclose(found.a[at], a, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(found.b[at], b, rtol=1e-9, atol=1e-9)
        if k < 5:
            a, b = a + rates[k] * matrix @ b.T, b + rates[k] * a.T @ matrix
    same = laws.early_descent(matrix, start, jnp.full(40, 0.4), np.array([7, 40]))
    once = laws.early_descent(matrix, start, 0.4, np.array([7, 40]))
    np.testing.assert_allclose(same.a, once.a, rtol=1e-9)
    np.testing.assert_allclose(same.b, once.b, rtol=1e-9)
    beyond = laws.early_descent(matrix, start, rates, np.array([6]))
    assert np.isnan(beyond.a).all()
