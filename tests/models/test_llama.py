"""Llama: the committed files of transformers, positions, what is refused, random shapes."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lorajax import adapters, models
from lorajax.models.llama import places

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
NAMES = ("llama_tied", "llama_scaled")
TOLERANCE = 1e-5

# Parameters by the releases' own counts.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "smollm2-135m": 134_515_008,
}


def load(name, **changes):
    return models.load(FIXTURES / name, **changes)


def batch(name):
    found = np.load(FIXTURES / name / "expected.npz")
    return {k: jnp.asarray(found[k]) for k in ("tokens", "mask")}, found["outputs"]


def call(model, given):
    return nnx.jit(lambda m, given: m(**given))(model, given)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_transformers(name):
    given, expected = batch(name)
    seen = np.asarray(given["mask"]) > 0
    found = np.asarray(call(load(name), given))
    np.testing.assert_allclose(found[seen], expected[seen], rtol=0, atol=TOLERANCE)
    assert np.isfinite(found).all()


def test_every_switch_is_read():
    tied, scaled = load("llama_tied").config, load("llama_scaled").config
    assert (tied.tied, tied.rope, tied.head_width, tied.start) == (True, "default", 4, 1)
    assert (scaled.tied, scaled.rope, scaled.head_width) == (False, "llama3", 6)
    assert (tied.ends, scaled.ends) == ((2,), (2, 3))
    assert (scaled.factor, scaled.low, scaled.high, scaled.original) == (8, 1, 4, 64)
    assert (scaled.theta, scaled.start, scaled.padding) == (300, -1, 0)
    assert scaled.attention_bias and scaled.mlp_bias and scaled.groups == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_keeps_names_and_bytes(name, tmp_path):
    model = load(name)
    after = load_file(models.save(model, tmp_path / "model.safetensors", layout="huggingface"))
    parts = (FIXTURES / name).glob("*.safetensors")
    before = {k: v for part in parts for k, v in load_file(part).items() if "inv_freq" not in k}
    assert before.keys() == after.keys()
    for key, value in after.items():
        np.testing.assert_array_equal(before[key], value)
    assert models.load(tmp_path).config == model.config


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name):
    model = nnx.eval_shape(lambda: models.build(models.config(name), rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type = 'mistral', which is another model"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be 'silu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'; it must be one"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0}},
            "rope_type is 'dynamic'; it must be one of default, linear, llama3",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "there is no 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"head_dim": 8}, "states head_dim = 8, its tensors show 6"),
        ({"num_key_value_heads": 4}, "states num_key_value_heads = 4, its tensors show 2"),
        ({"attention_bias": False}, "states attention_bias = False, its tensors show True"),
        ({"tie_word_embeddings": True}, "states tie_word_embeddings, and lm_head.weight is not"),
    ],
)
def test_what_a_configuration_states_and_the_model_has_not_is_refused(changes, message, tmp_path):
    folder = shutil.copytree(FIXTURES / "llama_scaled", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        models.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight"),
        (lambda t: t.update(extra=t["model.norm.weight"]), "has extra, which this model has no"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(15, np.float32)}),
            "model.norm.weight has shape",
        ),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), "there is no"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, tmp_path):
    folder = shutil.copytree(FIXTURES / "llama_tied", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_a_head_that_is_neither_there_nor_tied_is_refused(tmp_path):
    folder = shutil.copytree(FIXTURES / "llama_tied", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"there is no lm_head.weight, and its config.json does"):
        models.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="does not tell heads"):
        models.load(folder)


def test_places():
    tokens = jnp.zeros((1, 6), jnp.int32)
    mask = jnp.asarray([[0, 0, 1, 1, 1, 0]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0]])
    assert places(tokens).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert places(tokens, mask).tolist() == [[0, 0, 0, 1, 2, 2]]
    assert places(tokens, None, segments).tolist() == [[0, 1, 2, 0, 1, 0]]


def test_packed_and_padded_texts_read_as_if_alone():
    model = load("llama_scaled")
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(3, 40, (1, 9)), jnp.int32)
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    mask = jnp.asarray([[0, 0, 0, 0, 1, 1, 1, 1, 1]], bool)
    run = nnx.jit(lambda m, *given: m(*given[:2], segments=given[2]))
    alone = call(model, {"tokens": tokens[:, 4:]})
    packed = run(model, tokens, None, segments)
    np.testing.assert_allclose(packed[:, 4:], alone, atol=TOLERANCE)
    np.testing.assert_allclose(run(model, tokens, mask, None)[:, 4:], alone, atol=TOLERANCE)
    np.testing.assert_allclose(packed[:, :4], call(model, {"tokens": tokens[:, :4]}), atol=1e-5)
    with pytest.raises(ValueError, match="segments and cache are both given"):
        model(tokens, cache=model.cache(1, 9), segments=segments)


def test_remat_changes_no_gradient_and_half_precision_stays_half():
    model, (given, _) = load("llama_tied"), batch("llama_tied")
    mask = given["mask"][:, :, None].astype(jnp.float32)
    gradient = nnx.jit(nnx.grad(lambda m, given: jnp.square(m(**given) * mask).mean()))
    plain = gradient(model, given)
    model.remat = True
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(gradient(model, given)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    half = load("llama_tied", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    found = call(half, given)
    assert found.dtype == jnp.bfloat16
    seen, expected = np.asarray(given["mask"]) > 0, batch("llama_tied")[1]
    assert np.abs(np.asarray(found, np.float32) - expected)[seen].max() < 0.2


def test_what_makes_no_model():
    for changes, message in (
        ({"rope": "yarn"}, "rope is 'yarn'; it must be one of default, linear, llama3"),
        ({"groups": 7}, "must be a multiple of groups = 7"),
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"head_width": 7}, "head_width is 7; it must be even"),
        ({"theta": -1.0}, "theta is -1.0; it must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            models.config("llama-3-8b", **changes)


# From here on: against transformers itself.


def drawn(seed, library):
    """A random tiny configuration of transformers, with every switch drawn."""
    rng = np.random.default_rng(seed)
    groups, shared = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    theta = float(rng.choice([500.0, 10000.0, 5e5]))
    rope = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        library.LLAMA3 | {"factor": float(rng.choice([8, 32]))},
    ][seed % 3] | {"rope_theta": theta}
    return {
        "num_key_value_heads": groups,
        "num_attention_heads": groups * shared,
        "hidden_size": groups * shared * 2 * int(rng.integers(1, 4)),
        "head_dim": 2 * int(rng.integers(1, 5)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "intermediate_size": int(rng.integers(3, 30)),
        "tie_word_embeddings": bool(rng.integers(2)),
        "attention_bias": bool(rng.integers(2)),
        "mlp_bias": bool(rng.integers(2)),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5])),
        "rope_parameters": rope,
    }


@pytest.mark.formats
@pytest.mark.parametrize("seed", range(6))
def test_logits_loss_and_gradients_of_random_configurations(seed, tmp_path, library):
    theirs = library.llama(seed=seed, **drawn(seed, library))
    theirs.save_pretrained(tmp_path)
    model = models.load(tmp_path)
    tokens, mask, _ = library.texts(seed)
    expected = library.outputs(theirs, tokens, mask)
    weights = np.random.default_rng(seed).standard_normal(expected.shape).astype(np.float32)
    weights *= mask[:, :, None]
    weights /= np.abs(weights).sum()
    loss = (expected.tanh() * library.torch.from_numpy(weights)).sum()
    loss.backward()

    def scored(model):
        logits = model(jnp.asarray(tokens), jnp.asarray(mask))
        return (jnp.tanh(logits) * weights).sum(), logits

    (found, logits), gradient = nnx.jit(nnx.value_and_grad(scored, has_aux=True))(model)
    seen = weights != 0
    wanted = expected.detach().numpy()[seen]
    np.testing.assert_allclose(np.asarray(logits)[seen], wanted, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found, loss.item(), rtol=0, atol=TOLERANCE)
    nnx.update(model, gradient)
    ours = models.tensors(model, "huggingface")
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(
            ours[name], parameter.grad.numpy(), rtol=0, atol=TOLERANCE, err_msg=name
        )


@pytest.mark.formats
@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_positions_of_a_hundred_thousand_tokens(kind, library):
    from transformers.models.llama import modeling_llama

    from lorajax.models.llama.model import frequencies

    scaling = library.LLAMA3 | {"original_max_position_embeddings": 8192}
    rope = (scaling if kind == "llama3" else {"rope_type": kind}) | {"rope_theta": 5e5}
    settings = library.transformers.LlamaConfig(head_dim=128, rope_parameters=rope)
    theirs = modeling_llama.LlamaRotaryEmbedding(settings)
    positions = np.arange(8000, 131072, 1009)
    cosine, sine = theirs(library.torch.zeros(1), library.torch.from_numpy(positions)[None])
    fields = {"factor": 8.0} if kind == "llama3" else {}
    config = models.LlamaConfig(width=256, heads=2, theta=5e5, rope=kind, **fields)
    angles = jnp.asarray(positions, jnp.float32)[:, None] * frequencies(config)[None]
    np.testing.assert_allclose(jnp.cos(angles), cosine[0, :, :64].numpy(), atol=1e-6)
    np.testing.assert_allclose(jnp.sin(angles), sine[0, :, :64].numpy(), atol=1e-6)


@pytest.mark.formats
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_is_written(name, tmp_path, library):
    models.save(load(name), tmp_path / "model.safetensors", layout="huggingface")
    kind = library.transformers.LlamaForCausalLM
    again, told = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    given, expected = batch(name)
    with library.torch.no_grad():
        found = library.outputs(again.eval(), *(np.array(v) for v in given.values())).numpy()
    seen = np.asarray(given["mask"]) > 0
    np.testing.assert_allclose(found[seen], expected[seen], rtol=0, atol=TOLERANCE)


@pytest.mark.formats
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_goes_to_peft_under_the_names_of_the_base(tmp_path, library):
    peft = pytest.importorskip("peft")
    model = load("llama_scaled")
    targets = ["**/query", "**/value", "**/down"]
    adapted = adapters.adapt(model, targets, key=jax.random.key(0), rank=2)
    for layer in adapters.layers(adapted).values():
        b = layer.adapters["default"].b
        b.set_value(0.3 * jax.random.normal(jax.random.key(1), b.shape, b.dtype))
    rules = models.torch_rules(model.config, "huggingface")
    adapters.save_peft(adapted, tmp_path, rules=rules)
    base = library.transformers.LlamaForCausalLM.from_pretrained(FIXTURES / "llama_scaled")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    found = theirs.peft_config["default"].target_modules
    assert "model.layers.0.self_attn.q_proj" in found
    given, _ = batch("llama_scaled")
    with library.torch.no_grad():
        expected = library.outputs(theirs, *(np.array(v) for v in given.values())).numpy()
    seen = np.asarray(given["mask"]) > 0
    np.testing.assert_allclose(
        np.asarray(call(adapted, given))[seen], expected[seen], rtol=0, atol=TOLERANCE
    )
    assert np.abs(np.asarray(call(model, given))[seen] - expected[seen]).max() > 0.01
    again = adapters.load_peft(model, tmp_path, rules=rules)
    np.testing.assert_allclose(call(again, given), call(adapted, given), atol=TOLERANCE)
