"""Laws at numbers that were worked out by hand, with the constants that they claim."""

import jax.numpy as jnp
import numpy as np
import pytest

from lorajax import Factors, TuckerFactors, laws


def test_what_is_conserved():
    factors = Factors(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([[3.0, 0.0], [1.0, 1.0]]))
    # AᵀA = [[1, 2], [2, 5]], BBᵀ = [[9, 3], [3, 2]].
    level = laws.lora_plus_level(factors, 4.0)
    np.testing.assert_allclose(level, [[-5.0, 5.0], [5.0, 18.0]])
    u = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    tucker = TuckerFactors(jnp.array([[3.0, 0.0], [1.0, 1.0]]), (u, 2 * u))
    np.testing.assert_allclose(laws.tucker_level(tucker, 0), [[-8.0, -1.0], [-1.0, 3.0]])
    # Of the other mode: 4 AᵀA, and the core's columns.
    np.testing.assert_allclose(laws.tucker_level(tucker, 1), [[-6.0, 7.0], [7.0, 19.0]])
    assert float(laws.imbalance_decay(0.5, 0.3)) == pytest.approx(np.exp(-0.3))


def test_counts_and_bounds():
    assert laws.rank_count(5.0) == 15
    assert laws.outer_bound(0.1, 4.0, 0.2) == pytest.approx(0.9)
    assert laws.spurious_share(1.0, 5.0) == pytest.approx(0.4)
    assert laws.spurious_distance(2.0, 5.0, 0.2, 3.0) == pytest.approx(1.5)
    assert laws.tucker_delay_exponent(3) == 2
    np.testing.assert_allclose(laws.orthonormal_error(6, np.array([2, 6])), [2**0.5, 0.0])


def test_one_scaled_step_leaves_a_quarter_of_the_error_squared():
    # One entry: X = √P goes to ½(X + S/X), and S − X'² is −¼ (S − P)²/P.
    p, s = 2.0, 5.0
    after = s - (0.5 * (p**0.5 + s / p**0.5)) ** 2
    found = laws.scaled_gd_error(jnp.full((1, 1), s - p), jnp.full((1, 1), p))
    assert float(found[0, 0]) == pytest.approx(after, rel=1e-12)
    # In two dimensions, E P⁻¹ E with P diagonal.
    error, gram = jnp.array([[1.0, 2.0], [2.0, 0.0]]), jnp.diag(jnp.array([1.0, 2.0]))
    want = [[-0.75, -0.5], [-0.5, -1.0]]
    np.testing.assert_allclose(laws.scaled_gd_error(error, gram), want, rtol=1e-12)
