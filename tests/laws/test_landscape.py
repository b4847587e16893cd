"""Bounds of LoRA's landscape by numbers that are worked out by hand."""

import numpy as np
import pytest

from lorajax import laws


def test_a_spurious_point_lies_as_far_away_as_its_smallest_singular_values_say():
    values = np.array([[2.0, 1.0, 1.0], [2.0, 1.0, 0.4]])
    # 2α/β = 1/4: the share is 2/4 of the last, and 2/4 over 0.4 is above 1: no such point.
    found = laws.spurious_away(1.0, 8.0, values, 1)
    np.testing.assert_allclose(found, [2.0 / (1 - 0.5), np.inf])
    # r* = 2 compares with the second singular value: 1/4 of 1, and 1/4 over 0.4.
    found = laws.spurious_away(1.0, 8.0, values, 2)
    np.testing.assert_allclose(found, [1.0 / (1 - 0.25), 0.16 / (1 - 0.625)])
    with pytest.raises(ValueError, match="best_rank is 3; it must be from 1 to 2"):
        laws.spurious_away(1.0, 8.0, values, 3)


def test_shares_and_counts():
    assert laws.spurious_share(1.0, 8.0) == 0.25
    assert laws.spurious_distance(2.0, 8.0, 0.5, 3.0) == 6.0
    assert laws.outer_bound(0.1, 8.0, 0.5) == pytest.approx(4.1)
    assert laws.rank_count(4.0) == 10
