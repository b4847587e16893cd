"""`sweep_flows`: any start over any axes, against one flow at a time, by the engine it names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax
from lorajax import initializers, spectra
from lorajax.flows import start_of
from lorajax.flows.plan import reduced_shape
from lorajax.flows.sweeping import plan_flows
from lorajax.problems import TwoLayer
from lorajax.sweeps import open_sweep

TIMES = jnp.linspace(0.0, 12.0, 13)
SPECTRUM = (3.0, 1.5)
AXES = {"scale": [1e-1, 1e-4], "rank": [1, 3], "seed": [0, 7]}


@pytest.fixture(scope="module")
def problem():
    return lorajax.MatrixFactorization.from_spectrum(jax.random.key(0), (9, 7), SPECTRUM)


def slow(key, shape, rank, scale, tilt=0.0):
    """A start of one's own, with a parameter of its own."""
    a, b = initializers.small(key, shape, rank, scale)
    return lorajax.Factors(a + tilt, b)


@pytest.mark.parametrize(
    ("start", "engine"), [("orthogonal", "closed form"), ("lora", "reduced ODE"), (slow, "reduced")]
)
def test_a_lane_is_the_flow_from_its_start(problem, start, engine):
    planned = plan_flows(problem, start, AXES, TIMES, key=jax.random.key(5))
    assert planned.plans["rank 3"].engine.startswith(engine)
    assert planned.plans["rank 1"].engine == "closed form"  # any start of rank 1 is balanced
    found = planned.run()
    assert found.engine == str(planned) and not found["status"].any()
    assert found["singular_values"].sizes["mode"] == 3
    where = {"scale": 1e-4, "rank": 3, "seed": 7}
    key = functools.reduce(jax.random.fold_in, _words(planned, 1), jax.random.key(5))
    factors = start_of(problem, start, key=key, rank=3, scale=1e-4)
    path = lorajax.gradient_flow(problem, factors, TIMES, rtol=1e-12)
    here = found.sel(where)
    values = np.asarray(spectra.singular_values(path))
    np.testing.assert_allclose(here["singular_values"], values, atol=1e-7)
    np.testing.assert_allclose(here["losses"], path.losses, atol=1e-7)
    # Lower ranks are filled up with zeros.
    assert not found["singular_values"].sel(rank=1, mode=2).any()


def _words(planned, index):
    from lorajax.sweeps.axes import fold_words, make_grid

    grid = make_grid(planned.axes, planned.options["static"])
    return list(fold_words(grid, ("seed",))["seed"][index])


def test_parameters_of_the_start_are_axes_and_starts_are_one(problem):
    axes = {"scale": [1e-2], "rank": [2], "tilt": [0.0, 0.1]}
    found = lorajax.sweep_flows(problem, slow, axes, TIMES, observe="effective_rank")
    assert found["effective_rank"].dims == ("scale", "rank", "tilt", "time")
    axes.pop("tilt")
    found = lorajax.sweep_flows(problem, ["lora", "spectral"], axes, TIMES, observe="half_times")
    assert found["half_times"].dims == ("start", "scale", "rank", "target_mode")
    assert list(found["start"].values) == ["lora", "spectral"]
    assert "reduced ODE" in found.engine and "closed form" in found.engine
    # A spectral start learns each mode on its own, and the larger one first.
    assert np.all(np.diff(found["half_times"].sel(start="spectral").values) > 0)


def test_a_function_of_axes_makes_the_problem(problem):
    def make(ratio):
        s = jnp.stack([jnp.ones_like(ratio), ratio]) * 3.0
        return lorajax.MatrixFactorization(problem.u, s, problem.v)

    axes = {"ratio": [0.5, 0.25], "rank": [3], "scale": [1e-3]}
    found = lorajax.sweep_flows(make, "orthogonal", axes, TIMES)
    assert found.engine.startswith("closed form")
    other = lorajax.sweep_flows(
        problem, "orthogonal", {"rank": [3], "scale": [1e-3]}, TIMES, observe="losses"
    )
    np.testing.assert_allclose(found["losses"].sel(ratio=0.5), other["losses"], atol=1e-12)
    whole = lorajax.sweep_flows(make, "orthogonal", axes, TIMES, observe="factor_norm")
    assert whole.engine.startswith("full ODE") and not whole["status"].any()


def test_two_layers_and_functions_of_the_factors():
    problem = TwoLayer.pretrained(jax.random.key(7), 5, "top")
    axes = {"scale": [1e-1, 1e-2], "rank": [2]}
    found = lorajax.sweep_flows(
        problem, "spectral", axes, TIMES, observe=("misalignment", "losses")
    )
    assert found.engine.startswith("two-layer ODE") and not found["status"].any()
    assert float(found["misalignment"].max()) < 1e-12

    def size(factors):
        return {"columns": jnp.linalg.norm(factors.first.a, axis=0)}

    seen = lorajax.sweep_flows(problem, "spectral", axes, TIMES, observe=size)
    assert seen["columns"].dims == ("scale", "rank", "time", "columns_0")


def operations(function, start):
    """What XLA counts."""
    return jax.jit(function).lower(start).compile().cost_analysis()["flops"]


def test_a_plan_counts_operations_as_xla_does(key):
    """Within a factor of 4, of the order of magnitude that is promised."""
    problem = lorajax.MatrixFactorization.from_spectrum(key, (20, 15), (4.0, 2.0, 1.0))
    start = initializers.lora(key, problem.shape, 4, 0.1)
    for times in (np.linspace(0, 12, 61), np.linspace(0, 240, 61)):
        path, planned = lorajax.solve(problem, start, times)
        one = operations(lambda x, problem=path.problem: problem.gradient(x), path.start)
        counted = 13 * int(path.steps) * one  # Dopri8 looks at the field 13 times a step
        assert planned.engine == "reduced ODE" and 0.25 < planned.flops / counted < 4
    even = initializers.orthogonal(key, problem.shape, 4, 0.1)
    counted = operations(lambda x: lorajax.balanced_flow(problem, x, TIMES).core, even)
    assert 0.25 < lorajax.plan(problem, even, TIMES).flops / counted < 4
    for shape in ((20, 15), (4, 15), (15, 5)):
        thin = lorajax.MatrixFactorization.from_spectrum(key, shape, (4.0, 2.0, 1.0))
        reduced = lorajax.exact.reduce(thin, initializers.lora(key, shape, 4))
        assert reduced_shape(thin, 4) == reduced.problem.shape


def test_a_start_along_the_gradient_of_a_loss_without_a_target():
    """Minus the gradient of ½ (tr W)² at tr W = 2 is −2 I: each direction lowers the trace."""
    problem = lorajax.TraceSquared(jnp.asarray(2.0), 6)
    start = start_of(problem, "spectral", rank=3, scale=0.1)
    assert float(jnp.trace(start.product)) == pytest.approx(-3 * 0.01, rel=1e-12)
    other = jnp.outer(jnp.arange(1.0, 7.0), jnp.arange(1.0, 6.0))
    loss = lorajax.ProductLoss(lambda x, y: jnp.sum((x - y) ** 2) / 2, (6, 5), (other,))
    start = start_of(loss, "spectral", rank=1, scale=0.1)
    np.testing.assert_allclose(start.product, 0.01 * other / jnp.linalg.norm(other), atol=1e-15)


def test_a_start_that_is_not_what_its_group_is_fails(problem):
    def sometimes(key, shape, rank, scale):
        a, b = initializers.orthogonal(key, shape, rank, scale)
        middle = (scale < 0.05) & (scale > 0.005)
        return lorajax.Factors(jnp.where(middle, a * jnp.arange(1.0, rank + 1)[None], a), b)

    axes = {"scale": [1e-1, 1e-2, 1e-3], "rank": [2]}
    found = lorajax.sweep_flows(problem, sometimes, axes, TIMES)
    assert found["status"].values.ravel().tolist() == [0, 3, 0]


def test_a_store_is_gone_on_from_and_tells_other_problems(problem, tmp_path):
    axes, store = {"scale": [1e-1, 1e-4], "rank": [2]}, tmp_path / "s.zarr"
    first = lorajax.sweep_flows(problem, "orthogonal", axes, TIMES, store=store).load()
    seen = []
    again = lorajax.sweep_flows(
        problem, "orthogonal", axes, TIMES, store=store, progress=seen.append
    )
    assert seen[0].resumed == 2 and again.engine == first.engine
    np.testing.assert_array_equal(open_sweep(store)["losses"], first["losses"])
    other = lorajax.MatrixFactorization(problem.u, 2 * problem.singular_values, problem.v)
    with pytest.raises(ValueError, match="another sweep"):
        lorajax.sweep_flows(other, "orthogonal", axes, TIMES, store=store)


@pytest.mark.parametrize(
    ("start", "axes", "options", "words"),
    [
        ("lora", {"scle": [1.0]}, {}, "no parameter 'scle'; it takes rank, scale"),
        ("lora", {"scale": [-1.0], "rank": [2]}, {}, "scale is -1.0"),
        ("lora", {"scale": 1.0, "rank": [2]}, {}, r"give a list of values, e.g. \[1.0\]"),
        ("lora", {"rank": [2], "seed": 3}, {}, r"e.g. range\(3\)"),
        ("lora", {"rank": [0]}, {}, "rank is 0"),
        ("lora", {"rank": [99]}, {}, "rank is 99"),
        ("lora", {"scale": [1.0]}, {}, "needs rank"),
        ("lora", {"key": [1]}, {}, "which the problem gives"),
        ("lora", {}, {}, "axes is empty"),
        ("nope", AXES, {}, "must be one of balanced"),
        ("orthogonal", AXES, {"observe": "loss"}, "observe names 'loss'"),
        ("orthogonal", AXES, {"observe": ()}, "observe is empty"),
        ("pissa", {"rank": [2], "scale": [1.0]}, {}, "'pissa' has no parameter 'scale'"),
        ("pissa", {"rank": [2]}, {}, "needs weight"),
        ("lora_ga", {"rank": [2]}, {}, "recentered"),
    ],
)
def test_bad_input_is_named(problem, start, axes, options, words):
    with pytest.raises(ValueError, match=words):
        lorajax.sweep_flows(problem, start, axes, TIMES, **options)
    with pytest.raises(ValueError, match="must increase"):
        lorajax.sweep_flows(problem, start, axes, TIMES[::-1], **options)
