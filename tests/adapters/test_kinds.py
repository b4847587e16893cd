"""Kinds of adapters: how they are asked for, and a kind of a stranger's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import adapters
from lorajax.adapters import kinds, methods, paths

KEY = jax.random.key(0, impl="rbg")


class ScalingMethod(adapters.PeftMethod):
    """A method like PEFT's IA3, under a type of its own."""

    type, suffixes = "SCALING", ("scale",)

    def refusal(self, base, axes=None):
        if getattr(base, "bias", None) is not None:
            return "has a bias, which that method scales along"
        return super().refusal(base, axes)

    def write(self, torch, base, adapter):
        scale = 1 + adapter.scaling * np.asarray(adapter.change[...], np.float32)
        return adapters.PeftLayer({"scale": scale[:, None]})

    def config(self, modules, adapters):
        return modules, {"feedforward_modules": []}

    def read(self, torch, base, parts, config, *, offset, dtype):
        methods.check_shape(
            torch.module, "scale", parts["scale"], (adapters.layout(base).shape[1], 1)
        )
        return Scaling(jnp.asarray(parts["scale"][:, 0] - 1, dtype), start="peft", attends=False)


class Scaling(adapters.Adapter):
    """Scales every column of the kernel."""

    kind, rank, peft = "scaling", 1, ScalingMethod()

    def __init__(self, change, **options):
        self.change = nnx.LoRAParam(change)
        super().__init__(**options)

    def update(self, base):
        view, kernel = adapters.layout(base), adapters.kernel_of(base).astype(self.dtype)
        return self.scaling * view.kernel(view.matrix(kernel) * self.change[None, :])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingSpec(adapters.Spec):
    """The options of a stranger's kind."""

    name = "scaling"

    size: float = 0.0

    def build(self, site):
        columns = adapters.layout(site.base).shape[1]
        change = jnp.full(columns, self.size, self.dtype)
        return Scaling(change, start="zero", **self.common(site))


def layer_of(kind, *args, **options):
    draw = np.random.default_rng(0)
    layer = nnx.eval_shape(lambda: kind(*args, rngs=nnx.Rngs(0), **options))
    for _, variable in nnx.to_flat_state(nnx.state(layer)):
        variable.set_value(jnp.asarray(draw.normal(size=variable.shape), variable.dtype))
    return layer


LAYERS = {
    "linear": (lambda: layer_of(nnx.Linear, 6, 5), (3, 6)),
    "general": (lambda: layer_of(nnx.LinearGeneral, (2, 3), (4, 2), axis=(-2, -1)), (3, 2, 3)),
    "einsum": (lambda: layer_of(nnx.Einsum, "...ab,abc->...c", (2, 3, 4), (4,)), (3, 2, 3)),
    "conv": (
        lambda: layer_of(nnx.Conv, 4, 6, (3,), feature_group_count=2, strides=2),
        (2, 7, 4),
    ),
    "embed": (lambda: layer_of(nnx.Embed, 7, 5), (2, 3)),
}


def inputs_of(layer, shape):
    draw = np.random.default_rng(1)
    if isinstance(layer, nnx.Embed):
        return jnp.asarray(draw.integers(0, 7, shape))
    return jnp.asarray(draw.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", LAYERS)
def test_a_kind_that_says_its_update_alone_acts_on_every_layer(name):
    make, shape = LAYERS[name]
    layer = make()
    x = inputs_of(layer, shape)
    still = adapters.adapt(layer, kind=ScalingSpec, key=KEY)
    np.testing.assert_array_equal(still(x), layer(x))
    model = adapters.adapt(layer, kind=ScalingSpec(size=0.5), key=KEY)
    merged = adapters.remove(adapters.merge(model))
    np.testing.assert_allclose(model(x), merged(x), atol=1e-5)
    bias = 0 if getattr(layer, "bias", None) is None else np.asarray(layer.bias[...])
    scaled = 1.5 * (np.asarray(layer(x)) - bias) + bias
    np.testing.assert_allclose(model(x), scaled, atol=1e-5)
    if name == "embed":
        query = jnp.ones((2, 5), jnp.float32)
        np.testing.assert_allclose(model.attend(query), 1.5 * layer.attend(query), atol=1e-5)


def test_it_is_described_trained_blended_and_saved_like_any_other(tmp_path):
    model = nnx.List([layer_of(nnx.Linear, 6, 5), layer_of(nnx.Linear, 5, 2)])
    targets = {"0": {"kind": "scaling", "size": 0.5}, "1": 2}
    adapted = adapters.adapt(model, targets, key=KEY)
    row, other = adapters.describe(adapted).rows
    assert (row.kind, row.parameters, row.start) == ("scaling", 5, "zero")
    assert other.kind == "LoRA"
    x = inputs_of(model[0], (3, 6))
    wrt = adapters.trainable(adapted)
    loss = lambda m: jnp.sum(m[0](x) ** 2)  # noqa: E731
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(adapted)
    assert float(jnp.abs(dict(grads)[0]["adapters"]["default"]["change"][...]).min()) > 0
    half = adapters.activate(adapted, {"default": 0.5})
    full, none = adapted[0](x), model[0](x)
    np.testing.assert_allclose(half[0](x), (full + none) / 2, atol=1e-5)
    adapters.save_checkpoint(adapted, tmp_path / "state")
    fresh = adapters.adapt(model, {"0": {"kind": "scaling"}, "1": 2}, key=KEY)
    adapters.load_checkpoint(fresh, tmp_path / "state")
    np.testing.assert_array_equal(fresh[0](x), full)


def test_it_declares_how_peft_holds_it(tmp_path):
    model = nnx.List([layer_of(nnx.Linear, 6, 5, use_bias=False), layer_of(nnx.Linear, 5, 2)])
    adapted = adapters.adapt(model, "0", kind=ScalingSpec(size=0.5), key=KEY)
    adapters.save_peft(adapted, tmp_path / "a")
    again = adapters.load_peft(model, tmp_path / "a")
    x = inputs_of(model[0], (3, 6))
    np.testing.assert_allclose(again[0](x), 1.5 * model[0](x), atol=1e-5)
    biased = adapters.adapt(model, "1", kind="scaling", key=KEY)
    with pytest.raises(ValueError, match="of '1': it has a bias, which that method"):
        adapters.save_peft(biased, tmp_path / "b")

    class Undeclared(Scaling):
        peft = None

    biased[1].adapters["default"] = Undeclared(jnp.zeros(2, jnp.float32))
    with pytest.raises(ValueError, match="it is a scaling update, for which PEFT has no method"):
        adapters.save_peft(biased, tmp_path / "b")


def test_a_kind_is_asked_for_by_name_by_class_and_by_instance():
    layer = layer_of(nnx.Linear, 6, 5)
    x = inputs_of(layer, (3, 6))
    spec = adapters.LoRASpec(rank=3, alpha=6, start="pissa")
    given = [
        adapters.adapt(layer, key=KEY, rank=3, alpha=6, start="pissa"),
        adapters.adapt(layer, key=KEY, kind="lora", rank=3, alpha=6, start="pissa"),
        adapters.adapt(layer, key=KEY, kind=adapters.LoRASpec, rank=3, alpha=6, start="pissa"),
        adapters.adapt(layer, key=KEY, kind=spec),
        adapters.adapt(layer, {"**": spec}, key=KEY),
        adapters.adapt(layer, {"**": {"kind": spec, "rank": 3}}, key=KEY, rank=1),
        adapters.adapt(layer, {"**": 3}, key=KEY, kind=dataclasses.replace(spec, rank=1)),
    ]
    for model in given:
        adapter = model.adapters["default"]
        assert (adapter.rank, adapter.scaling, adapter.start) == (3, 2.0, "pissa")
        np.testing.assert_array_equal(model(x), given[0](x))


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        (adapters.AdaLoRASpec, "dora"),
        (adapters.TuckerSpec, "dora"),
        (adapters.AdaLoRASpec, "rslora"),
        (adapters.TuckerSpec, "axes"),
        (adapters.LoRASpec, "tied"),
        (adapters.TuckerSpec, "recenter"),
    ],
)
def test_options_that_exclude_each_other_cannot_be_written(kind, option):
    assert option not in {field.name for field in dataclasses.fields(kind)}
    with pytest.raises(ValueError, match=f"no option '{option}' .*those of {kind.__name__}"):
        adapters.adapt(layer_of(nnx.Linear, 6, 5), key=KEY, kind=kind, **{option: True})


class Tied(nnx.Module):
    """A model whose embedding makes its logits."""

    def __init__(self):
        self.embed = layer_of(nnx.Embed, 7, 5)
        self.inner = layer_of(nnx.Linear, 5, 5)

    def __call__(self, tokens):
        return self.embed.attend(self.inner(self.embed(tokens)))


def test_an_embedding_that_makes_logits_is_told_from_one_that_does_not(tmp_path):
    assert paths.attends(Tied()) and not paths.attends(nnx.List([Tied().embed]))
    tokens = jnp.asarray([[0, 3, 6]])
    model = Tied()
    both = adapters.adapt(model, "embed", key=KEY, kind=ScalingSpec(size=0.5))
    lookup = adapters.adapt(model, "embed", key=KEY, kind=ScalingSpec(size=0.5, attends=False))
    inner = lambda scale: model.inner(scale * model.embed(tokens))  # noqa: E731
    np.testing.assert_allclose(both(tokens), 1.5 * model.embed.attend(inner(1.5)), atol=1e-4)
    np.testing.assert_allclose(lookup(tokens), model.embed.attend(inner(1.5)), atol=1e-4)
    for adapted in (both, lookup):
        merged = adapters.merge(adapted)
        np.testing.assert_allclose(merged(tokens), adapted(tokens), atol=1e-4)
        np.testing.assert_array_equal(adapters.unmerge(merged)(tokens), adapted(tokens))
    adapters.remove(adapters.merge(both))
    with pytest.raises(ValueError, match="leaves attend alone, so that one merged table cannot"):
        adapters.remove(adapters.merge(lookup))
    with pytest.raises(ValueError, match="acts in Embed.attend, too, .*adapt with attends=False"):
        adapters.save_peft(both, tmp_path / "a")
    adapters.save_peft(lookup, tmp_path / "a")
    again = adapters.load_peft(model, tmp_path / "a")
    np.testing.assert_allclose(again(tokens), lookup(tokens), atol=1e-5)
    with pytest.raises(ValueError, match="'embed' to save in full holds the Embed 'embed', whose"):
        inner = adapters.adapt(model, {"inner": 2}, key=KEY)
        adapters.save_peft(inner, tmp_path / "b", heads=["embed"])
    assert not (tmp_path / "b").exists()


def test_a_name_that_a_kind_has_is_not_taken_in_silence():
    def make(qualname):
        return type(qualname, (adapters.Spec,), {"name": "lora", "__module__": "elsewhere"})

    other = make("Mine")
    with pytest.raises(ValueError, match="name is 'lora' of two kinds, elsewhere.Mine"):
        kinds.kinds()
    other.name = "mine"
    again = make("Mine")  # as a cell of a notebook that is run twice defines it
    again.name = "mine"
    assert kinds.kinds()["mine"] is again
    other.name = again.name = None
    assert "mine" not in kinds.kinds()
