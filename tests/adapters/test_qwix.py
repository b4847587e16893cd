"""Parity with Qwix 0.1.8 on Linear, attention and Conv (tests/formats/make_qwix_fixtures.py)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import Factors, adapters
from lorajax.adapters import LoRA

FIXTURE = pathlib.Path(__file__).resolve().parents[1] / "formats" / "fixtures" / "qwix.npz"
KEY = jax.random.key(0, impl="rbg")
LAYERS = {
    "linear": lambda rngs: nnx.Linear(8, 6, rngs=rngs),
    "attention": lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
    "conv": lambda rngs: nnx.Conv(4, 6, (3, 2), strides=(2, 1), padding="VALID", rngs=rngs),
}


@pytest.mark.parametrize("name", list(LAYERS))
def test_the_same_factors_give_the_same_output(name):
    arrays = {
        key.removeprefix(name + "/"): value
        for key, value in np.load(FIXTURE).items()
        if key.startswith(name + "/")
    }
    rank, alpha = (np.load(FIXTURE)[key].item() for key in ("rank", "alpha"))
    layer = nnx.eval_shape(lambda: LAYERS[name](nnx.Rngs(0)))
    for path, variable in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        variable.set_value(jnp.asarray(arrays["/".join(map(str, path))]))
    model = adapters.adapt(layer, key=KEY, rank=rank, alpha=alpha)
    found = adapters.layers(model)
    assert len(found) == (4 if name == "attention" else 1)
    for path, adapted in found.items():
        at = f"{path}/" if path else ""
        a, b = (arrays[f"{at}kernel_lora_{part}"] for part in "ab")
        factors = Factors(jnp.asarray(a.reshape(-1, rank)), jnp.asarray(b.reshape(rank, -1)))
        # Qwix starts at the same shapes: a rank-r pair for each kernel, read as a matrix.
        assert factors.shape == adapters.layout(adapted.base).shape
        adapted.adapters["default"] = LoRA(factors, alpha=alpha)
    x = jnp.asarray(arrays["x"])
    assert float(np.max(np.abs(np.asarray(layer(x)) - arrays["y"]))) > 0.1
    np.testing.assert_allclose(model(x), arrays["y"], atol=1e-5)


def test_the_flax_scale_is_qwixs_start():
    """Both draw A with he_uniform: entries of variance 2/in, in one unit a scale of √2."""
    init = nnx.initializers.he_uniform()(jax.random.key(0), (4096, 8), jnp.float32)
    layer = nnx.eval_shape(lambda: nnx.Linear(4096, 8, rngs=nnx.Rngs(0)))
    layer.kernel.set_value(jnp.ones((4096, 8), jnp.float32))

    def start(key, shape, rank, dtype):
        from lorajax import initializers

        return initializers.lora(key, shape, rank, "flax", distribution="uniform", dtype=dtype)

    a = adapters.adapt(layer, key=KEY, rank=8, start=start).adapters["default"].a[...]
    assert float(jnp.std(a)) == pytest.approx(float(jnp.std(init)), rel=0.02)
    assert float(jnp.max(jnp.abs(a))) == pytest.approx(float(jnp.max(jnp.abs(init))), rel=0.01)
