"""(IA)³ and Propulsion: kinds that scale what a layer puts out, or takes in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorajax import adapters

KEY = jax.random.key(0)


def layer_of(kind, *args, **options):
    draw = np.random.default_rng(0)
    layer = nnx.eval_shape(lambda: kind(*args, rngs=nnx.Rngs(0), **options))
    for _, variable in nnx.to_flat_state(nnx.state(layer)):
        variable.set_value(jnp.asarray(draw.normal(size=variable.shape), variable.dtype))
    return layer


LAYERS = {
    "linear": (lambda: layer_of(nnx.Linear, 6, 5), (3, 6)),
    "general": (lambda: layer_of(nnx.LinearGeneral, (2, 3), (4, 2), axis=(-2, -1)), (3, 2, 3)),
    "conv": (lambda: layer_of(nnx.Conv, 4, 6, (3,)), (2, 7, 4)),
    "embed": (lambda: layer_of(nnx.Embed, 7, 5), (2, 3)),
}


def moved(model, seed=3):
    graphdef, params, rest = nnx.split(model, nnx.LoRAParam, ...)
    draw = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: x + jnp.asarray(draw.normal(size=x.shape) / 9, x.dtype), params)
    return nnx.merge(graphdef, params, rest)


@pytest.mark.parametrize("side", ["outputs", "inputs"])
@pytest.mark.parametrize("kind", ["ia3", "propulsion"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_start_changes_nothing_and_a_merged_layer_is_the_adapted_one(name, kind, side):
    make, shape = LAYERS[name]
    layer, draw = make(), np.random.default_rng(1)
    x = jnp.asarray(draw.normal(size=shape), jnp.float32)
    if name == "embed":
        x = jnp.asarray(draw.integers(0, 7, shape))
    still = adapters.adapt(layer, kind=kind, side=side, key=KEY)
    np.testing.assert_array_equal(still(x), layer(x))
    model = moved(still)
    assert float(jnp.abs(model(x) - layer(x)).max()) > 0.05
    merged = adapters.merge(model)
    np.testing.assert_allclose(merged(x), model(x), rtol=1e-6, atol=2e-5)
    plain = adapters.remove(merged)
    np.testing.assert_array_equal(plain(x), merged(x))
    np.testing.assert_array_equal(adapters.unmerge(merged)(x), model(x))


def test_outputs_are_scaled_with_their_bias_and_inputs_before_it():
    layer = layer_of(nnx.Linear, 3, 2)
    x = jnp.ones((1, 3), jnp.float32)
    change = jnp.array([1.0, -0.5], "float32")
    for kind, power in ((adapters.IA3Spec, 1), (adapters.PropulsionSpec(power=3), 3)):
        model = adapters.adapt(layer, kind=kind, key=KEY)
        model.adapters["default"].change[...] = change
        scale = np.array([2.0, 0.5]) ** power
        np.testing.assert_allclose(model(x), scale * np.asarray(layer(x)), rtol=1e-6)
    model = adapters.adapt(layer, kind="ia3", side="inputs", key=KEY)
    model.adapters["default"].change[...] = jnp.array([1.0, 0.0, -1.0], "float32")
    np.testing.assert_allclose(model(x), layer(jnp.array([[2.0, 1.0, 0.0]], "float32")), rtol=1e-6)


def test_scales_are_learned_and_described():
    model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 3, rngs=nnx.Rngs(1)))
    adapted = adapters.adapt(model, kind="propulsion", power=2, key=KEY)
    rows = adapters.describe(adapted).rows
    assert [(row.kind, row.parameters) for row in rows] == [("Propulsion", 6), ("Propulsion", 3)]
    x = jax.random.normal(KEY, (32, 4), "float32")
    want = model(x) * jnp.array([[1.5, 1.0, 0.6]], "float32")
    wrt = adapters.trainable(adapted)
    optimizer = nnx.Optimizer(adapted, optax.adam(0.05), wrt=wrt)

    def loss(m):
        return jnp.mean((m(x) - want) ** 2)

    @nnx.jit
    def step(m, optimizer):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(m)
        with jax.numpy_dtype_promotion("standard"):  # optax's own bias correction mixes dtypes
            optimizer.update(m, grads)
        return value

    first = float(step(adapted, optimizer))
    for _ in range(80):
        last = float(step(adapted, optimizer))
    assert last < 0.01 * first


def test_files_and_checkpoints_bring_scales_back(tmp_path):
    model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 3, rngs=nnx.Rngs(1)))
    targets = {"layers/0": {}, "layers/1": {"side": "inputs"}}
    adapted = moved(adapters.adapt(model, targets, kind="ia3", alpha=2.0, key=KEY))
    x = jax.random.normal(KEY, (5, 4), "float32")
    adapters.save_peft(adapted, tmp_path / "peft")
    again = adapters.load_peft(model, tmp_path / "peft")
    np.testing.assert_allclose(again(x), adapted(x), atol=1e-6)
    adapters.save_checkpoint(adapted, tmp_path / "whole")
    fresh = adapters.adapt(model, targets, kind="ia3", alpha=2.0, key=KEY)
    adapters.load_checkpoint(fresh, tmp_path / "whole")
    np.testing.assert_array_equal(fresh(x), adapted(x))


REFUSED = [
    (lambda m, f: adapters.adapt(m, kind="ia3", dropout=0.1, key=KEY), "dropout is 0.1"),
    (lambda m, f: adapters.adapt(m, kind="propulsion", power=0, key=KEY), "power is 0"),
    (
        lambda m, f: adapters.save_peft(adapters.adapt(m, kind="propulsion", key=KEY), f),
        "Propulsion update, for which PEFT has no method",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_scales_cannot_do_is_refused(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(layer_of(nnx.Linear, 3, 2), tmp_path)
    layer = layer_of(nnx.Embed, 7, 5)
    with pytest.raises(ValueError, match="does not adapt"):
        adapters.save_peft(adapters.adapt(layer, kind="ia3", attends=False, key=KEY), tmp_path)
