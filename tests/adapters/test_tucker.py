"""Tucker-LoRA: against matricized LoRA, tied across layers, its count and what it can hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import Factors, adapters, initializers
from lorajax.adapters import LoRA, Tucker
from lorajax.initializers import TuckerFactors

KEY = jax.random.key(0, impl="rbg")
F64 = jnp.float64


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def layer_of(kind, *args, **options):
    layer = nnx.eval_shape(
        lambda: kind(*args, use_bias=False, param_dtype=F64, rngs=nnx.Rngs(0), **options)
    )
    layer.kernel = nnx.Param(draw(*layer.kernel.shape))
    return layer


LAYERS = {
    "linear": (lambda: layer_of(nnx.Linear, 6, 5), (3, 6)),
    "conv1d": (lambda: layer_of(nnx.Conv, 4, 6, (3,), strides=2), (2, 7, 4)),
    "conv2d": (lambda: layer_of(nnx.Conv, 4, 6, (3, 2), kernel_dilation=2), (2, 6, 5, 4)),
    "groups": (lambda: layer_of(nnx.Conv, 4, 6, (3,), feature_group_count=2), (2, 7, 4)),
    "query": (lambda: layer_of(nnx.LinearGeneral, 6, (2, 4)), (3, 6)),
    "out": (lambda: layer_of(nnx.LinearGeneral, (2, 4), 5, axis=(-2, -1)), (3, 2, 4)),
}


def matching_identity(view, factors):
    """The Tucker form of a matricized LoRA: every mode whole but the last input and the outputs.

    A (n_1 … n_p, r), read as a tensor, is A = ×_i I, and its last axis meets that of B: the core is
    the identity between the rank index of A and that of B, spread over the modes that are whole.
    """
    a, b = factors
    r = a.shape[1]
    inputs = [view.kernel_shape[i] for i in inputs_of(view)]
    *whole, last = inputs
    outside = int(np.prod(whole, dtype=int))
    # U of the last input mode holds A's columns for each index of the whole modes.
    mode = a.reshape(outside, last, r).swapaxes(0, 1).reshape(last, outside * r)
    core = jnp.eye(outside * r, dtype=a.dtype).reshape(outside, r, outside * r)
    core = core.swapaxes(1, 2).reshape(*whole, outside * r, r)
    return TuckerFactors(core, (*(jnp.eye(n, dtype=a.dtype) for n in whole), mode, b.T))


def inputs_of(view):
    axes = getattr(view, "axes", None)
    return axes.inputs if axes else tuple(range(len(view.kernel_shape) - 1))


def wrapped(layer, adapter):
    model = adapters.adapt(layer, key=KEY, rank=1, dtype=F64)
    model.adapters["default"] = adapter
    return model


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "groups", "out"])
def test_with_the_matching_identity_as_core_it_is_matricized_lora(name):
    make, shape = LAYERS[name]
    layer = make()
    view = adapters.layout(layer)
    m, n = view.shape
    factors = Factors(draw(m, 2), draw(2, n, seed=1))
    tucker = matching_identity(view, factors)
    assert tucker.core.shape == tuple(f.shape[1] for f in tucker.factors)
    lora, same = wrapped(layer, LoRA(factors)), wrapped(layer, Tucker(tucker, alpha=None))
    x = draw(*shape, seed=2)
    np.testing.assert_allclose(same(x), lora(x), atol=1e-11)
    np.testing.assert_allclose(
        adapters.effective_kernel(same), adapters.effective_kernel(lora), atol=1e-12
    )


@pytest.mark.parametrize("name", list(LAYERS))
def test_parameters_match_the_formula(name):
    layer = LAYERS[name][0]()
    model = adapters.adapt(layer, key=KEY, rank=2, kind="tucker", dtype=F64)
    adapter, shape = model.adapters["default"], layer.kernel.shape
    ranks = adapter.ranks
    want = np.prod(ranks) + sum(n * r for n, r in zip(shape, ranks, strict=True))
    assert adapter.parameters == want
    if "conv" in name or name == "groups":
        assert ranks[:-2] == shape[:-2] and ranks[-2:] == (2, 2)
    assert adapters.describe(model).trainable == want


def best_lora(tensor, view_shape, rank):
    u, s, vt = np.linalg.svd(tensor.reshape(view_shape), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ vt[:rank]).reshape(tensor.shape)


@pytest.mark.parametrize("seed", range(3))
def test_at_equal_parameters_it_holds_low_multilinear_rank_better(seed):
    """A 3×3 convolution of 16 → 16 channels whose update has multilinear rank (2, 2, 4, 4)."""
    shape, ranks = (3, 3, 16, 16), (2, 2, 4, 4)
    core = draw(*ranks, seed=seed)
    factors = tuple(draw(n, r, seed=10 + seed) for n, r in zip(shape, ranks, strict=True))
    target = np.asarray(TuckerFactors(core, factors).product)
    start = initializers.hosvd(jnp.asarray(target), ranks)
    projected = target
    for mode, frame in enumerate(start.factors):
        projected = np.moveaxis(np.tensordot(frame @ frame.T, projected, axes=(1, mode)), 0, mode)
    # Rounded up, in favor of LoRA: a rank costs 9 · 16 + 16 parameters.
    rank = -(-start.parameters // 160)
    lora = best_lora(target, (144, 16), rank)
    size = np.linalg.norm(target)
    assert np.linalg.norm(projected - target) < 1e-12 * size
    assert np.linalg.norm(lora - target) > 0.05 * size


def test_tied_layers_share_one_tensor():
    class Stack(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([layer_of(nnx.Linear, 6, 5) for _ in range(4)])

    model = Stack()
    options = {"kind": "tucker", "tied": True, "dtype": F64}
    adapted = adapters.adapt(model, "layers/*", key=KEY, rank=(3, 2, 2), **options)
    found = [layer.adapters["default"] for layer in adapters.layers(adapted).values()]
    assert all(adapter.core is found[0].core for adapter in found)
    assert [adapter.layer for adapter in found] == [0, 1, 2, 3]
    count = 3 * 2 * 2 + 4 * 3 + 6 * 2 + 5 * 2
    params = nnx.state(adapted, adapters.trainable(adapted))
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert adapters.describe(adapted).trainable == count
    x = draw(2, 6)
    np.testing.assert_array_equal(adapted.layers[1](x), model.layers[1](x))

    # The stacked tensor itself, against the layers' updates; and gradients reach the shared core.
    found[0].core[...] = draw(3, 2, 2)
    tensor = TuckerFactors(found[0].core[...], tuple(mode[...] for mode in found[0].modes)).product
    for index, adapter in enumerate(found):
        np.testing.assert_allclose(
            adapter.update(adapted.layers[index].base), tensor[index] * adapter.scaling, atol=1e-12
        )
    loss = lambda m: sum(jnp.sum(layer(x) ** 2) for layer in m.layers)  # noqa: E731
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, adapters.trainable(adapted)))(adapted)
    assert sum(g.size for g in jax.tree.leaves(grads)) == count
    assert all(bool(jnp.any(g)) for g in jax.tree.leaves(grads))
    merged = adapters.merge(adapted)
    np.testing.assert_allclose(merged.layers[3](x), adapted.layers[3](x), atol=1e-12)
    copy = nnx.clone(adapted)
    assert copy.layers[0].adapters["default"].core is copy.layers[3].adapters["default"].core

    gradients = {f"layers/{i}": draw(6, 5, seed=i) for i in range(4)}
    started = adapters.adapt(
        model, "layers/*", key=KEY, rank=2, start="hosvd", gradients=gradients, **options
    )
    frames = next(iter(adapters.layers(started).values())).adapters["default"].modes
    assert [f.shape for f in frames] == [(4, 4), (6, 2), (5, 2)]


def test_two_zero_parts_are_refused():
    def dead(shape, ranks):
        return TuckerFactors(
            jnp.zeros(ranks), tuple(jnp.zeros((n, r)) for n, r in zip(shape, ranks, strict=True))
        )

    with pytest.raises(ValueError, match="has 3 zero arrays among core and factors"):
        adapters.adapt(LAYERS["linear"][0](), key=KEY, rank=2, kind="tucker", start=dead)
