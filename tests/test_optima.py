"""Certified optima against an independent solver, and the facts about stationary points."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorajax import Decayed, Factors, Linearized, ProductLoss, descend, optima
from lorajax.claims import ntk
from lorajax.optima.proximal import smoothness

SAMPLES, SHAPE = 10, (6, 5)
OUTPUTS = {"squared": 2, "logistic": 1, "softmax": 3}


def make(key, loss="squared", shape=SHAPE, samples=SAMPLES):
    k = OUTPUTS[loss]
    keys = jax.random.split(key, 3)
    features = jax.random.normal(keys[0], (samples, k, *shape))
    outputs = 0.3 * jax.random.normal(keys[1], (samples, k))
    targets = jax.random.normal(keys[2], (samples, k))
    if loss == "logistic":
        targets = jnp.sign(targets)
    if loss == "softmax":
        targets = jax.nn.one_hot(jnp.argmax(targets, axis=1), k)
    return Linearized.from_features(features, targets, loss, outputs=outputs)


def decay_of(problem, share=0.1):
    """A share of the least decay at which nothing is learned at all."""
    return share * float(jnp.linalg.norm(problem.full_gradient(problem.zero()), 2))


def independent(problem, decay):
    """The same problem by an interior-point solver: the least objective and its minimizer."""
    cvxpy = pytest.importorskip("cvxpy")
    features, f0 = np.asarray(problem.jacobian.features), np.asarray(problem.outputs)
    y, x = np.asarray(problem.targets), cvxpy.Variable(problem.shape)
    samples, outputs = y.shape
    z = [
        cvxpy.hstack(
            [f0[i, k] + cvxpy.sum(cvxpy.multiply(features[i, k], x)) for k in range(outputs)]
        )
        for i in range(samples)
    ]
    losses = {
        "squared": lambda z, y: cvxpy.sum_squares(z - y) / 2,
        "logistic": lambda z, y: cvxpy.sum(cvxpy.logistic(cvxpy.multiply(-y, z))),
        "softmax": lambda z, y: cvxpy.log_sum_exp(z) - y @ z,
    }
    mean = sum(losses[problem.loss_name](z[i], y[i]) for i in range(samples)) / samples
    program = cvxpy.Problem(cvxpy.Minimize(mean + decay * cvxpy.normNuc(x)))
    program.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return program.value, jnp.asarray(x.value)


def random_factors(key, rank, scale=0.5):
    keys = jax.random.split(key)
    a, b = jax.random.normal(keys[0], (6, rank)), jax.random.normal(keys[1], (rank, 5))
    return Factors(scale * a, scale * b)


@eqx.filter_jit
def rest(problem, decay, start, perturbation=None):
    """The factors at which momentum descent on LoRA's objective rests."""
    return ntk.come_to_rest(problem, decay, start, 3000, perturbation).factors


@pytest.mark.parametrize("loss", list(OUTPUTS))
def test_the_certified_optimum_is_the_independent_solvers(loss, key):
    problem = make(key, loss)
    decay = decay_of(problem)
    found = optima.minimize(problem, decay)
    assert bool(found.converged)
    certificate = found.certificate
    assert 0 <= float(certificate.gap) <= 1e-8
    least, other = independent(problem, decay)
    assert float(certificate.objective) == pytest.approx(least, abs=1e-8)
    # The bound is one: below what the other solver reached, up to its own tolerance.
    assert float(certificate.lower_bound) <= least + 1e-9
    # Its solution's gap bounds its distance, as any point's does.
    certified = optima.certify(problem, other, decay)
    assert float(certified.objective) == pytest.approx(least, abs=1e-9)
    assert float(certified.objective) - float(certified.gap) <= least + 1e-9
    assert float(certificate.gradient_norm) == pytest.approx(decay, rel=1e-6)
    assert abs(float(certificate.alignment)) < 1e-8


@pytest.mark.parametrize("loss", list(OUTPUTS))
def test_the_bound_holds_anywhere(loss, key):
    problem = make(key, loss)
    decay = decay_of(problem)
    least = float(optima.minimize(problem, decay).certificate.objective)
    for i in range(20):
        x = jax.random.normal(jax.random.fold_in(key, i), SHAPE) * 10.0 ** (i % 4 - 2)
        certificate = optima.certify(problem, x, decay)
        assert float(certificate.lower_bound) <= least + 1e-12
        assert float(certificate.gap) >= float(certificate.objective) - least - 1e-12


def test_where_the_gradient_is_feasible_the_gap_is_the_alignment(key):
    problem = make(key)
    decay = 1.2 * decay_of(problem, 1.0)
    x = 1e-3 * jax.random.normal(key, SHAPE)
    certificate = optima.certify(problem, x, decay)
    assert float(certificate.gradient_norm) < decay
    assert float(certificate.gap) == pytest.approx(float(certificate.alignment), rel=1e-10)


@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_lora_with_decay_reaches_the_certified_optimum(loss, key):
    """Nuclear-norm full fine-tuning and LoRA with decay are one problem."""
    problem = make(key, loss)
    decay = decay_of(problem)
    best = optima.minimize(problem, decay)
    end = rest(problem, jnp.asarray(decay), random_factors(key, 5))
    certificate = optima.certify(problem, end, decay)
    assert float(certificate.gap) < 1e-8
    assert float(certificate.objective) == pytest.approx(
        float(best.certificate.objective), abs=1e-8
    )
    np.testing.assert_allclose(end.product, best.update, atol=1e-3)


def test_lbfgs_reaches_it_as_well(key):
    problem = make(key)
    decayed = Decayed(problem, jnp.asarray(decay_of(problem)))
    path = descend(decayed, random_factors(key, 5), optax.lbfgs(), 200, every=200)
    end = jax.tree.map(lambda x: x[-1], path.factors)
    assert float(optima.certify(problem, end, decayed.decay).gap) < 1e-8


def test_factors_are_judged_by_their_own_objective(key):
    problem = make(key)
    a, b = jax.random.normal(key, (6, 2)), jax.random.normal(key, (2, 5))
    balanced = optima.certify(problem, a @ b, 0.1)
    lopsided = optima.certify(problem, Factors(10 * a, b / 10), 0.1)
    assert float(lopsided.objective) > float(balanced.objective)
    assert float(lopsided.lower_bound) == pytest.approx(float(balanced.lower_bound))


def test_several_weights_share_one_certificate(key):
    keys = jax.random.split(key, 3)
    features = {
        "first": jax.random.normal(keys[0], (8, 1, 5, 4)),
        "second": jax.random.normal(keys[1], (8, 1, 4, 5)),
        "third": jax.random.normal(keys[1], (8, 1, 4, 5)),
    }
    problem = Linearized.from_features(features, jax.random.normal(keys[2], (8, 1)))
    found = optima.minimize(problem, 0.1)
    assert bool(found.converged) and set(found.update) == set(features)
    # As one block-diagonal matrix the problem is the same.
    whole = jnp.zeros((8, 1, 13, 14))
    for (i, j), g in zip([(0, 0), (5, 4), (9, 9)], features.values(), strict=True):
        whole = whole.at[:, :, i : i + g.shape[2], j : j + g.shape[3]].set(g)
    joint = optima.minimize(Linearized.from_features(whole, problem.targets), 0.1)
    assert float(found.certificate.objective) == pytest.approx(
        float(joint.certificate.objective), abs=1e-9
    )


def test_the_perturbed_certificate_is_the_plain_one_in_other_units(key):
    """P = εI only raises the decay; and a bound with any P stays below the objective reached."""
    problem = make(key)
    decay = decay_of(problem)
    f = random_factors(key, 3, 0.3)
    shifted = optima.certify(problem, f, decay, perturbation=0.5 * decay * jnp.eye(11))
    plain = optima.certify(problem, f, 1.5 * decay)
    assert float(shifted.objective) == pytest.approx(float(plain.objective))
    assert float(shifted.lower_bound) == pytest.approx(float(plain.lower_bound), rel=1e-9)
    noise = jax.random.normal(key, (11, 11))
    p = 0.02 * decay * (noise + noise.T)
    last = rest(problem, jnp.asarray(decay), random_factors(key, 5), p)
    assert float(optima.certify(problem, last, decay, perturbation=p).gap) < 1e-8


def test_the_minimum_under_vmap_is_that_of_each_lane(key):
    problem = make(key)
    decays = jnp.array([0.05, 0.1, 0.3]) * decay_of(problem, 1.0)
    together = jax.vmap(lambda w: optima.minimize(problem, w))(decays)
    for i, w in enumerate(decays):
        alone = optima.minimize(problem, w)
        np.testing.assert_allclose(together.update[i], alone.update, atol=1e-6)
    assert bool(jnp.all(together.converged))


def test_a_decay_beyond_the_gradient_learns_nothing(key):
    problem = make(key)
    found = optima.minimize(problem, 1.01 * decay_of(problem, 1.0))
    np.testing.assert_array_equal(found.update, jnp.zeros(SHAPE))
    assert int(found.steps) == 0


def test_steps_are_few_where_curvatures_differ_and_shrink_where_they_were_too_long():
    """Diagonal data: each entry is a soft threshold, with curvatures g²/N from 4 to 1/400.

    Plain steps would take about 4·400 ln(1e10) = 37,000. The first sample's target of −1 hides the
    largest curvature from the power iteration, which finds a sixteenth of it.
    """
    gains, targets, decay = np.array([4.0, 1.0, 0.3, 0.1]), np.array([-1.0, 1.0, 1.0, 1.0]), 1e-3
    features = jnp.asarray(gains[:, None, None] * np.eye(4)[:, :, None] * np.eye(4)[:, None, :])
    problem = Linearized.from_features(features[:, None], jnp.asarray(targets)[:, None])
    assert float(smoothness(problem)) < 0.3
    found = optima.minimize(problem, decay)
    slopes, curvatures = gains * targets / 4, gains**2 / 4
    want = np.sign(slopes) * np.maximum(np.abs(slopes) - decay, 0) / curvatures
    assert bool(found.converged) and int(found.steps) < 4000
    np.testing.assert_allclose(found.update, np.diag(want), atol=1e-3)
    assert float(found.certificate.objective) == pytest.approx(
        float(np.mean((gains * want - targets) ** 2) / 2 + decay * np.abs(want).sum()), abs=1e-9
    )
    # From next to the end, along the stiffest entry alone, it is a matter of a few steps.
    near = jnp.asarray(np.diag(want + 1e-3 * np.eye(4)[0]))
    again = optima.minimize(problem, decay, start=near)
    assert bool(again.converged) and int(again.steps) < int(found.steps) / 4


def test_smoothness_is_never_above_the_constant(key):
    problem = make(key)
    gram = problem.kernel().reshape(problem.equations, -1) / SAMPLES
    exact = float(jnp.linalg.eigvalsh(gram)[-1])
    assert 0.9 * exact < float(smoothness(problem)) <= exact * (1 + 1e-12)


def test_the_gradient_at_a_stationary_point_falls_apart(key):
    problem = make(key)
    decay = decay_of(problem)
    start = random_factors(key, 2)
    decayed = Decayed(problem, jnp.asarray(decay))
    end = rest(problem, jnp.asarray(decay), start)
    found = optima.structure(problem.full_gradient(end), end, decay)
    assert float(found.leakage) < 1e-6 and float(found.imbalance) < 1e-6
    away = optima.structure(problem.full_gradient(start), start, decay)
    assert float(away.leakage) > 1e-2 and float(away.imbalance) > 1e-2
    assert float(optima.lowest_curvature(decayed, end)) > -1e-7
    saddle = Factors(jnp.zeros((6, 2)), jnp.zeros((2, 5)))
    assert float(optima.lowest_curvature(decayed, saddle)) < -1e-2


def test_a_rank_can_be_spared_until_the_bound(key):
    """½(tr X − y)² + w‖X‖_* has minimizers of every rank; one of rank 1 must exist (KN = 1)."""
    n, decay, target = 4, 0.25, 3.0
    problem = Linearized.from_features(jnp.eye(n)[None, None], jnp.full((1, 1), target))
    best = optima.minimize(problem, decay)
    np.testing.assert_allclose(best.update, (target - decay) / n * jnp.eye(n), atol=1e-6)
    root = jnp.linalg.cholesky(best.update)
    reduced, ranks = optima.reduce_rank(problem, Factors(root, root.T))
    assert ranks == [4, 3, 2, 1] and reduced.rank == 1
    certificate = optima.certify(problem, reduced, decay)
    assert float(certificate.gap) < 1e-7


def test_the_counts_of_the_theorems():
    for equations in range(1, 40):
        rank = optima.sufficient_rank(equations)
        assert rank * (rank + 1) / 2 > equations >= rank * (rank - 1) / 2
        assert optima.existing_rank(equations) == rank - 1
    assert optima.manifold_rank(20, (8, 8)) == 2  # 2·16 − 4 = 28 > 27 ≥ 15
    assert optima.manifold_rank(100, (8, 8)) is None
    # One rank has 15 dimensions: more than 1.35 · 11 = 14.85, and less than 1.35 · 12.
    assert [optima.manifold_rank(n, (8, 8)) for n in (11, 12)] == [1, 2]


def test_structure_takes_any_smooth_loss(key):
    problem = ProductLoss(lambda x, s: jnp.sum((x - s) ** 2) / 2, (6, 5), (jnp.ones((6, 5)),))
    f = Factors(jnp.ones((6, 1)) * 0.9, jnp.ones((1, 5)))
    found = optima.structure(problem.full_gradient(f), f, 0.1)
    assert found.singular_values.shape == (1,)
    # There the gradient is −0.1 · 1 1ᵀ, of norm 0.1 √30 and along the update: nothing is left.
    assert float(optima.structure(problem.full_gradient(f), f, 0.1 * 30**0.5).outer) < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: optima.certify(p, p.zero(), -1.0), "decay is -1.0"),
        (lambda p: optima.minimize(p, 0.0), "decay is 0.0"),
        (lambda p: optima.minimize(p, 0.1, tolerance=0.0), "tolerance is 0.0"),
        (lambda p: optima.certify(p, jnp.zeros((5, 6)), 0.1), r"update has shape \(5, 6\)"),
        (
            lambda p: optima.certify(p, p.zero(), 0.1, perturbation=jnp.eye(11)),
            "it must be factors",
        ),
    ],
)
def test_bad_input_is_refused(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(make(key))


def test_sparing_a_rank_leaves_every_output_as_it_is(key):
    features = jax.random.normal(key, (2, 1, 6, 5))
    problem = Linearized.from_features(features, jnp.ones((2, 1)))
    before = random_factors(key, 4)
    after, ranks = optima.reduce_rank(problem, before)
    assert ranks == [4, 3, 2, 1]
    np.testing.assert_allclose(
        problem.predict(after.product), problem.predict(before.product), atol=1e-10
    )


def test_the_lowest_curvature_is_the_lowest():
    class Quadratic(eqx.Module):
        curvatures: jax.Array

        def loss(self, x):
            return 0.5 * jnp.sum(self.curvatures * x**2)

        def gradient(self, x):
            return self.curvatures * x

    problem = Quadratic(jnp.array([2.0, -3.0, 1.0]))
    assert float(optima.lowest_curvature(problem, jnp.ones(3))) == pytest.approx(-3)
