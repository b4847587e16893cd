"""Adapters of models read from public checkpoints, loaded by PEFT onto those very checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytestmark = [pytest.mark.formats, pytest.mark.filterwarnings("ignore")]
for package in ("torch", "transformers", "peft", "timm"):
    try:
        __import__(package)
    except Exception as error:  # a timm whose torchvision does not load counts as missing
        pytest.skip(f"{package} does not load: {error}", allow_module_level=True)

import peft  # noqa: E402
import safetensors.torch  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from lorajax import adapters, models  # noqa: E402

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
PIXELS = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)


def huggingface(folder):
    sizes = SIZES | {"intermediate_size": 48, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    model.save_pretrained(folder)
    return lambda: transformers.ViTForImageClassification.from_pretrained(folder), folder, {}


def vision_transformer():
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return timm.models.VisionTransformer(num_classes=3, **options).eval()


def timm_file(folder):
    folder.mkdir()
    file = folder / "model.safetensors"
    safetensors.torch.save_file(vision_transformer().state_dict(), file)
    return vision_transformer, file, {"heads": 4}


def augreg(folder):
    _, file, changes = timm_file(folder)
    model = models.load(file, **changes)
    models.save(model, folder / "vit.npz", layout="augreg")
    return vision_transformer, folder / "vit.npz", changes | {"gelu": "erf"}


SOURCES = {"huggingface": huggingface, "timm": timm_file, "augreg": augreg}
TARGETS = {
    "one": "**/query",
    "ranks": {"**/query": 2, "blocks/0/**/value": {"rank": 3, "alpha": 6}, "**/mlp/*": 4},
    "fused": {"**/query": 2, "**/key": 1, "**/value": 3},
    "patches": ["embeddings/patches", "**/out"],
}
METHODS = {
    "lora": {},
    "rslora": {"rslora": True, "alpha": 3.0},
    "pissa": {"start": "pissa"},
    "adalora": {"kind": "adalora"},
    "dora": {"dora": True},
}


def moved(model, heads):
    state = nnx.state(model, adapters.trainable(model, heads=heads))
    draw = np.random.default_rng(1)
    change = lambda x: x + jnp.asarray(draw.normal(size=x.shape) / 5, x.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(change, state))
    return model


def logits_of(torch_model):
    pixels = torch.tensor(np.moveaxis(PIXELS, -1, 1))
    with torch.no_grad():
        out = torch_model.eval()(pixels)
    return (out if isinstance(out, torch.Tensor) else out.logits).numpy()


@pytest.mark.parametrize(
    ("source", "targets", "method", "heads"),
    [
        ("huggingface", "ranks", "lora", ["head", "norm"]),
        ("huggingface", "patches", "pissa", []),
        ("huggingface", "ranks", "adalora", []),
        ("timm", "one", "lora", ["head"]),
        ("timm", "ranks", "rslora", ["head", "norm"]),
        ("timm", "ranks", "pissa", []),
        ("timm", "ranks", "adalora", []),
        ("timm", "fused", "dora", []),
        ("timm", "patches", "lora", ["head"]),
        ("augreg", "ranks", "lora", ["head"]),
    ],
)
def test_peft_loads_it_onto_the_base_that_it_names(source, targets, method, heads, tmp_path):
    make, file, changes = SOURCES[source](tmp_path / "base")
    layout = models.layout_of(file)
    base = models.load(file, **changes)
    rules = models.torch_rules(base.config, layout)
    np.testing.assert_allclose(base(jnp.asarray(PIXELS)), logits_of(make()), atol=1e-4)
    options = {"rank": 2} | METHODS[method]
    adapted = adapters.adapt(base, TARGETS[targets], key=jax.random.key(0), **options)
    adapted = moved(adapted, heads)
    adapters.save_peft(adapted, tmp_path / "a", rules=rules, heads=heads, base_model=str(file))
    want = np.asarray(adapted(jnp.asarray(PIXELS)))
    found = peft.PeftModel.from_pretrained(make(), tmp_path / "a")
    assert float(np.max(np.abs(want - np.asarray(base(jnp.asarray(PIXELS)))))) > 1e-2
    np.testing.assert_allclose(logits_of(found), want, atol=1e-4)

    again = adapters.load_peft(base, tmp_path / "a", rules=rules)
    np.testing.assert_allclose(again(jnp.asarray(PIXELS)), want, atol=1e-4)
    ranks = {path: x.adapters["default"].rank for path, x in adapters.layers(again).items()}
    if method != "adalora":  # whose file has one rank
        for path, layer in adapters.layers(adapted).items():
            assert ranks[path] == layer.adapters["default"].rank


def test_what_peft_trained_on_the_fused_layer_is_read(tmp_path):
    make, file, changes = timm_file(tmp_path / "base")
    base = models.load(file, **changes)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["qkv", "proj", "fc1"])
    theirs = peft.get_peft_model(make(), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "a")
    assert isinstance(json.loads((tmp_path / "a" / "adapter_config.json").read_text()), dict)
    rules = models.torch_rules(base.config, "timm")
    ours = adapters.load_peft(base, tmp_path / "a", rules=rules)
    np.testing.assert_allclose(ours(jnp.asarray(PIXELS)), logits_of(theirs), atol=1e-4)
    adapters.save_peft(ours, tmp_path / "b", rules=rules)
    found = peft.PeftModel.from_pretrained(make(), tmp_path / "b")
    np.testing.assert_allclose(logits_of(found), logits_of(theirs), atol=1e-4)


def test_embeddings_train_along_where_torch_has_a_module_of_them(tmp_path):
    make, file, _ = huggingface(tmp_path / "base")
    base = models.load(file)
    rules = models.torch_rules(base.config, "huggingface")
    heads = ["head", "embeddings"]
    adapted = moved(adapters.adapt(base, "**/query", key=jax.random.key(0), rank=2), heads)
    adapters.save_peft(adapted, tmp_path / "a", rules=rules, heads=heads)
    want = np.asarray(adapted(jnp.asarray(PIXELS)))
    found = logits_of(peft.PeftModel.from_pretrained(make(), tmp_path / "a"))
    np.testing.assert_allclose(found, want, atol=1e-4)
    again = adapters.load_peft(base, tmp_path / "a", rules=rules)
    np.testing.assert_allclose(again(jnp.asarray(PIXELS)), want, atol=1e-4)
