"""Ranks of a network in which every layer's update has a planted rank."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import adapters

SHAPES = {"a": (20, 16), "b": (24, 12), "c": (16, 20), "d": (18, 18)}
PLANTED = {"a": 2, "b": 4, "c": 1, "d": 0}
NOISE = 0.5


class Branches(nnx.Module):
    """Linear branches side by side: the gradient of each sees its own planted update alone."""

    def __init__(self, shapes=SHAPES, seed=0):
        draw = np.random.default_rng(seed)
        for name, shape in shapes.items():
            layer = nnx.eval_shape(
                lambda shape=shape: nnx.Linear(*shape, use_bias=False, rngs=nnx.Rngs(0))
            )
            layer.kernel = nnx.Param(jnp.asarray(draw.normal(size=shape), jnp.float32))
            setattr(self, name, layer)

    def __call__(self, x):
        return {name: getattr(self, name)(value) for name, value in x.items()}


def loss(model, batch):
    x, y = batch
    out = model(x)
    return sum(0.5 * jnp.sum((out[name] - y[name]) ** 2, axis=-1) for name in out)


def planted(model, samples, seed, shapes=SHAPES, ranks=PLANTED, batch=500):
    draw = np.random.default_rng(seed)
    x, y = {}, {}
    for name, (m, n) in shapes.items():
        left, right = (np.linalg.qr(draw.normal(size=(k, k)))[0] for k in (m, n))
        strengths = 1 + np.arange(ranks[name]) / 4
        update = (left[:, : ranks[name]] * strengths) @ right[: ranks[name]]
        x[name] = draw.normal(size=(samples, m))
        kernel = np.asarray(getattr(model, name).kernel[...])
        y[name] = x[name] @ (kernel + update) + NOISE * draw.normal(size=(samples, n))
    cut = lambda i: jax.tree.map(lambda v: jnp.asarray(v[i : i + batch], jnp.float32), (x, y))  # noqa: E731
    return [cut(i) for i in range(0, samples, batch)]


@pytest.fixture(scope="module")
def network():
    model = Branches()
    return model, planted(model, 4000, seed=1)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("split_half", {}),
        ("random_signs", {}),
        ("c_over_n", {"noise": 1.0}),
    ],
)
def test_planted_ranks_are_recovered(network, rule, options):
    """The floor of the measured noise, or of C with the noise of residuals, not of labels alone."""
    model, batches = network
    found = adapters.select_ranks(model, loss, batches, rule, **options)
    assert {each.path: each.rank for each in found.layers} == PLANTED
    assert found.samples == 4000 and found.passes == 1
    assert found.ranks == {path: rank for path, rank in PLANTED.items() if rank}
    adapted = adapters.adapt(model, found.ranks, key=jax.random.key(0, impl="rbg"))
    assert set(adapters.layers(adapted)) == {"a", "b", "c"}


@pytest.mark.parametrize("rule", ["split_half", "random_signs"])
def test_recovery_is_exact_over_draws(rule):
    model = Branches()
    wrong = 0
    for seed in range(8):
        found = adapters.select_ranks(
            model, loss, planted(model, 4000, seed), rule, key=jax.random.key(seed, impl="rbg")
        )
        wrong += {each.path: each.rank for each in found.layers} != PLANTED
    assert wrong == 0


def test_sketched_ranks_agree():
    shapes, planted_ranks = {"a": (120, 100), "b": (20, 16)}, {"a": 3, "b": 2}
    model = Branches(shapes)
    batches = planted(model, 4000, 1, shapes, planted_ranks)
    found = adapters.select_ranks(model, loss, batches, memory=0, width=10)
    assert found.passes == 2
    exact = adapters.select_ranks(model, loss, batches)
    for sketched, full in zip(found.layers, exact.layers, strict=True):
        assert sketched.rank == full.rank == planted_ranks[full.path]
        assert full.certain and full.error == 0
        high = np.sqrt(np.asarray(sketched.singular_values) ** 2 + sketched.error**2)
        k = len(high)
        assert np.all(np.asarray(full.singular_values)[:k] <= high + 1e-6)
        assert np.all(np.asarray(sketched.singular_values) <= full.singular_values[:k] + 1e-6)
    assert found.layers[0].error > 0 and found.layers[1].error == 0


def test_energy_and_limits(network):
    model, batches = network
    found = adapters.select_ranks(model, loss, batches, "energy", "[ab]", fraction=0.5)
    for each in found.layers:
        squares = np.asarray(each.singular_values) ** 2
        assert squares[: each.rank].sum() >= 0.5 * squares.sum()
        assert squares[: each.rank - 1].sum() < 0.5 * squares.sum()
    limited = adapters.select_ranks(model, loss, batches, max_rank=2)
    assert [each.rank for each in limited.layers] == [2, 2, 1, 0]


def test_ranks_are_filled_up_by_the_next_directions_of_all_slices():
    layers = (
        adapters.Selected("a", (3, 7), 1, jnp.array([3.0, 2.0, 1.0]), 2.5, 0.0, 10),
        adapters.Selected("b", (2, 3), 0, jnp.array([[1.0, 0.5], [2.0, 0.5]]), 2.5, 0.0, 10),
        adapters.Selected("c", (1, 1), 1, jnp.array([0.1]), 0.05, 0.0, 2),
    )
    selection = adapters.Selection(layers, "split_half", 4, 1, {})
    # Energies: 9, 4, 1 in a, 1 + 4, 0.5 in b, whose slices share one rank, and 0.01 in c, which the
    # rule has found all the same.
    assert selection.filled(0).ranks == {}
    assert selection.filled(21).ranks == {"a": 1, "c": 1}
    assert selection.filled(22).ranks == {"a": 1, "b": 1, "c": 1}
    assert selection.filled(42).ranks == {"a": 3, "b": 1, "c": 1}
    assert selection.filled(42, max_rank=2).ranks == {"a": 2, "b": 2, "c": 1}
    assert selection.filled(10**6).ranks == {"a": 3, "b": 2, "c": 1}
    assert "by split_half (filled up) on 4 samples" in str(selection.filled(22))
    with pytest.raises(ValueError, match="max_rank is 0"):
        selection.filled(1, max_rank=0)


def test_a_budget_is_spent_where_it_is_asked_for(network):
    model, batches = network
    found = adapters.select_ranks(model, loss, batches)
    budget = 2 * found.parameters
    filled = adapters.select_ranks(model, loss, batches, budget=budget, fill=True)
    assert filled.ranks == found.filled(budget).ranks
    assert all(filled.ranks[path] >= rank for path, rank in found.ranks.items())
    left = budget - filled.parameters
    assert 0 <= left < max(each.cost for each in found.layers)


def test_a_rule_of_your_own_is_a_function(network):
    def within_a_factor(singular_values, *, factor=2.0):
        return jnp.sum(singular_values >= singular_values[..., :1] / factor, axis=-1)

    model, batches = network
    found = adapters.select_ranks(model, loss, batches, within_a_factor, "b", factor=1.5)
    values = np.asarray(found.layers[0].singular_values)
    assert found.layers[0].rank == (values >= values[0] / 1.5).sum() and found.layers[0].rank > 1
    assert found.rule == "within_a_factor"


def test_a_budget_goes_to_the_strongest_directions(network):
    model, batches = network
    free = adapters.select_ranks(model, loss, batches)
    for budget in (0, 40, 100, free.parameters, 10**6):
        found = adapters.select_ranks(model, loss, batches, budget=budget)
        assert found.parameters <= budget
        assert all(a.rank <= b.rank for a, b in zip(found.layers, free.layers, strict=True))
    assert found.ranks == free.ranks
    tight = adapters.select_ranks(model, loss, batches, budget=36)
    strongest = max(free.layers, key=lambda each: float(each.singular_values[0] ** 2) / each.cost)
    assert tight.ranks == {strongest.path: 1}


def test_tables_and_peft_patterns(network):
    model, batches = network
    found = adapters.select_ranks(model, loss, batches)
    text = str(found)
    assert "20×16" in text and text.endswith("by split_half on 4,000 samples.")
    config = found.peft(rename=lambda path: f"net.{path}")
    json.dumps(config)

    def rank(name):
        for key, value in config["rank_pattern"].items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return config["r"]

    assert {name: rank(name) for name in config["target_modules"]} == {
        "net.a": 2,
        "net.b": 4,
        "net.c": 1,
    }
    assert found.peft(alpha=8)["lora_alpha"] == 8 and not found.peft(alpha=8)["alpha_pattern"]
    nothing = found._replace(layers=tuple(each._replace(rank=0) for each in found.layers))
    with pytest.raises(ValueError, match="every rank is 0"):
        nothing.peft()


def test_the_cost_is_that_of_the_gradient_passes(network, traces):
    """Counted, not timed: one forward and one backward pass a batch; the benchmark has seconds."""
    model, batches = network
    calls = []

    def counted(model, batch):
        jax.debug.callback(lambda: calls.append(1))
        return loss(model, batch)

    adapters.select_ranks(model, counted, batches)
    jax.effects_barrier()
    assert len(calls) == len(batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "elbow"}, "rule is 'elbow'; it must be one of 'split_half'"),
        ({"rule": "c_over_n"}, "needs either constant or noise"),
        ({"rule": "c_over_n", "constant": 1.0, "noise": 1.0}, "needs either constant or noise"),
        ({"rule": "energy", "constant": 1.0}, "rule 'energy' has no constant; it takes fraction"),
        ({"rule": "split_half", "noise": 1.0}, "has no noise; it takes margin"),
        ({"rule": "c_over_n", "constant": -1.0}, "constant is -1"),
        ({"rule": "energy", "fraction": 0.0}, "fraction is 0.0"),
        ({"max_rank": 0}, "max_rank is 0"),
        ({"margin": -0.1}, "margin is -0.1"),
        ({"budget": -1}, "budget is -1"),
        ({"fill": True}, "fill is True without a budget"),
        ({"targets": "e"}, "matches no layer"),
    ],
)
def test_bad_calls(network, options, message):
    model, batches = network
    with pytest.raises(ValueError, match=message):
        adapters.select_ranks(model, loss, batches[:2], **options)


def test_whitened_ranks_are_those_of_the_update_whatever_the_inputs():
    """Inputs of 100 : 1 hide two of three planted directions from the plain rule alone."""
    shapes, draw = {"a": (20, 16)}, np.random.default_rng(5)
    model = Branches(shapes)
    strengths = np.geomspace(0.1, 10.0, 20)
    right = np.linalg.qr(draw.normal(size=(16, 16)))[0][:3]
    update = np.zeros((20, 16))
    update[[1, 10, 18]] = 1.5 * right / strengths[[1, 10, 18], None]
    x = draw.normal(size=(4000, 20)) * strengths
    y = x @ (np.asarray(model.a.kernel[...]) + update) + draw.normal(size=(4000, 16))
    batches = [
        ({"a": jnp.asarray(u, jnp.float32)}, {"a": jnp.asarray(v, jnp.float32)})
        for u, v in zip(np.split(x, 8), np.split(y, 8), strict=True)
    ]
    plain = adapters.select_ranks(model, loss, batches)
    found = adapters.select_ranks(model, loss, batches, "whitened")
    assert found.layers[0].rank == 3 > plain.layers[0].rank
    assert found.passes == 2 and plain.passes == 1
    moment = x.T @ x / len(x)
    values, vectors = np.linalg.eigh(moment)
    want = (vectors * values**-0.5) @ vectors.T @ np.asarray(plain.gradients["a"].matrix)
    sigma = np.linalg.svd(want, compute_uv=False)
    np.testing.assert_allclose(found.layers[0].singular_values, sigma, rtol=2e-3)
    # Gradients for starts are those of the loss, not whitened.
    np.testing.assert_array_equal(found.gradients["a"].matrix, plain.gradients["a"].matrix)
    with pytest.raises(ValueError, match="batches is an iterator"):
        adapters.select_ranks(model, loss, iter(batches), "whitened")


def test_whitening_leaves_out_what_no_input_has():
    moment = jnp.diag(jnp.array([4.0, 0.0, 1.0], "float32"))
    gradient = adapters.Gradient(None, jnp.ones((3, 2), "float32"), jnp.zeros((), "float32"))
    found = adapters.whitened(gradient, moment)
    np.testing.assert_array_equal(found.matrix, [[0.5, 0.5], [0, 0], [1, 1]])
    basis = jnp.eye(3, dtype="float32")[:, :2]
    sketch = adapters.Gradient(basis, gradient.core[:2], jnp.ones((), "float32"))
    found = adapters.whitened(sketch, moment)
    np.testing.assert_allclose(found.matrix, [[0.5, 0.5], [0, 0], [0, 0]], atol=1e-6)
    assert float(found.error) == 1.0  # at most that of the weakest kept direction
    with pytest.raises(ValueError, match="as many rows as moment has, 2"):
        adapters.whitened(gradient, moment[:2, :2])
