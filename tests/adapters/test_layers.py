"""Every layer kind against every method: start, merge and gradients.

Two engines answer each question: the low-rank path of the adapted layer, and Flax's own layer with
the dense kernel in it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import adapters, initializers

F64 = jnp.float64
# Compiling Threefry for each new shape costs more than what is tested here.
KEY = jax.random.key(0, impl="rbg")


def cheap_init(_, shape, dtype):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape) / 2, dtype)


def options(dtype, name="kernel"):
    return {"rngs": nnx.Rngs(KEY), "param_dtype": dtype, f"{name}_init": cheap_init}


def linear(dtype):
    return nnx.Linear(6, 5, **options(dtype)), (2, 3, 6)


def linear_general_query(dtype):
    return nnx.LinearGeneral(6, (2, 4), **options(dtype)), (2, 3, 6)


def linear_general_out(dtype):
    layer = nnx.LinearGeneral((2, 4), 5, axis=(-2, -1), **options(dtype))
    return layer, (3, 2, 4)


def linear_general_front(dtype):
    layer = nnx.LinearGeneral((3, 4), 5, axis=(1, -1), **options(dtype))
    return layer, (2, 3, 6, 4)


def linear_general_batch(dtype):
    layer = nnx.LinearGeneral(6, 5, batch_axis={0: 3}, **options(dtype))
    return layer, (3, 2, 6)


def einsum_ellipsis(dtype):
    layer = nnx.Einsum("...d,dhk->...hk", (6, 2, 4), (2, 4), **options(dtype))
    return layer, (2, 3, 6)


def einsum_reordered(dtype):
    layer = nnx.Einsum("btd,khd->bhtk", (4, 2, 6), None, **options(dtype))
    return layer, (2, 3, 6)


def einsum_experts(dtype):
    layer = nnx.Einsum("etd,edf->etf", (3, 6, 5), None, **options(dtype))
    return layer, (3, 2, 6)


def conv(dtype, dims, features=(4, 6), size=3, **settings):
    layer = nnx.Conv(*features, kernel_size=(size,) * dims, **options(dtype), **settings)
    return layer, (2, *(6, 5, 4)[:dims], features[0])


def embed(dtype):
    return nnx.Embed(7, 5, **options(dtype, "embedding")), (2, 3)


LAYERS = {
    "linear": linear,
    "general-query": linear_general_query,
    "general-out": linear_general_out,
    "general-front": linear_general_front,
    "general-batch": linear_general_batch,
    "einsum-ellipsis": einsum_ellipsis,
    "einsum-reordered": einsum_reordered,
    "einsum-experts": einsum_experts,
    "conv1d": functools.partial(conv, dims=1, strides=2),
    "conv1d-causal": functools.partial(conv, dims=1, padding="CAUSAL", kernel_dilation=2),
    "conv2d": functools.partial(conv, dims=2, strides=(2, 1), padding="VALID"),
    "conv2d-dilated": functools.partial(conv, dims=2, kernel_dilation=2, padding=((2, 1), (0, 3))),
    "conv2d-transposed": functools.partial(
        conv, dims=2, input_dilation=2, padding=((1, 1), (0, 2))
    ),
    "conv2d-circular": functools.partial(conv, dims=2, padding="CIRCULAR"),
    "conv2d-groups": functools.partial(conv, dims=2, feature_group_count=2),
    "conv2d-depthwise": functools.partial(
        conv, dims=2, features=(4, 8), feature_group_count=4, use_bias=False
    ),
    "conv2d-1x1": functools.partial(conv, dims=2, size=1),
    "conv3d": functools.partial(conv, dims=3, size=2, strides=(1, 2, 1)),
    "embed": embed,
}
LANES = {"general-batch", "einsum-experts"}

METHODS = {
    "lora": {},
    "rslora": {"rslora": True, "alpha": 3.0},
    "dora": {"dora": True, "alpha": 3.0},
    "dora-pissa": {"dora": True, "start": "pissa"},
    "pissa": {"start": "pissa", "alpha": 3.0},
    "milora": {"start": "milora"},
    "olora": {"start": "olora", "alpha": 3.0},
    "nora": {"start": "nora"},
    "orthogonal": {"start": "orthogonal"},
    "small": {"start": "small", "recenter": True},
    "spectral": {"start": "spectral", "recenter": True, "gradients": True},
    "lora_one": {"start": "lora_one", "recenter": True, "gradients": True},
    "lora_ga": {"start": "lora_ga", "gradients": True},
    "nystrom": {"start": "nystrom", "gradients": True},
    "adalora": {"kind": "adalora", "alpha": 3.0},
    "tucker": {"kind": "tucker", "alpha": 3.0},
    "hosvd": {"kind": "tucker", "start": "hosvd", "gradients": True},
}
# Every layer with LoRA, every method on a Linear, and on a few layers the methods that have a path
# of their own.
PAIRS = [
    *((layer, "lora") for layer in LAYERS),
    *(("linear", method) for method in METHODS if method != "lora"),
    *(
        (layer, method)
        for layer in ("general-out", "einsum-reordered", "conv2d-groups", "embed")
        for method in ("dora", "tucker")
    ),
    ("conv3d", "tucker"),
    ("einsum-experts", "tucker"),
]
# Gradients: every kind of layer, and every path that a gradient can take.
GRADIENTS = [
    *((layer, "lora") for layer in ("linear", "general-query", "general-out", "einsum-reordered")),
    *((layer, "lora") for layer in ("general-batch", "conv1d", "conv2d", "conv2d-dilated")),
    *((layer, "lora") for layer in ("conv2d-groups", "conv3d", "embed")),
    *(("linear", method) for method in ("dora", "dora-pissa", "pissa", "adalora", "tucker")),
    *(("conv2d-groups", method) for method in ("dora", "tucker")),
    *(("embed", method) for method in ("dora", "tucker")),
    ("general-out", "tucker"),
]


def data(shape, layer, dtype, seed=1):
    draw = np.random.default_rng(seed)
    if isinstance(layer, nnx.Embed):
        return jnp.asarray(draw.integers(0, 7, shape))
    return jnp.asarray(draw.normal(size=shape), dtype)


def adapted(layer, method, dtype, rank=2):
    chosen = dict(METHODS[method])
    if chosen.pop("gradients", False):
        view = adapters.layout(layer)
        chosen["gradients"] = {"": data(view.slices + view.shape, None, dtype)}
    return adapters.adapt(layer, key=KEY, rank=rank, dtype=dtype, **chosen)


def shaken(model, seed=3, size=0.3):
    """The model with every trainable leaf of its adapters moved at random."""
    graphdef, params, rest = nnx.split(model, nnx.LoRAParam, ...)
    leaves, tree = jax.tree.flatten(params)
    draw = np.random.default_rng(seed)
    moved = [x + jnp.asarray(size * draw.normal(size=x.shape), x.dtype) for x in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, moved), rest)


def outputs(model, base, x):
    """Everything that test_start_and_merge looks at."""
    moved = shaken(model)
    merged = adapters.merge(moved)
    models = base, model, moved, merged, adapters.remove(merged), adapters.unmerge(merged)
    return [each(x) for each in models]


def gradients(model, base, x):
    """Gradients through the low-rank path, and through the dense kernel in the plain layer."""
    graphdef, params, rest = nnx.split(shaken(model), nnx.LoRAParam, ...)

    def low_rank(params):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, params, rest)(x)))

    def dense(params):
        plain = nnx.clone(base)
        kernel = adapters.effective_kernel(nnx.merge(graphdef, params, rest))
        setattr(plain, "embedding" if isinstance(plain, nnx.Embed) else "kernel", nnx.Param(kernel))
        return jnp.sum(jnp.sin(plain(x)))

    return [jax.tree.leaves(jax.grad(f)(params)) for f in (low_rank, dense)]


def in_one_program(look, name, method, dtype):
    """What `look(model, layer, x)` says, from one compilation: adapting included."""
    layer, shape = LAYERS[name](dtype)
    graphdef, state = nnx.split(layer)

    def program(state, x):
        layer = nnx.merge(graphdef, state)
        return look(adapted(layer, method, dtype), layer, x)

    fast = {"xla_backend_optimization_level": 0}
    return jax.jit(program, compiler_options=fast)(state, data(shape, layer, dtype))


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_start_and_merge(name, method):
    results = in_one_program(outputs, name, method, jnp.float32)
    base, start, moved, merged, plain, unmerged = results
    assert float(jnp.max(jnp.abs(start - base))) <= 1e-6
    assert float(jnp.max(jnp.abs(moved - base))) > 1e-3
    assert float(jnp.max(jnp.abs(merged - moved))) <= 1e-5
    np.testing.assert_array_equal(plain, merged)
    np.testing.assert_array_equal(unmerged, moved)


@pytest.mark.parametrize(("name", "method"), GRADIENTS)
def test_gradient_is_that_of_the_dense_reparametrization(name, method):
    ours, want = in_one_program(gradients, name, method, F64)
    assert max(float(jnp.max(jnp.abs(w))) for w in want) > 1e-3
    for got, w in zip(ours, want, strict=True):
        np.testing.assert_allclose(got, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["linear", "general-out", "einsum-reordered", "conv2d-groups", "conv3d", "embed"]
)
def test_update_is_the_scaled_product_of_the_factors(name):
    """The dense kernel against a formula that shares no code with the layouts."""
    layer, _ = LAYERS[name](F64)
    model = shaken(adapters.adapt(layer, key=KEY, rank=2, alpha=6.0, dtype=F64))
    adapter = model.adapters["default"]
    a, b = adapter.factors
    kernel = layer.embedding[...] if name == "embed" else layer.kernel[...]
    if name == "einsum-reordered":
        want = 3 * jnp.einsum("dr,rkh->khd", a, b.reshape(2, 4, 2))
    else:
        want = 3 * (a @ b).reshape(kernel.shape)
    np.testing.assert_allclose(adapters.effective_kernel(model), kernel + want, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "general-out", "conv2d", "embed"])
def test_dora_keeps_its_magnitudes_as_column_norms(name):
    layer, _ = LAYERS[name](F64)
    model = shaken(adapters.adapt(layer, key=KEY, rank=2, dora=True, dtype=F64))
    view = adapters.layout(layer)
    columns = jnp.linalg.norm(view.matrix(adapters.effective_kernel(model)), axis=0)
    magnitude = model.adapters["default"].magnitude[...]
    np.testing.assert_allclose(columns, jnp.abs(magnitude), rtol=1e-12)


SLICED = {"general-batch", "einsum-experts"}  # their slices have no columns in common


def test_layers_of_several_slices_are_known():
    assert {n for n, make in LAYERS.items() if adapters.layout(make(F64)[0]).slices} == SLICED


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in SLICED])
def test_columns_and_bias_fit_the_output(name):
    layer, shape = LAYERS[name](F64)
    view = adapters.layout(layer)
    x = data(shape, layer, F64)
    y = layer(x)
    scale = jnp.arange(1.0, view.shape[1] + 1)
    bias = view.bias(y)
    rest = nnx.clone(layer)
    variable = rest.embedding if name == "embed" else rest.kernel
    variable.set_value(view.kernel(view.matrix(variable[...]) * scale[None, :]))
    want = rest(x)
    plain = y if bias is None else y - bias
    got = view.columns(scale, y) * plain + (0 if bias is None else bias)
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "axes", "slices"),
    [
        ("general-query", adapters.Axes((0,), (2,)), (2,)),
        ("general-out", adapters.Axes((1,), (2,)), (2,)),
        ("einsum-ellipsis", adapters.Axes((0,), (-1,)), (2,)),
    ],
)
def test_named_axes_give_each_head_its_own_factors(name, axes, slices):
    layer, shape = LAYERS[name](F64)
    assert adapters.layout(layer, axes).slices == slices
    model = shaken(adapters.adapt(layer, key=KEY, rank=2, start="pissa", axes=axes, dtype=F64))
    factors = model.adapters["default"].factors
    assert factors.a.shape[0] == factors.b.shape[0] == slices[0]
    x = data(shape, layer, F64)
    np.testing.assert_allclose(adapters.merge(model)(x), model(x), atol=1e-12)
    assert float(jnp.max(jnp.abs(model(x) - layer(x)))) > 1e-3


def test_attend_sees_the_adapted_table():
    layer = nnx.Embed(7, 5, **options(F64, "embedding"))
    query = data((2, 5), None, F64)
    for method in ("lora", "dora", "pissa", "adalora", "tucker"):
        model = shaken(adapted(layer, method, F64))
        want = adapters.remove(adapters.merge(model)).attend(query)
        np.testing.assert_allclose(model.attend(query), want, atol=1e-12)


@pytest.mark.parametrize("kind", ["lora", "tucker"])
def test_stacked_layers_run_under_scan(kind):
    """Layers made by nnx.vmap carry a stack axis, which nnx.scan takes off."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(4, 4, rngs=rngs, param_dtype=F64)

    stack = make(nnx.Rngs(KEY))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return jnp.tanh(layer(x))

    x = data((2, 4), None, F64)
    model = adapters.adapt(stack, key=KEY, rank=2, kind=kind, dtype=F64)
    np.testing.assert_allclose(run(x, model), run(x, stack), atol=1e-15)
    moved = shaken(model)
    np.testing.assert_allclose(run(x, adapters.merge(moved)), run(x, moved), atol=1e-12)
    assert float(jnp.max(jnp.abs(run(x, moved) - run(x, stack)))) > 1e-2


def test_bfloat16_base_with_float32_factors():
    layer = nnx.Linear(64, 32, rngs=nnx.Rngs(KEY), param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    x = data((8, 64), None, jnp.bfloat16)
    model = adapters.adapt(layer, key=KEY, rank=4)
    np.testing.assert_array_equal(model(x), layer(x))
    adapter = model.adapters["default"]
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))} == {
        jnp.dtype(jnp.float32)
    }
    # A weight change too small for bfloat16 to hold still changes the output the right way on
    # average: the rounding is of the sum, once.
    adapter.b[...] = 1e-3 * data(adapter.b.shape, None, jnp.float32)
    exact = x.astype(F64) @ (
        layer.kernel[...].astype(F64) + (adapter.a[...] @ adapter.b[...]).astype(F64)
    )
    assert model(x).dtype == jnp.bfloat16
    assert float(jnp.max(jnp.abs(model(x).astype(F64) - exact))) < 2.0**-7 * float(
        jnp.max(jnp.abs(exact))
    )


def test_dropout_acts_in_training_only():
    layer = nnx.Linear(6, 5, rngs=nnx.Rngs(KEY))
    x = data((4, 6), None, jnp.float32)
    model = shaken(adapters.adapt(layer, key=KEY, rank=2, dropout=0.5))
    model.eval()
    quiet = model(x)
    np.testing.assert_allclose(quiet, adapters.merge(model)(x), atol=1e-6)
    model.train()
    assert float(jnp.max(jnp.abs(model(x) - quiet))) > 1e-3
    assert float(jnp.max(jnp.abs(model(x) - model(x)))) > 1e-3


def test_arrays_of_the_base_are_not_read_past_the_adapter():
    model = adapters.adapt(nnx.Linear(6, 5, rngs=nnx.Rngs(KEY)), key=KEY, rank=2)
    assert model.in_features == 6
    with pytest.raises(AttributeError, match="goes past the adapters"):
        _ = model.kernel
    with pytest.raises(AttributeError):
        _ = model.no_such_attribute


class Doubling(nnx.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.parametrize(
    ("layer", "axes", "message"),
    [
        (nnx.LayerNorm(4, rngs=nnx.Rngs(KEY)), None, "a LayerNorm cannot be adapted"),
        (Doubling(4, 4, rngs=nnx.Rngs(KEY)), None, "a Doubling cannot be adapted"),
        (
            nnx.Conv(2, 2, (3,), mask=jnp.ones((3, 2, 2)), rngs=nnx.Rngs(KEY)),
            None,
            "has a mask",
        ),
        (nnx.Conv(2, 2, (3,), rngs=nnx.Rngs(KEY)), adapters.Axes((0,), (1,)), "given for a Conv"),
        (nnx.Embed(3, 2, rngs=nnx.Rngs(KEY)), adapters.Axes((0,), (1,)), "given for an Embed"),
        (nnx.Linear(4, 4, rngs=nnx.Rngs(KEY)), adapters.Axes((1,), (0,)), "only \\(0,\\) are"),
        (nnx.Linear(4, 4, rngs=nnx.Rngs(KEY)), adapters.Axes((0,), (5,)), "axes name 5"),
        (nnx.Linear(4, 4, rngs=nnx.Rngs(KEY)), adapters.Axes((0,), ()), "at least one axis"),
        (nnx.Linear(4, 4, rngs=nnx.Rngs(KEY)), adapters.Axes((0, 0), (1,)), "named once"),
        (nnx.Einsum("ab,bcd->ac", (2, 3, 4), rngs=nnx.Rngs(KEY)), None, "sums axis 2"),
        (nnx.Einsum("a...b,...bc->a...c", (2, 3), rngs=nnx.Rngs(KEY)), None, "an ellipsis"),
    ],
)
def test_layers_and_axes_that_do_not_fit(layer, axes, message):
    with pytest.raises(ValueError, match=message):
        adapters.layout(layer, axes)


def test_initializers_by_name_and_by_function_are_the_same():
    layer = nnx.Linear(6, 5, rngs=nnx.Rngs(KEY))
    start = functools.partial(initializers.lora, scale="flax", distribution="uniform")
    one = adapters.adapt(layer, key=KEY, rank=2, start=start)
    two = adapters.adapt(layer, key=KEY, rank=2, start="lora")
    ratio = one.adapters["default"].a[...].std() / two.adapters["default"].a[...].std()
    assert 1 < float(ratio) < 6
    assert one.adapters["default"].start == "lora(scale='flax', distribution='uniform')"
