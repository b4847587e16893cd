"""Laws of learning rates, against numbers worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from lorajax import finetune, laws


def test_carried_rates_are_powers():
    assert float(laws.carried_rate(4.0, 1.0)) == 0.5
    found = laws.carried_rate(1.0, 16.0, np.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(found, [0.25, 0.5, 1.0])


def test_the_gain_of_a_step_is_that_of_the_rank_for_one_multiplier_alone():
    found = laws.gradient_step_gain(np.array([4.0, 16.0]), 0.5, 0.25)
    np.testing.assert_allclose(found, [0.25, 0.25])
    np.testing.assert_allclose(laws.gradient_step_gain(4.0, 1.0), 0.25)


def test_sign_steps_by_hand():
    # z = (1, −2), x = (3, −1): B moves by 0.1 a step, z by 0.01 · 4 from the second one on.
    through_b, through_a = laws.sign_change(2.0, 0.01, 0.1, 4.0, 3.0, 2.0, 0.5)
    assert float(through_b) == pytest.approx(0.5 * 2 * 0.1 * 3)
    assert float(through_a) == pytest.approx(0.5 * 2 * 0.1 * 2 * 0.04)
    assert float(laws.factor_balance(0.01, 300.0)) == pytest.approx(3.0)


def test_a_multiplier_is_a_change_of_time_and_scale():
    times, a = laws.multiplied_equivalent(np.array([1.0, 2.0]), jnp.ones((2, 1)), 4.0)
    np.testing.assert_array_equal(times, [4.0, 8.0])
    np.testing.assert_array_equal(a, [[2.0], [2.0]])


def test_whitened_laws_by_hand():
    assert float(laws.whitened_risk(jnp.array([3.0, 2.0, 1.0]), 1)) == 2.5
    assert float(laws.whitened_noise((3, 2), 2.0, 12)) == 2.0


def test_a_trial_carries_its_rate_to_all_ranks():
    found = finetune.transfer({"a": 4, "b": 16, "c": 64}, trial=4, learning_rate=0.002)
    assert found.rank == 16 and found.alpha == 4 and found.rsalpha == 2
    assert found.rates == {"alpha/r": 1.0, "alpha/√r": pytest.approx(2**-0.5), "1": 0.5}
    assert "0.002" in str(found) and "multiply it by 0.71" in str(found)
    with pytest.raises(ValueError, match="no layer with a rank"):
        finetune.transfer({})
