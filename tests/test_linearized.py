"""The linearized problem: written out, matrix-free and by autodiff, all one and the same."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorajax import Decayed, Factors, Linearized, descend, gradient_flow
from lorajax.factors import is_factors
from lorajax.problems import updates
from lorajax.problems.convex_losses import LOSSES

OUTPUTS = {"squared": 2, "logistic": 1, "softmax": 3}


def model(weights, x):
    """Two layers, both adapted."""
    return jnp.tanh(x @ weights["first"]) @ weights["second"]


def targets_of(key, loss, samples):
    k = OUTPUTS[loss]
    if loss == "softmax":
        return jax.nn.one_hot(jax.random.randint(key, (samples,), 0, k), k)
    values = jax.random.normal(key, (samples, k))
    return jnp.sign(values) if loss == "logistic" else values


def make(key, loss="squared", samples=12, block=None):
    keys = jax.random.split(key, 5)
    weights = {
        "first": jax.random.normal(keys[0], (6, 5)),
        "second": jax.random.normal(keys[1], (5, OUTPUTS[loss])),
    }
    x = jax.random.normal(keys[2], (samples, 6))
    y = targets_of(keys[3], loss, samples)
    problem = Linearized.from_function(model, weights, x, y, loss, block=block)
    draw = jax.tree.map(lambda w: 0.3 * jax.random.normal(keys[4], w.shape), weights)
    return problem, weights, draw


def factors_of(tree, rank=2):
    """Factors of the weights' shapes, with entries of the draw."""

    def one(d):
        m, n = d.shape
        return Factors(jnp.resize(d, (m, rank)), jnp.resize(d[::-1], (rank, n)))

    return jax.tree.map(one, tree)


@eqx.filter_jit
def everything(problem, update):
    """What a problem has to say at an update."""
    return problem.predict(update), problem.loss(update), problem.full_gradient(update)


@eqx.filter_jit
def both_gradients(problem, update):
    """A problem's own gradient and autodiff's."""
    return problem.gradient(update), jax.grad(problem.loss)(update)


@eqx.filter_jit
def matrix_gradient(problem, update):
    """Autodiff's gradient with respect to the matrices."""
    return jax.grad(problem.loss)(update)


def close(x, y, tolerance=1e-10):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (1 + float(jnp.abs(a).max())))


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_matrix_free_and_written_out_are_one_problem(loss, block, key):
    free, _, update = make(key, loss, block=block)
    written = free.with_features()
    assert written.shape == free.shape and written.equations == free.equations
    close(everything(free, update), everything(written, update))
    close(free.kernel(4), written.kernel())
    close(free.kernel(), written.kernel())


def test_it_is_the_first_order_of_the_model(key):
    problem, weights, update = make(key)
    x = problem.jacobian.inputs
    close(problem.predict(problem.zero()), model(weights, x))
    errors = []
    for step in (1e-2, 1e-3):
        small = jax.tree.map(lambda d, s=step: s * d, update)
        moved = model(jax.tree.map(jnp.add, weights, small), x)
        errors.append(float(jnp.abs(moved - problem.predict(small)).max()))
    assert errors[1] < 0.02 * errors[0]  # of second order


@pytest.mark.parametrize("loss", list(LOSSES))
def test_gradients_are_derivatives(loss, key):
    problem, _, update = make(key, loss)
    factors = factors_of(update)
    close(*both_gradients(problem, factors))
    close(everything(problem, update)[2], matrix_gradient(problem, update))
    rotations = jax.tree.map(lambda f: jnp.eye(sum(f.shape)) * 0.1, factors, is_leaf=is_factors)
    for perturbation in (None, rotations):
        decayed = Decayed(problem, jnp.asarray(0.2), perturbation)
        close(*both_gradients(decayed, factors))


@pytest.mark.parametrize("loss", list(LOSSES))
def test_conjugates_satisfy_fenchels_equality_and_inequality(loss, key):
    """ℓ(z) + ℓ*(p) ≥ ⟨p, z⟩ for all p in the domain, with equality at p = ℓ'(z)."""
    keys = jax.random.split(key, 3)
    y = targets_of(keys[0], loss, 40)
    z, other = (2 * jax.random.normal(k, y.shape) for k in keys[1:])
    each = LOSSES[loss]
    p = each.derivative(z, y)
    close(each.value(z, y) + each.conjugate(p, y), jnp.sum(p * z, axis=1), 1e-12)
    for shrink in (0.0, 0.3, 1.0):
        gap = each.value(other, y) + each.conjugate(shrink * p, y)
        assert bool(jnp.all(gap - shrink * jnp.sum(p * other, axis=1) > -1e-12))
    hessian = jax.jit(jax.vmap(jax.hessian(lambda z, y: each.value(z[None], y[None])[0])))(z, y)
    assert float(jnp.linalg.eigvalsh(hessian).max()) <= each.curvature + 1e-12


def test_decay_in_the_problem_is_the_flows_own(key):
    problem, _, update = make(key)
    factors, times = factors_of(update), jnp.linspace(0.0, 1.0, 3)
    inside = gradient_flow(Decayed(problem, jnp.asarray(0.3)), factors, times)
    outside = gradient_flow(problem, factors, times, weight_decay=0.3)
    assert inside.converged
    close(inside.factors, outside.factors, 1e-6)


def test_decay_is_really_applied(key):
    """Without a loss to speak of, factors shrink by e^{−wt}, and the product by its square."""
    problem, _, update = make(key)
    flat = Linearized(
        problem.outputs, problem.targets, 0 * problem.sample_weights, problem.jacobian, "squared"
    )
    factors = factors_of(update)
    path = gradient_flow(Decayed(flat, jnp.asarray(0.5)), factors, jnp.array([0.0, 1.0, 2.0]))
    close(
        jax.tree.map(lambda x: x[-1], path.factors),
        jax.tree.map(lambda x: np.exp(-1.0) * x, factors),
        1e-7,
    )


def test_lbfgs_is_a_descent_like_any_other(key):
    problem, _, update = make(key)
    decayed = Decayed(problem, jnp.asarray(0.1))
    # Backtracking compiles in half the time of the default search, and keeps the loss likewise.
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
    optimizer = optax.lbfgs(linesearch=search)
    path = descend(decayed, factors_of(update), optimizer, 150, every=50)
    assert path.converged and path.times.shape == (4,)
    slope = decayed.gradient(jax.tree.map(lambda x: x[-1], path.factors))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slope)) < 1e-6


def test_samples_of_weight_zero_do_not_count(key):
    problem, _, update = make(key)
    written = problem.with_features()
    half = Linearized.from_features(
        jax.tree.map(lambda g: g[:6], written.jacobian.features),
        written.targets[:6],
        outputs=written.outputs[:6],
    )
    masked = Linearized(
        written.outputs,
        written.targets,
        jnp.repeat(jnp.array([1 / 6, 0.0]), 6),
        written.jacobian,
        "squared",
    )
    close(half.loss(update), masked.loss(update))
    close(half.full_gradient(update), masked.full_gradient(update))


def test_it_runs_under_vmap_and_traces_once(key, traces):
    problem, _, update = make(key)
    decayed = Decayed(problem, jnp.asarray(0.1))
    run = jax.jit(jax.vmap(decayed.gradient))
    lanes = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), factors_of(update))
    run(lanes)
    with traces() as names:
        found = run(lanes)
    assert not names
    close(jax.tree.map(lambda x: x[0], found), decayed.gradient(factors_of(update)))


def test_updates_takes_matrices_and_factors(key):
    a, b = jax.random.normal(key, (4, 2)), jnp.ones((2, 3))
    found = updates({"x": Factors(a, b), "y": a})
    np.testing.assert_array_equal(found["x"], a @ b)
    np.testing.assert_array_equal(found["y"], a)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "hinge"}, "must be one of squared, logistic, softmax"),
        ({"loss": "logistic"}, r"\+1 or −1"),
        ({"loss": "softmax"}, "distribution"),
        ({"features": jnp.ones((4, 1, 3))}, r"must be \(4, 1, m, n\)"),
        ({"features": jnp.full((4, 1, 3, 2), jnp.inf)}, "features has 24 entries"),
        ({"targets": jnp.ones(4)}, r"must be \(samples, outputs\)"),
    ],
)
def test_bad_features_are_refused(change, message):
    given = {"features": jnp.ones((4, 1, 3, 2)), "targets": 2 * jnp.ones((4, 1))} | change
    if "targets" in change:
        with pytest.raises(Exception, match="targets"):
            Linearized.from_features(**given)
        return
    with pytest.raises(ValueError, match=message):
        Linearized.from_features(**given)


def test_a_block_that_does_not_divide_is_refused(key):
    with pytest.raises(ValueError, match="block is 5; it must divide the number of samples, 12"):
        make(key, block=5)
    problem, _, _ = make(key)
    with pytest.raises(ValueError, match="block is 0"):
        problem.kernel(0)
