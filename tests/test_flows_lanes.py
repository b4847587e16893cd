"""The engines for many flows at once, against one flow at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax
from lorajax import initializers
from lorajax.flows import NON_FINITE, STATUS, lanes, stepping
from lorajax.problems import TwoLayer, TwoLayerFactors

SCALES = jnp.array([1.0, 1e-3, 1e-8])


@pytest.fixture(scope="module")
def problem():
    spectrum = (4.0, 2.5, 1.0)
    return lorajax.MatrixFactorization.from_spectrum(jax.random.key(0), (24, 20), spectrum)


def starts(initializer, problem, rank):
    keys = jax.random.split(jax.random.key(1), SCALES.shape[0])
    return jax.vmap(lambda k, a: initializer(k, problem.shape, rank, a))(keys, SCALES)


@pytest.mark.parametrize(
    ("initializer", "rank"),
    [pytest.param(initializers.lora, 5, marks=pytest.mark.apart), (initializers.small, 2)],
)
def test_reduced_ode_agrees_with_gradient_flow(problem, initializer, rank):
    times = jnp.linspace(0.0, 20.0, 30)
    factors = starts(initializer, problem, rank)
    found, engine = lanes.spectra(problem, factors, times)
    assert engine == "reduced ODE" and not found.status.any()
    # A lane keeps 1e-8 with room to spare, so that its tolerance shows in its steps alone.
    told = lanes.spectra(problem, factors, times, rtol=3e-10)[0]
    np.testing.assert_array_equal(found.steps, told.steps)
    values = found.observed["singular_values"]
    for i in range(SCALES.shape[0]):
        one = lorajax.Factors(factors.a[i], factors.b[i])
        path = lorajax.gradient_flow(problem, one, times, rtol=1e-12)
        want = lorajax.spectra.singular_values(path)[:, : values.shape[-1]]
        np.testing.assert_allclose(values[i], want, atol=1e-8 * 4.0)


def test_spectra_takes_the_closed_form_where_it_can(problem):
    times = jnp.linspace(0.0, 20.0, 30)
    factors = starts(initializers.orthogonal, problem, 5)
    found, engine = lanes.spectra(problem, factors, times)
    assert engine == "closed form" and not found.steps.any()
    integrated = lanes.reduced_ode(problem, factors, times, one_sided=True)
    np.testing.assert_allclose(
        found.observed["singular_values"], integrated.observed["singular_values"], atol=4e-8
    )


def two_layers(rank_one: bool) -> TwoLayer:
    rng = np.random.default_rng(0)
    w1, w2 = rng.standard_normal((10, 12)) / 3, rng.standard_normal((8, 10)) / 3
    shift = np.outer(rng.standard_normal(8), rng.standard_normal(12))
    if not rank_one:
        shift = shift + 0.3 * rng.standard_normal((8, 12))
    return TwoLayer(jnp.asarray(w1), jnp.asarray(w2), jnp.asarray(shift))


@pytest.mark.parametrize("rank_one", [False, True])
def test_two_layer_agrees_with_gradient_flow(rank_one):
    problem, times = two_layers(rank_one), jnp.linspace(0.0, 4.0, 9)
    first, second = problem.shape
    keys = jax.random.split(jax.random.key(1), 3)

    def start(key, scale):
        one, two = jax.random.split(key)
        small = initializers.small
        return TwoLayerFactors(small(one, first, 3, scale), small(two, second, 3, scale))

    factors = jax.vmap(start)(keys, jnp.array([0.3, 1e-2, 1e-6]))
    found = lanes.full_ode(
        problem,
        factors,
        times,
        observe=lambda f: {
            "norm": lorajax.spectra.factor_norm(f.first),
            "entries": jnp.concatenate([f.second.a[:2, :2], f.second.b[:2, :2], f.first.a[:2, :2]]),
        },
        bucket=2,
    )
    assert not found.status.any()
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], factors)
        path = lorajax.gradient_flow(problem, one, times, rtol=1e-11)
        np.testing.assert_allclose(found.observed["losses"][i], path.losses, rtol=1e-7)
        norms = lorajax.spectra.factor_norm(path.core.first)
        np.testing.assert_allclose(found.observed["norm"][i], norms, rtol=1e-6)
        core = path.core
        entries = [x[:, :2, :2] for x in (core.second.a, core.second.b, core.first.a)]
        np.testing.assert_allclose(
            found.observed["entries"][i], jnp.concatenate(entries, axis=1), atol=1e-6
        )


def test_a_step_beyond_the_tolerance_is_not_taken():
    """Where the rate of v' = k(t)(1 − v) switches on, the next step is too long by any factor.

    A step may be off by atol + rtol in the root mean square of three entries, two of which are
    exact: by 2 √3 rtol in v. What earlier steps left decays as v settles, so twice that is allowed.
    """
    onset, rtol = jnp.linspace(0.5, 3.0, 24), 1e-6

    def field(state):
        clock, value, at = state.T
        rate = 40 * jax.nn.sigmoid(20 * (clock - at))
        return jnp.stack([jnp.ones_like(clock), rate * (1 - value), jnp.zeros_like(at)], axis=1)

    begin = jnp.full_like(onset, 1e-3)
    start = jnp.stack([begin, jnp.zeros_like(onset), onset], axis=1)
    times = jnp.array([1.0, 2.0, 3.0, 3.5])
    atol = jnp.full_like(onset, rtol)
    found = stepping.integrate(field, start, times, rtol, atol, lambda state: state[:, 1])

    def integral(clock):
        return 2 * np.logaddexp(0, 20 * (np.asarray(clock) - np.asarray(onset)[:, None]))

    want = -np.expm1(integral(begin[:, None]) - integral(times[None] + 1e-3))
    np.testing.assert_allclose(found.observed, want, rtol=0, atol=4 * 3**0.5 * rtol)


def test_tolerances_are_a_mean_over_entries_and_rise_together():
    def steps(start, rtol, atol):
        times = jnp.array([1.0, 4.0], start.dtype)
        atol = jnp.full((1,), atol, start.dtype)
        rtol = jnp.asarray(rtol, start.dtype)
        found = stepping.integrate(lambda y: -4 * y, start, times, rtol, atol, lambda y: y)
        return int(found.steps[0])

    # Copies of an entry leave the root mean square as it is.
    once = steps(jnp.ones((1, 1)), 1e-6, 1e-6)
    assert steps(jnp.ones((1, 4)), 1e-6, 1e-6) == once
    # Below rounding, rtol is raised to 8 units of it, and atol by the same factor.
    single, least = jnp.ones((1, 1), jnp.float32), 8 * float(jnp.finfo(jnp.float32).eps)
    assert steps(single, least / 2**10, 2.0**-30) == steps(single, least, 2.0**-20)


def test_full_ode_runs_any_problem():
    target = jnp.diag(jnp.array([2.0, 1.0, 0.5]))
    problem = lorajax.SymmetricFactorization(target)
    start = 0.1 * jax.random.normal(jax.random.key(0), (4, 3, 2))
    times = jnp.linspace(0.0, 5.0, 6)
    found = lanes.full_ode(problem, start, times)
    path = lorajax.gradient_flow(problem, start[1], times, rtol=1e-11)
    np.testing.assert_allclose(found.observed["losses"][1], path.losses, rtol=1e-7)


def test_a_lane_that_runs_out_of_steps_says_so_and_the_others_go_on(problem):
    factors = starts(initializers.lora, problem, 3)
    times = jnp.linspace(0.0, 20.0, 5)
    far = lorajax.Factors(factors.a.at[1].mul(1e6), factors.b)
    found = lanes.reduced_ode(problem, far, times, one_sided=True, max_steps=300)
    assert [STATUS[int(s)] for s in found.status] == ["converged", "max steps", "converged"]
    values = found.observed["singular_values"]
    assert jnp.isnan(values[1, -1]).all() and jnp.isfinite(values[::2]).all()
    spoiled = lorajax.Factors(factors.a.at[1, 0, 0].set(jnp.nan), factors.b)
    found = lanes.reduced_ode(problem, spoiled, times, one_sided=False)
    assert int(found.status[1]) == NON_FINITE and not found.status[::2].any()


def test_shapes_that_do_not_fit_are_named(problem):
    with pytest.raises(ValueError, match="lanes, m, r"):
        lanes.spectra(problem, initializers.lora(jax.random.key(0), (24, 20), 2), jnp.ones(1))


def test_lanes_may_have_units_of_time_of_their_own():
    problem = TwoLayer.pretrained(jax.random.key(3), 6, "top")
    small = functools.partial(initializers.small, rank=2, scale=1e-2)
    keys = jax.random.split(jax.random.key(1), 2)
    factors = jax.vmap(lambda key: problem.blind_start(small, key))(keys)
    units, grid = jnp.array([0.5, 2.0]), jnp.linspace(0.0, 1.0, 5)
    found = lanes.two_layer(problem, factors, grid, units=units)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], factors)
        path = lorajax.gradient_flow(problem, one, units[i] * grid, rtol=1e-11)
        losses = found.observed["losses"][i]
        np.testing.assert_allclose(losses, path.losses, rtol=1e-7, atol=1e-9 * losses[0])
