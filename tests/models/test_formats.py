"""Full-size models against the libraries that define their formats: logits within 1e-4, float32.

Needs torch, torchvision, transformers and timm (`pytest -m formats`). A torchvision of another
build than torch's is imported without its compiled operators (`benchmarks/peers`).
"""

import importlib
import importlib.util
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import peers
from lorajax import models
from lorajax.models import layers

pytestmark = pytest.mark.formats

TOLERANCE = 1e-4
SIDE = 224


def references():
    peers.load_torchvision()
    for name in ("torch", "torchvision", "transformers", "timm"):
        pytest.importorskip(name, exc_type=(ImportError, RuntimeError))
    path = __file__.replace("test_formats", "references")
    spec = importlib.util.spec_from_file_location("lorajax_references", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


_DINO = {"num_labels": 1000, "image_size": 518}
_SMALL = {"hidden_size": 384, "num_attention_heads": 6}
# name: (function of references, its arguments, what is given to load the file)
FULL = {
    "huggingface ViT-B/16": ("huggingface_vit", (), {}, {}),
    "timm DeiT-Ti": ("timm_vit", ("deit_tiny_patch16_224",), {}, {}),
    "timm DeiT-Ti distilled": ("timm_vit", ("deit_tiny_distilled_patch16_224",), {}, {}),
    "augreg ViT-S/16": ("augreg_vit", ("vit_small_patch16_224",), {}, {"gelu": "erf"}),
    "dinov2-small": ("huggingface", ("Dinov2",), _DINO | _SMALL, {"image_size": SIDE}),
    "dinov2-base": ("huggingface", ("Dinov2",), _DINO, {"image_size": SIDE}),
    "dinov2-with-registers-small": (
        "huggingface",
        ("Dinov2WithRegisters",),
        _DINO | _SMALL,
        {"image_size": SIDE},
    ),
    "dinov2-with-registers-base": (
        "huggingface",
        ("Dinov2WithRegisters",),
        _DINO,
        {"image_size": SIDE},
    ),
    "clip-vit-base-patch16": ("tower", ("CLIP", 1000), {"patch_size": 16}, {}),
    "clip-vit-base-patch16 pair": ("pair", ("CLIP", 1000), {"patch_size": 16}, {"pool": "cls"}),
    "siglip-base-patch16-224": ("tower", ("Siglip", 1000), {}, {}),
    "siglip-base-patch16-224 pair": ("pair", ("Siglip", 1000), {}, {"pool": "attention"}),
    "timm DeiT III S/16": ("timm_folder", ("deit3_small_patch16_224",), {}, {}),
    "timm ViT-H/14": ("timm_folder", ("vit_huge_patch14_224",), {"num_classes": 1000}, {}),
    "timm CLIP B/16": (
        "timm_folder",
        ("vit_base_patch16_clip_quickgelu_224",),
        {"num_classes": 10},
        {},
    ),
    "timm SigLIP B/16": ("timm_folder", ("vit_base_patch16_siglip_224",), {"num_classes": 10}, {}),
    "torchvision ViT-B/16": ("full", ("vit_b_16",), {}, {}),
    "ResNet-50": ("full", ("resnet50",), {}, {}),
    "VGG-16": ("full", ("vgg16",), {}, {}),
    "VGG-16-BN": ("full", ("vgg16_bn",), {}, {}),
}


def make(name, tmp_path):
    library = references()
    function, arguments, options, changes = FULL[name]
    if function == "full":
        import torchvision

        arguments = [getattr(torchvision.models, arguments[0])]
    return getattr(library, function)(tmp_path, *arguments, **options), changes


@pytest.mark.parametrize("name", FULL)
def test_full_size_logits(name, tmp_path):
    library = references()
    (path, reference), changes = make(name, tmp_path)
    inputs = library.images(SIDE, number=2)
    expected = library.logits(reference, inputs)
    logits = nnx.jit(lambda m, x: m(x))(models.load(path, **changes), jnp.asarray(inputs))
    error = float(np.max(np.abs(np.asarray(logits) - expected)))
    print(f"{name}: logits of size {np.std(expected):.2f}, largest error {error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(5, 9), (37, 16), (16, 16), (3, 40)])
def test_positions_are_interpolated_as_torch_does(size, antialias):
    references()
    import torch

    grid = np.random.default_rng(0).standard_normal((16, 12, 4)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(grid).permute(2, 0, 1)[None],
        size=size,
        mode="bicubic",
        align_corners=False,
        antialias=antialias,
    )
    found = layers.resize_grid(grid, size, antialias=antialias)
    # Torch takes coordinates of up to 40 in float32, which is 2e-6 of a pixel, and a pixel's step
    # is up to 6 here.
    np.testing.assert_allclose(found, expected[0].permute(1, 2, 0), rtol=0, atol=2e-5)


# Small members of timm's zoo whose tensors do not show what they are.
TOLD = {
    "two heads": ("test_vit", {"num_classes": 7}),
    "heads of the argument": ("vit_tiny_patch16_224", {"num_heads": 6, "depth": 1}),
    "heads of a giant": ("vit_giant_patch14_224", {"depth": 1, "num_classes": 7}),
    "tanh": ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh", "depth": 1}),
    "mean": ("vit_tiny_patch16_224", {"global_pool": "avg", "depth": 1}),
    "no square": ("vit_tiny_patch16_224", {"img_size": (64, 256), "depth": 1}),
    "pooled afterwards": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "fc_norm": False, "depth": 1},
    ),
    "quick": ("vit_tiny_patch16_224", {"act_layer": "quick_gelu", "depth": 1}),
    "clip": ("vit_base_patch32_clip_224", {"depth": 1, "num_classes": 7}),
    "scaled layers": ("deit3_small_patch16_224", {"depth": 1}),
    "dinov2": ("vit_small_patch14_dinov2", {"depth": 1, "num_classes": 7, "img_size": 56}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"depth": 1, "num_classes": 7, "img_size": 56}),
    "gates": (
        "vit_giant_patch14_dinov2",
        {"depth": 1, "num_classes": 7, "img_size": 56, "embed_dim": 48, "num_heads": 3},
    ),
    "attention pool": ("vit_base_patch16_siglip_224", {"depth": 1, "num_classes": 7}),
    "mean of a tower": ("vit_base_patch32_siglip_gap_256", {"depth": 1, "num_classes": 7}),
    "resnet": ("resnet18", {"num_classes": 7}),
    "antialiased": ("resnetaa50", {}),
    "blurred": ("resnetblur50", {}),
    "unknown": ("vit_wee_patch16_reg1_gap_256", {"depth": 1}),
    "a norm of queries": ("vit_tiny_patch16_224", {"qk_norm": True, "depth": 1}),
}
REFUSED = (*list(TOLD)[16:],)


@pytest.mark.parametrize("name", TOLD)
def test_folders_of_timm_are_read_as_timm_means_them(name, tmp_path):
    library = references()
    architecture, changes = TOLD[name]
    folder, reference = library.timm_folder(tmp_path, architecture, **changes)
    if name in REFUSED:
        with pytest.raises(
            ValueError, match="has no place for|must be one of|does not tell|lacks|no tensor"
        ):
            models.load(folder)
        return
    model = models.load(folder)
    height, width = getattr(model.config, "image_size", (64, 64))
    inputs = library.images(max(height, width), number=1)[:, :height, :width]
    expected = library.logits(reference, inputs)
    logits = nnx.jit(lambda m, x: m(x))(model, jnp.asarray(inputs))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    cfg = reference.pretrained_cfg
    np.testing.assert_allclose(np.broadcast_to(model.config.mean, 3), cfg["mean"])
    np.testing.assert_allclose(np.broadcast_to(model.config.std, 3), cfg["std"])


def test_timm_rebuilds_a_model_from_what_an_export_states(tmp_path):
    library = references()
    config = models.ViTConfig((16, 32), 4, 24, 2, 3, mlp_width=40, classes=5, gelu="tanh")
    model = models.build(config, rngs=nnx.Rngs(0))
    models.save(model, tmp_path / "model.safetensors", layout="timm")
    rebuilt = library.timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    inputs = library.images(32, number=1)[:, :16]
    expected = library.logits(rebuilt, inputs)
    np.testing.assert_allclose(model(jnp.asarray(inputs)), expected, rtol=0, atol=TOLERANCE)


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
