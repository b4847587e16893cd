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


@pytest.mark.parametrize("shape", [(60, 40), (18, 18), (60, 10)])
def test_the_mean_of_noise_lies_below_the_constant_by_the_tracy_widom_mean(shape):
    draw = np.random.default_rng(1)
    squares = np.linalg.svd(draw.normal(size=(2000, *shape)), compute_uv=False)[:, 0] ** 2
    found = squares / ranks.noise_constant(shape, 1.0)
    bar = found.std() / len(found) ** 0.5
    finite = np.log1p(ranks.edge_margin(shape, 1.0)) * min(shape) ** (-2 / 3)
    assert abs(found.mean() - ranks.edge_mean(shape)) < 4 * bar + finite


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


def test_zeros_have_rank_zero_and_rounding_is_no_signal():
    zero = jnp.zeros((6, 5))
    exact = jnp.asarray(np.outer(np.arange(1.0, 7.0), np.arange(1.0, 6.0)))
    for gradient, rank in ((zero, 0), (exact, 1)):
        assert int(ranks.split_half(gradient, gradient).rank) == rank
        assert int(ranks.random_signs(gradient, zero).rank) == rank
        values = jnp.linalg.svd(gradient, compute_uv=False)
        assert int(ranks.energy(values, 1.0)) == rank
        assert ranks.allocate({"a": values}, {"a": 1}, 10) == {"a": rank}
    assert [
        int(mode.rank)
        for mode in ranks.split_half_modes(jnp.zeros((3, 2, 2)), jnp.zeros((3, 2, 2)))
    ] == [0] * 3
    assert int(ranks.above(jnp.zeros(4), 0.0)) == 0
    assert int(ranks.c_over_n(jnp.zeros(4), 10, 1e-300)) == 0


def test_the_constants_are_the_formulas():
    assert ranks.noise_constant((9, 4), 2.0) == pytest.approx(4 * 25)
    assert ranks.noise_constant((9, 4), 2.0, margin=0.1) == pytest.approx(110)
    # σ² against C/n, on both sides of it by 1 %.
    values = jnp.sqrt(spectrum(1.01, 0.99) * 50 / 200)
    assert int(ranks.c_over_n(values, 200, 50.0)) == 1
    # The floor of the halves is the norm of their half-difference, on both sides of it by 1 %.
    noise, signal = jnp.diag(spectrum(0.3, 0.2)), jnp.diag(spectrum(0.303, 0.297))
    found = ranks.split_half(signal + noise, signal - noise)
    assert float(found.floor) == pytest.approx(0.3) and int(found.rank) == 1
    assert int(ranks.random_signs(signal, noise).rank) == 1
    unfolded = ranks.split_half_modes((signal + noise)[..., None], (signal - noise)[..., None])[0]
    margin = ranks.edge_margin((2, 2), ranks.UNFOLDED_WIDTH)
    assert float(unfolded.floor) == pytest.approx(0.3 * (1 + margin) ** 0.5)


def test_a_budget_goes_by_energy_and_not_by_size():
    # Three times the price for twice the singular value: four times the energy, so worth it.
    spectra = {"dear": spectrum(2.0), "cheap": spectrum(1.0)}
    assert ranks.allocate(spectra, {"dear": 3, "cheap": 1}, 3) == {"dear": 1, "cheap": 0}


@pytest.mark.parametrize("name", ["split_half", "whitened", "random_signs", "c_over_n", "energy"])
def test_rules_by_name_are_those_on_gradients(name):
    (first, second), signed = noisy_gradients(2000, 0)
    mean, rest = (first + second) / 2, (first - second) / 2
    values = jnp.linalg.svd(mean, compute_uv=False)
    rule = ranks.rule(name)
    assert name in ranks.rules() and rule.name == name and ranks.rule(rule) is rule
    floors = {"halves": jnp.linalg.norm(rest, 2), "signs": jnp.linalg.norm(signed, 2), "none": None}
    options = {
        "split_half": {"margin": 0},
        "whitened": {"margin": 0},
        "random_signs": {"margin": 0},
        "c_over_n": {"constant": 90},
    }
    found = rule(
        values, shape=SHAPE, samples=2000, floor=floors[rule.noise], **options.get(name, {})
    )
    want = {
        "split_half": lambda: ranks.split_half(first, second),
        "whitened": lambda: ranks.split_half(first, second),  # of whitened halves it is that rule
        "random_signs": lambda: ranks.random_signs(mean, signed),
        "c_over_n": lambda: ranks.RankEstimate(
            ranks.c_over_n(values, 2000, 90.0), values, jnp.asarray((90 / 2000) ** 0.5)
        ),
        "energy": lambda: ranks.RankEstimate(ranks.energy(values, 0.9), values, jnp.zeros(())),
    }[name]()
    assert int(found.rank) == int(want.rank)
    np.testing.assert_allclose(found.floor, want.floor, rtol=1e-12)


def test_any_function_of_spectra_is_a_rule():
    def needy(singular_values, *, samples, share):
        return jnp.sum(singular_values > share / samples, axis=-1)

    rule, values = ranks.rule(needy), spectrum(3.0, 2.0, 0.5)
    assert rule.noise == "none" and list(rule.options) == ["share"]
    assert int(rule(values, shape=(3, 3), samples=10, share=10.0).rank) == 2
    batch = ranks.rule("c_over_n")(
        jnp.stack([values, values / 4]), shape=(3, 3), samples=10, constant=10.0
    )
    assert batch.rank.tolist() == [2, 0] and batch.floor.shape == (2,)
    derived = ranks.rule("c_over_n")(values, shape=(4, 1), samples=9, noise=1.0)
    margin = ranks.edge_margin((4, 1))
    assert float(derived.floor) == pytest.approx((1 + margin) ** 0.5)


RULES = [
    (lambda: ranks.rule("best"), "rule is 'best'; it must be one of 'split_half'"),
    (lambda: ranks.rule(lambda values: values), "first argument is singular_values"),
    (
        lambda: ranks.rule("energy").check(constant=1.0),
        "'energy' has no constant; it takes fraction",
    ),
    (lambda: ranks.rule(lambda singular_values, share: 0).check(), "needs share"),
    (lambda: ranks.rule("split_half")(G[0], shape=(3, 2), samples=4), "needs the floor"),
    (lambda: ranks.rule("c_over_n")(G[0], shape=(3, 2), samples=4), "either constant or noise"),
    (
        lambda: ranks.rule("split_half")(G[0], shape=(3, 2), samples=4, floor=G[0, 0], margin=-1),
        "margin is -1",
    ),
]


@pytest.mark.parametrize(("call", "message"), RULES)
def test_what_is_no_rule_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rounding_leaves_a_floor_relative_to_the_largest_singular_value():
    eps = np.finfo(np.float64).eps
    found = ranks.rounding_floor(jnp.array([[3.0, 1.0], [0.0, 0.0]]), 10)
    np.testing.assert_allclose(found, [30 * eps, 0], rtol=1e-12)
    assert float(ranks.rounding_floor(jnp.zeros((0,)))) == 0
