"""PEFT's files, both ways, against logits that PEFT computed (tests/formats/make_fixtures.py)."""

import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lorajax import adapters, models
from lorajax.adapters import peft
from lorajax.adapters.peft import writing

FORMATS = pathlib.Path(__file__).resolve().parents[1] / "formats"
sys.path.insert(0, str(FORMATS))

import tiny_models  # noqa: E402

FIXTURES = FORMATS / "fixtures"
READ = sorted(
    (file.parents[1].name, file.parent.name) for file in FIXTURES.glob("*/*/adapter_config.json")
)
WRITTEN = sorted(
    (file.parents[2].name, file.parent.name)
    for file in FIXTURES.glob("*/written/*/adapter_config.json")
)


@pytest.fixture(scope="module")
def bases():
    return {family: tiny_models.load(FIXTURES / family) for family in ("bert", "vit")}


def expected(family, case, folder="."):
    inputs = np.load(FIXTURES / family / "logits.npz")
    return inputs[tiny_models.INPUTS[family]], np.load(FIXTURES / family / folder / "logits.npz")[
        case
    ]


def test_the_fixtures_are_there():
    assert len(READ) >= 13 and len(WRITTEN) >= 13


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_the_base_gives_the_logits_of_transformers(family, bases):
    inputs, want = expected(family, "base")
    np.testing.assert_allclose(tiny_models.logits(bases[family], inputs), want, atol=1e-5)


@pytest.mark.parametrize(("family", "case"), READ)
def test_what_peft_wrote_gives_its_logits(family, case, bases):
    inputs, want = expected(family, case)
    _, base = expected(family, "base")
    adapted = adapters.load_peft(bases[family], FIXTURES / family / case)
    assert float(np.max(np.abs(want - base))) > 1e-3
    np.testing.assert_allclose(tiny_models.logits(adapted, inputs), want, atol=1e-5)
    merged = adapters.remove(adapters.merge(adapted))
    np.testing.assert_allclose(tiny_models.logits(merged, inputs), want, atol=1e-5)


@pytest.mark.parametrize(("family", "case"), WRITTEN)
def test_what_peft_read_gives_its_logits_and_is_written_again(family, case, bases, tmp_path):
    folder = FIXTURES / family / "written" / case
    inputs, want = expected(family, case, "written")
    adapted = adapters.load_peft(bases[family], folder)
    np.testing.assert_allclose(tiny_models.logits(adapted, inputs), want, atol=1e-5)
    adapters.save_peft(adapted, tmp_path)
    ours, theirs = peft.read_peft(tmp_path), peft.read_peft(folder)
    assert ours[0] == theirs[0] and ours[2] == theirs[2]
    assert set(ours[1]) == set(theirs[1])
    for name, tensor in theirs[1].items():
        np.testing.assert_allclose(ours[1][name], tensor, rtol=1e-6, err_msg=name)


def test_an_offset_comes_back_as_an_offset(bases, tmp_path):
    model = adapters.adapt(bases["bert"], "**/query", key=jax.random.key(0), rank=2, start="pissa")
    adapters.save_peft(model, tmp_path)
    again = adapters.load_peft(bases["bert"], tmp_path)
    for path, layer in adapters.layers(model).items():
        one, two = layer.adapters["default"], adapters.layers(again)[path].adapters["default"]
        assert two.rank == 2 and two.scaling == one.scaling
        for a, b in zip((*one.factors, *one.offset), (*two.factors, *two.offset), strict=True):
            np.testing.assert_array_equal(a, b)


def test_names_heads_and_dtypes_travel(bases, tmp_path):
    model = adapters.adapt(bases["bert"], {"**/query": 2}, key=jax.random.key(0), dropout=0.25)
    model.classifier.kernel[...] += 1
    rename = lambda path: "wrapped." + path.replace("/", ".")  # noqa: E731
    adapters.save_peft(
        model, tmp_path, rename=rename, heads=["classifier"], base_model="tiny", task_type="SEQ_CLS"
    )
    config, tensors, _ = peft.read_peft(tmp_path)
    assert config["modules_to_save"] == ["wrapped.classifier"] and config["lora_dropout"] == 0.25
    assert config["base_model_name_or_path"] == "tiny" and config["task_type"] == "SEQ_CLS"
    assert "base_model.model.wrapped.classifier.weight" in tensors
    again = adapters.load_peft(
        bases["bert"], tmp_path, rename=rename, name="new", dtype=jnp.bfloat16
    )
    np.testing.assert_array_equal(again.classifier.kernel[...], model.classifier.kernel[...])
    assert (
        float(jnp.max(jnp.abs(bases["bert"].classifier.kernel[...] - again.classifier.kernel[...])))
        > 0.5
    )
    assert adapters.names(again) == ("new",)
    adapters.save_peft(again, tmp_path, name="new", rename=rename)
    reread, *_ = peft.read_peft(tmp_path)
    assert reread["rank_pattern"] == {}


def test_modules_of_several_kinds_are_saved_in_full(tmp_path):
    """Norms, bare parameters and nested layers come back bit for bit; others are refused."""
    config = models.ViTConfig((8, 8), 4, width=8, depth=1, heads=2, classes=3, channels=1)
    base = models.build(config, rngs=nnx.Rngs(0))
    model = adapters.adapt(base, "**/query", key=jax.random.key(0), rank=2)
    heads = ("head", "embeddings", "norm", "blocks/0/norm1")
    changed = nnx.state(model, adapters.trainable(model, heads=heads))
    nnx.update(model, jax.tree.map(lambda x: x + 1, changed))
    adapters.save_peft(model, tmp_path, heads=heads)
    config, tensors, _ = peft.read_peft(tmp_path)
    assert config["modules_to_save"] == ["head", "embeddings", "norm", "blocks.0.norm1"]
    written = {name.removeprefix("base_model.model.") for name in tensors}
    assert {"embeddings.prefix", "embeddings.patches.weight", "blocks.0.norm1.weight"} < written
    again = adapters.load_peft(base, tmp_path)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1), jnp.float32)
    np.testing.assert_array_equal(again(images), model(images))
    assert float(jnp.abs(again(images) - base(images)).max()) > 0.1
    with pytest.raises(ValueError, match="'blocks/0/attention' to save in full holds Adapted"):
        adapters.save_peft(model, tmp_path, heads=["blocks/0/attention"])


def test_target_modules_never_hit_a_neighbor():
    """A name that is the suffix of another one is written as a whole-name pattern."""

    class Two(nnx.Module):
        def __init__(self):
            self.query = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.inner = tiny_models.Names(query=nnx.Linear(4, 4, rngs=nnx.Rngs(0)))

    assert writing._targets(["query"], ["query", "inner.query"]) == "query"
    assert writing._targets(["query", "inner.query"], ["query", "inner.query"]) == [
        "inner.query",
        "query",
    ]


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (lambda r: nnx.Linear(4, 4, rngs=r), {"kind": "tucker"}, "a Tucker update, for which PEFT"),
        (lambda r: nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=r), {}, "has 2 groups"),
        (lambda r: nnx.Conv(4, 4, (3,), kernel_dilation=2, rngs=r), {}, "is dilated"),
        (lambda r: nnx.Conv(4, 4, (3,), padding="CIRCULAR", rngs=r), {}, "pads as CIRCULAR"),
        (lambda r: nnx.Conv(4, 4, (3,), rngs=r), {"kind": "adalora"}, "no two-dimensional"),
        (lambda r: nnx.Embed(4, 4, rngs=r), {"kind": "adalora"}, "an Embed, which"),
        (
            lambda r: nnx.LinearGeneral(4, (2, 4), rngs=r),
            {"axes": adapters.Axes((0,), (2,))},
            "has 2 slices",
        ),
    ],
)
def test_what_peft_cannot_express_is_refused(layer, options, message, tmp_path):
    model = tiny_models.Names(layer=nnx.eval_shape(lambda: layer(nnx.Rngs(0))))
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        variable.set_value(jnp.ones(variable.shape, variable.dtype))
    adapted = adapters.adapt(model, key=jax.random.key(0, impl="rbg"), rank=2, **options)
    with pytest.raises(
        ValueError, match=f"PEFT cannot express the adapter of 'layer': it .*{message}"
    ):
        adapters.save_peft(adapted, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_mixed_methods_and_missing_names_are_refused(bases, tmp_path):
    targets = {"**/query": {"dora": True}, "**/key": {}}
    mixed = adapters.adapt(bases["bert"], targets, key=jax.random.key(0), rank=2)
    with pytest.raises(ValueError, match="mixes DoRA and LoRA"):
        adapters.save_peft(mixed, tmp_path)
    with pytest.raises(ValueError, match="no adapter 'other' to save"):
        adapters.save_peft(mixed, tmp_path, name="other")
    with pytest.raises(ValueError, match="heads name 'clasifier', which is no plain module"):
        one = adapters.adapt(bases["bert"], "**/query", key=jax.random.key(0), rank=2)
        adapters.save_peft(one, tmp_path, heads=["clasifier"])
    with pytest.raises(ValueError, match="rename gives two layers the name"):
        adapters.save_peft(one, tmp_path, rename=lambda path: "same")


@pytest.fixture
def good(tmp_path):
    target = tmp_path / "adapter"
    shutil.copytree(FIXTURES / "bert" / "lora", target)
    return target


def edit_config(folder, **changes):
    file = folder / peft.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, edit):
    file = folder / peft.WEIGHTS
    tensors = safetensors.numpy.load_file(file)
    edit(tensors)
    safetensors.numpy.save_file(tensors, file)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query."


def rename_keys(old, new):
    def edit(tensors):
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return edit


def cast(dtype):
    def edit(tensors):
        tensors[QUERY + "lora_A.weight"] = tensors[QUERY + "lora_A.weight"].astype(dtype)

    return edit


BAD = {
    "no folder": (lambda f: shutil.rmtree(f), "has no adapter_config.json"),
    "no weights": (lambda f: (f / peft.WEIGHTS).unlink(), "a folder with both files"),
    "a pickle": (
        lambda f: (f / peft.WEIGHTS).rename(f / "adapter_model.bin"),
        "only a pickle, which could run any code",
    ),
    "truncated": (
        lambda f: (f / peft.WEIGHTS).write_bytes((f / peft.WEIGHTS).read_bytes()[:-100]),
        "is not a whole safetensors file",
    ),
    "empty": (lambda f: (f / peft.WEIGHTS).write_bytes(b""), "is not a whole safetensors file"),
    "header that lies": (
        lambda f: (f / peft.WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"),
        "is not a whole safetensors file",
    ),
    "header of another file": (
        lambda f: (f / peft.WEIGHTS).write_bytes((8).to_bytes(8, "little") + b"[1,2,3] "),
        "is not a whole safetensors file",
    ),
    "config cut": (
        lambda f: (f / peft.CONFIG).write_text((f / peft.CONFIG).read_text()[:50]),
        "is not valid JSON",
    ),
    "config deep": (lambda f: (f / peft.CONFIG).write_text("[" * 100_000), "is not valid JSON"),
    "config binary": (lambda f: (f / peft.CONFIG).write_bytes(b"\xff\xfe"), "is not valid JSON"),
    "config a list": (lambda f: (f / peft.CONFIG).write_text("[]"), "it must be a dict"),
    "config huge": (
        lambda f: (f / peft.CONFIG).write_text(" " * (peft.LARGEST_CONFIG + 1)),
        "is larger than",
    ),
    "other method": (lambda f: edit_config(f, peft_type="LOHA"), "peft_type is 'LOHA'"),
    "foreign option": (lambda f: edit_config(f, lora_bias=True), "uses PEFT's lora_bias"),
    "biases": (lambda f: edit_config(f, bias="all"), "trains biases"),
    "alpha": (lambda f: edit_config(f, lora_alpha="16"), "lora_alpha in the configuration"),
    "rank": (lambda f: edit_config(f, r=5), "has rank 4; the configuration says 5"),
    "dropout": (lambda f: edit_config(f, lora_dropout=2), "lora_dropout in the configuration"),
    "pattern": (lambda f: edit_config(f, rank_pattern=[]), None),
    "pattern type": (lambda f: edit_config(f, rank_pattern=[1]), "rank_pattern in the conf"),
    "pattern regex": (lambda f: edit_config(f, rank_pattern={"(": 1}), "not a regular expr"),
    "pattern bomb": (lambda f: edit_config(f, alpha_pattern={"(a+)+": 1}), "too complex"),
    "dora": (lambda f: edit_config(f, use_dora=True), "lacks lora_magnitude_vector"),
    "converted": (lambda f: edit_config(f, init_lora_weights="corda"), "started with 'corda'"),
    "saved list": (lambda f: edit_config(f, modules_to_save="x"), "is not a list of names"),
    "nan": (
        lambda f: edit_tensors(f, lambda t: t[QUERY + "lora_A.weight"].fill(np.nan)),
        "64 of 64 entries that are NaN or infinite",
    ),
    "integers": (lambda f: edit_tensors(f, cast(np.int8)), "weights must be floating point"),
    "prefix": (
        lambda f: edit_tensors(f, rename_keys("base_model.model.", "")),
        "names of PEFT begin with",
    ),
    "other model": (
        lambda f: edit_tensors(f, rename_keys("self.query", "self.q")),
        "is of another model: it has a layer .*near misses: 'bert.encoder.layer.0.attention.self.q",
    ),
    "stranger": (
        lambda f: edit_tensors(f, lambda t: t.update({QUERY + "weight": np.ones(3)})),
        "belongs to no LoRA adapter",
    ),
    "lonely factor": (
        lambda f: edit_tensors(f, lambda t: t.pop(QUERY + "lora_B.weight")),
        "lacks lora_B",
    ),
    "shape": (
        lambda f: edit_tensors(
            f, lambda t: t.update({QUERY + "lora_A.weight": np.ones((4, 15), np.float32)})
        ),
        "lora_A of shape \\(4, 15\\); here it must be \\(4, 16\\)",
    ),
    "scalar": (
        lambda f: edit_tensors(
            f, lambda t: t.update({QUERY + "lora_A.weight": np.zeros((), np.float32)})
        ),
        "lora_A of shape",
    ),
    "nothing": (lambda f: edit_tensors(f, lambda t: t.clear()), "holds no LoRA factors"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_files_get_one_sentence(case, good, bases):
    spoil, message = BAD[case]
    spoil(good)
    if message is None:
        adapters.load_peft(bases["bert"], good)
        return
    with pytest.raises(ValueError, match=message) as caught:
        adapters.load_peft(bases["bert"], good)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_taken(good, bases):
    one = adapters.load_peft(bases["bert"], good)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        adapters.load_peft(one, good)


def test_random_bytes_never_do_more_than_raise(good, bases):
    draw = np.random.default_rng(0)
    data = bytearray((good / peft.WEIGHTS).read_bytes())
    for _ in range(60):
        spoiled = bytearray(data)
        for at in draw.integers(0, 600, 4):
            spoiled[at] = draw.integers(256)
        (good / peft.WEIGHTS).write_bytes(bytes(spoiled))
        try:
            peft.read_peft(good)
        except ValueError as error:
            assert "\n" not in str(error)


def test_checkpoints_hold_the_full_state(bases, tmp_path):
    options = {"rank": 2, "start": "pissa", "dropout": 0.1}
    model = adapters.adapt(bases["bert"], "**/query", key=jax.random.key(0), **options)
    adapters.save_checkpoint(model, tmp_path / "state")
    other = adapters.adapt(bases["bert"], "**/query", key=jax.random.key(1), **options)
    other.classifier.kernel[...] += 1
    adapters.layers(other)["bert/encoder/layer/0/attention/self/query"].adapters["default"].a[
        ...
    ] += 1
    adapters.load_checkpoint(other, tmp_path / "state")

    def leaves(model):
        every = jax.tree.leaves(nnx.state(model))
        keys = [jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in every]
        assert any(keys)
        return [jax.random.key_data(x) if k else x for x, k in zip(every, keys, strict=True)]

    for x, y in zip(leaves(model), leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="exists already"):
        adapters.save_checkpoint(model, tmp_path / "state")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        adapters.load_checkpoint(model, tmp_path / "nothing")
    larger = adapters.adapt(bases["bert"], "**/query", key=jax.random.key(0), rank=3)
    with pytest.raises(ValueError, match="is no checkpoint of this model"):
        adapters.load_checkpoint(larger, tmp_path / "state")
