"""What laws say outside their range."""

import numpy as np
import pytest

from lorajax import laws


def test_below_the_threshold_a_direction_is_the_bulk_s():
    c = 0.5
    edge = 1 + c**0.5
    for strength in (0.0, 0.3, 0.99 * c**0.25, c**0.25):
        np.testing.assert_allclose(laws.gaussian_intruder(strength, c), edge, rtol=1e-7)
        np.testing.assert_allclose(laws.gaussian_intruder_overlap(strength, c), 0, atol=1e-7)
    # Right above it both go on from there.
    assert edge < float(laws.gaussian_intruder(1.01 * c**0.25, c)) < 1.001 * edge
    assert 0 < float(laws.gaussian_intruder_overlap(1.01 * c**0.25, c)) < 0.1


@pytest.mark.parametrize("c", [0.0, -0.5, 1.5, float("nan")])
def test_a_ratio_of_sides_is_from_0_to_1(c):
    c = np.array(c)
    assert np.isnan(laws.gaussian_threshold(c))
    for strength in (0.1, 3.0):
        assert np.isnan(laws.gaussian_intruder(strength, c))
        assert np.isnan(laws.gaussian_intruder_overlap(strength, c))


def test_descents_have_no_law_where_a_factor_is_0():
    starts = np.array([-1.0, 0.0, 0.1])
    found = laws.riemannian_mode(1.0, 2.0, starts)
    assert np.isnan(found).tolist() == [True, True, False]
    np.testing.assert_allclose(found[2], 2 - 1.9 * np.exp(-2), rtol=1e-7)
    first, second = laws.adam_first_step(np.array([-1.0, 0.0, 4.0]))
    assert np.isnan(first).tolist() == np.isnan(second).tolist() == [True, True, False]
    assert (float(first[2]), float(second[2])) == (0.25, 4.0)
    # The constant that its claim alters.
    np.testing.assert_allclose(np.stack(laws.adam_first_step(4.0, exponent=1.5)), [1 / 8, 8.0])
