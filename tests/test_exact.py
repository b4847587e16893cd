"""The exact flows: the reduction, and both closed forms against a tight ODE solve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import lorajax
from lorajax import initializers
from lorajax.exact import balance, is_balanced, lanes, reduce
from lorajax.exact.jacobi import counted, jacobi

SPECTRUM = (4.0, 2.5, 1.0)
SHAPE = (14, 12)

one_sided, two_sided = jax.jit(lanes.one_sided), jax.jit(lanes.two_sided)
values_of, losses_of = jax.jit(lanes.singular_values), jax.jit(lanes.losses)


def problem_of(spectrum=SPECTRUM, shape=SHAPE):
    return lorajax.MatrixFactorization.from_spectrum(jax.random.key(3), shape, spectrum)


def tight_ode(problem, factors, times):
    """Singular values by DOP853 at its tightest, written down without the library's field."""
    reduced = reduce(problem, factors)
    s, core = np.diag(np.asarray(reduced.problem.singular_values)), reduced.factors
    (p, r), q, k = core.a.shape, core.b.shape[1], s.shape[0]
    target = np.zeros((p, q))
    target[:k, :k] = s
    scale = max(float(jnp.max(jnp.abs(core.a))), float(jnp.max(jnp.abs(core.b))))

    def field(t, z):
        a, b = z[: p * r].reshape(p, r), z[p * r :].reshape(r, q)
        return np.concatenate([(target @ b.T - a @ (b @ b.T)).ravel(),
                               (a.T @ target - (a.T @ a) @ b).ravel()])  # fmt: skip

    start = np.concatenate([np.asarray(core.a).ravel(), np.asarray(core.b).ravel()])
    solution = scipy.integrate.solve_ivp(
        field, (0, times[-1]), start, "DOP853", times, rtol=1e-13, atol=1e-15 * scale
    )
    paths = solution.y.T
    products = [z[: p * r].reshape(p, r) @ z[p * r :].reshape(r, q) for z in paths]
    return np.stack([np.linalg.svd(x, compute_uv=False)[: min(k, r)] for x in products])


def by_steps(problem, factors, times):
    return lorajax.spectra.singular_values(lorajax.balanced_flow(problem, factors, times))


def by_one_sided_lanes(problem, factors, times):
    level = balance(factors)[0]
    along = problem.u.T @ factors.a
    form = one_sided(problem.singular_values[None], level[None], along[None])
    return values_of(form, times)[0]


def by_two_sided_lanes(problem, factors, times):
    reduced, level = reduce(problem, factors), balance(factors)[0]
    first = jax.tree.map(lambda x: x[None], (reduced.problem, reduced.factors, level))
    return values_of(two_sided(*first), times)[0]


ONE_SIDED = {"steps": by_steps, "lanes": by_one_sided_lanes}
TWO_SIDED = {"steps": by_steps, "lanes": by_two_sided_lanes}
# To t = 40/s_1 and to 20/s_k.
TIMES = np.union1d(np.linspace(0, 40 / SPECTRUM[0], 21), np.linspace(0, 20 / SPECTRUM[-1], 21))


@functools.lru_cache
def truth(kind, rank, scale):
    problem, start = problem_of(), start_of(kind, rank, scale)
    return tight_ode(problem, start, TIMES)


def start_of(kind, rank, scale):
    problem, key = problem_of(), jax.random.key(rank)
    if kind == "spectral":
        return initializers.spectral(problem.target, rank, scale)
    start = getattr(initializers, kind.split()[0])(key, SHAPE, rank, scale)
    if kind == "orthogonal turned":
        turned = initializers.orthogonal(key, SHAPE[::-1], rank, scale)
        start = lorajax.Factors(jnp.zeros((SHAPE[0], rank)), turned.a.T)
    return start


@pytest.mark.parametrize("engine", ["steps", "lanes"])
@pytest.mark.parametrize("rank", [2, 3, 5])  # below, at and above k
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-8])
def test_lora_starts_follow_the_ode(engine, rank, scale):
    found = ONE_SIDED[engine](problem_of(), start_of("orthogonal", rank, scale), jnp.asarray(TIMES))
    want = truth("orthogonal", rank, scale)
    np.testing.assert_allclose(found[:, : want.shape[1]], want, atol=1e-9 * SPECTRUM[0])


@pytest.mark.parametrize("engine", ["steps", "lanes"])
@pytest.mark.parametrize("kind", ["balanced", "orthogonal turned", "spectral"])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_starts_in_both_factors_follow_the_ode(engine, kind, scale):
    for rank in (2, 4):
        found = TWO_SIDED[engine](problem_of(), start_of(kind, rank, scale), jnp.asarray(TIMES))
        want = truth(kind, rank, scale)
        np.testing.assert_allclose(found[:, : want.shape[1]], want, atol=1e-9 * SPECTRUM[0])


@pytest.mark.parametrize("engine", ["steps", "lanes"])
@pytest.mark.parametrize("sizes", [(0.6, 0.3), (0.3, 0.6)])
def test_unequal_factors_of_a_matrix_with_few_rows_follow_the_ode(engine, sizes):
    """λ of either sign with both factors filled, and more across the columns than the rows."""
    problem, keys = problem_of(shape=(4, 12)), jax.random.split(jax.random.key(0))
    left, right = (
        initializers.orthogonal(key, (n, n), 4, size).a
        for key, n, size in zip(keys, (4, 12), sizes, strict=True)
    )
    start, times = lorajax.Factors(left, right.T), np.linspace(0, 4, 9)
    found = TWO_SIDED[engine](problem, start, jnp.asarray(times))
    want = tight_ode(problem, start, times)
    np.testing.assert_allclose(found[:, : want.shape[1]], want, atol=1e-9 * SPECTRUM[0])
    if engine == "steps":
        path = lorajax.balanced_flow(problem, start, jnp.asarray(times))
        assert float(path.drift) < 1e-12


def test_the_closed_form_keeps_its_digits_at_early_times():
    """One entry a factor is one mode; C is 1 + (2κt)…, whose series must end where it is exact."""
    one = jnp.ones((1, 1))
    problem = lorajax.MatrixFactorization(one, jnp.array([2.0]), one)
    times = jnp.logspace(-6, 0, 13)
    found = lorajax.balanced_flow(problem, lorajax.Factors(1.5 * one, 0 * one), times)
    want = lorajax.laws.lora_mode(times, 2.0, 1.5)
    # Growing and decaying parts cancel, which leaves the rounding of a² = 2.25.
    np.testing.assert_allclose(found.core.product[:, 0, 0], want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("columns", [1, 4, 9])
def test_jacobi_finds_singular_values(columns):
    matrices = np.random.default_rng(0).standard_normal((columns, 14, 6))
    matrices[:, :, 0] *= np.logspace(0, -12, columns)[:, None]  # graded columns
    matrices[columns // 2, :, 1] = 0
    found = jax.jit(jacobi)(jnp.asarray(matrices))
    for i in range(6):
        want = np.linalg.svd(matrices[:, :, i], compute_uv=False)
        np.testing.assert_allclose(found[:, i], want, atol=1e-14 * want[0])
    graded = np.linalg.svd(matrices[:, :, 0], compute_uv=False)
    if columns > 1:
        np.testing.assert_allclose(found[-1, 0], graded[-1], rtol=1e-2)


@pytest.mark.parametrize("columns", [4, 9])
def test_jacobi_goes_on_where_columns_are_nearly_orthogonal(columns):
    """Cosines of 1e-3: to stop after one sweep would leave errors of 1e-10 and more."""
    draw = np.random.default_rng(0)
    frame = np.linalg.qr(draw.standard_normal((14, columns)))[0] * np.linspace(1, 2, columns)
    matrix = frame @ (np.eye(columns) + 6e-4 * draw.uniform(-1, 1, (columns, columns)))
    found = jax.jit(jacobi)(jnp.asarray(matrix.T)[:, :, None])[:, 0]
    want = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("second", [(0.6, 0.9), (0.6, -0.7), (-0.4, 0.95)])
def test_one_rotation_makes_two_columns_orthogonal(second):
    """So that the second sweep finds nothing, whichever is the longer and at whatever angle."""
    columns = jnp.array([(1.0, 0.0), second])[:, :, None]
    want = np.linalg.svd(columns[:, :, 0], compute_uv=False)
    for given in (list(columns), columns):  # written out, and in a loop
        found, sweeps = counted(given)
        assert int(sweeps) == 2
        np.testing.assert_allclose(found[:, 0], want, rtol=1e-14)


def test_large_ranks_take_the_looped_path():
    spectrum = tuple(np.linspace(4, 1, 9))
    problem = problem_of(spectrum, (20, 18))
    start = initializers.orthogonal(jax.random.key(0), (20, 18), 9, 1e-3)
    times = jnp.linspace(0, 20, 9)
    found = by_one_sided_lanes(problem, start, times)
    want = by_steps(problem, start, times)
    np.testing.assert_allclose(found, want, atol=1e-12)


@pytest.mark.parametrize("kind", ["orthogonal", "balanced"])
def test_losses_of_lanes(kind):
    problem, start = problem_of(), start_of(kind, 5, 1e-2)
    times = jnp.asarray(TIMES)
    path = lorajax.balanced_flow(problem, start, times)
    reduced, level = reduce(problem, start), balance(start)[0]
    first = jax.tree.map(lambda x: x[None], (reduced.problem, reduced.factors, level))
    forms = [two_sided(*first)]
    if kind == "orthogonal":
        along = (problem.u.T @ start.a)[None]
        forms.append(one_sided(problem.singular_values[None], level[None], along))
    for form in forms:
        np.testing.assert_allclose(losses_of(form, times)[0], path.losses, atol=1e-12, rtol=1e-9)


def test_a_start_along_some_modes_leaves_the_others_at_zero():
    # Exactly 0 along mode 1: a rounding error there would have grown to it by then.
    along = jnp.zeros((1, 3, 2)).at[0, 1, 0].set(1e-3).at[0, 2, 1].set(1e-3)
    form = one_sided(jnp.array([SPECTRUM]), jnp.array([1e-6]), along)
    found = values_of(form, jnp.array([0.0, 5.0, 40.0]))[0]
    np.testing.assert_allclose(found[-1], SPECTRUM[1:], atol=1e-9)


def test_lanes_do_not_depend_on_their_neighbors():
    problem = problem_of()
    starts = [start_of("orthogonal", 5, scale) for scale in (1.0, 1e-4, 1e-8)] * 40
    along = jnp.stack([problem.u.T @ f.a for f in starts])
    level = jnp.stack([balance(f)[0] for f in starts])
    s = jnp.broadcast_to(problem.singular_values, (120, 3))
    times = jnp.linspace(0, 20, 7)
    whole = values_of(one_sided(s, level, along), times)
    for i in (0, 1, 119):
        form = one_sided(s[i : i + 1], level[i : i + 1], along[i : i + 1])
        alone = values_of(form, times)[0]
        np.testing.assert_allclose(whole[i], alone, atol=1e-13)


def test_the_reduced_flow_lifts_to_the_full_one():
    problem, times = problem_of(), jnp.linspace(0, 6, 4)
    start = initializers.small(jax.random.key(0), SHAPE, 3, 0.3)
    full = lorajax.gradient_flow(problem, start, times, reduced=False, rtol=1e-11)
    reduced = lorajax.gradient_flow(problem, start, times, reduced=True, rtol=1e-11)
    np.testing.assert_allclose(reduced.factors.a, full.factors.a, atol=1e-9)
    np.testing.assert_allclose(reduced.factors.b, full.factors.b, atol=1e-9)
    assert reduce(problem, start).problem.shape == (6, 6)


def test_balance_tells_what_the_closed_form_solves():
    key = jax.random.key(0)
    assert bool(is_balanced(initializers.orthogonal(key, SHAPE, 3, 1e-3)))
    gaussian = initializers.lora(key, SHAPE, 3, 1e-3)
    assert not bool(is_balanced(gaussian))
    with pytest.raises(ValueError, match="multiple of the identity"):
        lorajax.balanced_flow(problem_of(), gaussian, jnp.ones(1))
    even = initializers.orthogonal(key, SHAPE, 3, 1e-3)
    nearly = even._replace(a=even.a.at[0, 0].add(1e-11))  # 1e-8 of its norm: far above rounding
    assert not bool(is_balanced(nearly))
    both = jax.vmap(lambda k: initializers.orthogonal(k, SHAPE, 3))(jax.random.split(key, 4))
    assert is_balanced(both).shape == (4,)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([], "at least one"),
        ([1.0, 0.5], "must increase"),
        ([-1.0], "start at"),
        ([[0.0]], "vector"),
    ],
)
def test_bad_times_are_named(times, words):
    with pytest.raises(ValueError, match=words):
        lorajax.problems.check_times(np.array(times))
