"""What a spectrum alone says of updates that stand out: against Gaussian limits and matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorajax import laws, ranks


def quantiles(n, c):
    """Singular values of a large n×(n/c) Gaussian matrix, by the law of Marchenko and Pastur."""
    edges = 1 - np.sqrt(c), 1 + np.sqrt(c)
    # Nodes that crowd at both edges, where the density ends as a root.
    angle = np.linspace(0, np.pi, 200_001)
    t = (edges[0] + edges[1]) / 2 - (edges[1] - edges[0]) / 2 * np.cos(angle)
    inside = np.maximum((edges[1] ** 2 - t**2) * (t**2 - edges[0] ** 2), 0)
    density = np.sqrt(inside) / t * np.sin(angle)
    mass = np.cumsum(density) / density.sum()
    return np.interp((np.arange(n) + 0.5) / n, mass, t)


@pytest.mark.parametrize("c", [0.25, 0.5])
def test_values_and_overlaps_have_the_gaussian_limits(c):
    n = 4000
    values, shape = quantiles(n, c), (n, round(n / c))
    for theta in np.array([1.5, 2.5]) * c**0.25:
        value = ranks.intruder_value(values, shape, theta)
        assert value == pytest.approx(float(laws.gaussian_intruder(theta, c)), rel=1e-4)
        short, long = ranks.intruder_overlaps(values, shape, theta)
        law = float(laws.gaussian_intruder_overlap(theta, c))
        assert short == pytest.approx(law, rel=1e-3)
        # The other side, by the same law with the sides' roles exchanged (recalled).
        other = 1 - (c + theta**2) / (theta**2 * (theta**2 + 1))
        assert long == pytest.approx(other, rel=1e-3)
    # Quantiles are evenly spaced at the edge, where a spectrum's gap is random: n^(−1/3).
    assert ranks.intruder_threshold(values, shape) == pytest.approx(
        float(laws.gaussian_threshold(c)), rel=n ** (-1 / 3)
    )


def test_a_matrix_with_many_directions_agrees():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(300, 500)) * (np.arange(1, 301) ** -0.3)[:, None]
    values = np.linalg.svd(w, compute_uv=False)
    theta, found = 1.5 * ranks.intruder_threshold(values, w.shape), []
    for _ in range(8):
        u, v = rng.normal(size=300), rng.normal(size=500)
        update = theta * np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))
        found.append(np.linalg.svd(w + update, compute_uv=False)[0])
    assert np.mean(found) == pytest.approx(ranks.intruder_value(values, w.shape, theta), rel=0.02)


def test_orientation_and_units_do_not_matter():
    values = np.array([3.0, 2.0, 1.0, 0.5])
    one = ranks.intruder_value(values, (4, 7), 2.0)
    assert ranks.intruder_value(values, (7, 4), 2.0) == one
    for unit in (1e-9, 1e9):
        found = ranks.intruder_value(unit * values, (4, 7), 2.0 * unit)
        assert found == pytest.approx(unit * one, rel=1e-12)
    for strength in (1e3, 1e12, 1e20):  # the update hides the matrix
        found = ranks.intruder_value(values, (4, 7), strength)
        assert found == pytest.approx(strength, rel=1e-2)
    assert ranks.intruder_value(values, (4, 7), 1e-9) == pytest.approx(3.0)
    assert ranks.intruder_threshold(np.ones(4), (4, 7)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranks.intruder_threshold(np.ones(3), (4, 7)), "has 4 of them"),
        (lambda: ranks.intruder_threshold(np.zeros(4), (4, 7)), "at least one positive"),
        (lambda: ranks.intruder_value(np.ones(4), (4, 7), 0.0), "strength is 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_effective_rank_counts_equal_directions():
    spectra = np.array([[2.0, 2.0, 2.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = ranks.effective_rank(jnp.asarray(spectra))
    np.testing.assert_allclose(found, [3.0, 1.0, 0.0], rtol=1e-12)
    p = np.array([0.5, 0.3, 0.2])
    want = np.exp(-np.sum(p * np.log(p)))
    np.testing.assert_allclose(ranks.effective_rank(jnp.asarray(7 * p)), want, rtol=1e-12)


def test_values_that_cannot_be_solved_for_are_named():
    values = np.array([3.0, 2.0, 1.0])
    with pytest.raises(ValueError, match="singular_values are complex"):
        ranks.intruder_threshold(values + 0j, (3, 5))
    with pytest.raises(ValueError, match="are being traced"):
        jax.jit(lambda x: ranks.intruder_value(x, (3, 5), 5.0))(values)
