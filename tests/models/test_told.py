"""What no tensor shows: read from the files beside the weights, asked for by name, or refused."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lorajax import models
from tests.models.test_checkpoints import FIXTURES, run

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


def beside(name, folder, **files):
    """A copy of a fixture's weights with JSON files beside it; returns the folder."""
    shutil.copy(FIXTURES / name / "model.safetensors", folder)
    if (FIXTURES / name / "config.json").exists():
        shutil.copy(FIXTURES / name / "config.json", folder)
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


def check_logits(name, model):
    expected = np.load(FIXTURES / name / "expected.npz")
    logits = run(model, jnp.asarray(expected["images"]))
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=1e-5)


def timm(architecture="vit_tiny_patch16_224", pool="token", **arguments):
    arguments = {"embed_dim": 24, "depth": 2, "img_size": [16, 16], "patch_size": 4} | arguments
    return {"architecture": architecture, "global_pool": pool, "model_args": arguments}


class TestTimm:
    """The config.json of timm: its architecture, model_args, global_pool and pretrained_cfg."""

    @pytest.mark.parametrize(
        "config",
        [
            timm(),  # the architecture's own three heads, whatever the width
            timm("vit_base_patch16_224", num_heads=3),
            timm(num_heads=3, act_layer="gelu", class_token=True, reg_tokens=0, init_values=None),
        ],
    )
    def test_heads(self, config, tmp_path):
        model = models.load(beside("timm_vit", tmp_path, config=config))
        assert (model.config.heads, model.config.gelu, model.config.pool) == (3, "erf", "cls")
        check_logits("timm_vit", model)

    def test_pooling_and_activation(self, tmp_path):
        config = timm(pool="avg", act_layer="gelu_tanh", num_heads=3)
        model = models.load(beside("timm_vit_mean", tmp_path, config=config))
        assert (model.config.pool, model.config.gelu) == ("mean", "tanh")
        del config["model_args"]["act_layer"]
        check_logits("timm_vit_mean", models.load(beside("timm_vit_mean", tmp_path, config=config)))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"pool": "avg"}, "global_pool is 'avg' without fc_norm"),
            ({"pool": "map"}, "global_pool is 'map'"),
            ({"pool": "max"}, "global_pool is 'max'"),
            ({"act_layer": "silu"}, "act_layer is 'silu'; it must be one of gelu"),
            ({"act_layer": "relu"}, "act_layer is 'relu'"),
            ({"norm_layer": "rmsnorm"}, "states norm_layer = 'rmsnorm'"),
            ({"class_token": False}, "states class_token = False, its tensors show True"),
            ({"no_embed_class": True}, r"images of \(16, 16\), its tensors show 17 patches"),
            ({"reg_tokens": 4}, "states reg_tokens = 4, its tensors show 0"),
            ({"pre_norm": True}, "states pre_norm = True, its tensors show False"),
            ({"qk_norm": True}, "states qk_norm = True"),
            ({"init_values": 1e-5}, "states init_values = 1e-05, its tensors show no layer"),
            ({"dynamic_img_size": True}, "states dynamic_img_size = True"),
            ({"pool_include_prefix": True}, "states pool_include_prefix = True"),
            ({"mlp_layer": "swiglu"}, "states mlp_layer = 'swiglu'"),
            ({"a_setting_of_tomorrow": 1}, "states a_setting_of_tomorrow = 1"),
            ({"depth": 3}, "states depth = 3, its tensors show 2"),
            ({"embed_dim": 48}, "states embed_dim = 48, its tensors show 24"),
            ({"patch_size": 8}, "states patch_size = 8, its tensors show 4"),
            ({"num_classes": 6}, "states num_classes = 6, its tensors show 5"),
            ({"img_size": 24}, r"states images of \(24, 24\), its tensors show 16 patches"),
            ({"architecture": "deit_base_distilled_patch16_224"}, "states distilled = True"),
        ],
    )
    def test_what_a_vit_has_no_place_for(self, change, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            models.load(beside("timm_vit", tmp_path, config=timm(**change)))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("reg_token", "cannot be read as one"),
            ("norm_pre.weight", "does not tell gelu, epsilon"),
            ("blocks.0.ls1.gamma", "lacks blocks.0.ls2.gamma"),
            ("blocks.0.attn.q_norm.weight", "has norms of queries and keys"),
            ("attn_pool.latent", "lacks attn_pool"),
            (None, "does not tell image_size, gelu, epsilon"),
        ],
    )
    def test_parts_that_a_vit_has_no_place_for(self, name, message, tmp_path):
        tensors = load_file(FIXTURES / "timm_vit" / "model.safetensors")
        if name:
            tensors[name] = np.ones(24, np.float32)
        else:
            del tensors["cls_token"]
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            models.load(tmp_path, heads=3)

    def test_an_unknown_architecture_tells_nothing(self, tmp_path):
        folder = beside("timm_vit", tmp_path, config=timm("vit_base_patch16_xp_224"))
        message = r"does not tell heads, gelu, epsilon .*heads=…, gelu=…, epsilon=…\)"
        with pytest.raises(ValueError, match=message):
            models.load(folder)
        check_logits("timm_vit", models.load(folder, heads=3, gelu="erf", epsilon=1e-6))

    def test_a_width_that_is_not_the_architectures(self, tmp_path):
        config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5}
        folder = beside("timm_vit", tmp_path, config=config)
        with pytest.raises(ValueError, match="does not tell heads .*width is 24"):
            models.load(folder)
        check_logits("timm_vit", models.load(folder, heads=3))

    def test_a_bare_file_of_another_width_does_not_tell_its_heads(self):
        with pytest.raises(ValueError, match=r"does not tell heads .*give models\.load"):
            models.load(FIXTURES / "timm_vit")

    def test_images_that_are_no_square(self, tmp_path):
        tensors = load_file(FIXTURES / "timm_vit" / "model.safetensors")
        # 4 × 4 positions read as 2 × 8: what is stated counts, and not the square root.
        model = models.load(beside("timm_vit", tmp_path, config=timm(img_size=[8, 32])))
        assert model.config.image_size == (8, 32)
        tensors["pos_embed"] = tensors["pos_embed"][:, :13]  # 12 patches
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").unlink()
        with pytest.raises(ValueError, match="does not tell image_size .*no square grid"):
            models.load(tmp_path, heads=3)
        told = models.load(tmp_path, heads=3, image_size=(12, 16))
        np.testing.assert_array_equal(told.embeddings.positions[...], tensors["pos_embed"])

    def test_statistics(self, tmp_path):
        config = timm() | {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": 0.25}}
        loaded = models.load(beside("timm_vit", tmp_path, config=config)).config
        assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.25,))

    def test_an_export_states_all_of_it(self, tmp_path):
        changes = {"heads": 3, "gelu": "tanh", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        for name in ("timm_vit", "timm_vit_mean", "timm_deit_distilled"):
            model = models.load(FIXTURES / name, **changes)
            models.save(model, tmp_path / "model.safetensors", layout="timm")
            assert models.load(tmp_path).config == model.config
        with pytest.raises(ValueError, match="epsilon = 1e-06, and not 1e-12"):
            models.save(models.load(FIXTURES / "huggingface_vit"), tmp_path / "m", layout="timm")


class TestResNet:
    """timm's ResNets have torchvision's names, and variants of which no tensor tells."""

    @pytest.mark.parametrize("architecture", ["resnet50", "tv_resnet34", "gluon_resnet101_v1b"])
    def test_the_plain_ones_are_torchvisions(self, architecture, tmp_path):
        config = {"architecture": architecture, "global_pool": "avg", "num_classes": 5}
        check_logits("resnet_basic", models.load(beside("resnet_basic", tmp_path, config=config)))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"architecture": "resnetaa50"}, "architecture is 'resnetaa50'"),
            ({"architecture": "resnetblur50"}, "architecture is 'resnetblur50'"),
            ({"architecture": "seresnet50"}, "architecture is 'seresnet50'"),
            ({"architecture": "resnet50", "global_pool": "max"}, "global_pool = 'max'"),
            ({"model_args": {"output_stride": 8}}, "output_stride = 8"),
            ({"model_args": {"act_layer": "silu"}}, "act_layer = 'silu'"),
            ({"model_args": {"aa_layer": "avg"}}, "aa_layer = 'avg'"),
            ({"num_classes": 7}, "num_classes = 7, its tensors show 5"),
        ],
    )
    def test_the_others_are_refused(self, config, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            models.load(beside("resnet_basic", tmp_path, config=config))

    def test_statistics_of_a_processor(self, tmp_path):
        processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
        folder = beside("vgg", tmp_path, preprocessor_config=processor)
        assert models.load(folder).config.std == (0.4, 0.5, 0.6)


class TestHuggingFace:
    """config.json and preprocessor_config.json of transformers."""

    def changed(self, folder, **changes):
        config = json.loads((FIXTURES / "huggingface_vit" / "config.json").read_text())
        config = {k: v for k, v in (config | changes).items() if v != "left out"}
        return beside("huggingface_vit", folder, config=config)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model_type": "vit_mae"}, "model_type = 'vit_mae', which is another model"),
            ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
            ({"hidden_size": 48}, "hidden_size = 48, its tensors show 24"),
            ({"num_hidden_layers": 3}, "num_hidden_layers = 3"),
            ({"intermediate_size": 96}, "intermediate_size = 96"),
            ({"patch_size": 8}, "patch_size = 8"),
            ({"num_channels": 1}, "num_channels = 1"),
            ({"image_size": 32}, r"states images of \(32, 32\)"),
            ({"id2label": {"0": "cat"}}, "id2label = 1, its tensors show 5"),
            ({"num_attention_heads": 5}, "must be a multiple of heads = 5"),
            ({"num_attention_heads": "3"}, "heads is '3'|num_attention_heads|type"),
        ],
    )
    def test_contradictions(self, change, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            models.load(self.changed(tmp_path, **change))

    def test_what_is_left_out_has_the_librarys_own_default(self, tmp_path):
        config = models.load(self.changed(tmp_path, layer_norm_eps="left out")).config
        assert config.epsilon == 1e-12
        folder = self.changed(tmp_path, num_attention_heads="left out")
        assert models.load(folder).config.heads == 12

    def test_without_configuration_the_caller_is_asked(self, tmp_path):
        shutil.copy(FIXTURES / "huggingface_vit" / "model.safetensors", tmp_path)
        with pytest.raises(ValueError, match="does not tell heads, gelu, epsilon"):
            models.load(tmp_path)
        told = models.load(tmp_path, heads=3, gelu="erf", epsilon=1e-12)
        check_logits("huggingface_vit", told)

    # Each processor, and its own arithmetic on bytes.
    PROCESSORS = {
        "nothing said": ({}, lambda x: (x / 255 - 0.5) / 0.5),
        "no normalization": ({"do_normalize": False}, lambda x: x / 255),
        "another factor": ({"rescale_factor": 1 / 127.5}, lambda x: (x / 127.5 - 0.5) / 0.5),
        "bytes": (
            {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [63.75] * 3},
            lambda x: (x - 127.5) / 63.75,
        ),
        "bytes by default": ({"do_rescale": False}, lambda x: (x - 0.5) / 0.5),
        "neither": ({"do_rescale": False, "do_normalize": False}, lambda x: x),
        "scalars": ({"image_mean": 0.5, "image_std": 0.25}, lambda x: (x / 255 - 0.5) / 0.25),
        "channels": (
            {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
            lambda x: (x / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.4, 0.5, 0.6]),
        ),
    }

    @pytest.mark.parametrize("name", PROCESSORS)
    def test_images_are_scaled_as_the_processor_does(self, name, tmp_path):
        processor, expected = self.PROCESSORS[name]
        processor = {"image_processor_type": "ViTImageProcessor", **processor}
        folder = beside("huggingface_vit", tmp_path, preprocessor_config=processor)
        config = models.load(folder).config
        found = models.normalize(IMAGES, config.mean, config.std)
        np.testing.assert_allclose(found, expected(IMAGES.astype(np.float64)), rtol=1e-6, atol=1e-5)

    @pytest.mark.parametrize(
        ("processor", "message"),
        [
            ({"image_mean": None, "image_std": None}, "does not tell mean, std"),
            ({"image_mean": None}, "does not tell mean .*normalizes without image_mean"),
            ({"image_processor_type": "BitImageProcessor"}, "does not tell mean, std"),
            ({"image_mean": "0.5"}, "mean is '0.5'; it must be a number or a list"),
            ({"image_mean": []}, "must be a number or a list"),
            ({"image_std": [0.5, 0.0, 0.5]}, "every entry must be positive"),
            ({"image_mean": [0.5, 0.5, 0.5, 0.4]}, "must have 1 entry or 3"),
            ({"rescale_factor": 0}, "rescale_factor is 0.0; it must be positive"),
            ({"do_flip_channel_order": True}, "has do_flip_channel_order"),
            ({"rescale_offset": True}, "has rescale_offset"),
            ({"do_resize": True, "size": {"height": 32, "width": 32}}, r"size = \(32, 32\)"),
            ({"do_center_crop": True, "crop_size": 8, "size": 16}, r"size = \(8, 8\)"),
        ],
    )
    def test_processors_that_cannot_be_followed(self, processor, message, tmp_path):
        full = {"image_processor_type": "ViTImageProcessor"} | processor
        folder = beside("huggingface_vit", tmp_path, preprocessor_config=full)
        with pytest.raises(ValueError, match=message):
            models.load(folder)

    def test_the_caller_may_tell_what_a_processor_leaves_out(self, tmp_path):
        processor = {"image_mean": None, "image_std": None}
        folder = beside("huggingface_vit", tmp_path, preprocessor_config=processor)
        config = models.load(folder, mean=(0.4,), std=(0.2,)).config
        assert (config.mean, config.std) == ((0.4,), (0.2,))

    def test_an_export_states_its_scaling(self, tmp_path):
        model = models.load(FIXTURES / "huggingface_vit", mean=(0.1, 0.2, 0.3), std=(0.4,))
        models.save(model, tmp_path / "model.safetensors", layout="huggingface")
        assert models.load(tmp_path).config == model.config


class TestConfigurationAlone:
    """A plan needs no weights: a folder with config.json has the shapes of the whole checkpoint.

    Only whether a BERT's pooler was trained, its tensors tell alone.
    """

    @pytest.mark.parametrize(
        "name",
        [
            "bert_classes",
            "roberta_regression",
            "roberta_words",
            "llama_tied",
            "llama_scaled",
        ],
    )
    def test_it_is_the_model_of_the_checkpoint(self, name, tmp_path):
        shutil.copy(FIXTURES / name / "config.json", tmp_path)
        # What other files show: a trained pooler, tokens that end a text.
        pool = {"pool": "cls"} if name == "bert_words" else {}
        given, whole = models.abstract(tmp_path, **pool), models.abstract(FIXTURES / name)
        ends = {"ends": whole.config.ends} if hasattr(whole.config, "ends") else {}
        assert dataclasses.replace(given.config, **ends) == whole.config
        assert nnx.state(given) == nnx.state(whole)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"model_type": "gpt2"}, "has no weights, and its config.json states .*'gpt2'"),
            ({"model_type": "llama"}, "states vocab_size = None; it must lie in 1"),
            (
                {
                    "model_type": "llama",
                    **{"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8},
                    **{"num_attention_heads": 2, "num_hidden_layers": 10**9},
                },
                "states num_hidden_layers = 1000000000; it must lie in 1",
            ),
        ],
    )
    def test_refusals(self, config, message, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            models.abstract(tmp_path)
