import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from lorajax import (
    DiagonalFactorization,
    Factors,
    LinearAttention,
    MatrixFactorization,
    ProductLoss,
    SymmetricFactorization,
    TraceSquared,
    TuckerFactorization,
    TuckerFactors,
    TwoLayer,
    TwoLayerFactors,
    initializers,
)

TOLERANCE = {"float64": 1e-12, "float32": 1e-4}


def log_cosh(product, target):
    return jnp.sum(jnp.logaddexp(product - target, target - product))


def make(name: str, key, dtype):
    """A problem and a point of it, all entries of order one."""
    keys = jax.random.split(key, 6)
    normal = [jax.random.normal(k, shape, dtype) for k, shape in zip(keys, SHAPES, strict=True)]
    if name == "matrix":
        problem = MatrixFactorization.from_spectrum(keys[0], (7, 5), (3.0, 1.0), dtype=dtype)
        return problem, Factors(normal[1], normal[2])
    if name == "diagonal":
        problem = DiagonalFactorization(jnp.array([3.0, 1.0], dtype), (7, 5))
        return problem, Factors(normal[1], normal[2])
    if name == "symmetric":
        return SymmetricFactorization(normal[0] @ normal[0].T), normal[1]
    if name == "product":
        return ProductLoss(log_cosh, (7, 5), (normal[0],)), Factors(normal[1], normal[2])
    if name == "trace":
        return TraceSquared(normal[0][0, 0], 7), Factors(normal[1], normal[1].T + 1)
    if name == "attention":
        problem = LinearAttention(jnp.array([1.0, 0.5, 0.2], dtype), jnp.asarray(5.0, dtype))
        return problem, problem.start(keys[0], 2, 1.0)
    if name.startswith("tucker"):
        shape, ranks = ((7, 5), (3, 2)) if name.endswith("2") else ((7, 5, 4, 3), (2, 3, 2, 3))
        parts = [
            jax.random.normal(k, s, dtype)
            for k, s in zip(keys, (ranks, *zip(shape, ranks, strict=True)), strict=False)
        ]
        problem = TuckerFactorization.from_spectrum(keys[5], shape, (3.0, 1.0), dtype=dtype)
        return problem, TuckerFactors(parts[0], tuple(parts[1:]))
    layers = TwoLayer(normal[3], normal[4], normal[5])
    return layers, TwoLayerFactors(
        initializers.small(keys[0], (6, 8), 3, 1.0, dtype=dtype),
        initializers.small(keys[1], (7, 6), 3, 1.0, dtype=dtype),
    )


SHAPES = ((7, 5), (7, 3), (3, 5), (6, 8), (7, 6), (7, 8))
NAMES = (
    "matrix",
    "diagonal",
    "symmetric",
    "product",
    "trace",
    "tucker_2",
    "tucker_4",
    "attention",
    "two_layers",
)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_derivative_of_the_loss(name, dtype, key):
    problem, factors = make(name, key, jnp.dtype(dtype))
    expected = jax.jit(lambda x: jax.grad(problem.loss)(x))(factors)
    found = jax.jit(lambda x: problem.gradient(x))(factors)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert x.dtype == y.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(y, x, rtol=0, atol=TOLERANCE[dtype] * float(jnp.abs(x).max()))


def test_loss_keeps_its_digits_next_to_the_oracle(key):
    problem = MatrixFactorization.from_spectrum(key, (30, 20), (3.0, 2.0, 1.0))
    best = problem.oracle(3)
    bump = 1e-9 * jax.random.normal(key, best.a.shape)
    near = Factors(best.a + bump, best.b)
    expected = 0.5 * float(jnp.sum((bump @ best.b) ** 2))
    assert float(problem.loss(near)) == pytest.approx(expected, rel=1e-5)
    # The residual form says the same where it can be formed.
    far = Factors(best.a + 0.1, best.b)
    residual = problem.target - far.product
    assert float(problem.loss(far)) == pytest.approx(0.5 * float(jnp.sum(residual**2)), rel=1e-12)


def test_oracle_reaches_the_least_loss_at_every_rank(key):
    problem = MatrixFactorization.from_spectrum(key, (12, 9), (3.0, 2.0, 1.0))
    for rank in range(1, 6):
        factors = problem.oracle(rank)
        assert factors.rank == rank
        loss = float(problem.loss(factors))
        assert loss == pytest.approx(float(problem.oracle_loss(rank)), abs=1e-28, rel=1e-12)
        np.testing.assert_allclose(factors.a.T @ factors.a, factors.b @ factors.b.T, atol=1e-14)


def test_from_target_finds_rank_and_spectrum(key):
    made = MatrixFactorization.from_spectrum(key, (12, 9), (3.0, 2.0, 1.0))
    found = MatrixFactorization.from_target(made.target)
    assert found.rank == 3
    np.testing.assert_allclose(found.singular_values, made.singular_values, rtol=1e-12)
    np.testing.assert_allclose(found.target, made.target, atol=1e-13)


def test_recentered_adds_what_the_offset_takes_off(key):
    problem = MatrixFactorization.from_spectrum(key, (12, 9), (3.0, 2.0))
    weight = jax.random.normal(key, (12, 9))
    start = initializers.pissa(weight, 2)
    moved = problem.recentered(start.offset)
    # The adapted weight is W at the start, so the loss is that of no update at all.
    expected = 0.5 * float(jnp.sum(problem.singular_values**2))
    assert float(moved.loss(start.factors)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1.0, 2.0), "decreasing order"),
        ((1.0, -1.0), "finite"),
        ((1.0, float("nan")), "finite"),
        ((), "at least one"),
        ((5.0, 4.0, 3.0, 2.0, 1.0), "at most 4"),
    ],
)
def test_bad_spectra_are_refused(values, message, key):
    with pytest.raises(ValueError, match=message):
        MatrixFactorization.from_spectrum(key, (5, 4), values)


def test_bad_targets_are_refused():
    with pytest.raises(ValueError, match="target has 1 entries"):
        MatrixFactorization.from_target(jnp.ones((3, 3)).at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="target is zero"):
        MatrixFactorization.from_target(jnp.zeros((3, 3)))


def test_layers_that_do_not_chain_are_refused():
    with pytest.raises(ValueError, match=r"\(p, h\), \(h, q\) and \(p, q\)"):
        TwoLayer(jnp.ones((4, 5)), jnp.ones((3, 4)), jnp.ones((3, 6)))


def test_trace_squared_is_the_loss_of_the_whole_matrix(key):
    weight, a, b = (jax.random.normal(k, (6, 6)) for k in jax.random.split(key, 3))
    problem, factors = TraceSquared.from_weight(weight), Factors(a[:, :2], b[:2])
    whole = jnp.trace(weight + factors.product)
    assert float(problem.loss(factors)) == pytest.approx(0.5 * float(whole) ** 2, rel=1e-12)
    np.testing.assert_allclose(problem.full_gradient(factors), whole * jnp.eye(6), rtol=1e-12)
    # Full fine-tuning moves along −I alone and ends where the trace is 0.
    assert abs(float(jnp.trace(weight + problem.full_update()))) < 1e-13
    assert problem.shape == (6, 6)


def test_bad_traces_are_refused():
    with pytest.raises(ValueError, match=r"weight has shape \(2, 3\)"):
        TraceSquared.from_weight(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="size is 0"):
        TraceSquared(jnp.asarray(1.0), 0)
    with pytest.raises(ValueError, match="trace has 1 entries"):
        TraceSquared(jnp.asarray(jnp.nan), 3)


@pytest.mark.parametrize("target", ["generic", "top", "bottom"])
def test_pretrained_layers_have_the_target_where_it_is_said_to_be(target):
    problem = TwoLayer.pretrained(jax.random.key(0), 6, target, strength=3.0)
    u, s, vt = np.linalg.svd(np.asarray(problem.w2 @ problem.w1))
    found_u, found_s, found_vt = np.linalg.svd(np.asarray(problem.shift))
    np.testing.assert_allclose(found_s, [3.0, 0, 0, 0, 0, 0], atol=1e-12)
    along = np.abs(u.T @ found_u[:, 0]), np.abs(vt @ found_vt[0])
    if target == "generic":
        assert max(along[0].max(), along[1].max()) < 0.99
    else:
        index = 0 if target == "top" else 5
        np.testing.assert_allclose([along[0][index], along[1][index]], 1, atol=1e-12)
    np.testing.assert_allclose(s, np.linspace(1, 0.3, 6) * np.linspace(2, 0.6, 6))


@pytest.mark.parametrize(
    ("arguments", "words"), [((0, "top"), "size is 0"), ((4, "middle"), "target is 'middle'")]
)
def test_pretrained_layers_name_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        TwoLayer.pretrained(jax.random.key(0), *arguments)


@pytest.mark.parametrize("name", ["tucker_2", "tucker_4"])
def test_tucker_loss_is_that_of_the_full_residual(name, key):
    problem, factors = make(name, key, jnp.dtype("float64"))
    expected = 0.5 * float(jnp.sum((problem.target - factors.product) ** 2))
    assert float(problem.loss(factors)) == pytest.approx(expected, rel=1e-12)


def test_tucker_loss_keeps_its_digits_next_to_the_target(key):
    problem = TuckerFactorization.from_spectrum(key, (8, 7, 6), (3.0, 1.0))
    bump = 1e-9 * jax.random.normal(key, (8, 2))
    frames = (problem.frames[0] + bump, *problem.frames[1:])
    expected = 0.5 * float(jnp.sum(TuckerFactors(problem.core, (bump, *frames[1:])).product ** 2))
    assert float(problem.loss(TuckerFactors(problem.core, frames))) == pytest.approx(
        expected, rel=1e-6
    )


def test_tucker_target_by_its_tensor_is_the_one_by_its_spectrum(key):
    made = TuckerFactorization.from_spectrum(key, (8, 7, 6), (3.0, 2.0, 1.0))
    found = TuckerFactorization.from_target(made.target)
    assert found.ranks == (3, 3, 3)
    np.testing.assert_allclose(found.target, made.target, atol=1e-13)
    assert made.parameters((2, 2, 2)) == 8 + 2 * (8 + 7 + 6)


def test_bad_tensors_are_refused(key):
    with pytest.raises(ValueError, match="at least two modes"):
        TuckerFactorization.from_spectrum(key, (5,), (1.0,))
    with pytest.raises(ValueError, match="at most 3"):
        TuckerFactorization.from_spectrum(key, (5, 4, 3), (4.0, 3.0, 2.0, 1.0))
    with pytest.raises(ValueError, match="target is zero"):
        TuckerFactorization.from_target(jnp.zeros((3, 3, 3)))
    with pytest.raises(ValueError, match="at least two modes"):
        TuckerFactorization.from_target(jnp.ones(3))
    problem = TuckerFactorization.from_spectrum(key, (5, 4, 3), (2.0,))
    with pytest.raises(ValueError, match=r"must be \(r_1, …\) and \(n_i, r_i\)"):
        problem.loss(initializers.tucker(key, (5, 4, 4), (2, 2, 2)))


def test_attention_loss_is_the_mean_over_sampled_contexts(key):
    values, context, samples = jnp.array([1.0, 0.5, 0.2]), 5, 100_000
    problem = LinearAttention(values, jnp.asarray(float(context)))
    heads = problem.start(key, 2, 0.8)
    keys = jax.random.split(key, 3)
    root = jnp.sqrt(values)[None]
    w = jax.random.normal(keys[0], (samples, 3))
    query = root * jax.random.normal(keys[1], (samples, 3))
    x = root[None] * jax.random.normal(keys[2], (samples, context, 3))
    labels = jnp.einsum("snd,sd->sn", x, w)
    estimate = jnp.einsum("sn,snd->sd", labels, x) / context
    answer = jnp.sum((estimate @ heads.product) * query, axis=1)
    errors = np.asarray((jnp.sum(w * query, axis=1) - answer) ** 2)
    bar = errors.std() / samples**0.5
    assert abs(float(problem.loss(heads)) - errors.mean()) < 4 * bar < 0.05 * errors.mean()
    np.testing.assert_allclose(
        problem.full_gradient(
            heads._replace(value=jnp.ones(3), key=jnp.eye(3), query=jnp.diag(problem.optimum))
        ),
        0,
        atol=1e-14,
    )


@pytest.mark.parametrize(
    ("values", "context", "message"),
    [
        ((0.5, 1.0), 4.0, "decreasing order"),
        ((1.0, -0.5), 4.0, "positive"),
        ((1.0, 0.5), 0.0, "context is 0"),
    ],
)
def test_bad_attention_problems_are_refused(values, context, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(jnp.array(values), jnp.asarray(context))


def test_modes_of_a_tucker_update_are_the_targets_at_the_target(key):
    problem = TuckerFactorization.from_spectrum(key, (8, 7, 6), (3.0, 1.0))
    found = problem.modes(TuckerFactors(problem.core, problem.frames))
    np.testing.assert_allclose(found, [3.0, 1.0], rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64", "int32"])
def test_other_precisions_are_refused_at_creation(dtype, key):
    matrix = jnp.ones((3, 2)).astype(dtype)
    jaxtyping.config.update("jaxtyping_disable", True)  # the shape checks would speak first
    try:
        for make_one in (
            lambda: MatrixFactorization.from_target(matrix),
            lambda: MatrixFactorization.from_spectrum(key, (3, 2), (1.0,), dtype=dtype),
            lambda: MatrixFactorization(matrix, matrix[0], matrix[:2]),
            lambda: SymmetricFactorization(matrix[:2]),
            lambda: TuckerFactorization.from_target(matrix),
            lambda: TwoLayer(matrix, matrix.T, matrix[:2, :2]),
            lambda: TraceSquared(matrix[0, 0], 3),
        ):
            with pytest.raises(ValueError, match=rf"{dtype}\)?; (problems|it must be)"):
                make_one()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
