"""Laws of two frozen layers, on an instance whose growth rates are written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorajax import Factors, TwoLayer, TwoLayerFactors, laws


def test_rates_and_what_follows_from_them():
    # E = 6 e₁e₁ᵀ: g₁ = σ₁(W2ᵀE) = 3, g₂ = σ₁(E W1ᵀ) = 12, δ_w = 1/4.
    w1, w2 = jnp.diag(jnp.array([2.0, 1.0])), jnp.diag(jnp.array([0.5, 1.0]))
    problem = TwoLayer(w1, w2, jnp.diag(jnp.array([6.0, 0.0])))
    assert [float(x) for x in laws.growth_rates(problem)] == pytest.approx([3.0, 12.0])
    assert float(laws.escape_slope(problem)) == pytest.approx(1 / 12)
    assert float(laws.slow_layer_exponent(problem)) == pytest.approx(0.75)
    assert float(laws.alignment_exponent(problem)) == pytest.approx(0.5)


def test_the_loss_decays_at_twice_the_residuals_rate():
    # One entry a factor: L = ½ R², R' = −R Σ (∂(w2 w1)/∂factor)².
    def one(x):
        return jnp.full((1, 1), x)

    end = TwoLayerFactors(Factors(one(0.3), one(0.5)), Factors(one(0.7), one(0.2)))
    problem = TwoLayer(one(1.0), one(2.0), one(5.0))
    first, second = 1.0 + 0.15, 2.0 + 0.14
    squares = second**2 * (0.3**2 + 0.5**2) + first**2 * (0.7**2 + 0.2**2)
    np.testing.assert_allclose(laws.loss_decay(problem, end), 2 * squares, rtol=1e-12)


def test_the_loss_decays_at_the_rayleigh_quotient_of_the_derivative():
    w1, w2, shift, a1, b1, a2, b2 = (
        jnp.asarray(np.random.default_rng(i).normal(size=shape))
        for i, shape in enumerate(((3, 4), (5, 3), (5, 4), (3, 2), (2, 4), (5, 1), (1, 3)))
    )
    end = TwoLayerFactors(Factors(a1, b1), Factors(a2, b2))

    def product(end):
        return (w2 + end.second.a @ end.second.b) @ (w1 + end.first.a @ end.first.b)

    unit = shift / jnp.linalg.norm(shift)
    pulled = jax.vjp(product, end)[1](unit)[0]
    want = 2 * sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(pulled))
    np.testing.assert_allclose(laws.loss_decay(TwoLayer(w1, w2, shift), end), want, rtol=1e-12)
