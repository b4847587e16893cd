"""Layers whose derivatives are written out: they are those of the plain formulas, and leaner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import finetune, models, tasks
from lorajax.finetune import recipes
from lorajax.models import layers


def plain_standardized(x):
    centered = x - x.mean(axis=-1, keepdims=True)
    return centered / jnp.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-5)


PAIRS = {
    "erf": (lambda x: layers.gelu(x), lambda x: jax.nn.gelu(x, approximate=False)),
    "tanh": (lambda x: layers.gelu(x, "tanh"), lambda x: jax.nn.gelu(x, approximate=True)),
    "quick": (lambda x: layers.gelu(x, "quick"), lambda x: x / (1 + jnp.exp(-1.702 * x))),
    "softmax": (layers.softmax, lambda x: jnp.exp(x) / jnp.exp(x).sum(axis=-1, keepdims=True)),
    "standardize": (lambda x: layers.standardize(x, 1e-5), plain_standardized),
    "gate": (lambda x: layers.gated(x, jnp.cos(x)), lambda x: x / (1 + jnp.exp(-x)) * jnp.cos(x)),
    "gated": (lambda x: layers.gated(jnp.cos(x), x), lambda x: jax.nn.silu(jnp.cos(x)) * x),
}


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_two_derivatives_are_those_of_the_formula(name):
    x, t, u = jax.random.normal(jax.random.key(0), (3, 4, 7))

    def all_of(f):
        slope = lambda x: jax.grad(lambda x: (f(x) * t).sum())(x)  # noqa: E731
        return f(x), jax.jvp(f, (x,), (u,))[1], slope(x), jax.jvp(slope, (x,), (u,))[1]

    for ours, theirs in zip(*map(all_of, PAIRS[name]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.apart
def test_a_step_holds_one_array_where_xla_would_hold_two():
    config = models.ViTConfig((32, 32), 4, width=64, depth=4, heads=4, classes=10)
    model = nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))
    model, wrt, _ = finetune.abstract_lora(model, rank=4)
    task, batch = tasks.expected(model, 16)
    trainer = finetune.Trainer(model, wrt, task, recipes.lora(10, batch_size=16))
    state = jax.eval_shape(trainer.init)
    left_alone = jax.jit(trainer.advance, donate_argnums=0).lower(state, trainer.frozen, batch)
    used, without = (
        program.compile().memory_analysis().temp_size_in_bytes
        for program in (trainer.lower(state, batch), left_alone)
    )
    assert used <= 1.001 * without
    if jax.__version_info__ < (0, 11):  # XLA of 0.12.0.1 keeps the barriers of this program itself
        assert used < 0.75 * without
