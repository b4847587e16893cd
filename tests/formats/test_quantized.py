"""Adapters on a base that Qwix keeps in int8: adapted first, then quantized below the adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import adapters, data, finetune, models, tasks

qwix = pytest.importorskip("qwix")
pytestmark = [pytest.mark.formats, pytest.mark.filterwarnings("ignore")]
CONFIG = models.LlamaConfig(
    vocabulary=64, width=32, depth=2, heads=4, groups=2, mlp_width=64, context=32
)


def held(model) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def test_adapters_train_on_an_int8_base():
    model = models.build(CONFIG, rngs=nnx.Rngs(0))
    model.eval()
    adapted = adapters.adapt(model, "blocks/**", key=jax.random.key(1), rank=2)
    tokens = np.random.default_rng(0).integers(2, 64, (4, 16)).astype(np.int32)
    rule = qwix.QuantizationRule(module_path="blocks/.*/base", weight_qtype=jnp.int8)
    small = qwix.quantize_model(adapted, qwix.PtqProvider([rule]), jnp.asarray(tokens))
    assert len(adapters.layers(small)) == 14
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(nnx.state(small))]
    assert sum(dtype == jnp.int8 for dtype in dtypes) == 14
    assert held(small) < 0.5 * held(adapted)
    wanted = adapted(jnp.asarray(tokens))
    assert float(jnp.abs(small(jnp.asarray(tokens)) - wanted).max()) < 0.05 * float(
        jnp.abs(wanted).max()
    )
    table = data.Table(
        {
            "tokens": tokens,
            "targets": np.ones((4, 16), bool),
            "positions": np.tile(np.arange(16, dtype=np.int32), (4, 1)),
            "segments": np.ones((4, 16), np.int32),
        }
    )
    recipe = finetune.Recipe(5, batch_size=4, learning_rate=1e-2, schedule="constant")
    losses = {}
    for name, each in (("float32", adapted), ("int8", small)):
        trainer = finetune.Trainer(each, adapters.trainable(each), tasks.NextToken(), recipe)
        found = losses[name] = []
        finetune.fit(trainer, table, callback=lambda r, to=found: to.append(float(r.metrics.loss)))
        assert trainer.parameters == sum(
            factor.size
            for layer in adapters.layers(each).values()
            for factor in layer.adapters["default"].factors
        )
    assert losses["int8"][-1] < losses["int8"][0] - 0.2
    np.testing.assert_allclose(losses["int8"], losses["float32"], atol=0.01)
