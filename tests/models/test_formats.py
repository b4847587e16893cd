"""Full-size models against the libraries that define their formats: logits within 1e-4, float32.

Needs torch, torchvision, transformers and timm (`pytest -m formats`). PyTorch's CPU build from
PyPI has no torchvision that imports beside it; the tests then say so and skip.
"""

import importlib
import importlib.util
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import models

pytestmark = pytest.mark.formats

TOLERANCE = 1e-4
SIDE = 224


def references():
    for name in ("torch", "torchvision", "transformers", "timm"):
        pytest.importorskip(name, exc_type=(ImportError, RuntimeError))
    path = __file__.replace("test_formats", "references")
    spec = importlib.util.spec_from_file_location("lorajax_references", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make(name, tmp_path):
    library = references()
    if name == "huggingface ViT-B/16":
        return library.huggingface_vit(tmp_path), {}
    if name == "timm DeiT-Ti":
        return library.timm_vit(tmp_path, "deit_tiny_patch16_224"), {}
    if name == "timm DeiT-Ti distilled":
        return library.timm_vit(tmp_path, "deit_tiny_distilled_patch16_224"), {}
    if name == "augreg ViT-S/16":
        return library.augreg_vit(tmp_path, "vit_small_patch16_224"), {"gelu": "erf"}
    from torchvision.models import resnet50, vgg16, vgg16_bn

    return library.full(
        tmp_path, {"ResNet-50": resnet50, "VGG-16": vgg16, "VGG-16-BN": vgg16_bn}[name]
    ), {}


@pytest.mark.parametrize(
    "name",
    [
        "huggingface ViT-B/16",
        "timm DeiT-Ti",
        "timm DeiT-Ti distilled",
        "augreg ViT-S/16",
        "ResNet-50",
        "VGG-16",
        "VGG-16-BN",
    ],
)
def test_full_size_logits(name, tmp_path):
    library = references()
    (path, reference), changes = make(name, tmp_path)
    inputs = library.images(SIDE, number=2)
    expected = library.logits(reference, inputs)
    logits = nnx.jit(lambda m, x: m(x))(models.load(path, **changes), jnp.asarray(inputs))
    error = float(np.max(np.abs(np.asarray(logits) - expected)))
    print(f"{name}: logits of size {np.std(expected):.2f}, largest error {error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", ["huggingface ViT-B/16", "timm DeiT-Ti"])
def test_exports_run_in_the_defining_library(name, tmp_path):
    library = references()
    (path, reference), _ = make(name, tmp_path / "in")
    inputs = library.images(SIDE, number=1)
    expected = library.logits(reference, inputs)
    model = models.load(path)
    if name.startswith("huggingface"):
        models.save(model, tmp_path / "out" / "model.safetensors", layout="huggingface")
        vit = library.transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
        again = library.logits(lambda x: vit.eval()(x).logits, inputs)
    else:
        out = models.save(model, tmp_path / "out" / "model.safetensors", layout="timm")
        from safetensors.torch import load_file

        vit = library.timm.create_model("deit_tiny_patch16_224").eval()
        vit.load_state_dict(load_file(out))
        again = library.logits(vit, inputs)
    np.testing.assert_allclose(again, expected, rtol=0, atol=TOLERANCE)
