import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from lorajax import LinearAttention, laws
from lorajax.problems import AttentionHeads


def test_allora_time_solves_its_equation():
    s, a, eta = 2.0, 0.7, 4.0
    solution = scipy.integrate.solve_ivp(
        lambda _, w: a**2 * (s - w) / np.sqrt(w + eta**-2),
        (0, 6.0),
        [0.0],
        "DOP853",
        np.linspace(0.0, 6.0, 31),
        rtol=1e-12,
        atol=1e-14,
    )
    found = laws.allora_time(solution.y[0], s, a, eta)
    np.testing.assert_allclose(found, solution.t, atol=1e-9)


def test_plateaus_are_the_losses_of_partly_learned_heads():
    problem = LinearAttention(jnp.array([1.0, 0.6, 0.3]), jnp.asarray(7.0))
    levels = laws.attention_plateaus(problem)
    for learned in range(4):
        mask = (jnp.arange(3) < learned).astype(float)
        heads = AttentionHeads(mask, jnp.eye(3), jnp.diag(problem.optimum))
        assert float(problem.loss(heads)) == pytest.approx(float(levels[learned]), rel=1e-12)
        # They are saddles: nothing of the head that is to be learned next pulls on it yet.
        idle = AttentionHeads(mask, mask[:, None] * jnp.eye(3), jnp.diag(mask * problem.optimum))
        gradient = problem.gradient(idle)
        assert max(float(jnp.abs(x).max()) for x in gradient) < 1e-14


def test_overlap_rate_of_one_neuron_is_the_arc_cosine_kernels_slope():
    overlap = jnp.linspace(-0.9, 0.9, 7)
    one = jnp.ones(1)
    found = laws.relu_overlap_rate(overlap, jnp.zeros((1, 2)), one, one)

    def kernel(m):
        return (jnp.sqrt(1 - m**2) + m * (jnp.pi - jnp.arccos(m))) / (2 * jnp.pi)

    np.testing.assert_allclose(found, jax.vmap(jax.grad(kernel))(overlap), rtol=1e-10)
    # Several neurons: the slope of Σ a_i a_j E[relu relu'], an arc-cosine kernel of each pair.
    weights = jnp.array([[0.5, -1.0], [0.3, 0.8], [1.2, 0.1]])
    outputs, directions = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.7, 1.5, -0.4])

    def expected(m):
        gram = weights @ weights.T
        size = jnp.sqrt(jnp.diagonal(gram) + directions**2)
        sizes = jnp.multiply.outer(size, size)
        cosine = (gram + m * jnp.multiply.outer(directions, directions)) / sizes
        return outputs @ (sizes * kernel(cosine)) @ outputs

    found = laws.relu_overlap_rate(overlap, weights, outputs, directions)
    slope = jax.vmap(jax.grad(expected))(overlap)
    np.testing.assert_allclose(found, slope, rtol=1e-10)
    velocity = laws.relu_overlap_velocity(overlap, weights, outputs, directions)
    np.testing.assert_allclose(velocity, slope * (1 - overlap**2), rtol=1e-10)


def test_one_step_error_falls_with_the_root_of_the_samples():
    assert laws.one_step_error(8, 900) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="samples"):
        laws.one_step_error(8, 0)
