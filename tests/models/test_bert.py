"""BERT and RoBERTa: the committed files of transformers, what is refused, random shapes."""

import dataclasses
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

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
NAMES = ("bert_classes", "bert_encoder", "bert_words", "roberta_regression", "roberta_words")
TOLERANCE = 1e-5

# Parameters of BertModel and RobertaModel (transformers' documentation of the checkpoints).
PARAMETERS = {"bert-base-uncased": 109_482_240, "roberta-base": 124_055_040}


def load(name, **changes):
    given = {"pool": "mean"} if name == "bert_encoder" else {}
    return models.load(FIXTURES / name, **given | changes)


def batch(name):
    found = np.load(FIXTURES / name / "expected.npz")
    keys = [key for key in ("tokens", "mask", "types") if key in found]
    return {key: jnp.asarray(found[key]) for key in keys}, found["outputs"]


def call(model, given):
    return nnx.jit(lambda m, given: m(**given))(model, given)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_transformers(name):
    model, (given, expected) = load(name), batch(name)
    if model.config.head == "none":
        found = nnx.jit(lambda m, given: m.encode(**given))(model, given)
    else:
        found = call(model, given)
    if expected.ndim == 3:
        seen = np.asarray(given["mask"]) > 0
        found, expected = np.asarray(found)[seen], expected[seen]
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_keeps_names_and_bytes(name, tmp_path):
    pool = "cls" if name == "bert_encoder" else {}
    model = load(name, **({"pool": pool} if pool else {}))
    path = models.save(model, tmp_path / "model.safetensors", layout="huggingface")
    before, after = load_file(FIXTURES / name / "model.safetensors"), load_file(path)
    if name == "bert_words":  # the file has the names of 2018, and more than one head
        before = {
            k.replace(".gamma", ".weight").replace(".beta", ".bias"): v
            for k, v in before.items()
            if "seq_relationship" not in k and "position_ids" not in k
        }
    repeated = {"cls.predictions.decoder.weight", "lm_head.bias"}
    assert before.keys() - repeated == after.keys()
    for key, value in after.items():
        np.testing.assert_array_equal(before[key], value)
    again = models.load(tmp_path, **({"pool": pool} if pool else {}))
    pool = again.config.pool  # the second head, which showed that the pooler was trained, is gone
    assert pool == ("mean" if name == "bert_words" else model.config.pool)
    assert dataclasses.replace(again.config, pool=model.config.pool) == model.config


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name):
    head = "none"
    pool = {"pool": "cls"} if name.startswith("bert") else {}
    config = models.config(name, head=head, **pool)
    model = nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]


def edited(name, tmp_path, **changes):
    """A copy of a fixture whose config.json states something else; None takes a key out."""
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "electra"}, "model_type = 'electra', which is another model"),
        ({"hidden_act": "swish"}, "hidden_act is 'swish'; it must be one of gelu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"hidden_size": 32}, "states hidden_size = 32, its tensors show 16"),
        ({"num_attention_heads": 3}, "width is 16; it must be a multiple of heads = 3"),
        ({"pad_token_id": 99}, "padding is 99"),
    ],
)
def test_what_a_configuration_states_and_the_model_has_not_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        models.load(edited("bert_classes", tmp_path, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("classifier.bias"), None),
        (lambda t: t.pop("bert.pooler.dense.bias"), "lacks pooler.dense.bias"),
        (lambda t: t.update(extra=t["classifier.bias"]), "has extra, which this model has no"),
        (
            lambda t: t.update({"embeddings.LayerNorm.bias": t["classifier.bias"]}),
            "embeddings.LayerNorm.bias are two spellings of one",
        ),
        (
            lambda t: t.update({"bert.pooler.dense.weight": np.zeros((16, 15), np.float32)}),
            "pooler.dense.weight has shape",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, tmp_path):
    folder = shutil.copytree(FIXTURES / "bert_classes", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    message = message or "has no classification head"
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_tied_words_that_differ_are_refused(tmp_path):
    folder = shutil.copytree(FIXTURES / "bert_words", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["cls.predictions.decoder.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="states tie_word_embeddings, and cls.predictions.decoder"):
        models.load(folder)


def test_a_pooler_that_may_never_have_been_trained_is_not_used_silently():
    with pytest.raises(ValueError, match=r"does not tell pool \(it is an encoder without a head"):
        models.load(FIXTURES / "bert_encoder")
    model = load("bert_encoder", classes=5)
    assert (model.config.head, model.config.pool, model.pooler) == ("classes", "mean", None)
    assert model.head.kernel.shape == (16, 5)
    with pytest.raises(ValueError, match="the head of bert has no pool = 'mean'"):
        models.tensors(model, "huggingface")


def test_other_heads_on_the_files_of_masked_words():
    bert, roberta = load("bert_words", classes=2), load("roberta_words", classes=4)
    assert bert.config.pool == "cls" and bert.heads == ("head",)
    np.testing.assert_array_equal(bert.pooler.kernel[...], np.eye(16))
    assert roberta.config.pool == "first" and roberta.head.out.kernel.shape == (16, 4)
    assert load("roberta_words").heads == ()
    given, _ = batch("roberta_words")
    assert call(roberta, given).shape == (3, 4)


def test_a_file_without_configuration_is_asked_for_its_heads(tmp_path):
    shutil.copy(FIXTURES / "roberta_regression" / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="does not tell heads, gelu, epsilon"):
        models.load(tmp_path)
    model = models.load(tmp_path, heads=2, gelu="erf", epsilon=1e-5)
    assert model.config == load("roberta_regression").config


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_pooling_sees_only_the_unmasked_and_no_row_is_a_nan(pool):
    model = load("bert_encoder", pool=pool, classes=2)
    tokens = jnp.asarray([[3, 4, 5, 6, 7]] * 3, jnp.int32)
    mask = jnp.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    other = tokens.at[0, 3:].set(9)

    @nnx.jit
    def run(model, tokens, mask):
        return nnx.value_and_grad(lambda m: jnp.square(m(tokens, mask)).sum())(model)

    (value, gradient), (again, _) = run(model, tokens, mask), run(model, other, mask)
    np.testing.assert_allclose(value, again, rtol=1e-6)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    pooled = nnx.jit(lambda m, *given: m.pooled(*given))
    short = pooled(model, tokens[:1, :3])
    np.testing.assert_allclose(pooled(model, tokens, mask)[:1], short, atol=1e-6)


def test_remat_changes_no_gradient_and_dtype_and_dropout_do_what_they_say():
    name = "roberta_regression"
    model, (given, expected) = load(name, dropout=0.5), batch(name)
    gradient = nnx.jit(nnx.grad(lambda m, given: jnp.square(m(**given)).sum()))
    plain = gradient(model, given)
    model.remat = True
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(gradient(model, given)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    model.train()
    run = nnx.jit(lambda m, given: m(**given))
    assert not np.array_equal(run(model, given), run(model, given))
    found = call(load(name, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), given)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.1)


def test_what_makes_no_model():
    for changes, message in (
        ({"pool": "max"}, "pool is 'max'; it must be one of cls, first, mean"),
        ({"heads": 7}, "must be a multiple of heads = 7"),
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"style": "roberta", "context": 1}, "has no position for a token"),
    ):
        with pytest.raises(ValueError, match=message):
            models.config("bert-base-uncased", **changes)
    model = load("bert_classes")
    with pytest.raises(ValueError, match="has positions for 16 tokens"):
        model(jnp.ones((1, 17), jnp.int32))


def test_adapters_are_named_as_torch_names_the_modules():
    model = load("bert_classes")
    adapted = adapters.adapt(model, ["**/query", "**/value"], key=jax.random.key(0), rank=2)
    assert len(adapters.layers(adapted)) == 4
    rules = {rule.ours[0]: rule.theirs for rule in models.torch_rules(model.config, "huggingface")}
    start = "bert.encoder.layer.0.attention.self.query.weight"
    assert rules["blocks.0.attention.query.kernel"] == (start,)
    bare = models.torch_rules(load("bert_encoder").config, "huggingface")
    assert start.removeprefix("bert.") in [name for rule in bare for name in rule.theirs]


# From here on: against transformers itself.


def drawn(seed):
    """A random tiny configuration of transformers, with every switch drawn."""
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 4))
    style, head = [("Bert", "Roberta"), ("ForSequenceClassification", "ForMaskedLM")]
    config = {
        "style": style[seed % 2],
        "head": head[seed // 2 % 2],
        "hidden_size": heads * int(rng.integers(2, 7)),
        "num_attention_heads": heads,
        "num_hidden_layers": int(rng.integers(1, 4)),
        "intermediate_size": int(rng.integers(3, 30)),
        "type_vocab_size": int(rng.integers(1, 4)) if seed % 2 == 0 else 1,
        "hidden_act": str(rng.choice(["gelu", "gelu_new", "gelu_pytorch_tanh"])),
        "layer_norm_eps": float(rng.choice([1e-12, 1e-5])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "pad_token_id": int(rng.integers(0, 3)),
    }
    if config["head"] == "ForSequenceClassification":
        config["num_labels"] = int(rng.integers(1, 5))
    return config


def padded(name, settings):
    roberta = settings["style"] == "Roberta" and "position_embeddings" in name
    return roberta or "word_embeddings" in name


@pytest.mark.formats
@pytest.mark.parametrize("seed", range(8))
def test_logits_loss_and_gradients_of_random_configurations(seed, tmp_path, library):
    settings = drawn(seed)
    theirs = library.bert(seed=seed, **settings)
    theirs.save_pretrained(tmp_path)
    model = models.load(tmp_path)
    tokens, mask, types = library.texts(seed, padding=settings["pad_token_id"])
    types = types % settings["type_vocab_size"]
    expected = library.outputs(theirs, tokens, mask, types)
    # A loss with different weights for all outputs that mean something.
    weights = np.random.default_rng(seed).standard_normal(expected.shape).astype(np.float32)
    weights *= mask[:, :, None] if weights.ndim == 3 else 1
    weights /= np.abs(weights).sum()
    loss = (expected.tanh() * library.torch.from_numpy(weights)).sum()
    loss.backward()

    def scored(model):
        logits = model(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(types))
        return (jnp.tanh(logits) * weights).sum(), logits

    (found, logits), gradient = nnx.jit(nnx.value_and_grad(scored, has_aux=True))(model)
    seen = weights != 0
    theirs_seen = expected.detach().numpy()[seen]
    np.testing.assert_allclose(np.asarray(logits)[seen], theirs_seen, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found, loss.item(), rtol=0, atol=TOLERANCE)
    nnx.update(model, gradient)
    ours = models.tensors(model, "huggingface")
    for name, parameter in theirs.named_parameters():
        if name in ours:
            wanted, got = parameter.grad.numpy().copy(), ours[name].copy()
            if padded(name, settings):  # torch gives padding no gradient
                wanted[settings["pad_token_id"]] = got[settings["pad_token_id"]] = 0
            np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE, err_msg=name)


@pytest.mark.formats
@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_is_written(name, tmp_path, library):
    model = load(name, **({"pool": "cls"} if name == "bert_encoder" else {}))
    models.save(model, tmp_path / "model.safetensors", layout="huggingface")
    kind = getattr(
        library.transformers, json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    )
    given, expected = batch(name)
    again, told = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert told["missing_keys"] <= {"lm_head.bias"} and not told["mismatched_keys"]
    with library.torch.no_grad():
        found = library.outputs(again.eval(), *(np.array(value) for value in given.values()))
    seen = np.asarray(given["mask"]) > 0 if expected.ndim == 3 else slice(None)
    np.testing.assert_allclose(found.numpy()[seen], expected[seen], rtol=0, atol=TOLERANCE)


@pytest.mark.formats
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["bert_classes", "bert_encoder", "roberta_words"])
def test_an_adapter_goes_to_peft_under_the_names_of_the_base(name, tmp_path, library):
    peft = pytest.importorskip("peft")
    model = load(name)
    adapted = adapters.adapt(model, ["**/query", "**/value"], key=jax.random.key(0), rank=2)
    for layer in adapters.layers(adapted).values():
        b = layer.adapters["default"].b
        b.set_value(0.3 * jax.random.normal(jax.random.key(1), b.shape, b.dtype))
    rules = models.torch_rules(model.config, "huggingface")
    adapters.save_peft(adapted, tmp_path, rules=rules)
    kind = json.loads((FIXTURES / name / "config.json").read_text())["architectures"][0]
    base = getattr(library.transformers, kind).from_pretrained(FIXTURES / name)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    targets = theirs.peft_config["default"].target_modules
    assert any(target.endswith("encoder.layer.0.attention.self.query") for target in targets)
    given, _ = batch(name)
    with library.torch.no_grad():
        expected = library.outputs(theirs, *(np.array(v) for v in given.values())).numpy()
    run = (lambda m, g: m.encode(**g)) if name == "bert_encoder" else (lambda m, g: m(**g))
    found, base_found = nnx.jit(run)(adapted, given), nnx.jit(run)(model, given)
    seen = np.asarray(given["mask"]) > 0 if expected.ndim == 3 else slice(None)
    np.testing.assert_allclose(np.asarray(found)[seen], expected[seen], rtol=0, atol=TOLERANCE)
    assert np.abs(np.asarray(base_found)[seen] - expected[seen]).max() > 0.01


# The real MiniLM.

# Tests compile without optimizations; what runs for seconds is better off with them.
OPTIMIZED = {"xla_backend_optimization_level": 3} if jax.default_backend() == "cpu" else None


def sentences(data_dir, part):
    lines = (data_dir / "glue" / part).read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    return rows[0], rows[1:]


@pytest.mark.slow
def test_minilm_scores_sentences_as_published(data_dir):
    tokenizers = pytest.importorskip("tokenizers")
    header, rows = sentences(data_dir, "stsb_test.tsv")
    tokenizer = tokenizers.Tokenizer.from_file(str(data_dir / "minilm-l6" / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding(length=128)
    model = models.load(data_dir / "minilm-l6", pool="mean")
    graph, state = nnx.split(model)
    run = jax.jit(
        lambda state, tokens, mask: nnx.merge(graph, state)(tokens, mask),
        compiler_options=OPTIMIZED,
    )
    texts = [row[column] for column in (-3, -2) for row in rows]
    found = tokenizer.encode_batch(texts)
    lengths = np.asarray([sum(each.attention_mask) for each in found])
    order = np.argsort(lengths, kind="stable")
    vectors = np.zeros((len(texts), model.config.width), np.float32)
    for start in range(0, len(texts), 64):
        chosen = order[start : start + 64]
        length = -(-lengths[chosen].max() // 16) * 16
        filled = [found[i] for i in chosen] + [found[0]] * (64 - len(chosen))
        tokens = jnp.asarray([each.ids[:length] for each in filled], jnp.int32)
        mask = jnp.asarray([each.attention_mask[:length] for each in filled], jnp.int32)
        vectors[chosen] = np.asarray(run(state, tokens, mask))[: len(chosen)]
    vectors = vectors.reshape(2, len(rows), -1)
    first, second = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    cosine = (first * second).sum(1)
    from scipy import stats

    found = stats.spearmanr(cosine, [float(row[-1]) for row in rows]).statistic
    print(f"STS-B test Spearman {found:.4f}")
    assert found == pytest.approx(0.820, abs=1e-3)


def test_what_it_takes_follows_its_head():
    shape = {"vocabulary": 20, "width": 8, "depth": 1, "heads": 2}
    found = {
        head: models.Bert(models.BertConfig(**shape, head=head), rngs=nnx.Rngs(0)).takes
        for head in ("classes", "words", "none")
    }
    assert found == {"classes": "texts", "words": "masked words", "none": "vectors"}
