"""Adapters under the names of torch's models, without torch: fused layers, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import adapters, models
from lorajax.adapters import peft, torch_layers

KEY = jax.random.key(0, impl="rbg")
CONFIG = models.ViTConfig((8, 8), 4, width=8, depth=1, heads=2, classes=3, channels=1)


@pytest.fixture(scope="module")
def model():
    return models.build(CONFIG, rngs=nnx.Rngs(0))


def test_each_layout_names_the_modules_of_its_torch_model(model):
    def names(layout):
        rules = models.torch_rules(CONFIG, layout)
        found = torch_layers.Names(model, rules=rules)
        return [found.module(f"blocks/0/{path}") for path in ("attention/key", "mlp/down")]

    fused = [("blocks.0.attn.qkv", 1), ("blocks.0.mlp.fc2", 0)]
    assert names("timm") == names("augreg") == fused
    assert names("huggingface") == [
        ("vit.layers.0.attention.k_proj", 0),
        ("vit.layers.0.mlp.fc2", 0),
    ]
    before = "vit.encoder.layer.0."
    assert names("huggingface-4") == [
        (f"{before}attention.attention.key", 0),
        (f"{before}output.dense", 0),
    ]
    assert models.torch_rules(CONFIG, "lorajax") is None
    with pytest.raises(ValueError, match="layout is 'keras'; for a ViTConfig it must be one"):
        models.torch_rules(CONFIG, "keras")


def test_a_file_tells_its_layout(model, tmp_path):
    for layout in ("lorajax", "timm", "augreg"):
        suffix = ".npz" if layout == "augreg" else ".safetensors"
        file = models.save(model, tmp_path / f"{layout}{suffix}", layout=layout)
        assert models.layout_of(file) == layout


def test_one_fused_layer_holds_the_ranks_of_three_and_gives_them_back(model, tmp_path):
    rules = models.torch_rules(CONFIG, "timm")
    adapted = adapters.adapt(model, {"**/query": 2, "**/value": {"rank": 1, "alpha": 3}}, key=KEY)
    for layer in adapters.layers(adapted).values():
        b = layer.adapters["default"].b
        b.set_value(jnp.ones(b.shape, b.dtype))
    adapters.save_peft(adapted, tmp_path / "a", rules=rules)
    config, tensors, _ = peft.read_peft(tmp_path / "a")
    assert config["target_modules"] == ["blocks.0.attn.qkv"] and config["r"] == 3
    start = "base_model.model.blocks.0.attn.qkv."
    shapes = [tensors[f"{start}lora_{name}.weight"].shape for name in "AB"]
    assert shapes == [(3, 8), (24, 3)]
    again = adapters.load_peft(model, tmp_path / "a", rules=rules)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)
    np.testing.assert_allclose(again(x), adapted(x), atol=1e-5)
    found = {path: x.adapters["default"] for path, x in adapters.layers(again).items()}
    # One module has one scaling: the largest, which query's B makes up for.
    assert {path: (x.rank, x.scaling) for path, x in found.items()} == {
        "blocks/0/attention/query": (2, pytest.approx(3)),
        "blocks/0/attention/value": (1, pytest.approx(3)),
    }


def test_what_a_fused_layer_and_a_model_without_modules_cannot_hold(model, tmp_path):
    rules = models.torch_rules(CONFIG, "timm")
    dora = adapters.adapt(model, "**/query", key=KEY, rank=2, dora=True)
    with pytest.raises(ValueError, match="part of 'blocks.0.attn.qkv': DoRA has a magnitude"):
        adapters.save_peft(dora, tmp_path, rules=rules)
    mixed = {"**/query": {"start": "pissa"}, "**/key": {}}
    some = adapters.adapt(model, mixed, key=KEY, rank=2)
    with pytest.raises(ValueError, match="start with an offset and others do not"):
        adapters.save_peft(some, tmp_path, rules=rules)
    plain = adapters.adapt(model, "**/query", key=KEY, rank=2)
    with pytest.raises(ValueError, match="'embeddings' to save in full is no module of its own"):
        adapters.save_peft(plain, tmp_path, rules=rules, heads=["embeddings"])
    with pytest.raises(ValueError, match="rename and rules are both given"):
        adapters.save_peft(plain, tmp_path, rules=rules, rename=str)
