"""Putting adapters into whole models: targets, names, filters, transforms, memory."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorajax import adapters
from lorajax.adapters import paths

KEY = jax.random.key(0, impl="rbg")


def cheap_init(_, shape, dtype):
    return jnp.asarray(np.random.default_rng(shape[0]).normal(size=shape) / shape[0] ** 0.5, dtype)


class Block(nnx.Module):
    def __init__(self, width, rngs):
        init = {"kernel_init": cheap_init, "rngs": rngs}
        self.attention = nnx.MultiHeadAttention(2, width, decode=False, **init)
        self.up = nnx.Linear(width, 2 * width, **init)
        self.down = nnx.Linear(2 * width, width, **init)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(jax.nn.gelu(self.up(x)))


class Model(nnx.Module):
    def __init__(self, width=8, depth=2, key=KEY):
        rngs = nnx.Rngs(key)
        self.embed = nnx.Embed(11, width, embedding_init=cheap_init, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(depth)])
        self.head = nnx.Linear(width, 3, kernel_init=cheap_init, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=-2))


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 5)))


@pytest.fixture(scope="module")
def model():
    return Model()


@pytest.fixture(scope="module")
def two(model):
    """A model with two adapters, both away from their start."""
    first = adapters.adapt(model, {"**/query": 2, "**/up": 3}, key=KEY, name="french", alpha=4.0)
    both = adapters.adapt(first, "**/up", key=KEY, rank=2, name="legal", start="pissa")
    return moved(both)


def moved(model, seed=0):
    graphdef, params, rest = nnx.split(model, nnx.LoRAParam, ...)
    draw = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: x + jnp.asarray(draw.normal(size=x.shape) / 4, x.dtype), params)
    return nnx.merge(graphdef, params, rest)


def loose():
    """Optax's Adam divides floats by powers with an integer exponent, which strict mode refuses."""
    return jax.numpy_dtype_promotion("standard")


def loss(model, tokens):
    return jnp.mean(model(tokens) ** 2)


def snapshot(model):
    return [np.array(x) for x in jax.tree.leaves(nnx.state(model))]


def assert_same(one, two):
    for x, y in zip(one, two, strict=True):
        np.testing.assert_array_equal(x, y)


def test_targets_ranks_and_options_by_pattern(model):
    adapted = adapters.adapt(
        model,
        {"blocks/0/**/query": 4, "**/query": {"rank": 2, "alpha": 6, "rslora": True}, "head": 0},
        key=KEY,
        alpha=3.0,
    )
    found = {path: layer.adapters["default"] for path, layer in adapters.layers(adapted).items()}
    assert {path: (x.rank, x.scaling) for path, x in found.items()} == {
        "blocks/0/attention/query": (4, 0.75),
        "blocks/1/attention/query": (2, 6 / 2**0.5),
    }
    assert isinstance(adapted.head, nnx.Linear)


def test_predicates_and_sequences_select(model):
    targets = ["head", lambda path, layer: isinstance(layer, nnx.Linear) and "up" in path]
    wide = adapters.adapt(model, targets, key=KEY, rank=2)
    assert set(adapters.layers(wide)) == {"head", "blocks/0/up", "blocks/1/up"}
    everything = adapters.adapt(model, key=KEY, rank=2)
    assert len(adapters.layers(everything)) == 14


def test_alpha_left_out_means_a_scaling_of_one(model):
    for rslora in (False, True):
        adapted = adapters.adapt(model, "head", key=KEY, rank=3, rslora=rslora)
        assert adapted.head.adapters["default"].scaling == pytest.approx(1)


def test_starts_do_not_depend_on_the_other_targets(model):
    one = adapters.adapt(model, "**/up", key=KEY, rank=2)
    two = adapters.adapt(model, "**", key=KEY, rank=2)
    path = "blocks/1/up"
    a, b = (adapters.layers(m)[path].adapters["default"].a[...] for m in (one, two))
    np.testing.assert_array_equal(a, b)
    other = adapters.layers(one)["blocks/0/up"].adapters["default"].a[...]
    assert float(jnp.max(jnp.abs(a - other))) > 0.01


def test_the_model_given_is_never_changed(model):
    before = snapshot(model)
    kinds = {path: type(x) for path, x in paths.modules(model).items()}
    targets = ["**/query", "blocks/0/up"]
    adapted = moved(adapters.adapt(model, targets, key=KEY, rank=2, start="pissa"))
    merged = adapters.merge(adapted)
    held = snapshot(adapted)
    optimizer = nnx.Optimizer(
        adapted, optax.sgd(0.1), wrt=adapters.trainable(adapted, heads="head")
    )
    wrt = nnx.DiffState(0, adapters.trainable(adapted, heads="head"))
    optimizer.update(adapted, nnx.jit(nnx.grad(loss, argnums=wrt))(adapted, TOKENS))
    adapters.remove(merged), adapters.activate(adapted, ()), adapters.unmerge(merged)
    assert_same(snapshot(model), before)
    assert {path: type(x) for path, x in paths.modules(model).items()} == kinds
    assert any(np.any(x != y) for x, y in zip(snapshot(adapted), held, strict=True))


def test_arrays_of_the_base_are_shared_not_copied(model):
    adapted = adapters.adapt(model, "**/up", key=KEY, rank=2, start="pissa")
    kernel = adapted.blocks[0].up.base.kernel[...]
    assert kernel.unsafe_buffer_pointer() == model.blocks[0].up.kernel[...].unsafe_buffer_pointer()


def test_adapters_switch_and_blend(model, two):
    outputs = {which: adapters.activate(two, which)(TOKENS) for which in ("french", "legal")}
    np.testing.assert_array_equal(adapters.activate(two, ())(TOKENS), model(TOKENS))
    assert adapters.names(two) == ("french", "legal")
    for which, y in outputs.items():
        alone = adapters.remove(two, [n for n in ("french", "legal") if n != which])
        np.testing.assert_allclose(alone(TOKENS), y, atol=1e-6)
    blend = adapters.activate(two, {"french": 0.5, "legal": 2.0})
    layer, plain = blend.blocks[0].up, model.blocks[0].up
    updates = {n: layer.adapters[n].update(layer.base) for n in ("french", "legal")}
    want = plain.kernel[...] + 0.5 * updates["french"] + 2 * updates["legal"]
    np.testing.assert_allclose(adapters.effective_kernel(layer), want, atol=1e-6)
    np.testing.assert_allclose(adapters.merge(blend)(TOKENS), blend(TOKENS), atol=1e-5)


def test_a_second_adapter_starts_where_the_first_one_is(two):
    third = adapters.adapt(two, "head", key=KEY, rank=2, name="third")
    np.testing.assert_allclose(third(TOKENS), two(TOKENS), atol=1e-6)


def test_merge_unmerge_and_remove_round_trip(model, two):
    merged = adapters.merge(two)
    np.testing.assert_allclose(merged(TOKENS), two(TOKENS), atol=1e-5)
    assert_same(snapshot(adapters.unmerge(merged)), snapshot(two))
    assert_same(snapshot(adapters.remove(two)), snapshot(model))
    plain = adapters.remove(merged)
    assert not adapters.layers(plain)
    np.testing.assert_array_equal(plain(TOKENS), merged(TOKENS))
    left = adapters.remove(two, "french")
    assert set(adapters.layers(left)) == {"blocks/0/up", "blocks/1/up"}


def test_describe_prints_every_adapter(two):
    text = str(adapters.describe(two))
    assert "blocks/0/attention/query  LinearGeneral  8×2×4" in text
    assert "pissa" in text and "french" in text and "1.333" in text
    total = adapters.describe(two)
    assert total.trainable == 2 * (2 * 16) + 2 * (3 * 24) + 2 * (2 * 24)
    params = sum(x.size for x in jax.tree.leaves(nnx.state(two, nnx.Param)))
    assert total.total == params
    assert str(adapters.describe(adapters.remove(two))).startswith("layer")


def test_shared_layers_stay_shared():
    class Tied(nnx.Module):
        def __init__(self):
            self.one = nnx.Linear(4, 4, rngs=nnx.Rngs(KEY), kernel_init=cheap_init)
            self.two = self.one

    adapted = adapters.adapt(Tied(), "one", key=KEY, rank=2)
    assert adapted.one is adapted.two and list(adapters.layers(adapted)) == ["one"]


def test_layers_in_plain_containers_are_found():
    class Bag(nnx.Module):
        def __init__(self):
            make = lambda: nnx.Linear(4, 4, rngs=nnx.Rngs(KEY), kernel_init=cheap_init)  # noqa: E731
            self.pair = nnx.data((make(), make()))
            self.table = nnx.data({"x": make(), "y": [make()]})

    adapted = adapters.adapt(Bag(), ["pair/1", "table/**"], key=KEY, rank=2)
    assert set(adapters.layers(adapted)) == {"pair/1", "table/x", "table/y/0"}
    assert isinstance(adapted.pair[0], nnx.Linear)


def test_only_adapters_and_named_heads_train(model):
    adapted = adapters.adapt(model, "**/up", key=KEY, rank=2)
    only = nnx.state(adapted, adapters.trainable(adapted))
    assert {path[-1] for path, _ in nnx.to_flat_state(only)} == {"a", "b"}
    headed = nnx.state(adapted, adapters.trainable(adapted, heads="head"))
    extra = {path for path, _ in nnx.to_flat_state(headed)} - {
        path for path, _ in nnx.to_flat_state(only)
    }
    assert extra == {("head", "kernel"), ("head", "bias")}
    optimizer = nnx.Optimizer(adapted, optax.adam(1e-3), wrt=adapters.trainable(adapted))
    count = sum(x.size for x in jax.tree.leaves(only))
    moments = [x for x in jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState)) if x.ndim]
    assert sum(x.nbytes for x in moments) == 8 * count
    second = adapters.adapt(adapted, "head", key=KEY, rank=2, name="second")
    chosen = nnx.state(second, adapters.trainable(second, "second"))
    assert {path[0] for path, _ in nnx.to_flat_state(chosen)} == {"head"}


def test_the_lowered_gradient_has_adapter_leaves_alone(model):
    adapted = adapters.adapt(model, "**/up", key=KEY, rank=2)
    wrt = adapters.trainable(adapted)
    graphdef, params, rest = nnx.split(adapted, wrt, ...)

    def f(params, rest):
        return jax.grad(lambda p: loss(nnx.merge(graphdef, p, rest), TOKENS))(params)

    lowered = jax.jit(f).lower(params, rest)
    shapes = sorted(x.shape for x in jax.tree.leaves(lowered.out_info))
    assert shapes == sorted([(8, 2), (2, 16)] * 2)
    # The program writes no array of a base kernel's shape: no dense weight gradient is formed.
    assert "16x8xf32" not in str(lowered.out_info)
    text = lowered.as_text()
    produced = [line for line in text.splitlines() if "dot_general" in line]
    dense = [
        line
        for line in produced
        if line.rstrip().endswith(("-> tensor<8x16xf32>", "-> tensor<16x8xf32>"))
    ]
    assert produced and not dense


def test_transforms(two):
    y = two(TOKENS)
    np.testing.assert_allclose(nnx.jit(lambda m, t: m(t))(two, TOKENS), y, rtol=1e-5, atol=1e-5)
    remat = nnx.remat(lambda m, t: m(t))
    wrt = nnx.DiffState(0, adapters.trainable(two))
    plain = nnx.jit(nnx.grad(loss, argnums=wrt))(two, TOKENS)
    again = nnx.jit(nnx.grad(lambda m, t: jnp.mean(remat(m, t) ** 2), argnums=wrt))(two, TOKENS)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    lanes = nnx.jit(nnx.vmap(lambda m, t: m(t), in_axes=(None, 0)))
    batched = lanes(two, TOKENS[:, None])
    np.testing.assert_allclose(batched[:, 0], y, rtol=1e-5, atol=1e-5)
    # Many adapters of one base at once: only adapter leaves carry the lane axis.
    graphdef, params, rest = nnx.split(two, nnx.LoRAParam, ...)
    lanes = jax.tree.map(lambda x: jnp.stack([x, 0 * x]), params)
    outs = jax.jit(jax.vmap(lambda p: nnx.merge(graphdef, p, rest)(TOKENS)))(lanes)
    np.testing.assert_allclose(outs[0], y, rtol=1e-5, atol=1e-5)
    assert float(jnp.max(jnp.abs(outs[1] - y))) > 1e-3


def test_adapting_inside_jit(model):
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state):
        return adapters.adapt(nnx.merge(graphdef, state), "**/up", key=KEY, rank=2)(TOKENS)

    wanted = model(TOKENS)
    # One program rounds otherwise than many: some thirty roundings of the largest entry.
    rounding = 32 * np.finfo(np.float32).eps * float(abs(wanted).max())
    np.testing.assert_allclose(run(state), wanted, atol=rounding)


def test_a_training_step_lowers_the_loss_and_traces_once(model, traces):
    adapted = adapters.adapt(model, "**/attention/*", key=KEY, rank=2)
    optimizer = nnx.Optimizer(adapted, optax.adam(1e-2), wrt=adapters.trainable(adapted))

    @nnx.jit
    def step(model, optimizer):
        wrt = nnx.DiffState(0, adapters.trainable(model))
        value, grads = nnx.value_and_grad(loss, argnums=wrt)(model, TOKENS)
        with loose():
            optimizer.update(model, grads)
        return value

    first = float(step(adapted, optimizer))
    base = snapshot(adapters.remove(adapted))
    step(adapted, optimizer)
    with traces() as names:
        for _ in range(20):
            last = float(step(adapted, optimizer))
    assert "step" not in names
    assert last < 0.5 * first
    assert_same(snapshot(adapters.remove(adapted)), base)


def test_memory_of_a_step_beyond_the_base():
    """Parameters, gradients and Adam's two moments of the adapters, and activations; no more."""
    width, rows, rank = 128, 16, 4
    init = {"kernel_init": cheap_init, "use_bias": False}
    layers = [nnx.Linear(width, width, rngs=nnx.Rngs(KEY), **init) for _ in range(4)]
    model = nnx.Sequential(*layers)
    adapted = adapters.adapt(model, key=KEY, rank=rank)
    tx = optax.adam(1e-3)
    graphdef, params, rest = nnx.split(adapted, adapters.trainable(adapted), ...)
    moments = tx.init(params)
    x = jnp.ones((rows, width), jnp.float32)

    def step(params, moments, rest, x):
        value = lambda p: jnp.mean(nnx.merge(graphdef, p, rest)(x) ** 2)  # noqa: E731
        grads = jax.grad(value)(params)
        with loose():
            updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, moments, rest, x).compile()
    memory = compiled.memory_analysis()
    base = sum(v.nbytes for v in jax.tree.leaves(rest))
    count = sum(v.size for v in jax.tree.leaves(params))
    assert count == 4 * rank * 2 * width
    # Gradients are outputs here, so that temporaries are what backpropagation itself holds.
    gradient = jax.grad(lambda p: jnp.mean(nnx.merge(graphdef, p, rest)(x) ** 2))
    activations = jax.jit(gradient).lower(params).compile().memory_analysis().temp_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes - x.nbytes
    assert 0 < peak - base <= activations + 16 * count
    assert peak - base < 16 * 4 * width * width / 4


@pytest.mark.apart
def test_sharded_bases_get_sharded_factors(virtual):
    """On four devices: A is split as the kernel's rows, B as its columns; results agree."""
    code = """
        import jax, jax.numpy as jnp, numpy as np
        from flax import nnx
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from lorajax import adapters
        mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
        layer = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
        plain = adapters.adapt(layer, key=jax.random.key(0), rank=4, start="pissa")
        placed = nnx.clone(layer)
        placed.kernel.set_value(
            jax.device_put(layer.kernel[...], NamedSharding(mesh, P("data", "model"))))
        sharded = adapters.adapt(placed, key=jax.random.key(0), rank=4, start="pissa")
        adapter = sharded.adapters["default"]
        assert adapter.a[...].sharding.spec == P("data", None), adapter.a[...].sharding
        assert adapter.b[...].sharding.spec == P(None, "model"), adapter.b[...].sharding
        x = jax.random.normal(jax.random.key(1), (4, 8))
        xs = jax.device_put(x, NamedSharding(mesh, P("data", None)))
        f = nnx.jit(lambda m, x: m(x))
        assert jnp.max(jnp.abs(f(sharded, xs) - f(plain, x))) < 1e-5
        g = nnx.grad(lambda m: jnp.sum(m(xs) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam))
        assert g(sharded)["adapters"]["default"]["b"][...].sharding.spec == P(None, "model")
        head = nnx.LinearGeneral(8, (4, 2), rngs=nnx.Rngs(0))
        head.kernel.set_value(
            jax.device_put(head.kernel[...], NamedSharding(mesh, P(None, "model", None))))
        heads = adapters.adapt(head, key=jax.random.key(0), rank=4)
        assert heads.adapters["default"].b[...].sharding.spec == P(None, "model")
        print("sharded")
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(arguments, env=virtual(4), capture_output=True, text=True)
    assert done.stdout.strip() == "sharded", done.stderr


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ("**/qery", {}, "matches no layer of the model; near misses: 'blocks/0/attention/query'"),
        ("**/attention", {}, "a MultiHeadAttention that cannot be adapted itself; the layers"),
        ("**/norm", {}, "a LayerNorm that cannot be adapted; these can: Linear"),
        ((), {}, "targets are empty"),
        ([3], {}, "a path pattern or a predicate"),
        (lambda path, layer: False, {}, "is true for none of the 14 layers"),
        ({"**": 2, "**/up": 3}, {}, "matches only layers that earlier targets have taken"),
        ("head", {"rank": 4}, "layer 'head': rank is 4; for a matrix of shape \\(8, 3\\)"),
        ("head", {"rank": True}, "rank is True"),
        ("head", {"rank": 0}, "every rank is 0"),
        ("head", {"rank": (1, 2)}, "it must be one integer"),
        ("head", {"ranks": 2}, "adapt has no option 'ranks'"),
        ({"head": {"ranks": 2}}, {}, "no option 'ranks' for 'head'"),
        ("head", {"rank": 2, "alpha": -1.0}, "alpha is -1.0"),
        ("head", {"rank": 2, "dropout": 1.0}, "dropout is 1.0"),
        ("head", {"rank": 2, "kind": "lokr"}, "must be .*'adalora', .*'lora', .*'tucker' or a sub"),
        ("head", {"rank": 2, "kind": "tucker", "dora": True}, "those of TuckerSpec"),
        ("head", {"rank": 2, "kind": "adalora", "rslora": True}, "those of AdaLoRASpec are"),
        ("head", {"rank": 2, "kind": "adalora", "dora": True}, "no option 'dora' for 'head'"),
        ("head", {"rank": 2, "kind": "tucker", "recenter": True}, "no option 'recenter'"),
        ("head", {"rank": 2, "kind": "adalora", "start": "lora"}, "leaves a factor zero"),
        ("head", {"rank": 2, "tied": True}, "no option 'tied' for 'head'; those of LoRASpec"),
        ("head", {"rank": 2, "kind": "tucker", "start": "pissa"}, "'tucker' or 'hosvd'"),
        ("head", {"rank": (2, 5), "kind": "tucker"}, "ranks\\[1\\] is 5"),
        ("head", {"rank": (2,), "kind": "tucker"}, "one integer or 2 of them"),
        ("head", {"rank": 2, "dtype": jnp.int32}, "must be floating point"),
        ("head", {"rank": 2, "start": "pisa"}, "start is 'pisa'; a named start"),
        ("head", {"rank": 2, "start": "lora_one"}, "needs gradient; give gradients="),
        ("head", {"rank": 2, "start": "eva"}, "needs inputs; give inputs="),
        ("head", {"rank": 2, "start": lambda key, size: None}, "a parameter 'size' that nothing"),
        ("head", {"rank": 2, "start": lambda key: 3}, "returned a int"),
        ("head", {"rank": 2, "name": "a/b"}, "it must be a word"),
        (
            {"**/up": {"kind": "tucker", "rank": 2, "tied": True}, "head": 2},
            {"axes": adapters.Axes((0,), (1,))},
            "no option 'axes' for 'blocks/0/up'; those of TuckerSpec",
        ),
        (["**/up", "**/down"], {"rank": 2, "kind": "tucker", "tied": True}, None),
        (
            lambda path, layer: "up" in path or path == "head",
            {"rank": 2, "kind": "tucker", "tied": True},
            "must be of one kind and shape",
        ),
    ],
)
def test_bad_calls_say_what_would_be_right(model, targets, options, message):
    if message is None:
        adapted = adapters.adapt(model, targets, key=KEY, **options)
        assert len(adapters.layers(adapted)) == 4
        return
    with pytest.raises(ValueError, match=message):
        adapters.adapt(model, targets, key=KEY, **options)


def test_both_factors_zero_are_refused(model):
    from lorajax import Factors

    def zeros(shape, rank):
        return Factors(jnp.zeros((shape[0], rank)), jnp.zeros((rank, shape[1])))

    with pytest.raises(ValueError, match="the factors of 'head' are both zero"):
        adapters.adapt(model, "head", key=KEY, rank=2, start=zeros)


def test_dora_refuses_zero_columns():
    layer = nnx.Linear(4, 3, rngs=nnx.Rngs(KEY), kernel_init=nnx.initializers.zeros)
    with pytest.raises(ValueError, match="3 columns of its kernel are zero"):
        adapters.adapt(layer, key=KEY, rank=2, dora=True)


def test_misuse_of_an_adapted_model(model, two):
    merged = adapters.merge(two)
    cases = [
        (lambda: adapters.adapt(two, "**/up", key=KEY, name="french"), "has an adapter 'french'"),
        (lambda: adapters.adapt(merged, "**/up", key=KEY, name="x"), "is merged; unmerge"),
        (lambda: adapters.merge(merged), "it is merged; unmerge it first"),
        (lambda: adapters.unmerge(two), "it is not merged; merge it first"),
        (lambda: adapters.merge(model), "no adapters to merge"),
        (lambda: adapters.remove(two, "german"), "no adapter 'german'; it has 'french', 'legal'"),
        (lambda: adapters.remove(merged, "french"), "it is merged"),
        (lambda: adapters.activate(two, "german"), "no adapter 'german'"),
        (lambda: adapters.activate(two, {"french": float("nan")}), "weight of 'french' is nan"),
        (lambda: adapters.trainable(model), "no adapters to train"),
        (lambda: adapters.trainable(two, heads="haed"), "near misses: 'head"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("**", "", True),
        ("**", "a/b/c", True),
        ("**/c", "c", True),
        ("a/**/c", "a/c", True),
        ("a/**/c", "a/b/b/c", True),
        ("a/*/c", "a/b/b/c", False),
        ("a*/[0-2]", "abc/1", True),
        ("a*/[!0-2]", "abc/1", False),
        ("a.c", "abc", False),
        ("layer_?", "layer_1", True),
        ("**/b/**", "a/b/c/d", True),
        ("[", "[", True),
    ],
)
def test_patterns(pattern, path, expected):
    assert paths.matches(pattern, path) is expected
    assert paths.matches(paths.escape(path), path)
