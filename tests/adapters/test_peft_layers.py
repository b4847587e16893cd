"""What PEFT does by kind of layer, and what it writes along with an adapter: hand-made files."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lorajax import adapters
from lorajax.adapters import peft

KEY = jax.random.key(0, impl="rbg")
DRAW = np.random.default_rng(0)


def draw(*shape):
    return DRAW.normal(size=shape).astype(np.float32)


class Model(nnx.Module):
    """One layer of each kind, and what else a model may save in full."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(7, 6, rngs=rngs)
        self.conv = nnx.Conv(6, 4, (3,), rngs=rngs)
        self.batch_norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.group_norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.heads = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=rngs)
        self.linear = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.group_norm(self.batch_norm(self.conv(self.embed(tokens))))
        return self.linear(self.out(self.heads(x)))


TOKENS = jnp.asarray([[0, 3, 6, 1]])


def write(folder, tensors, **config):
    """A file as PEFT would write it, with LoRA of rank 2."""
    folder.mkdir(exist_ok=True)
    targets = sorted({key.split(".lora_")[0] for key in tensors if ".lora_" in key})
    whole = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets} | config
    (folder / peft.CONFIG).write_text(json.dumps(whole))
    named = {f"base_model.model.{key}": value for key, value in tensors.items()}
    safetensors.numpy.save_file(named, folder / peft.WEIGHTS)
    return folder


def pair(module, rows, columns, first="lora_A.weight", second="lora_B.weight"):
    return {f"{module}.{first}": rows, f"{module}.{second}": columns}


def embedding():
    return pair("embed", draw(2, 7), draw(6, 2), "lora_embedding_A", "lora_embedding_B")


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "loftq"])
def test_starts_with_offsets_leave_embeddings_and_convolutions_alone(start, tmp_path):
    model = Model()
    factors = embedding() | pair("conv", draw(2, 6, 3), draw(4, 2, 1))
    plain = adapters.load_peft(model, write(tmp_path / "plain", factors))
    started = adapters.load_peft(
        model, write(tmp_path / "started", factors, init_lora_weights=start)
    )
    assert started.embed.adapters["default"].offset is None
    np.testing.assert_array_equal(started(TOKENS), plain(TOKENS))
    linear = factors | pair("linear", draw(2, 4), draw(3, 2))
    folder = write(tmp_path / "linear", linear, init_lora_weights=start)
    if start in ("corda", "loftq"):
        with pytest.raises(ValueError, match=f"was started with '{start}', which changes the base"):
            adapters.load_peft(model, folder)
    else:
        found = adapters.load_peft(model, folder)
        assert found.linear.adapters["default"].offset.rank == 2


def test_an_embedding_saved_along_takes_the_place_of_the_base(tmp_path):
    """PEFT writes `base_layer.weight` of an adapted embedding, and loads it again."""
    model, table = Model(), draw(7, 6)
    folder = write(tmp_path / "a", embedding() | {"embed.base_layer.weight": table})
    found = adapters.load_peft(model, folder)
    np.testing.assert_array_equal(found.embed.base.embedding[...], table)
    assert float(jnp.abs(model.embed.embedding[...] - table).max()) > 0.1
    adapters.save_peft(found, tmp_path / "b", heads=["embed"])
    config, tensors, _ = peft.read_peft(tmp_path / "b")
    assert config["modules_to_save"] is None
    np.testing.assert_array_equal(tensors["base_model.model.embed.base_layer.weight"], table)
    again = adapters.load_peft(model, tmp_path / "b")
    np.testing.assert_array_equal(again(TOKENS), found(TOKENS))

    linear = pair("linear", draw(2, 4), draw(3, 2))
    beside = adapters.load_peft(model, write(tmp_path / "c", linear | {"embed.weight": table}))
    np.testing.assert_array_equal(beside.embed.embedding[...], table)
    resized = write(tmp_path / "d", linear | {"embed.weight": draw(9, 6)})
    with pytest.raises(ValueError, match="has weight of shape \\(9, 6\\); here it must be \\(7, 6"):
        adapters.load_peft(model, resized)


SAVED = {
    "embed": {"weight": (7, 6)},
    "conv": {"weight": (4, 6, 3), "bias": (4,)},
    "batch_norm": {"weight": (4,), "bias": (4,), "running_mean": (4,), "running_var": (4,)},
    "group_norm": {"weight": (4,), "bias": (4,)},
    "heads": {"weight": (6, 4), "bias": (6,)},
    "out": {"weight": (4, 6), "bias": (4,)},
}


@pytest.mark.parametrize("module", SAVED)
def test_modules_of_every_kind_are_saved_in_full_and_read_again(module, tmp_path):
    model = Model()
    parts = {f"{module}.{name}": np.abs(draw(*shape)) for name, shape in SAVED[module].items()}
    counted = {"batch_norm.num_batches_tracked": np.array(3)} if module == "batch_norm" else {}
    linear = pair("linear", draw(2, 4), draw(3, 2))
    folder = write(tmp_path / "a", linear | parts | counted, modules_to_save=[module])
    found = adapters.load_peft(model, folder)
    adapters.save_peft(found, tmp_path / "b", heads=[module])
    config, tensors, _ = peft.read_peft(tmp_path / "b")
    assert config["modules_to_save"] == [module]
    for name, value in parts.items():
        np.testing.assert_array_equal(tensors[f"base_model.model.{name}"], value)
    again = adapters.load_peft(model, tmp_path / "b")
    np.testing.assert_array_equal(again(TOKENS), found(TOKENS))
    assert float(jnp.abs(found(TOKENS) - model(TOKENS)).max()) > 1e-4


def test_the_order_of_a_convolution_saved_in_full_is_torchs(tmp_path):
    model, weight = Model(), draw(4, 6, 3)
    parts = pair("linear", draw(2, 4), draw(3, 2)) | {"conv.weight": weight, "conv.bias": draw(4)}
    found = adapters.load_peft(model, write(tmp_path / "a", parts, modules_to_save=["conv"]))
    np.testing.assert_array_equal(found.conv.kernel[...], weight.transpose(2, 1, 0))


def test_a_merged_layer_takes_no_adapter(tmp_path):
    model = adapters.adapt(Model(), {"linear": 2}, key=KEY)
    adapters.save_peft(model, tmp_path / "a")
    with pytest.raises(ValueError, match="the layer 'linear' is merged; unmerge the model first"):
        adapters.load_peft(adapters.merge(model), tmp_path / "a", name="second")
    both = adapters.load_peft(model, tmp_path / "a", name="second")
    assert adapters.names(both) == ("default", "second")
    with pytest.raises(ValueError, match="name is 'a/b'; it must be a word"):
        adapters.load_peft(model, tmp_path / "a", name="a/b")


REFUSED = {
    "groups": (
        lambda r: nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=r),
        pair("layer", draw(2, 2, 3), draw(4, 2, 1)),
        "has 2 groups",
    ),
    "dilation": (
        lambda r: nnx.Conv(4, 4, (3,), kernel_dilation=2, rngs=r),
        pair("layer", draw(2, 4, 3), draw(4, 2, 1)),
        "is dilated",
    ),
    "circular": (
        lambda r: nnx.Conv(4, 4, (3,), padding="CIRCULAR", rngs=r),
        pair("layer", draw(2, 4, 3), draw(4, 2, 1)),
        "pads as CIRCULAR",
    ),
    "slices": (
        lambda r: nnx.LinearGeneral(4, 3, axis=-1, batch_axis={0: 2}, rngs=r),
        pair("layer", draw(2, 4), draw(3, 2)),
        "has 2 slices",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_reading_refuses_what_writing_refuses(case, tmp_path):
    make, tensors, message = REFUSED[case]
    model = nnx.Dict(layer=make(nnx.Rngs(0)))
    sentence = f"PEFT cannot express the adapter of 'layer': it {message}"
    with pytest.raises(ValueError, match=sentence):
        adapters.load_peft(model, write(tmp_path / "a", tensors))
    adapted = adapters.adapt(model, key=KEY, rank=2)
    with pytest.raises(ValueError, match=sentence):
        adapters.save_peft(adapted, tmp_path / "b")


def test_a_dilated_convolution_is_adalora_in_both_directions(tmp_path):
    """PEFT's AdaLoRA forms the kernel, and so follows the dilation that its LoRA does not."""
    conv = nnx.Conv(2, 4, (3, 2), kernel_dilation=2, rngs=nnx.Rngs(0))
    adapted = adapters.adapt(nnx.Dict(layer=conv), key=KEY, rank=2, kind="adalora")
    adapted["layer"].adapters["default"].e.set_value(jnp.ones(2, jnp.float32))
    adapters.save_peft(adapted, tmp_path / "a")
    again = adapters.load_peft(nnx.Dict(layer=conv), tmp_path / "a")
    x = jnp.asarray(draw(1, 6, 5, 2))
    np.testing.assert_allclose(again["layer"](x), adapted["layer"](x), atol=1e-5)


@pytest.mark.apart
def test_what_was_committed_to_no_device_stays_so(virtual):
    """A model that is sharded in part runs after a checkpoint and after a module saved in full."""
    code = """
        import pathlib, tempfile
        import jax, jax.numpy as jnp, numpy as np, optax
        from flax import nnx
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from lorajax import adapters
        mesh = Mesh(np.array(jax.devices()), ("x",))
        model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)),
                               nnx.Linear(16, 4, rngs=nnx.Rngs(1)))
        placed = NamedSharding(mesh, P(None, "x"))
        for layer in model.layers:
            layer.kernel.set_value(jax.device_put(layer.kernel[...], placed))
        adapted = adapters.adapt(model, {"layers/0": 4}, key=jax.random.key(0), dropout=0.1)
        adapted.eval()
        x = jnp.ones((4, 8), "float32")
        want = adapted(x)
        optimizer = nnx.Optimizer(adapted, optax.adam(1e-3), wrt=adapters.trainable(adapted))
        folder = pathlib.Path(tempfile.mkdtemp())
        both = {"model": adapted, "optimizer": optimizer}
        adapters.save_checkpoint(both, folder / "state")
        adapters.load_checkpoint(both, folder / "state")
        first = adapted.layers[0]
        assert first.base.kernel[...].sharding == placed
        assert not first.base.bias[...].committed
        assert all(not x.committed for x in jax.tree.leaves(nnx.state(optimizer, nnx.RngKey)))
        assert bool(jnp.array_equal(adapted(x), want))
        adapters.save_peft(adapted, folder / "peft", heads=["layers/1"])
        again = adapters.load_peft(model, folder / "peft")
        assert again.layers[1].kernel[...].sharding == placed
        assert not again.layers[1].bias[...].committed
        assert bool(jnp.array_equal(again(x), want))
        print("placed")
    """
    arguments = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(arguments, env=virtual(4), capture_output=True, text=True)
    assert done.stdout.strip() == "placed", done.stderr
