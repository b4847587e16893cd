"""Adapters of image towers, trained on their files here, loaded by PEFT onto these very files."""

import importlib.util
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytestmark = [pytest.mark.formats, pytest.mark.filterwarnings("ignore")]
for package in ("torch", "torchvision", "transformers", "peft", "timm"):
    try:
        __import__(package)
    except Exception as error:  # a torchvision that does not load beside this torch counts as none
        pytest.skip(f"{package} does not load: {error}", allow_module_level=True)

import peft  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torchvision.models import vision_transformer  # noqa: E402

from lorajax import adapters, models  # noqa: E402
from lorajax.adapters.paths import find  # noqa: E402
from lorajax.cli import main  # noqa: E402

_PATH = pathlib.Path(__file__).parents[1] / "models" / "references.py"
_SPEC = importlib.util.spec_from_file_location("lorajax_references", _PATH)
assert _SPEC and _SPEC.loader
references = importlib.util.module_from_spec(_SPEC)
sys.modules.setdefault(_SPEC.name, references)
_SPEC.loader.exec_module(references)

PIXELS = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)


def transformer(kind):
    """Makes the classifier of transformers from the folder that the adapter names."""
    return lambda folder: getattr(transformers, kind).from_pretrained(folder)


def torchvision_vit(folder):
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24, "num_classes": 5}
    model = vision_transformer.VisionTransformer(image_size=16, patch_size=4, **sizes)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def timm_model(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


# fixture: (how torch makes the base, what is given to load it, heads that torch has as modules)
SOURCES = {
    "dinov2": (
        transformer("Dinov2ForImageClassification"),
        {"image_size": 16},
        ["head", "embeddings"],
    ),
    "dinov2_registers": (
        transformer("Dinov2WithRegistersForImageClassification"),
        {"image_size": 16},
        ["head", "embeddings"],
    ),
    "clip": (transformer("CLIPForImageClassification"), {}, ["head", "embeddings"]),
    "siglip": (transformer("SiglipForImageClassification"), {}, ["head", "embeddings"]),
    "timm_deit3": (timm_model, {}, ["head", "norm"]),
    "timm_dinov2": (timm_model, {}, ["head"]),
    "timm_clip": (timm_model, {}, ["head", "norm_before"]),
    "timm_siglip": (timm_model, {}, ["head"]),
    "torchvision_vit": (torchvision_vit, {"heads": 2}, ["head", "norm"]),
}
TARGETS = {
    "attention": {"**/attention/query": 2, "**/attention/value": {"rank": 3, "alpha": 6}},
    "mlp": ["**/mlp/*", "**/out"],
    "all": ["**/attention/*", "**/mlp/*", "**/patches"],
}
ENDS = ("query", "key", "value", "up", "down", "patches")
CASES = [(name, targets, "lora") for name in SOURCES for targets in TARGETS] + [
    ("torchvision_vit", "all", "rslora"),
    ("torchvision_vit", "attention", "pissa"),
    ("timm_dinov2", "all", "pissa"),
    ("dinov2", "all", "dora"),
]
METHODS = {
    "lora": {},
    "rslora": {"rslora": True, "alpha": 3.0},
    "pissa": {"start": "pissa"},
    "dora": {"dora": True},
}


@nnx.jit
def run(model, images):
    return model(images)


def logits_of(model):
    with torch.no_grad():
        out = model.eval()(torch.tensor(np.moveaxis(PIXELS, -1, 1)))
    return (out if isinstance(out, torch.Tensor) else out.logits).numpy()


@pytest.mark.parametrize(("name", "targets", "method"), CASES)
def test_peft_loads_it_onto_the_base_that_it_names(name, targets, method, tmp_path):
    make, changes, heads = SOURCES[name]
    folder = tmp_path / "base"
    references.SMALL[name][1](folder)
    base = models.load(folder, **changes)
    pixels = jnp.asarray(PIXELS)
    plain = np.asarray(run(base, pixels))
    np.testing.assert_allclose(plain, logits_of(make(folder)), atol=1e-4)
    rules = models.torch_rules(base.config, models.layout_of(folder))
    options = {"rank": 2, "start": "lora"} | METHODS[method]
    chosen = TARGETS[targets]
    if name == "torchvision_vit" and targets != "attention":  # PEFT adds those of outputs twice
        chosen = [path for path in find(base) if path.endswith(ENDS)]
    adapted = adapters.adapt(base, chosen, key=jax.random.key(0), **options)
    if targets == "all":
        heads = [path for path in heads if path != "embeddings"]
    state = nnx.state(adapted, adapters.trainable(adapted, heads=heads))
    draw = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: x + jnp.asarray(draw.normal(size=x.shape) / 5, x.dtype), state)
    nnx.update(adapted, moved)
    adapters.save_peft(adapted, tmp_path / "a", rules=rules, heads=heads, base_model=str(folder))
    want = np.asarray(run(adapted, pixels))
    assert np.abs(want - plain).max() > 1e-2
    found = peft.PeftModel.from_pretrained(make(folder), tmp_path / "a")
    np.testing.assert_allclose(logits_of(found), want, atol=1e-4)
    again = adapters.load_peft(base, tmp_path / "a", rules=rules)
    np.testing.assert_allclose(run(again, pixels), want, atol=1e-4)


LABELS = {"num_labels": 2, "ignore_mismatched_sizes": True}


@pytest.mark.parametrize("name", ["dinov2_registers", "clip", "siglip", "timm_clip"])
def test_so_does_the_command(name, tmp_path, capsys):
    folder = tmp_path / "base"
    references.SMALL[name][1](folder)
    draw = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(6):
            pixels = draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{i}.png")
    out = tmp_path / "out"
    options = ["--hold-out", "30", "--rank", "2", "--epochs", "2", "--batch-size", "4"]
    options += ["--probes", "1", "--checkpoints", "1", "--out", str(out), "--image-size", "16"]
    options += ["--also"] if name.startswith("timm") else []  # whose embeddings are no module
    files = ["--model", str(folder), "--data", str(tmp_path / "pictures")]
    try:
        assert main(["finetune", *files, *options]) == 0
    finally:
        jax.config.update("jax_enable_x64", True)
    assert "this package's names" not in capsys.readouterr().out
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    base = models.load(folder, classes=2, image_size=16)
    rules = models.torch_rules(base.config, models.layout_of(folder))
    tuned = adapters.load_peft(base, out / "adapter", rules=rules)
    if name.startswith("timm"):
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=2)
    else:
        kind = json.loads((folder / "config.json").read_text())["architectures"][0]
        theirs = getattr(transformers, kind).from_pretrained(folder, **LABELS)
    found = peft.PeftModel.from_pretrained(theirs, out / "adapter")
    want = run(tuned, jnp.asarray(PIXELS))
    assert np.abs(want - run(base, jnp.asarray(PIXELS))).max() > 1e-3
    np.testing.assert_allclose(logits_of(found), want, atol=1e-4)


def test_what_peft_trained_on_a_multihead_attention_is_read(tmp_path):
    references.SMALL["torchvision_vit"][1](tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["self_attention", "0"])
    theirs = peft.get_peft_model(torchvision_vit(tmp_path / "base"), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        attention = theirs.base_model.model.encoder.layers[0].self_attention
        attention.base_layer.out_proj.lora_B["default"].weight.zero_()
    theirs.save_pretrained(tmp_path / "a")
    base = models.load(tmp_path / "base", heads=2)
    rules = models.torch_rules(base.config, "torchvision")
    ours = adapters.load_peft(base, tmp_path / "a", rules=rules)
    np.testing.assert_allclose(run(ours, jnp.asarray(PIXELS)), logits_of(theirs), atol=1e-4)
    with torch.no_grad():
        attention.base_layer.out_proj.lora_B["default"].weight.fill_(0.1)
    theirs.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="output of a MultiheadAttention, which it adds twice"):
        adapters.load_peft(base, tmp_path / "b", rules=rules)


def test_what_peft_has_no_adapter_for_is_refused(tmp_path):
    references.SMALL["torchvision_vit"][1](tmp_path / "base")
    base = models.load(tmp_path / "base", heads=2)
    rules = models.torch_rules(base.config, "torchvision")
    adapted = adapters.adapt(base, "**/query", key=jax.random.key(0), rank=2, dora=True)
    with pytest.raises(ValueError, match="PEFT cannot express the adapter of .*self_attention"):
        adapters.save_peft(adapted, tmp_path / "a", rules=rules)
    adapted = adapters.adapt(base, "**/out", key=jax.random.key(0), rank=2)
    with pytest.raises(ValueError, match="'blocks/0/attention/out', the output of a Multi"):
        adapters.save_peft(adapted, tmp_path / "a", rules=rules)
