import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorajax import Factors, spectra


def random_factors(key, *lanes, m=9, r=3, n=7):
    keys = jax.random.split(key)
    a = jax.random.normal(keys[0], (*lanes, m, r))
    return Factors(a, jax.random.normal(keys[1], (*lanes, r, n)))


@pytest.mark.parametrize(("m", "n"), [(9, 7), (3, 7), (9, 2), (2, 2)])
def test_singular_values_are_those_of_the_product(key, m, n):
    factors = random_factors(key, 4, m=m, n=n)
    expected = np.linalg.svd(np.asarray(factors.product), compute_uv=False)[..., : min(3, m, n)]
    np.testing.assert_allclose(spectra.singular_values(factors), expected, atol=1e-12)


def test_singular_vectors_rebuild_the_product(key):
    factors = random_factors(key, 2)
    u, s, v = spectra.singular_vectors(factors)
    rebuilt = (u * s[..., None, :]) @ jnp.swapaxes(v, -1, -2)
    np.testing.assert_allclose(rebuilt, factors.product, atol=1e-12)
    identity = np.broadcast_to(np.eye(3), (2, 3, 3))
    np.testing.assert_allclose(jnp.swapaxes(u, -1, -2) @ u, identity, atol=1e-12)


@pytest.mark.parametrize("angle", [1e-12, 1e-6, 0.3, 1.2])
def test_misalignment_keeps_its_digits(angle):
    direction = jnp.array([2.0, 0.0])
    vector = jnp.array([-jnp.cos(angle), jnp.sin(angle)])
    expected = 2 * np.sin(angle / 2) ** 2
    assert float(spectra.misalignment(vector, direction)) == pytest.approx(expected, rel=1e-10)


def test_top_direction_is_an_eigenvector(key):
    matrix = jax.random.normal(key, (5, 4))
    whole = jnp.block([[jnp.zeros((5, 5)), matrix], [matrix.T, jnp.zeros((4, 4))]])
    direction = spectra.top_direction(matrix)
    top = jnp.linalg.svd(matrix, compute_uv=False)[0]
    np.testing.assert_allclose(whole @ direction, top * direction, atol=1e-12)


def test_leading_and_norm_agree_with_numpy(key):
    factors = random_factors(key, 3)
    stacked = np.concatenate([factors.a, np.swapaxes(factors.b, -1, -2)], axis=-2)
    u, s, _ = np.linalg.svd(stacked, full_matrices=False)
    vectors, norms = spectra.leading(factors)
    np.testing.assert_allclose(norms, s[:, 0], rtol=1e-12)
    np.testing.assert_allclose(spectra.factor_norm(factors), s[:, 0], rtol=1e-12)
    np.testing.assert_allclose(np.abs(np.sum(vectors * u[..., 0], axis=1)), 1.0, rtol=1e-12)


def test_effective_rank_counts_equal_values():
    values = jnp.array([[2.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(spectra.effective_rank(values), [2.0, 1.0, 0.0], atol=1e-12)


def test_hitting_times_from_both_sides_and_never():
    times = jnp.linspace(0.0, 4.0, 5)
    values = jnp.stack([times**2, 16.0 - times**2, jnp.zeros(5)], axis=1)
    found = spectra.hitting_times(times, values, jnp.array([2.5, 12.0, 1.0]))
    np.testing.assert_allclose(found[:2], [1.5, 2.0])
    assert np.isnan(found[2])


def test_imbalance_drift_sees_what_moves(key):
    factors = random_factors(key)
    still = jax.tree.map(lambda x: jnp.stack([x, x]), factors)
    assert float(spectra.imbalance_drift(still)) == 0.0
    moved = Factors(still.a.at[1].multiply(1.05), still.b)
    a, b = (np.asarray(x) for x in factors)
    change = np.linalg.norm((1.05**2 - 1) * a.T @ a) / (1.05**2 * np.sum(a**2) + np.sum(b**2))
    assert float(spectra.imbalance_drift(moved)) == pytest.approx(change, rel=1e-12)


def test_top_misalignment_is_one_minus_the_cosine():
    angle = 0.3
    z = np.array([np.cos(angle), np.sin(angle), 0, 0, 0])
    factors = Factors(jnp.asarray(3 * z[:3, None]), jnp.asarray(3 * z[None, 3:]))
    found = spectra.top_misalignment(factors, jnp.eye(5)[0])
    assert float(found) == pytest.approx(1 - np.cos(angle), rel=1e-12)


@pytest.mark.parametrize("turn", range(3))
def test_top_misalignment_of_tied_values_is_that_to_their_space(key, turn):
    # Any rotation of the columns has the same singular values, and other singular vectors.
    columns = jnp.linalg.qr(jax.random.normal(key, (8, 3)))[0]
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(turn), (3, 3)))[0]
    z = 1e-2 * columns @ rotation
    factors = Factors(z[:5], z[5:].T)
    inside = columns @ jnp.asarray([0.6, -0.8, 0.0])
    assert float(spectra.top_misalignment(factors, inside)) < 1e-28
    # What of a direction lies in the space is its cosine.
    away = jnp.linalg.svd(columns)[0][:, -1]
    found = spectra.top_misalignment(factors, 0.6 * inside + 0.8 * away)
    assert float(found) == pytest.approx(1 - 0.6, rel=1e-12)
    assert float(spectra.top_misalignment(factors, away)) == pytest.approx(1.0, rel=1e-12)
    nothing = jax.tree.map(jnp.zeros_like, factors)
    assert float(spectra.top_misalignment(nothing, away)) == 1.0


def test_singular_values_have_derivatives_where_a_factor_is_zero(key):
    factors = random_factors(key)
    along = random_factors(jax.random.fold_in(key, 1))

    def values(x):
        return spectra.singular_values(Factors(factors.a + x * along.a, x * along.b))

    found = jax.jvp(lambda x: values(x) / x, (1e-3,), (1.0,))[1]
    want = (values(2e-3) / 2e-3 - values(1e-9) / 1e-9) / 2e-3
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3)
    at_zero = jax.jvp(lambda x: jnp.sum(values(x)), (0.0,), (1.0,))[1]
    assert bool(jnp.isfinite(at_zero))


def test_principal_angles(key):
    frame = jnp.linalg.qr(jax.random.normal(key, (8, 4)))[0]
    found = spectra.alignment_subspace(frame[:, :2], frame[:, 1:3])
    np.testing.assert_allclose(found, [1.0, 0.0], atol=1e-12)


def test_observables_of_two_layers_name_the_layer():
    with pytest.raises(ValueError, match="path.core.first"):
        spectra.singular_values({"not": "factors"})


def test_rank_correlation_sees_order_and_nothing_else():
    x = np.array([0.1, 3.0, 2.0, 7.0])
    assert spectra.rank_correlation(x, np.exp(x)) == pytest.approx(1)
    assert spectra.rank_correlation(x, -(x**3)) == pytest.approx(-1)
    assert spectra.rank_correlation(x, x[[0, 2, 1, 3]]) == pytest.approx(0.8)
