"""AdaLoRA's budget, and LoRA+ and ALLoRA inside optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorajax import adapters

KEY = jax.random.key(0, impl="rbg")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Two(nnx.Module):
    """Two layers whose updates should have ranks 3 and 1."""

    def __init__(self):
        for seed, name in enumerate(("one", "two")):
            layer = nnx.eval_shape(lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
            layer.kernel = nnx.Param(draw(8, 8, seed=seed) / 3)
            layer.bias = nnx.Param(jnp.zeros(8, jnp.float32))
            setattr(self, name, layer)

    def __call__(self, x):
        return self.one(x), self.two(x)


@pytest.fixture(scope="module")
def task():
    model, x = Two(), draw(256, 8, seed=3)
    frames = [np.linalg.qr(draw(8, 8, seed=s))[0] for s in (4, 5)]
    updates = [frames[0][:, :3] @ frames[1][:3], 1.2 * frames[1][:, 3:4] @ frames[0][4:5]]
    kernels = [model.one.kernel[...] + updates[0], model.two.kernel[...] + updates[1]]
    return model, x, [x @ kernel for kernel in kernels]


def adalora(model, rank=4):
    return adapters.adapt(model, key=KEY, rank=rank, kind="adalora")


def test_the_budget_finds_the_ranks_of_the_layers(task):
    model, x, y = task
    adapted = adalora(model)
    optimizer = nnx.Optimizer(adapted, optax.adam(3e-2), wrt=adapters.trainable(adapted))
    steps = 150
    budget = adapters.RankBudget(adapted, final_rank=2, steps=steps, warmup=20, settle=40, every=5)

    @nnx.jit
    def step(model, optimizer, budget):
        def loss(model):
            out = model(x)
            error = sum(jnp.mean((a - b) ** 2) for a, b in zip(out, y, strict=True))
            return error + 0.1 * adapters.orthogonality(model), error

        wrt = nnx.DiffState(0, adapters.trainable(model))
        grads, error = nnx.grad(loss, argnums=wrt, has_aux=True)(model)
        with jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, grads)
        budget.update(model, grads)
        return error

    first = float(step(adapted, optimizer, budget))
    assert budget.ranks(adapted) == {"one": 4, "two": 4}
    for _ in range(steps - 1):
        last = float(step(adapted, optimizer, budget))
    assert budget.ranks(adapted) == {"one": 3, "two": 1}
    assert last < 0.02 * first
    assert float(adapters.orthogonality(adapted)) < 0.2
    np.testing.assert_array_equal(adapted.one.base.kernel[...], model.one.kernel[...])


def test_orthogonality_is_zero_at_the_default_start(task):
    assert float(adapters.orthogonality(adalora(task[0]))) < 1e-10


def test_cubic_budget():
    at = lambda t: int(  # noqa: E731
        adapters.cubic_budget(t, initial=40, final=10, steps=100, warmup=10, settle=30)
    )
    assert [at(t) for t in (0, 10, 40, 70, 100, 1000)] == [40, 40, 13, 10, 10, 10]
    assert all(at(t) >= at(t + 1) for t in range(100))
    assert int(jax.jit(lambda t: adapters.cubic_budget(t, initial=4, final=1, steps=10))(5)) == 1


def test_equal_scores_never_exceed_the_budget(task):
    adapted = adalora(task[0])
    budget = adapters.RankBudget(adapted, final_rank=1.5, steps=4)
    for layer in adapters.layers(adapted).values():
        layer.adapters["default"].e[...] += 1
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(adapted, adapters.trainable(adapted)))
    for _ in range(4):
        budget.update(adapted, zeros)
    assert sum(budget.ranks(adapted).values()) == 3


def test_a_budget_of_parameters_is_never_exceeded_nor_left_over():
    """Directions of unlike cost: the strongest stay, and what is left pays for no further one."""
    wide = adapters.adapt(
        nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 24, rngs=nnx.Rngs(1))),
        key=KEY, rank=4, kind="adalora",
    )  # fmt: skip
    costs, total = (17, 33), 105
    budget = adapters.RankBudget(wide, final_parameters=total, steps=4)
    assert budget.initial == 4 * 17 + 4 * 33 and budget.final == total
    for i, layer in enumerate(adapters.layers(wide).values()):
        layer.adapters["default"].e[...] += 1 + 10 * i + jnp.arange(4.0, dtype=jnp.float32)
    ones = jax.tree.map(jnp.ones_like, nnx.state(wide, adapters.trainable(wide)))
    for _ in range(4):
        budget.update(wide, ones)
    spent = sum(r * c for r, c in zip(budget.ranks(wide).values(), costs, strict=True))
    assert total - max(costs) < spent <= total
    # Three directions of the layer of the larger values; the fourth, next in order, does not fit.
    assert list(budget.ranks(wide).values()) == [0, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 10}, "give one of them"),
        ({"final_rank": 1, "final_parameters": 50, "steps": 10}, "give one of them"),
        ({"final_parameters": 137, "steps": 10}, "it must lie in 1 … initial = 136"),
        ({"final_rank": 0, "steps": 10}, "final is 0"),
        ({"final_rank": 5, "steps": 10}, "it must lie in 1 … initial = 8"),
        ({"final_rank": 2, "steps": 10, "warmup": 5, "settle": 5}, "must exceed warmup"),
        ({"final_rank": 2, "steps": 10, "every": 0}, "every is 0"),
        ({"final_rank": 2, "steps": 10, "sensitivity_decay": 1.0}, "sensitivity_decay is 1.0"),
        ({"final_rank": 2, "steps": 10, "name": "other"}, "no AdaLoRA adapter 'other'"),
    ],
)
def test_bad_budgets(task, options, message):
    with pytest.raises(ValueError, match=message):
        adapters.RankBudget(adalora(task[0]), **options)


def test_gradients_of_something_else_are_refused(task):
    adapted = adalora(task[0])
    budget = adapters.RankBudget(adapted, final_rank=2, steps=10)
    with pytest.raises(ValueError, match="grads lack 'one/adapters/default/a'"):
        budget.update(adapted, nnx.state(adapted, nnx.BatchStat))


def updated(tx, adapted, grads, heads=()):
    wrt = adapters.trainable(adapted, heads=heads)
    optimizer = nnx.Optimizer(adapted, tx, wrt=wrt)
    before = {path: np.array(v[...]) for path, v in nnx.to_flat_state(nnx.state(adapted, wrt))}
    optimizer.update(adapted, grads)
    after = dict(nnx.to_flat_state(nnx.state(adapted, wrt)))
    return {path: np.asarray(after[path][...]) - old for path, old in before.items()}


def gradients_of(adapted, task, heads=()):
    _, x, y = task
    loss = lambda m: sum(jnp.mean((a - b) ** 2) for a, b in zip(m(x), y, strict=True))  # noqa: E731
    wrt = nnx.DiffState(0, adapters.trainable(adapted, heads=heads))
    return nnx.grad(loss, argnums=wrt)(adapted)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (adapters.lora_plus(16.0), {"a": 1, "b": 16, "kernel": 1, "bias": 1}),
        (adapters.scale_beside(3.0), {"a": 1, "b": 1, "kernel": 3, "bias": 3}),
    ],
    ids=["lora_plus", "scale_beside"],
)
def test_each_scaling_speeds_up_its_own_part_and_nothing_else(task, scaling, expected):
    make = lambda: adapters.adapt(task[0], "one", key=KEY, rank=2, start="small")  # noqa: E731
    heads = ("two",)
    grads = gradients_of(make(), task, heads)
    plain = updated(optax.sgd(0.1), make(), grads, heads)
    fast = updated(optax.chain(optax.sgd(0.1), scaling), make(), grads, heads)
    ratios = {
        path[-1]: float(np.linalg.norm(fast[path]) / np.linalg.norm(plain[path])) for path in plain
    }
    assert ratios == pytest.approx(expected, rel=1e-3)


def test_allora_divides_the_columns_of_b(task):
    make = lambda: adapters.adapt(task[0], "one", key=KEY, rank=2, start="pissa")  # noqa: E731
    adapted = make()
    grads = gradients_of(adapted, task)
    plain = updated(optax.sgd(0.1), make(), grads)
    scaled = updated(optax.chain(adapters.allora(2.0), optax.sgd(0.1)), make(), grads)
    a, b = adapted.one.adapters["default"].factors
    gain = 1 / np.sqrt(np.linalg.norm(a @ b, axis=0) + 1 / 4)
    at = ("one", "adapters", "default")
    np.testing.assert_allclose(scaled[*at, "b"], plain[*at, "b"] * gain[None], atol=1e-6)
    np.testing.assert_array_equal(scaled[*at, "a"], plain[*at, "a"])


def test_optimizers_that_find_nothing_say_so(task):
    model = task[0]
    for tx in (adapters.lora_plus(), adapters.allora()):
        with pytest.raises(ValueError, match="finds no LoRA factors"):
            nnx.Optimizer(model, tx, wrt=nnx.Param)
    with pytest.raises(ValueError, match="scale_beside finds no adapter"):
        nnx.Optimizer(model, adapters.scale_beside(2.0), wrt=nnx.Param)
    with pytest.raises(ValueError, match="factor is 0"):
        adapters.scale_beside(0)
    with pytest.raises(ValueError, match="ratio is 0"):
        adapters.lora_plus(0)
    with pytest.raises(ValueError, match="eta is -1"):
        adapters.allora(-1)
    params = nnx.state(adapters.adapt(model, key=KEY, rank=1), nnx.LoRAParam)
    tx = adapters.allora()
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("names", ["ab", "a", "b"])
def test_factors_that_a_partition_has_parted(task, names):
    """A part without A has no product, one without B nothing that LoRA+ and ALLoRA act on."""
    model = adapters.adapt(task[0], "one", key=KEY, rank=2, start="pissa")
    wrt = adapters.trainable(model)

    def part(tree):
        def label(path, _):
            return "in" if any(f"'{name}'" in str(path) for name in names) else "out"

        return jax.tree_util.tree_map_with_path(label, tree)

    def step(transformation):
        parts = {"in": optax.chain(transformation, optax.sgd(0.1)), "out": optax.sgd(0.1)}
        optimizer = nnx.Optimizer(nnx.clone(model), optax.multi_transform(parts, part), wrt=wrt)
        optimizer.update(nnx.clone(model), gradients_of(model, task))

    for what, transformation in (
        ("lora_plus", adapters.lora_plus()),
        ("allora", adapters.allora()),
    ):
        if names == "a":
            with pytest.raises(ValueError, match=f"{what} is given 'one/.*' with A alone"):
                step(transformation)
        elif names == "b" and what == "allora":
            with pytest.raises(ValueError, match="allora is given 'one/.*' with B alone"):
                step(transformation)
        else:
            step(transformation)


def test_allora_knows_no_product_of_three(task):
    model = adalora(task[0])
    optimizer = nnx.Optimizer(model, adapters.allora(), wrt=adapters.trainable(model))
    with pytest.raises(ValueError, match="an AdaLoRA, whose update is not A B"):
        optimizer.update(model, gradients_of(model, task))
