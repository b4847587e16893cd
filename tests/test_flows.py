import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate

import lorajax
from lorajax import (
    Factors,
    MatrixFactorization,
    TwoLayer,
    TwoLayerFactors,
    flows,
    initializers,
    laws,
    spectra,
)
from lorajax.flows import lanes, stepping
from lorajax.flows.gradient import amplitude

TIMES = np.linspace(0.0, 12.0, 61)


@pytest.fixture
def problem(key):
    return MatrixFactorization.from_spectrum(key, (20, 15), (4.0, 2.0, 1.0))


@pytest.fixture
def start(problem):
    return initializers.lora(jax.random.key(5), problem.shape, 4, scale=0.1)


def test_flow_agrees_with_an_independent_solver(problem, start):
    target = np.asarray(problem.target)
    m, n = problem.shape

    def residual_form(_, y):
        a, b = y[: m * 4].reshape(m, 4), y[m * 4 :].reshape(4, n)
        rest = target - a @ b
        return np.concatenate([(rest @ b.T).ravel(), (a.T @ rest).ravel()])

    y0 = np.concatenate([np.ravel(x) for x in start])
    reference = scipy.integrate.solve_ivp(
        residual_form, (0, TIMES[-1]), y0, "DOP853", TIMES, rtol=1e-11, atol=1e-13
    ).y.T
    for reduced in (True, False):
        path = flows.gradient_flow(problem, start, TIMES, rtol=1e-10, reduced=reduced)
        found = np.concatenate([x.reshape(len(TIMES), -1) for x in path.factors], axis=1)
        assert path.converged
        np.testing.assert_allclose(found, reference, atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-12, 1e-20])
def test_escape_is_right_at_any_scale(scale):
    """At a fixed atol of 1e-6 it is not (theory section 8, and test_promises.py)."""
    s = 2.0
    problem = MatrixFactorization(jnp.ones((1, 1)), jnp.array([s]), jnp.ones((1, 1)))
    factors = Factors(jnp.full((1, 1), scale), jnp.zeros((1, 1)))
    last = 3.0 + float(np.log(1 / scale)) / s * 1.5
    times = np.linspace(0.0, last, 201)
    path = flows.gradient_flow(problem, factors, times)
    found = path.core.product[:, 0, 0]
    law = laws.lora_mode(times, s, scale)
    # The sup error of σ bounds the error of the escape time through the slope s²/2 at s/2.
    np.testing.assert_allclose(found, law, atol=2e-6)
    late = np.asarray(law) > 1e-3
    assert late.any() and path.converged


def test_float32_stays_float32(problem, start):
    problem32, start32 = jax.tree.map(lambda x: x.astype(jnp.float32), (problem, start))
    path = flows.gradient_flow(problem32, start32, TIMES)
    assert {x.dtype for x in jax.tree.leaves((path.core, path.times))} == {jnp.dtype("float32")}
    exact = flows.gradient_flow(problem, start, TIMES)
    found, expected = spectra.singular_values(path), spectra.singular_values(exact)
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_a_tolerance_is_that_of_the_solver(problem, start):
    """The steps are those of diffrax at the same rtol, with atol in units of the largest entry."""

    def slope(_t, y, _args):
        return jax.tree.map(jnp.negative, problem.gradient(y))

    largest = max(float(jnp.abs(x).max()) for x in start)
    times = jnp.asarray(TIMES)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(slope),
        diffrax.Dopri8(),
        times[0],
        times[-1],
        None,
        start,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5 * largest),
    )
    path = flows.gradient_flow(problem, start, TIMES, rtol=1e-5, reduced=False)
    assert int(path.steps) == int(solution.stats["num_steps"])
    np.testing.assert_allclose(path.core.a, solution.ys.a, atol=1e-12)


def test_numbers_change_without_a_new_trace(problem, start, traces):
    default = flows.gradient_flow(problem, start, TIMES)
    explicit = flows.gradient_flow(problem, start, TIMES, rtol=1e-8)
    assert int(default.steps) == int(explicit.steps)
    np.testing.assert_array_equal(default.core.a, explicit.core.a)
    with traces() as names:
        other = jax.tree.map(lambda x: 2.0 * x, start)
        flows.gradient_flow(problem, other, 0.5 * TIMES, rtol=1e-7, weight_decay=0.1, b_rate=2.0)
    assert "_integrate" not in names


def test_lanes_of_a_vmap_keep_their_own_tolerance(problem):
    scales = jnp.array([1e-1, 1e-6, 1e-12])
    base = initializers.lora(jax.random.key(5), problem.shape, 2, scale=1.0)
    times = np.linspace(0.0, 25.0, 51)

    def run(scale):
        path = flows.gradient_flow(problem, Factors(scale * base.a, base.b), times)
        return spectra.singular_values(path), path.status

    values, status = jax.jit(jax.vmap(run))(scales)
    assert not status.any()
    for i, scale in enumerate(scales):
        np.testing.assert_allclose(values[i], run(scale)[0], atol=1e-6)


def test_too_few_steps_are_a_status_and_not_an_exception(problem, start):
    path = flows.gradient_flow(problem, start, TIMES, max_steps=16)
    assert int(path.status) == flows.MAX_STEPS and not path.converged
    assert "max steps" in path.describe()
    assert bool(jnp.isnan(path.core.a[-1]).all()) and bool(jnp.isfinite(path.core.a[0]).all())


def test_a_descent_that_blows_up_is_marked(problem, start):
    path = flows.descend(problem, start, optax.sgd(5.0), 40, learning_rate=5.0)
    assert int(path.status) == flows.NON_FINITE
    good = flows.descend(problem, start, optax.sgd(0.05), 40, learning_rate=0.05)
    assert good.converged


def test_adam_runs_and_breaks_the_balance(problem, start):
    # optax's own bias correction mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        path = flows.descend(problem, start, optax.adam(1e-2), 200, every=50)
    assert path.converged and float(path.losses[-1]) < 0.5 * float(path.losses[0])
    assert float(spectra.imbalance_drift(path)) > 1e-2


def test_reduced_descent_equals_the_full_one(problem, start):
    for optimizer in (optax.sgd(0.05, momentum=0.5), flows.lora_plus(0.05, 4.0)):
        full = flows.descend(problem, start, optimizer, 30, every=30)
        reduced = flows.descend(problem, start, optimizer, 30, every=30, reduced=True)
        np.testing.assert_allclose(reduced.factors.product, full.factors.product, atol=1e-12)


def test_lora_plus_multiplies_the_step_of_b_alone(start):
    gradient = jax.tree.map(jnp.ones_like, start)
    optimizer = flows.lora_plus(0.1, 4.0)
    updates, _ = optimizer.update(gradient, optimizer.init(start), start)
    np.testing.assert_allclose(updates.a, -0.1)
    np.testing.assert_allclose(updates.b, -0.4)


def test_spectral_descent_steps_have_unit_singular_values(key):
    gradient = Factors(jax.random.normal(key, (6, 3)), jax.random.normal(key, (3, 5)))
    optimizer = flows.spectral_descent(1.0)
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    for update in updates:
        np.testing.assert_allclose(jnp.linalg.svd(update, compute_uv=False), 1.0, atol=1e-12)


def test_accelerated_descent_restarts_where_it_points_uphill():
    """Nesterov with the gradient's restart, written for one array."""
    curvatures, rate, steps = np.array([1.0, 0.02]), 0.9, 60
    y = last = np.ones(2)
    t, restarts, want = 1.0, 0, []
    for _ in range(steps):
        slope = curvatures * y
        reached = y - rate * slope
        if slope @ (reached - last) > 0:
            y, t, restarts = reached, 1.0, restarts + 1
        else:
            after = (1 + (1 + 4 * t * t) ** 0.5) / 2
            y, t = reached + (t - 1) / after * (reached - last), after
        last = reached
        want.append(y)
    optimizer, start = flows.accelerated(rate), jnp.ones(2)

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(curvatures * x, state, x)
        return (x + updates, state), x + updates

    found = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)[1]
    np.testing.assert_allclose(found, np.array(want), atol=1e-12)
    assert 2 <= restarts < steps / 4


def test_sequential_descent_uses_the_new_left_factor(problem, start):
    step, start = 0.03, start._replace(b=0.1 * start.a[: problem.shape[1]].T)  # B = 0 hides it
    path = flows.sequential_descent(problem, start, step, 1)
    a = start.a - step * problem.gradient(start).a
    b = start.b - step * problem.gradient(Factors(a, start.b)).b
    assert float(jnp.max(jnp.abs(b - start.b + step * problem.gradient(start).b))) > 1e-6
    np.testing.assert_allclose(path.core.a[1], a, atol=1e-15)
    np.testing.assert_allclose(path.core.b[1], b, atol=1e-15)


def test_solve_says_what_it_chose(problem, start, key):
    even = initializers.orthogonal(key, problem.shape, 4, scale=0.1)
    expected = {"closed form": even, "reduced ODE": start}
    for method, factors in expected.items():
        path, plan = flows.solve(problem, factors, TIMES)
        assert plan.engine == method and plan.flops > 0 and plan.reason in str(plan)
        insisted, other = flows.solve(problem, factors, TIMES, engine="full ODE", rtol=1e-10)
        assert other.engine == "full ODE"
        np.testing.assert_allclose(path.factors.product, insisted.factors.product, atol=1e-6)
    layers = TwoLayer(jnp.eye(3), jnp.eye(3), jnp.eye(3))
    small = initializers.small(key, (3, 3), 1, 0.1)
    assert flows.plan(layers, TwoLayerFactors(small, small), TIMES).engine == "full ODE"


BAD_TIMES = {
    "go from 1.0 to 1.0": [0.0, 1.0, 1.0],
    "start at -1.0": [-1.0, 1.0],
    "must be a vector": [[0.0, 1.0]],
}


@pytest.mark.parametrize("message", BAD_TIMES)
@pytest.mark.parametrize("run", [flows.gradient_flow, flows.balanced_flow, flows.solve])
def test_bad_times_are_refused(run, message, problem, key):
    factors = initializers.orthogonal(key, problem.shape, 2, 0.1)
    with pytest.raises(ValueError, match=message):
        run(problem, factors, np.array(BAD_TIMES[message]))


@pytest.mark.parametrize("run", [flows.gradient_flow, flows.balanced_flow, flows.solve])
def test_bad_starts_are_refused(run, problem, start):
    zero = jax.tree.map(jnp.zeros_like, start)
    holes = Factors(start.a.at[0, 0].set(jnp.nan), start.b)
    wrong = Factors(start.a[:-1], start.b)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), start)
    for factors, message in (
        (zero, "both zero"),
        (holes, "NaN or infinite"),
        (wrong, r"problem has shape \(20, 15\)"),
        (single, "dtype float32"),
    ):
        with pytest.raises(ValueError, match=message):
            run(problem, factors, TIMES)


def test_starts_that_are_not_balanced_have_no_closed_form(problem, start):
    with pytest.raises(ValueError, match="off a multiple of the identity"):
        flows.balanced_flow(problem, start, TIMES)


def test_bad_options_are_refused(problem, start):
    with pytest.raises(ValueError, match="rtol is 0"):
        flows.gradient_flow(problem, start, TIMES, rtol=0.0)
    with pytest.raises(ValueError, match="steps is 0"):
        flows.descend(problem, start, optax.sgd(0.1), 0)
    with pytest.raises(ValueError, match="every is 3"):
        flows.descend(problem, start, optax.sgd(0.1), 10, every=3)
    with pytest.raises(ValueError, match="has no reduction"):
        small = initializers.small(jax.random.key(0), (3, 3), 1, 0.1)
        layers = TwoLayer(jnp.eye(3), jnp.eye(3), jnp.eye(3))
        flows.gradient_flow(layers, TwoLayerFactors(small, small), TIMES, reduced=True)
    with pytest.raises(ValueError, match="ratio is -1"):
        flows.lora_plus(0.1, -1.0)


def test_large_problems_cost_what_small_ones_do():
    """Same answer for a 1024×1024 target of rank 2 as for its 6×6 core, and no 1024×1024 array."""
    key = jax.random.key(0)
    problem = MatrixFactorization.from_spectrum(key, (1024, 1024), (3.0, 1.0))
    factors = initializers.lora(key, problem.shape, 4, scale=0.1)
    path = lorajax.gradient_flow(problem, factors, TIMES)
    assert path.core.a.shape == (61, 6, 4)
    assert max(x.size for x in jax.tree.leaves(path)) <= 1024 * 6
    law = laws.lora_modes(problem, factors, path.times)
    np.testing.assert_allclose(spectra.singular_values(path)[:, :2], law, atol=0.05)


def test_a_tucker_update_flows_from_a_core_of_zeros_and_not_from_two(key):
    problem = lorajax.TuckerFactorization.from_spectrum(key, (5, 4, 3), (2.0,))
    start = initializers.superdiagonal(problem.target, 1, 0.5)
    resting = start._replace(core=jnp.zeros_like(start.core))
    path = lorajax.gradient_flow(problem, resting, np.linspace(0.0, 12.0, 3))
    assert path.converged and float(path.losses[-1]) < 1e-12
    stuck = resting._replace(factors=(*start.factors[:2], jnp.zeros_like(start.factors[2])))
    with pytest.raises(ValueError, match="all but at most one"):
        lorajax.gradient_flow(problem, stuck, np.linspace(0.0, 1.0, 3))


def test_allora_is_the_same_rule_for_a_problem_and_for_a_model(key):
    from lorajax import adapters

    params = initializers.small(key, (6, 5), 2, 0.7)
    grads = initializers.small(jax.random.fold_in(key, 1), (6, 5), 2, 1.0)
    rule = flows.allora(1.0, eta=3.0)
    updates, _ = rule.update(grads, rule.init(params), params)
    norms = jnp.linalg.norm(params.product, axis=0)
    np.testing.assert_allclose(updates.a, -grads.a)
    np.testing.assert_allclose(updates.b, -grads.b / jnp.sqrt(norms + 1 / 9)[None], rtol=1e-10)
    place = lambda pair: {"adapters": {"default": pair._asdict()}}  # noqa: E731
    same = adapters.allora(3.0)
    scaled, _ = same.update(place(grads), same.init(place(params)), place(params))
    found = scaled["adapters"]["default"]["b"]
    np.testing.assert_allclose(found, -updates.b, rtol=1e-12)
    with pytest.raises(ValueError, match="eta"):
        flows.allora(1.0, eta=0.0)


def moving(x, start, flow, kind):
    """What a flow ends in, as start, scale, spectrum, target and times all move with x."""
    shape, rank = start.shape, start.rank
    draws = [jax.random.normal(jax.random.key(i), (n, 6)) for i, n in enumerate(shape)]
    frames = [jnp.linalg.qr(draw)[0] for draw in draws]
    # Along such a curve the target's frames stay orthonormal.
    u, v = (jnp.cos(x) * q[:, :3] + jnp.sin(x) * q[:, 3:] for q in frames)
    values = jnp.array([4.0, 2.0, 1.0]) * (1 + x * jnp.array([1, 0.5, -1]))
    problem = MatrixFactorization(u, values, v)
    aside = initializers.small(jax.random.key(9), shape, rank, 1.0)
    if kind == "closed form":  # which starts there are is narrower: they stay balanced
        free = jnp.where(jnp.any(start.b), 0.0, 1.0)
        moved = Factors((1 + x) * start.a, start.b + x * free * aside.b)
    else:
        moved = jax.tree.map(lambda s, d: (1 + x) * s + x * d, start, aside)
    path = flow(problem, moved, jnp.array([0.2, 0.8, 2.0]) * (1 + x))
    weight = jax.random.normal(jax.random.key(3), (3, *shape))
    # A singular value that is 0 has no derivative, and one of the starts has but two.
    values = spectra.singular_values(path)[:, :2] * jnp.arange(1.0, 7.0).reshape(3, 2)
    product = jnp.sum(path.factors.product * weight)
    return jnp.stack([product, jnp.sum(path.losses), jnp.sum(values)])


def starts_of_all_kinds(shape, rank):
    """LoRA's own (B = 0), one with A = 0, one of less than full rank, and a generic one."""
    generic = initializers.small(jax.random.key(1), shape, rank, 0.3)
    zero = jax.tree.map(jnp.zeros_like, generic)
    less = Factors(generic.a.at[:, 1].set(generic.a[:, 0]), zero.b.at[0].set(generic.b[0]))
    starts = (generic._replace(b=zero.b), generic._replace(a=zero.a), less, generic)
    return jax.tree.map(lambda *x: jnp.stack(x), *starts)


def end_of_flow(reduced, adjoint=None):
    """What `moving` makes of a flow, as a function of how far its data have moved, and a start."""
    # A solver of half as many stages compiles in half the time.
    options = {"rtol": 1e-10, "solver": diffrax.Tsit5(), "adjoint": adjoint}
    run = functools.partial(flows.gradient_flow, reduced=reduced, **options)
    return lambda x, start: moving(x, start, run, "ODE")


def with_slope(value):
    """`value` and its derivative in its first argument, as one program for all lanes."""
    slope = lambda x, lane: jax.jvp(lambda y: value(y, lane), (x,), (1.0,))  # noqa: E731
    return jax.jit(jax.vmap(slope, (None, 0)))


@pytest.mark.parametrize("reduced", [pytest.param(True, marks=pytest.mark.apart), False])
def test_derivatives_are_those_of_differences(reduced):
    starts, run = starts_of_all_kinds((9, 8), 3), with_slope(end_of_flow(reduced))
    want = (run(1e-4, starts)[0] - run(-1e-4, starts)[0]) / 2e-4
    np.testing.assert_allclose(run(0.0, starts)[1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.apart
def test_derivatives_backward_are_those_forward():
    starts, adjoint = starts_of_all_kinds((9, 8), 3), diffrax.RecursiveCheckpointAdjoint()
    want = with_slope(end_of_flow(True))(0.0, starts)[1]
    total = lambda x, start: jnp.sum(end_of_flow(True, adjoint)(x, start))  # noqa: E731
    backward = jax.jit(jax.vmap(jax.grad(total), (None, 0)))(0.0, starts)
    np.testing.assert_allclose(backward, want.sum(axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [pytest.param("orthogonal", marks=pytest.mark.apart), "spectral"])
def test_derivatives_of_the_closed_form_are_those_of_the_flow(kind, key):
    shape = (9, 8)
    if kind == "orthogonal":
        start = initializers.orthogonal(key, shape, 3, 0.3)
    else:
        target = jax.random.normal(key, shape)
        start = initializers.spectral(target, 3, 0.3)
        value = spectra.singular_values(start)  # equal values keep AᵀA − BBᵀ a multiple of I
        root = value[None, :3] ** 0.5
        start = Factors(start.a / root, (start.b.T / root).T)

    def value(x, flow):
        return moving(x, start, flow, "closed form")

    closed = lambda x: value(x, flows.balanced_flow)  # noqa: E731
    forward = jax.jit(lambda: jax.jvp(closed, (0.0,), (1.0,))[1])()
    backward = jax.jit(lambda: jax.grad(lambda x: jnp.sum(closed(x)))(0.0))()
    integrated = lambda x: value(x, lambda *a: flows.gradient_flow(*a, rtol=1e-10))  # noqa: E731
    want = jax.jit(lambda h: (integrated(h) - integrated(-h)) / (2 * h))(1e-4)
    np.testing.assert_allclose(forward, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(backward, want.sum(), rtol=1e-4, atol=1e-4)


def test_derivatives_of_a_descent_do_not_depend_on_the_frames():
    start = jax.tree.map(lambda x: x[0], starts_of_all_kinds((9, 8), 3))

    def slope(reduced):
        def run(problem, factors, times):
            del times
            optimizer = optax.sgd(0.05, momentum=0.5)
            return flows.descend(problem, factors, optimizer, 8, every=4, reduced=reduced)

        # The path holds its start, whose product is 0, where singular values have no derivative.
        found = lambda x: moving(x, start, run, "GD")[:2]  # noqa: E731
        return jax.jit(lambda: jax.jvp(found, (0.0,), (1.0,))[1])()

    np.testing.assert_allclose(slope(True), slope(False), rtol=1e-9)


def test_a_traced_start_that_is_not_balanced_ends_in_a_status(problem, start):
    path = jax.jit(lambda start: flows.balanced_flow(problem, start, TIMES))(start)
    assert flows.STATUS[int(path.status)] == "unbalanced" and "unbalanced" in path.describe()
    assert bool(jnp.isnan(path.core.a).all())
    solved = jax.jit(lambda start: flows.solve(problem, start, TIMES)[0])(start)
    assert solved.converged


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.apart), 1e-5])
def test_a_factor_of_zeros_is_zero_at_the_start(problem, key, scale):
    """Rounding in place of B = 0 has a spectrum, whose effective rank was 2.8 and not 0."""
    start = initializers.orthogonal(key, problem.shape, 4, scale)
    turned = initializers.orthogonal(key, problem.shape[::-1], 4, scale).a.T
    turned = Factors(jnp.zeros_like(start.a), turned)
    times = np.array([0.0, 0.5])
    runs = [(flows.balanced_flow, start), (flows.balanced_flow, turned)]
    for flow, begin in (*runs, (flows.gradient_flow, start)):
        values = spectra.singular_values(flow(problem, begin, times))
        assert not np.any(values[0]) and np.all(values[1, :3] > 0)
        np.testing.assert_array_equal(spectra.effective_rank(values)[0], 0)
    both = jax.tree.map(lambda x: x[None], start)
    for one_sided in (True, False):
        found = lanes.closed_form(problem, both, jnp.asarray(times), one_sided=one_sided)
        values = found.observed["singular_values"][0]
        assert not np.any(values[0]) and np.all(values[1, :3] > 0)


def test_the_closed_form_takes_one_step_however_late(problem, key):
    times = np.array([1.0, 1e6, 1e10, 1e15])
    path = flows.balanced_flow(problem, initializers.orthogonal(key, problem.shape, 4, 1e-3), times)
    assert path.converged and int(path.steps) == 4
    np.testing.assert_allclose(spectra.singular_values(path)[-1, :3], [4, 2, 1], rtol=1e-12)
    # Directions that the target lacks fall as m0/(1 + 2 m0 t), whatever the horizon.
    both = initializers.balanced(key, problem.shape, 5, 1e-3)
    late = spectra.singular_values(flows.balanced_flow(problem, both, times))
    np.testing.assert_allclose(late[2, 3:], 0.5e-10, rtol=1e-3)


def test_a_flow_reports_how_far_it_leaves_its_law(problem, start):
    path = flows.gradient_flow(problem, start, TIMES, weight_decay=0.1)
    seen = spectra.imbalance(path) * jnp.exp(0.2 * jnp.asarray(TIMES))[:, None, None]
    assert 0 < float(path.drift) < 1e-7 and path.keeps_law and "drifted by" in path.describe()
    np.testing.assert_allclose(seen, seen[:1] + jnp.zeros_like(seen), atol=1e-6)
    plus = flows.gradient_flow(problem, start, TIMES, b_rate=4.0)
    assert float(plus.drift) < 1e-7
    loose = flows.gradient_flow(problem, start, TIMES, rtol=1e-2)
    assert not loose.keeps_law and "beyond the precision of float64" in loose.describe()
    descent = flows.descend(problem, start, optax.sgd(0.1), 60, every=10)
    assert float(descent.drift) == pytest.approx(float(spectra.imbalance_drift(descent)), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_lane_fails_only_where_its_own_time_stands_still(dtype):
    times = jnp.array([0.0, 1.0, 1e4], dtype)
    start = jnp.array([[1.0, 2.0], [1.0, jnp.nan]], dtype)
    rtol, atol = jnp.asarray(3e-10, dtype), jnp.full((2,), 3e-10, dtype)
    found = stepping.integrate(lambda y: -4 * y, start, times, rtol, atol, lambda y: y)
    assert found.status.tolist() == [flows.CONVERGED, flows.NON_FINITE]
    # Each step may be off by atol and rtol of the value.
    steps = int(found.steps[0])
    accuracy = 1e-5 if dtype == "float32" else steps * 3e-10 * (1 + np.exp(4.0))
    np.testing.assert_allclose(found.observed[0, 1], np.exp(-4) * np.array([1, 2]), rtol=accuracy)
    # The tolerance is that which was asked for, neither much finer nor coarser.
    exact = np.exp(-4.0 * np.array([0.3, 0.6, 1.0]))
    seen = stepping.integrate(
        lambda y: -4 * y,
        jnp.ones((1, 1)),
        jnp.array([0.3, 0.6, 1.0]),
        1e-4,
        jnp.full((1,), 1e-12),
        lambda y: y,
    )
    off = np.max(np.abs(seen.observed[0, :, 0] / exact - 1))
    assert 1e-6 < off < 1e-4 * int(seen.steps[0])
    # Below atol nothing is resolved: what is left at the end is of its size, not of rtol's.
    low = stepping.integrate(
        lambda y: -4 * y,
        jnp.ones((1, 1)),
        jnp.array([0.3, 0.6, 3.0]),
        1e-8,
        jnp.full((1,), 1e-3),
        lambda y: y,
    )
    assert 1e-7 < abs(float(low.observed[0, -1, 0]) - np.exp(-12.0)) < 1e-3 * int(low.steps[0])


def test_two_adapters_are_resolved_at_the_smaller_scale():
    small, large = (Factors(jnp.full((3, 2), x), jnp.zeros((2, 3))) for x in (1e-6, 0.5))
    assert float(amplitude(TwoLayerFactors(small, large))) == 1e-6
    assert float(amplitude(small._replace(b=large.a.T))) == 0.5
