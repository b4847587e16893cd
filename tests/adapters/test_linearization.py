"""A small ViT in the NTK regime: matrix-free against written out, and a trained adapter."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorajax import adapters, optima
from lorajax.finetune import adapt
from lorajax.models import ViT, ViTConfig

CONFIG = ViTConfig((8, 8), patch_size=4, width=12, depth=1, heads=2, classes=3, channels=1)
WHERE = ["blocks/*/attention/query", "blocks/*/mlp/*"]


@pytest.fixture(scope="module")
def vit():
    """A ViT of one block in float64, its data, and its linearization."""

    @nnx.jit
    def build():
        return ViT(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64)

    model = build()
    keys = jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (6, 8, 8, 1))
    y = jax.nn.one_hot(jax.random.randint(keys[1], (6,), 0, 3), 3)
    return model, x, y, adapters.linearized(model, x, y, WHERE)


def test_matrix_free_and_written_out_agree_to_1e_10(vit):
    model, x, _, free = vit
    written = free.with_features()
    update = jax.tree.map(
        lambda shape: jax.random.normal(jax.random.key(2), shape),
        free.shape,
        is_leaf=lambda s: isinstance(s, tuple),
    )
    np.testing.assert_allclose(free.outputs, nnx.jit(lambda m: m(x))(model), atol=1e-12)
    assert set(free.shape) == {
        "blocks/0/attention/query",
        "blocks/0/mlp/up",
        "blocks/0/mlp/down",
    }

    def agree(a, b):
        scale = max(1.0, float(jnp.abs(a).max()))
        assert float(jnp.abs(a - b).max()) <= 1e-10 * scale

    both = [
        eqx.filter_jit(lambda p: (p.predict(update), p.full_gradient(update)))(p)
        for p in (free, written)
    ]
    jax.tree.map(agree, *both)
    agree(free.kernel(2), written.kernel())


def test_it_is_the_models_own_first_order(vit):
    model, x, _, free = vit
    moved = nnx.clone(model)
    step = 1e-5 * jax.random.normal(jax.random.key(3), (12, 12))
    query = moved.blocks[0].attention.query
    query.kernel[...] = query.kernel[...] + step
    update = free.zero() | {"blocks/0/attention/query": step}
    change = eqx.filter_jit(lambda p: p.predict(update))(free) - free.outputs
    answer = nnx.jit(lambda m: m(x))
    error = jnp.abs(answer(moved) - answer(model) - change).max()
    assert float(error) < 1e-3 * float(jnp.abs(change).max())


def test_a_trained_adapter_gets_a_certificate(vit):
    model, x, y, problem = vit
    decay = 0.3 * float(optima.certify(problem, problem.zero(), 1.0).gradient_norm)
    best = optima.minimize(problem, decay, tolerance=1e-6, max_steps=2000)
    assert bool(best.converged)
    adapted = adapt(model, WHERE, key=jax.random.key(4), rank=2)
    optimizer = nnx.Optimizer(adapted, optax.sgd(0.1), wrt=adapters.trainable(adapted))

    @nnx.jit
    def step(adapted, optimizer):
        def loss(m):
            return optax.softmax_cross_entropy(m(x), y).mean()

        diff = nnx.DiffState(0, adapters.trainable(adapted))
        optimizer.update(adapted, nnx.grad(loss, argnums=diff)(adapted))

    for _ in range(5):
        step(adapted, optimizer)
    update = adapters.updates_of(adapted)
    update = jax.tree.map(lambda u: u.astype(jnp.float64), update)
    assert {path: u.shape for path, u in update.items()} == problem.shape
    found = optima.certify(problem, update, decay)
    # Trained without decay it is not at this minimum, and the certificate says how far it is.
    true_distance = float(found.objective - best.certificate.objective)
    assert 0 < true_distance <= float(found.gap)


def test_what_cannot_be_linearized_is_refused(vit):
    model, x, y, _ = vit
    adapted = adapt(model, "blocks/*/mlp/up", key=jax.random.key(4), rank=2)
    with pytest.raises(ValueError, match="give the model before `adapt`"):
        adapters.linearized(adapted, x, y, "blocks/*/mlp/up")
    with pytest.raises(ValueError, match="no LoRA named 'other'"):
        adapters.updates_of(adapted, "other")
    with pytest.raises(ValueError, match="matches no"):
        adapters.linearized(model, x, y, "nowhere/*")
