"""Rank rules, against spectra whose rank is known and against noise that has none."""

import itertools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from lorajax import initializers, ranks

SHAPE, PLANTED = (60, 40), 5


def noisy_gradients(samples, seed, rank=PLANTED, strength=1.0):
    """Half gradients of whitened linear regression with unit label noise and a planted update."""
    draw = np.random.default_rng(seed)
    m, n = SHAPE
    u, v = (np.linalg.qr(draw.normal(size=(k, k)))[0] for k in (m, n))
    target = strength * u[:, :rank] @ v[:rank]
    halves, signed = [], 0
    for _ in range(2):
        x = draw.normal(size=(samples // 2, m))
        residual = x @ target + draw.normal(size=(samples // 2, n))
        signs = draw.choice([-1.0, 1.0], size=(samples // 2, 1))
        signed = signed - x.T @ (signs * residual) / samples
        halves.append(jnp.asarray(-x.T @ residual / (samples // 2)))
    return halves, jnp.asarray(signed)


@pytest.mark.parametrize("seed", range(5))
def test_measured_floors_recover_a_planted_rank(seed):
    (first, second), signed = noisy_gradients(4000, seed)
    halves = ranks.split_half(first, second)
    signs = ranks.random_signs((first + second) / 2, signed)
    assert int(halves.rank) == int(signs.rank) == PLANTED
    np.testing.assert_allclose(float(halves.floor), float(signs.floor), rtol=0.15)


def test_few_samples_are_conservative():
    found = [int(ranks.split_half(*noisy_gradients(150, seed)[0]).rank) for seed in range(10)]
    assert max(found) <= PLANTED and np.mean(found) < PLANTED


@pytest.mark.parametrize("seed", range(3))
def test_c_over_n_with_the_derived_constant(seed):
    """The gradient's noise is that of the residuals: labels, and the update not yet learned."""
    (first, second), _ = noisy_gradients(4000, seed)
    values = jnp.linalg.svd((first + second) / 2, compute_uv=False)
    residual = (1 + PLANTED / SHAPE[1]) ** 0.5
    constant = ranks.noise_constant(SHAPE, residual, margin=0.1)
    assert int(ranks.c_over_n(values, 4000, constant)) == PLANTED
    assert int(ranks.c_over_n(values, 4000, 1e9)) == 0


def test_the_edge_margin_makes_chance_rare():
    """Pairs of pure noise matrices: without margin half of them exceed, with it about 1 in 1000."""
    draw = np.random.default_rng(0)
    for shape, pairs in (((18, 18), 4000), ((60, 10), 3000)):
        tops = np.linalg.svd(draw.normal(size=(2, pairs, *shape)), compute_uv=False)[..., 0]
        ratio = (tops[0] / tops[1]) ** 2
        assert 0.45 < np.mean(ratio > 1) < 0.55
        assert np.mean(ratio > 1 + ranks.edge_margin(shape)) < 3e-3
        loose = np.mean(ratio > 1 + ranks.edge_margin(shape, 4.6))
        assert 2e-3 < loose < 2e-2
    assert ranks.edge_margin((4096, 4096)) < 0.02 < ranks.edge_margin((64, 64))


def test_rules_act_on_batches_of_spectra():
    values = jnp.asarray([[3.0, 2.0, 0.5], [1.0, 0.1, 0.0], [0.0, 0.0, 0.0]])
    assert ranks.above(values, jnp.asarray([1.0, 0.5, 0.1])).tolist() == [2, 1, 0]
    assert ranks.energy(values, 0.9).tolist() == [2, 1, 0]
    assert ranks.energy(values, 1.0).tolist() == [3, 2, 0]
    np.testing.assert_allclose(ranks.stable_rank(values), [13.25 / 9, 1.01, 0.0])


@pytest.mark.parametrize("seed", range(5))
def test_energy_against_a_plain_sum(seed):
    values = np.sort(np.random.default_rng(seed).exponential(size=12))[::-1].copy()
    for fraction in (0.1, 0.5, 0.9, 0.99):
        share = np.cumsum(values**2) / np.sum(values**2)
        assert int(ranks.energy(jnp.asarray(values), fraction)) == 1 + np.sum(share < fraction)


def spectrum(*values):
    return jnp.asarray(values, float)


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_with_equal_costs_is_spent_optimally(seed):
    draw = np.random.default_rng(seed)
    spectra = {name: jnp.asarray(np.sort(draw.exponential(size=3))[::-1].copy()) for name in "abc"}
    costs = dict.fromkeys("abc", 7)

    def energy(chosen):
        return sum(float(jnp.sum(spectra[name][:rank] ** 2)) for name, rank in chosen.items())

    for budget in (0, 6, 7, 30, 100):
        found = ranks.allocate(spectra, costs, budget)
        assert sum(costs[n] * r for n, r in found.items()) <= budget
        best = max(
            energy(dict(zip("abc", combination, strict=True)))
            for combination in itertools.product(range(4), repeat=3)
            if 7 * sum(combination) <= budget
        )
        np.testing.assert_allclose(energy(found), best)


def test_a_budget_weighs_costs_and_respects_floors():
    spectra = {"wide": spectrum(3.0, 2.0), "narrow": spectrum(2.0, 1.9)}
    costs = {"wide": 100, "narrow": 10}
    assert ranks.allocate(spectra, costs, 20) == {"wide": 0, "narrow": 2}
    assert ranks.allocate(spectra, costs, 110) == {"wide": 0, "narrow": 2}
    assert ranks.allocate(spectra, costs, 120) == {"wide": 1, "narrow": 2}
    floors = {"wide": 0.0, "narrow": 1.95}
    assert ranks.allocate(spectra, costs, 1000, floors=floors) == {"wide": 2, "narrow": 1}
    zero = {"a": spectrum(0.0, 0.0)}
    assert ranks.allocate(zero, {"a": 1}, 10) == {"a": 0}


G = jnp.ones((3, 2))
BAD = [
    (lambda: ranks.noise_constant((3, 2), 0.0), "noise is 0.0"),
    (lambda: ranks.noise_constant((3, 2), 1.0, margin=-0.1), "margin is -0.1"),
    (lambda: ranks.c_over_n(spectrum(1.0), 0, 1.0), "samples is 0"),
    (lambda: ranks.c_over_n(spectrum(1.0), 5, -1.0), "constant is -1.0"),
    (lambda: ranks.split_half(G, G.T), "second has shape \\(2, 3\\)"),
    (lambda: ranks.split_half(G, G * jnp.nan), "second has 6 entries"),
    (lambda: ranks.random_signs(G, G.T), "signed has shape \\(2, 3\\)"),
    (lambda: ranks.energy(spectrum(1.0), 0.0), "fraction is 0.0"),
    (lambda: ranks.edge_margin((3, 2), -1.0), "width is -1.0"),
    (lambda: ranks.allocate({"a": spectrum(1.0)}, {"a": 1}, -1), "budget is -1"),
    (
        lambda: ranks.allocate({"a": spectrum(1.0)}, {"b": 1}, 1),
        "costs and spectra differ in .*'a'",
    ),
    (lambda: ranks.allocate({"a": spectrum(1.0)}, {"a": 0}, 1), "the cost of 'a' is 0"),
    (lambda: ranks.allocate({"a": spectrum(1.0, 2.0)}, {"a": 1}, 1), "'a' increases"),
    (lambda: ranks.allocate({"a": spectrum(jnp.nan)}, {"a": 1}, 1), "the spectrum of 'a' has 1"),
    (
        lambda: ranks.allocate({"a": spectrum(1.0)}, {"a": 1}, 1, floors={}),
        "floors and spectra differ",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_says_what_would_be_right(call, message):
    # Without the shape checks of the tests, which would speak first.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            call()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_rules_run_inside_jit():
    values = spectrum(3.0, 2.0, 0.5)
    assert int(jax.jit(lambda v: ranks.energy(v, 0.9))(values)) == 2
    assert int(jax.jit(lambda v: ranks.above(v, 1.0))(values)) == 2


def test_every_mode_of_a_tensor_has_its_own_rank(key):
    signal = initializers.tucker(key, (14, 14, 14), (2, 3, 4))
    core = jax.random.normal(key, (2, 3, 4))
    noise = 0.02 * jax.random.normal(jax.random.fold_in(key, 1), (2, 14, 14, 14))
    halves = signal._replace(core=core).product[None] + noise
    assert [int(mode.rank) for mode in ranks.split_half_modes(*halves)] == [2, 3, 4]
    with pytest.raises(ValueError, match="must have the shape of first"):
        ranks.split_half_modes(halves[0], halves[1, :5])
