"""Guidance: exact for outputs; for weights a blend that merges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import adapters

KEY = jax.random.key(0)


@pytest.fixture
def pair():
    model = nnx.Sequential(
        nnx.Linear(6, 8, rngs=nnx.Rngs(0)), jnp.tanh, nnx.Linear(8, 4, rngs=nnx.Rngs(1))
    )
    adapted = adapters.adapt(model, key=KEY, rank=2)
    for layer in adapters.layers(adapted).values():
        b = layer.adapters["default"].b
        b[...] = jax.random.normal(KEY, b.shape, b.dtype) / 3
    return model, adapted, jax.random.normal(jax.random.key(1), (5, 6), "float32")


def test_outputs_are_blended_exactly(pair):
    model, adapted, x = pair
    base, after = np.asarray(model(x)), np.asarray(adapted(x))
    np.testing.assert_array_equal(adapters.guided(adapted, x, 0), base)
    np.testing.assert_array_equal(adapters.guided(adapted, x, 1), after)
    for gamma in (-1.0, 0.3, 2.5):
        want = base + gamma * (after - base)
        np.testing.assert_allclose(adapters.guided(adapted, x, gamma), want, rtol=1e-5, atol=1e-6)
    # Of logits: the product of both distributions to the powers 1 − γ and γ.
    found = jax.nn.softmax(adapters.guided(adapted, x, 2.5))
    first, second = (np.asarray(jax.nn.softmax(jnp.asarray(y))) for y in (base, after))
    product = first**-1.5 * second**2.5
    np.testing.assert_allclose(found, product / product.sum(axis=1, keepdims=True), rtol=1e-4)
    half = adapters.guided(adapted, x, 0.5, forward=lambda m, y: m(y).mean(axis=1))
    np.testing.assert_allclose(half, ((base + after) / 2).mean(axis=1), rtol=1e-5, atol=1e-6)


def test_weights_are_blended_and_merge(pair):
    model, adapted, x = pair
    blend = adapters.guided_weights(adapted, 2.5)
    for path, layer in adapters.layers(adapted).items():
        kernel = np.asarray(layer.base.kernel[...])
        change = np.asarray(layer.adapters["default"].update(layer.base))
        found = adapters.effective_kernel(adapters.layers(blend)[path])
        np.testing.assert_allclose(found, kernel + 2.5 * change, rtol=1e-5, atol=1e-6)
    merged = adapters.remove(adapters.merge(blend))
    np.testing.assert_allclose(merged(x), blend(x), atol=1e-5)
    # One layer is linear in its weight: there both blends are the same.
    single = adapters.adapt(model.layers[0], key=KEY, rank=2)
    single.adapters["default"].b[...] = jnp.ones((2, 8), jnp.float32)
    np.testing.assert_allclose(
        adapters.guided_weights(single, -1.5)(x), adapters.guided(single, x, -1.5), atol=1e-5
    )
    assert float(jnp.abs(blend(x) - adapters.guided(adapted, x, 2.5)).max()) > 1e-2


def test_what_cannot_be_guided_is_refused(pair):
    model, adapted, x = pair
    with pytest.raises(ValueError, match="no adapter"):
        adapters.guided(model, x, 2.0)
    with pytest.raises(ValueError, match="merged"):
        adapters.guided_weights(adapters.merge(adapted), 2.0)
    with pytest.raises(ValueError, match="gamma is nan"):
        adapters.guided(adapted, x, float("nan"))
