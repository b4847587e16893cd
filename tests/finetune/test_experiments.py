"""What lanes of one fine-tuning program may differ in, and AdaLoRA's budget inside of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorajax import adapters, data, finetune, initializers, models, sweeps, tasks

pytestmark = pytest.mark.slow  # they train

CONFIG = models.ViTConfig(
    (8, 8), 4, width=16, depth=1, heads=2, classes=3, channels=1, mean=(0.5,), std=(0.25,)
)
RECIPE = finetune.Recipe(
    steps=8, batch_size=8, optimizer="adam", learning_rate=1e-2, schedule="constant"
)
TARGETS = "**/attention/*"
KEY = jax.random.key(5)
TASK = tasks.Images.of(CONFIG)


@pytest.fixture(scope="module")
def gradients(model, table):
    return finetune.gradients_of(model, TASK, table, targets=TARGETS, batch_size=15)


def test_lanes_differ_in_start_order_rate_and_ranks(model, table, gradients, losses_of):
    """One program; each lane is held against a loop of its own."""
    paths = [f"blocks/0/attention/{name}" for name in ("key", "out", "query")]
    allocations = [{paths[0]: 1, paths[1]: 3}, {paths[0]: 2, paths[2]: 1}]
    starts = (initializers.small, functools.partial(initializers.spectral, directions=1))
    run = finetune.run_of(
        model,
        TASK,
        table,
        RECIPE,
        start=starts,
        heads=("head",),
        gradients=gradients,
        watch=table,
        every=4,
        orders=2,
        allocations=allocations,
    )
    lanes = {"start": [0, 1], "allocation": [0, 1], "order": [0, 1], "rate": np.float32([1, 0.5])}
    scale = np.float32([0.1, 0.1])
    found = sweeps.sweep(run, {"lane": {**lanes, "scale": scale}}, key=KEY, fold=())
    assert found["singular_values"].shape == (2, 2, 3, 3)
    # Spectral starts lie along the gradient, of which the probe is told.
    assert found["misalignment"][1, 0].values[[0, 2]].max() < 1e-5
    assert found["misalignment"][0, 0].values[:2].min() > 1e-3
    for lane, (ranks, start) in enumerate(zip(allocations, starts, strict=True)):
        values = found["singular_values"][lane, -1].values
        for i, path in enumerate(paths):
            rank = ranks.get(path, 0)
            top = values[i, 0]
            assert (values[i, rank:] <= 1e-6 * max(top, 1e-30)).all()
            assert rank == 0 or top > 0
        # The same by hand: the largest ranks, cut to the lane's.
        full = adapters.adapt(
            model,
            {paths[0]: 2, paths[1]: 3, paths[2]: 1},
            key=jax.random.wrap_key_data(jax.random.key_data(KEY)),
            start=functools.partial(start, scale=0.1),
            gradients=gradients,
        )
        for path, layer in adapters.layers(full).items():
            each, rank = layer.adapters["default"], ranks.get(path, 0)
            each.a.set_value(each.a[...].at[:, rank:].set(0))
            each.b.set_value(each.b[...].at[rank:].set(0))
        recipe = finetune.Recipe(
            steps=8,
            batch_size=8,
            optimizer="adam",
            learning_rate=1e-2 * float(lanes["rate"][lane]),
            schedule="constant",
            seed=lane,  # the order's own
        )
        trainer = finetune.Trainer(full, adapters.trainable(full, heads="head"), TASK, recipe)
        before = trainer.evaluate(trainer.init(), table)
        _, losses = losses_of(trainer, table)
        np.testing.assert_allclose(found["loss"][lane], losses, atol=1e-4)
        assert float(found["watch_loss"][lane, 0]) == pytest.approx(float(before.loss), abs=1e-5)
        hits = float(found["watch_accuracy"][lane, 0])
        assert hits == pytest.approx(float(before.accuracy), abs=1e-6)


def test_whole_models_train_as_lanes_too(model, table, losses_of):
    run = finetune.run_of(
        model, TASK, table, RECIPE, targets=None, test={"a": table, "b": table}, every=0, orders=2
    )
    found = sweeps.sweep(run, {"order": [0, 1]}, key=KEY, fold=())
    assert "singular_values" not in found
    trainer = finetune.Trainer(model, nnx.Param, TASK, RECIPE)
    state, losses = losses_of(trainer, table)
    np.testing.assert_allclose(found["loss"][0], losses, atol=1e-4)
    assert np.abs(found["loss"][1].values - losses).max() > 1e-3
    after = trainer.evaluate(state, table)
    np.testing.assert_allclose(found["a_loss"], found["b_loss"])
    assert float(found["a_loss"][0]) == pytest.approx(float(after.loss), abs=1e-4)


def test_heads_train_alone_too(model, table, losses_of):
    options = {"targets": (), "heads": ("head",), "test": table, "every": 0}
    found = jax.jit(finetune.run_of(model, TASK, table, RECIPE, **options))(KEY)

    def is_head(path, value):
        return path[0] == "head" and isinstance(value, nnx.Param)

    trainer = finetune.Trainer(model, is_head, TASK, RECIPE)
    assert trainer.parameters == 17 * 3
    state, losses = losses_of(trainer, table)
    np.testing.assert_allclose(found["loss"], losses, atol=1e-5)
    after = trainer.evaluate(state, table)
    assert float(found["test_loss"]) == pytest.approx(float(after.loss), abs=1e-5)
    assert "singular_values" not in found
    with pytest.raises(ValueError, match="wrt matches no parameter"):
        jax.jit(finetune.run_of(model, TASK, table, RECIPE, **(options | {"heads": ()})))(KEY)


def test_adalora_is_pruned_as_its_allocator_would(model, table):
    """Against a plain loop with `nnx.Optimizer` and `adapters.RankBudget`."""
    start = functools.partial(initializers.balanced, scale=1.0)
    options = {"rank": 4, "start": start}
    recipe = finetune.Recipe(
        steps=12, batch_size=20, optimizer="adam", learning_rate=1e-2, schedule="constant"
    )
    run = finetune.run_of(
        model,
        TASK,
        table,
        recipe,
        targets=TARGETS,
        heads=("head",),
        every=0,
        final_rank=1.5,
        **options,
    )
    found = jax.jit(run)(KEY)
    assert found["ranks"].shape == (4,) and int(found["ranks"].sum()) == 6

    adapted = adapters.adapt(model, TARGETS, key=KEY, kind="adalora", **options)
    wrt = adapters.trainable(adapted, heads="head")
    optimizer = nnx.Optimizer(adapted, optax.adam(1e-2), wrt=wrt)
    budget = adapters.RankBudget(adapted, final_rank=1.5, steps=12, warmup=1, settle=4)
    order = data.Order(60, 20, 0)

    def loss(model, x, y):
        entropy = optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()
        return entropy + jnp.float32(0.1) * adapters.orthogonality(model), entropy

    @nnx.jit
    def step(model, optimizer, budget, x, y):
        argnums = nnx.DiffState(0, wrt)
        (_, entropy), grads = nnx.value_and_grad(loss, argnums=argnums, has_aux=True)(model, x, y)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, grads)
        budget.update(model, grads)
        return entropy

    losses = []
    for i in range(12):
        x = models.normalize(table.columns["images"][order(i)], CONFIG.mean, CONFIG.std, channels=1)
        losses.append(float(step(adapted, optimizer, budget, x, table.columns["labels"][order(i)])))
    np.testing.assert_allclose(found["loss"], losses, atol=1e-4)
    assert list(budget.ranks(adapted).values()) == np.asarray(found["ranks"]).tolist()


def test_runs_return_what_they_predict(model, table, losses_of):
    run = finetune.run_of(
        model, TASK, table, RECIPE, targets=(), heads=("head",), test={"a": table}, every=0,
        predicting=True, at_once=25,
    )  # fmt: skip
    found = jax.jit(run)(KEY)

    def is_head(path, value):
        return path[0] == "head" and isinstance(value, nnx.Param)

    trainer = finetune.Trainer(model, is_head, TASK, RECIPE)
    state, _ = losses_of(trainer, table)
    predictions, answers = trainer.predict(state, table)
    # 60 samples in chunks of 25: what fills the last one up is not among them.
    assert found["a_predictions"].tolist() == predictions.tolist()
    right = tasks.METRICS["accuracy"](predictions, answers)
    assert float(found["a_accuracy"]) == pytest.approx(right, abs=1e-6)
    with pytest.raises(ValueError, match="the task NextToken offers no predictions"):
        finetune.run_of(model, tasks.NextToken(), table, RECIPE, predicting=True, every=0)


def test_bad_options_are_refused(model, table):
    with pytest.raises(ValueError, match="orders is 0"):
        finetune.run_of(model, TASK, table, RECIPE, orders=0)
    run = finetune.run_of(
        model, TASK, table, RECIPE, start=("small", "pissa"), rank=2, targets=TARGETS, every=0
    )
    with pytest.raises(ValueError, match="can be picked from"):
        run(KEY, start=0)
    run = finetune.run_of(
        model, TASK, table, RECIPE, start="pissa", allocations=[{"blocks/0/mlp/up": 1}], every=0
    )
    with pytest.raises(ValueError, match="has an offset"):
        run(KEY, allocation=0)
    with pytest.raises(ValueError, match="takes at least 2"):
        finetune.interval([1.0])
    with pytest.raises(ValueError, match="level is 1"):
        finetune.interval([1.0, 2.0], level=1.0)


def test_a_run_that_ends_at_chance_is_told_from_one_that_is_noisy():
    rng = np.random.default_rng(0)
    noise = 0.3 * rng.standard_normal(2000)
    assert not finetune.ends(0.4 + noise).higher
    assert not finetune.ends(np.linspace(0.7, 0.3, 2000) + noise).higher
    risen = finetune.ends(np.r_[np.full(900, 0.4), np.full(1100, 0.69)] + noise)
    assert risen.higher and abs(risen.first - 0.4) < 0.1 and abs(risen.last - 0.69) < 0.1
    assert not finetune.ends([0.1] * 19 + [9.0] * 19).higher  # too few steps
    assert finetune.ends(np.r_[np.ones(90), np.full(10, np.nan)]).higher
    assert finetune.ends(np.r_[np.ones(90), np.full(10, np.inf)]).higher
    # One that diverges scatters by as much as it rises.
    assert finetune.ends(np.r_[2.4, 2.3, 2.2, np.full(54, 99.0), 35, 308, 40]).higher
    with pytest.raises(ValueError, match="losses are empty"):
        finetune.ends([])


@pytest.mark.parametrize("steps", [40, 60, 400])
def test_runs_that_stand_still_are_seldom_told_to_end_higher(steps):
    rng = np.random.default_rng(3)
    runs = 0.7 + 0.1 * rng.standard_normal((2000, steps))
    assert sum(finetune.ends(each).higher for each in runs) <= 10  # 2.7 in the mean
