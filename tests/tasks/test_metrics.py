"""GLUE's measures against scipy and against counting by hand."""

import numpy as np
import pytest
from scipy import stats

from lorajax.tasks import METRICS, metrics

RNG = np.random.default_rng(0)


def test_counts_by_hand():
    # One true positive, one false, two missed, one true negative.
    found, wanted = np.array([1, 1, 0, 0, 0]), np.array([1, 0, 1, 1, 0])
    assert metrics.accuracy(found, wanted) == pytest.approx(2 / 5)
    assert metrics.f1(found, wanted) == pytest.approx(2 * 1 / (2 * 1 + 1 + 2))
    assert metrics.f1(found, wanted, positive=0) == pytest.approx(2 * 1 / (2 * 1 + 2 + 1))
    by_hand = (1 * 1 - 1 * 2) / np.sqrt((1 + 1) * (1 + 2) * (1 + 1) * (1 + 2))
    assert metrics.matthews(found, wanted) == pytest.approx(by_hand)
    assert metrics.matthews(found, found) == pytest.approx(1)
    assert metrics.matthews(1 - wanted, wanted) == pytest.approx(-1)


def test_matthews_of_several_classes_is_the_correlation_of_their_indicators():
    found, wanted = RNG.integers(0, 4, (2, 200))
    found = np.where(RNG.random(200) < 0.5, wanted, found)
    table = np.zeros((4, 4))
    np.add.at(table, (wanted, found), 1)
    right, n = np.trace(table), table.sum()
    rows, columns = table.sum(1), table.sum(0)
    want = (right * n - rows @ columns) / np.sqrt((n**2 - columns @ columns) * (n**2 - rows @ rows))
    assert metrics.matthews(found, wanted) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_scipys(ties):
    x, y = RNG.normal(size=(2, 300))
    y = x + y
    if ties:
        x, y = np.round(2 * x), np.round(y)
    assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-12)
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
    np.testing.assert_array_equal(metrics.mean_ranks(x), stats.rankdata(x))


def test_measures_in_half_precision_and_of_large_numbers():
    x = np.float16([60000, 60032, 60064])
    assert metrics.pearson(x, np.arange(3)) == pytest.approx(1)
    assert metrics.pearson(np.float32([1e30, 2e30]), np.float32([1, 2])) == pytest.approx(1)


@pytest.mark.parametrize("name", METRICS)
def test_where_nothing_can_be_told_it_is_zero_and_other_shapes_are_refused(name):
    constant = np.full(4, 0.1)
    if name != "accuracy":
        assert METRICS[name](constant, np.arange(4)) == 0
    for bad in (np.arange(3), np.zeros((4, 1))):
        with pytest.raises(ValueError, match="both must be of one shape"):
            METRICS[name](bad, np.arange(4))
    with pytest.raises(ValueError, match="n of at least 1"):
        METRICS[name]([], [])
