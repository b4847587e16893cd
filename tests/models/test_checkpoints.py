"""Loading, exporting and refusing checkpoints, against logits of the defining libraries.

The fixtures and their logits were written by torchvision, transformers and timm themselves
(`references.py`), from tiny configurations of their own classes with random weights.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lorajax import models

FIXTURES = pathlib.Path(__file__).parent / "fixtures"

# name: (family, layout, what the files leave open)
CASES = {
    "huggingface_vit": ("ViT", "huggingface", {}),
    "timm_vit": ("ViT", "timm", {"heads": 3}),
    "timm_deit_distilled": ("ViT", "timm", {"heads": 3}),
    "timm_vit_mean": ("ViT", "timm", {"heads": 3}),
    # timm reads these files with the exact GELU; Google's own code has the tanh form.
    "augreg_vit": ("ViT", "augreg", {"gelu": "erf"}),
    "dinov2": ("ViT", "huggingface-dinov2", {"image_size": 16}),
    "dinov2_registers": ("ViT", "huggingface-dinov2", {"image_size": 16}),
    "clip": ("ViT", "huggingface-clip", {}),
    "clip_pair": ("ViT", "huggingface-clip", {"pool": "cls"}),
    "siglip": ("ViT", "huggingface-siglip", {}),
    "siglip_pair": ("ViT", "huggingface-siglip", {"pool": "attention"}),
    "torchvision_vit": ("ViT", "torchvision", {"heads": 2}),
    "timm_deit3": ("ViT", "timm", {}),
    "timm_dinov2": ("ViT", "timm", {}),
    "timm_clip": ("ViT", "timm", {}),
    "timm_siglip": ("ViT", "timm", {}),
    "timm_siglip_mean": ("ViT", "timm", {}),
    "resnet_basic": ("ResNet", "torchvision", {}),
    "resnet_bottleneck": ("ResNet", "torchvision", {}),
    "vgg": ("VGG", "torchvision", {"grid": 2}),
    "vgg_bn": ("VGG", "torchvision", {"grid": 2}),
}


def source(name: str) -> pathlib.Path:
    folder = FIXTURES / name
    return folder / "model.npz" if name == "augreg_vit" else folder


@nnx.jit
def run(model, images):
    return model(images)


def load(name: str, **options) -> models.Model:
    return models.load(source(name), **CASES[name][2], **options)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_the_defining_library(name):
    expected = np.load(FIXTURES / name / "expected.npz")
    model = load(name)
    assert type(model).__name__ == CASES[name][0]
    logits = run(model, jnp.asarray(expected["images"]))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)


# What transformers has in its classifiers' files and does not use for their logits.
IDLE = re.compile(r".*mask_token|vision_model\.post_layernorm\..*|vision_model\.head\..*")
PAIRS = ("clip_pair", "siglip_pair")


@pytest.mark.parametrize("name", [name for name in CASES if name not in PAIRS])
def test_export_restores_every_tensor_bit_for_bit(name, tmp_path):
    layout = CASES[name][1]
    path = tmp_path / ("model.npz" if layout == "augreg" else "model.safetensors")
    models.save(load(name), path, layout=layout)
    if layout == "augreg":
        original, exported = np.load(source(name)), np.load(path)
    else:
        original, exported = load_file(source(name) / "model.safetensors"), load_file(path)
    original = {k: v for k, v in original.items() if "num_batches_tracked" not in k}
    if name == "timm_vit_mean":  # timm keeps an unused norm or none, by version
        exported = {k: exported[k] for k in original}
    if layout.startswith("huggingface-"):
        original = {k: v for k, v in original.items() if k in exported or not IDLE.fullmatch(k)}
    assert original.keys() == exported.keys()
    for key, value in original.items():
        np.testing.assert_array_equal(value, exported[key], err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_own_format_keeps_configuration_and_logits(name, tmp_path):
    model = load(name)
    path = models.save(model, tmp_path / "own.safetensors", notes={"recipe": "none"})
    again = models.load(path)
    assert again.config == model.config
    x = jnp.asarray(np.load(FIXTURES / name / "expected.npz")["images"])
    np.testing.assert_array_equal(run(again, x), run(model, x))


def test_huggingface_export_states_its_configuration(tmp_path):
    model = load("huggingface_vit")
    models.save(model, tmp_path / "model.safetensors", layout="huggingface")
    assert models.load(tmp_path).config == model.config


@pytest.mark.parametrize(
    ("name", "layout"), [(n, CASES[n][1]) for n in CASES if CASES[n][1].startswith("huggingface-")]
)
def test_exports_of_towers_state_their_configurations(name, layout, tmp_path):
    if name in PAIRS:
        with pytest.raises(ValueError, match=f"layout is '{layout}', which has no pool = "):
            models.save(load(name), tmp_path / "model.safetensors", layout=layout)
        return
    model = load(name)
    models.save(model, tmp_path / "model.safetensors", layout=layout)
    assert models.load(tmp_path).config == model.config


@pytest.mark.parametrize("name", ["timm_deit3", "timm_dinov2", "timm_clip", "timm_siglip_mean"])
def test_exports_to_timm_state_their_configurations(name, tmp_path):
    model = load(name)
    models.save(model, tmp_path / "model.safetensors", layout="timm")
    assert dataclasses.replace(models.load(tmp_path).config, gelu="erf") == dataclasses.replace(
        model.config, gelu="erf"
    )


def test_a_tower_whose_queries_and_keys_are_turned():
    with pytest.raises(ValueError, match="no classification head"):
        models.load(source("dinov3"))
    model = models.load(source("dinov3"), classes=5)
    expected = np.load(FIXTURES / "dinov3" / "expected.npz")
    x = jnp.asarray(expected["images"])
    found = nnx.jit(lambda model, x: model.norm(model.tokens(x))[:, 0])(model, x)
    np.testing.assert_allclose(found, expected["logits"], rtol=0, atol=1e-5)
    last = nnx.jit(lambda model, x: model.head(model.norm(model.tokens(x))[:, 0]))(model, x)
    np.testing.assert_allclose(run(model, x), last, rtol=0, atol=1e-5)
    assert models.load(source("dinov3"), classes=5, image_size=24).config.grid == (6, 6)
    with pytest.raises(ValueError, match="has no classifier; use 'lorajax'"):
        models.save(model, "m.safetensors", layout="huggingface-dinov3")


def test_a_table_that_is_interpolated_stays_whole():
    small, large = (models.load(source("dinov2"), image_size=size) for size in (8, 24))
    np.testing.assert_array_equal(small.embeddings.positions[...], large.embeddings.positions[...])
    assert small.config.table == large.config.table == (5, 5)


def test_a_head_of_another_size_is_drawn_afresh_and_nothing_else_changes():
    old, new = load("timm_vit"), load("timm_vit", classes=7, seed=3)
    x = jnp.asarray(np.load(FIXTURES / "timm_vit" / "expected.npz")["images"])
    np.testing.assert_array_equal(old.tokens(x), new.tokens(x))
    assert new(x).shape == (3, 7)
    assert float(jnp.std(new.head.kernel[...])) == pytest.approx(24**-0.5, rel=0.2)
    again = load("timm_vit", classes=7, seed=3)
    np.testing.assert_array_equal(new.head.kernel[...], again.head.kernel[...])


@pytest.mark.parametrize("size", [(8, 8), (24, 32)])
def test_position_embeddings_are_interpolated(size):
    # As timm does it; how transformers does shows in the logits of the fixture "dinov2".
    old, new = load("timm_vit"), load("timm_vit", image_size=size)
    rows, columns = size[0] // 4, size[1] // 4
    grid = old.embeddings.positions[...][0, 1:].reshape(4, 4, -1)
    expected = jax.image.resize(grid, (rows, columns, 24), "cubic").reshape(rows * columns, -1)
    np.testing.assert_allclose(new.embeddings.positions[...][0, 1:], expected, atol=1e-6)
    np.testing.assert_array_equal(
        new.embeddings.positions[...][0, 0], old.embeddings.positions[...][0, 0]
    )
    assert new(jnp.zeros((1, *size, 3), jnp.float32)).shape == (1, 5)


def test_constant_position_embeddings_stay_constant(tmp_path):
    model = load("huggingface_vit")
    model.embeddings.positions.set_value(jnp.ones_like(model.embeddings.positions[...]))
    path = models.save(model, tmp_path / "m.safetensors")
    resized = models.load(path, image_size=40)
    np.testing.assert_allclose(resized.embeddings.positions[...], 1, atol=1e-6)


def test_a_bare_huggingface_vit_needs_a_number_of_classes(tmp_path):
    shutil.copy(FIXTURES / "huggingface_vit" / "config.json", tmp_path)
    tensors = load_file(FIXTURES / "huggingface_vit" / "model.safetensors")
    bare = {k.removeprefix("vit."): v for k, v in tensors.items() if "classifier" not in k}
    bare["pooler.dense.weight"] = np.zeros((24, 24), np.float32)
    save_file(bare, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no classification head"):
        models.load(tmp_path)
    model = models.load(tmp_path, classes=2)
    x = jnp.asarray(np.load(FIXTURES / "huggingface_vit" / "expected.npz")["images"])
    np.testing.assert_array_equal(model.tokens(x), load("huggingface_vit").tokens(x))


def test_a_query_bias_that_is_switched_off_counts_as_zero(tmp_path):
    tensors = load_file(FIXTURES / "timm_vit" / "model.safetensors")
    path = tmp_path / "m.safetensors"
    save_file({k: v for k, v in tensors.items() if not k.endswith("qkv.bias")}, path)
    without = models.load(path, heads=3)
    save_file({k: v * (not k.endswith("qkv.bias")) for k, v in tensors.items()}, path)
    x = jnp.asarray(np.load(FIXTURES / "timm_vit" / "expected.npz")["images"])
    np.testing.assert_array_equal(run(without, x), run(models.load(path, heads=3), x))


def test_sharded_folders_and_wrapped_names(tmp_path):
    tensors = load_file(FIXTURES / "resnet_basic" / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for part, file in ((names[::2], "a.safetensors"), (names[1::2], "b.safetensors")):
        save_file({f"module.{k}": tensors[k] for k in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = np.load(FIXTURES / "resnet_basic" / "expected.npz")
    logits = run(models.load(tmp_path), jnp.asarray(expected["images"]))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)


def test_bfloat16_weights_and_computation(tmp_path):
    exact = load("huggingface_vit")
    x = jnp.asarray(np.load(FIXTURES / "huggingface_vit" / "expected.npz")["images"])
    half = load("huggingface_vit", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert half.blocks[0].mlp.up.kernel[...].dtype == jnp.bfloat16
    logits = run(half, x)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), run(exact, x), atol=0.1)
    path = models.save(half, tmp_path / "half.safetensors")
    again = models.load(path, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(run(again, x), logits)


class TestRefusals:
    """Bad files get one sentence that names the file and the tensor."""

    def changed(self, tmp_path, change):
        tensors = load_file(FIXTURES / "timm_vit" / "model.safetensors")
        change(tensors)
        save_file(tensors, tmp_path / "m.safetensors")
        return tmp_path / "m.safetensors"

    def test_missing_tensor(self, tmp_path):
        path = self.changed(tmp_path, lambda t: t.pop("blocks.1.mlp.fc2.weight"))
        with pytest.raises(ValueError, match=r"lacks blocks\.1\.mlp\.fc2\.weight"):
            models.load(path, heads=3)

    def test_unexpected_tensor(self, tmp_path):
        path = self.changed(tmp_path, lambda t: t.update(extra=np.zeros(3, np.float32)))
        with pytest.raises(ValueError, match="has extra, which this model has no place for"):
            models.load(path, heads=3)

    def test_wrong_shape(self, tmp_path):
        def change(tensors):
            tensors["blocks.1.attn.proj.weight"] = np.zeros((24, 23), np.float32)

        with pytest.raises(ValueError, match=r"blocks\.1\.attention\.out\.kernel has shape"):
            models.load(self.changed(tmp_path, change), heads=3)

    def test_wrong_shape_of_a_fused_tensor(self, tmp_path):
        def change(tensors):
            tensors["blocks.1.attn.qkv.weight"] = np.zeros((71, 24), np.float32)

        with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.weight has shape \(71, 24\)"):
            models.load(self.changed(tmp_path, change), heads=3)

    def test_integers(self, tmp_path):
        path = self.changed(tmp_path, lambda t: t.update({"norm.bias": np.zeros(24, np.int32)}))
        with pytest.raises(ValueError, match=r"norm\.bias has dtype int32, not a float"):
            models.load(path, heads=3)

    def test_heads_that_do_not_divide_the_width(self):
        with pytest.raises(ValueError, match="must be a multiple of heads = 5"):
            models.load(FIXTURES / "timm_vit", heads=5)

    def test_unknown_field(self):
        with pytest.raises(ValueError, match="head is not a field of ViTConfig"):
            models.load(FIXTURES / "timm_vit", head=3)

    def test_truncated_safetensors(self, tmp_path):
        data = (FIXTURES / "vgg" / "model.safetensors").read_bytes()
        (tmp_path / "m.safetensors").write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            models.load(tmp_path / "m.safetensors")

    def test_pickles_in_an_npz(self, tmp_path):
        np.savez(tmp_path / "m.npz", **{"embedding/kernel": np.array([{}], dtype=object)})
        with pytest.raises(ValueError, match="without pickles"):
            models.load(tmp_path / "m.npz")

    @pytest.mark.parametrize("name", ["nothing.pt", "no/such/place", "nothing.safetensors"])
    def test_no_such_source(self, name):
        with pytest.raises(ValueError, match="does not exist"):
            models.load(name)

    def test_file_of_another_kind(self, tmp_path):
        (tmp_path / "m.pt").write_bytes(b"PK")
        with pytest.raises(ValueError, match=r"must be a folder, \.safetensors or \.npz"):
            models.load(tmp_path / "m.pt")

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"has no file 'model\.safetensors'"):
            models.load(tmp_path)

    def test_an_index_cannot_point_outside_its_folder(self, tmp_path):
        index = {"weight_map": {"x": "../outside.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file({"x": np.zeros(1, np.float32)}, tmp_path.parent / "outside.safetensors")
        with pytest.raises(ValueError, match="has no file '../outside.safetensors'"):
            models.load(tmp_path)

    def test_an_index_that_names_another_shard(self, tmp_path):
        tensors = load_file(FIXTURES / "resnet_basic" / "model.safetensors")
        first, *_, last = sorted(tensors)
        where = {name: "b.safetensors" if name == last else "a.safetensors" for name in tensors}
        for file in ("a.safetensors", "b.safetensors"):
            save_file({k: x for k, x in tensors.items() if where[k] == file}, tmp_path / file)
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": where}))
        models.load(tmp_path)
        index.write_text(json.dumps({"weight_map": where | {first: "b.safetensors"}}))
        said = f"index.json says that {first} lies in b.safetensors, and a.safetensors has it"
        with pytest.raises(ValueError, match=re.escape(said)):
            models.load(tmp_path)

    def test_unknown_architecture(self, tmp_path):
        save_file({"alpha": np.zeros(1, np.float32)}, tmp_path / "m.safetensors")
        with pytest.raises(ValueError, match="in no known format; its tensors are named alpha"):
            models.load(tmp_path / "m.safetensors")

    def test_layout_of_another_family(self, tmp_path):
        with pytest.raises(ValueError, match="for a VGG it must be one of lorajax, torchvision"):
            models.save(load("vgg"), tmp_path / "m.safetensors", layout="timm")

    def test_layout_that_cannot_say_it(self, tmp_path):
        with pytest.raises(ValueError, match="has no pool = 'mean'"):
            models.save(load("timm_vit_mean"), tmp_path / "m.npz", layout="augreg")

    def test_suffix_of_another_layout(self, tmp_path):
        with pytest.raises(ValueError, match=r"must end in \.npz"):
            models.save(load("timm_vit"), tmp_path / "m.safetensors", layout="augreg")


class TestNumbers:
    """Weights that are no numbers are refused in every format, unless they are asked for."""

    NAME = "blocks.1.mlp.fc1.weight"

    def written(self, folder, kind, value):
        """The tensors of a timm ViT in one kind of file, with a value in two places."""
        tensors = load_file(FIXTURES / "timm_vit" / "model.safetensors")
        flat = tensors[self.NAME].reshape(-1)
        flat[[3, flat.size - 1]] = value
        if kind == "npz":
            np.savez(folder / "m.npz", **self.augreg(value))
            return folder / "m.npz", folder / "m.npz"
        if kind == "file":
            save_file(tensors, folder / "m.safetensors")
            return folder / "m.safetensors", folder / "m.safetensors"
        names = sorted(tensors)
        where = {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}
        for file in ("0.safetensors", "1.safetensors"):
            save_file({k: tensors[k] for k in names if where[k] == file}, folder / file)
        index = json.dumps({"weight_map": where})
        (folder / "model.safetensors.index.json").write_text(index)
        return folder, folder / where[self.NAME]

    def augreg(self, value):
        tensors = dict(np.load(FIXTURES / "augreg_vit" / "model.npz"))
        kernel = next(name for name in tensors if name.endswith("Dense_0/kernel"))
        # Of the other byte order, as a file from elsewhere may be.
        tensors[kernel] = tensors[kernel].astype(">f4")
        tensors[kernel].reshape(-1)[[3, tensors[kernel].size - 1]] = value
        return tensors

    @pytest.mark.parametrize("kind", ["file", "shards", "npz"])
    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_they_are_refused_with_their_place(self, tmp_path, kind, value):
        path, file = self.written(tmp_path, kind, value)
        name = "Dense_0/kernel" if kind == "npz" else self.NAME
        with pytest.raises(ValueError, match=f"{name} has 2 of [0-9,]+ entries that are") as error:
            models.load(path, heads=3)
        assert str(file) in str(error.value) and str(error.value).count(". ") == 0
        found = models.load(path, heads=3, check_finite=False)
        arrays = [
            x for x in jax.tree.leaves(nnx.state(found)) if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        assert sum(int((~np.isfinite(x)).sum()) for x in arrays) == 2

    @pytest.mark.parametrize("kind", ["file", "shards", "npz"])
    def test_large_and_small_numbers_are_numbers(self, tmp_path, kind):
        for value in (-3.4e38, 1e-45):
            path, _ = self.written(tmp_path, kind, value)
            models.load(path, heads=3)

    def test_what_the_wanted_type_cannot_hold(self, tmp_path):
        path, _ = self.written(tmp_path, "file", 7e4)
        models.load(path, heads=3, param_dtype=jnp.bfloat16)
        with pytest.raises(ValueError, match="2 of .* NaN or infinite in float16"):
            models.load(path, heads=3, param_dtype=jnp.float16)


@pytest.mark.apart
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_a_model_is_not_in_memory_twice_while_it_is_read(tmp_path):
    config = models.LlamaConfig(vocabulary=1000, width=1024, depth=4, heads=8, mlp_width=2816)
    model = models.build(config, rngs=nnx.Rngs(0))
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    models.save(model, tmp_path / "model.safetensors", layout="huggingface")
    code = (
        "import re, sys, jax.numpy as jnp; from lorajax import models\n"
        "def kilobytes(what):\n"
        "    return int(re.search(what + r':\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "models.load('vit-fashion-mnist')  # imports what it needs\n"
        "before = kilobytes('VmRSS')\n"
        "model = models.load(sys.argv[1])\n"
        "print(kilobytes('VmHWM') - before)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # The largest tensor is a twentieth of it.
    grown = 1024 * int(found.splitlines()[-1])
    assert size < grown < 1.5 * size
