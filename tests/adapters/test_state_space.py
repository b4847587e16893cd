"""LoRA on state-space layers: their projections are layers like any other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorajax import adapters

KEY = jax.random.key(0)
WIDTH, STATES = 6, 4


class Diagonal(nnx.Module):
    """S4D between two projections: each channel a diagonal system of complex states, held fixed."""

    def __init__(self, rngs):
        self.in_proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.out_proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.rates = nnx.Param(jnp.full((WIDTH, STATES), -0.5, jnp.float32))
        turns = jnp.pi * jnp.arange(STATES, dtype=jnp.float32)[None, :]
        self.turns = nnx.Param(jnp.tile(turns, (WIDTH, 1)))
        self.reads = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, STATES), "float32"))
        self.skip = nnx.Param(jnp.ones((WIDTH,), jnp.float32))
        self.step = 0.1

    def __call__(self, x):
        u = self.in_proj(x)
        poles = jax.lax.complex(self.rates[...], self.turns[...])
        decay = jnp.exp(self.step * poles)
        drive = (decay - 1) / poles

        def advance(state, now):
            state = decay[None] * state + drive[None] * now[:, :, None].astype(state.dtype)
            return state, 2 * jnp.sum((self.reads[...][None] * state.real), axis=-1)

        start = jnp.zeros((len(x), WIDTH, STATES), jnp.complex64)
        _, y = jax.lax.scan(advance, start, jnp.swapaxes(u, 0, 1))
        y = jnp.swapaxes(y, 0, 1) + self.skip[...][None, None] * u
        return self.out_proj(jax.nn.gelu(y))


class Selective(nnx.Module):
    """A Mamba-type layer: step, input and output of the states are projections of the input."""

    def __init__(self, rngs):
        self.in_proj = nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.x_proj = nnx.Linear(WIDTH, 2 + 2 * STATES, use_bias=False, rngs=rngs)
        self.dt_proj = nnx.Linear(2, WIDTH, rngs=rngs)
        self.out_proj = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        rates = jnp.log(jnp.arange(1, STATES + 1, dtype=jnp.float32))
        self.rates = nnx.Param(jnp.tile(rates[None], (WIDTH, 1)))

    def __call__(self, x):
        u, gate = jnp.split(self.in_proj(x), 2, axis=-1)
        u = jax.nn.silu(u)
        short, write, read = jnp.split(self.x_proj(u), [2, 2 + STATES], axis=-1)
        step = jax.nn.softplus(self.dt_proj(short))
        poles = -jnp.exp(self.rates[...])[None]

        def advance(state, now):
            u, step, write, read = now
            fresh = (step * u)[:, :, None] * write[:, None, :]
            state = jnp.exp(step[:, :, None] * poles) * state + fresh
            return state, jnp.sum(state * read[:, None, :], axis=-1)

        start = jnp.zeros((len(x), WIDTH, STATES), x.dtype)
        along = [jnp.swapaxes(each, 0, 1) for each in (u, step, write, read)]
        _, y = jax.lax.scan(advance, start, tuple(along))
        return self.out_proj(jnp.swapaxes(y, 0, 1) * jax.nn.silu(gate))


@pytest.mark.parametrize(
    ("kind", "targets", "count"),
    [(Diagonal, "**/*_proj", 2), (Selective, ["in_proj", "x_proj", "dt_proj", "out_proj"], 4)],
)
def test_projections_of_a_state_space_layer_train_and_merge(kind, targets, count):
    layer = kind(nnx.Rngs(0))
    x = jax.random.normal(KEY, (3, 12, WIDTH), "float32")
    teacher = adapters.adapt(layer, targets, key=jax.random.key(1), rank=1)
    for each in adapters.layers(teacher).values():
        b = each.adapters["default"].b
        b[...] = jax.random.normal(jax.random.key(2), b.shape, b.dtype) / 3
    want = teacher(x)
    model = adapters.adapt(layer, targets, key=jax.random.key(3), rank=2)
    assert len(adapters.layers(model)) == count
    np.testing.assert_array_equal(model(x), layer(x))
    wrt = adapters.trainable(model)
    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=wrt)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda m: jnp.mean((m(x) - want) ** 2)  # noqa: E731
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        with jax.numpy_dtype_promotion("standard"):  # optax's own bias correction mixes dtypes
            optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(150)]
    assert losses[-1] < 0.1 * losses[0]
    for name in ("rates", "reads"):  # what no adapter is beside has not moved
        if hasattr(layer, name):
            np.testing.assert_array_equal(getattr(model, name)[...], getattr(layer, name)[...])
    merged = adapters.merge(model)
    np.testing.assert_allclose(merged(x), model(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(adapters.remove(merged)(x), merged(x))
    np.testing.assert_array_equal(adapters.unmerge(merged)(x), model(x))
