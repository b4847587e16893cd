"""Ranks and starts chosen here, written for PEFT; and, where torch is, loaded by it."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from benchmarks import peers
from lorajax import adapters, data, finetune, models, tasks
from lorajax.cli import main
from lorajax.finetune import bridge

tokenizers = pytest.importorskip("tokenizers")
FIXTURES = pathlib.Path(__file__).with_name("models") / "fixtures"
RANKS = {
    "bert_classes": {"blocks/0/attention/query": 2, "blocks/1/mlp/up": 3, "blocks/1/mlp/down": 2},
    "llama_tied": {"blocks/0/attention/key": 3, "blocks/0/mlp/gate": 1},
    "huggingface_vit": {"blocks/0/attention/value": 2, "blocks/1/mlp/down": 1},
}


@pytest.fixture(autouse=True)
def double_precision_afterwards():
    yield
    jax.config.update("jax_enable_x64", True)


@nnx.jit
def called(model, *given):
    return model(*given)


def chosen(ranks):
    """A selection of these ranks, as if the data had asked for them."""
    values = jnp.ones(3, jnp.float32)
    layers = [
        adapters.Selected(path, (9, 9), rank, values, 0.0, 0.0, 18) for path, rank in ranks.items()
    ]
    gradients = {}
    return adapters.Selection(tuple(layers), "energy", 1, 1, gradients)


def written(name, out, start=None):
    """A model, and the same with a start that was written for PEFT."""
    source = FIXTURES / name
    model = models.load(source)
    made = bridge.bridge(model, source)
    bridge.check_bridge(model, list(RANKS[name]), start, made)
    rows = {"tokens": np.zeros((2, 3), np.int32), "labels": np.zeros(2, np.int32)}
    adapted = bridge.write_start(
        model,
        chosen(RANKS[name]),
        out,
        made,
        task=tasks.Texts(),
        train=data.Table(rows),
        start=start,
    )
    return model, adapted, made


@pytest.mark.parametrize(
    ("name", "task_type", "head", "modules"),
    [
        (
            "bert_classes",
            "SEQ_CLS",
            ["classifier"],
            ["attention.self.query", "intermediate.dense", "output.dense"],
        ),
        ("llama_tied", "CAUSAL_LM", None, ["self_attn.k_proj", "mlp.gate_proj"]),
        ("huggingface_vit", None, ["classifier"], ["attention.v_proj", "mlp.fc2"]),
    ],
)
def test_the_configuration_has_the_ranks_by_torch_names(name, task_type, head, modules, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"of an earlier start")
    written(name, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == task_type and config["modules_to_save"] == head
    assert config["inference_mode"] is False and config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == str(FIXTURES / name)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    targets = config["target_modules"]
    targets = targets.replace("\\", "").split("|") if isinstance(targets, str) else targets
    for module, rank in zip(modules, RANKS[name].values(), strict=True):
        (target,) = [each for each in targets if each.endswith(module)]
        key = "^" + target.replace(".", "\\.")
        assert config["rank_pattern"].get(key, config["r"]) == rank
        assert config["alpha_pattern"].get(key, config["lora_alpha"]) == rank  # a scaling of 1


@pytest.mark.parametrize("start", ["orthogonal", "pissa"])
def test_a_start_has_its_own_ranks_and_loads_again(start, tmp_path):
    model, adapted, made = written("bert_classes", tmp_path, start)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == ("pissa" if start == "pissa" else True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    ranks = sorted(x.shape[0] for name, x in tensors.items() if name.endswith("lora_A.weight"))
    assert ranks == sorted(RANKS["bert_classes"].values())
    again = adapters.load_peft(model, tmp_path, rules=made.rules)
    tokens = jnp.asarray([[3, 5, 7]], jnp.int32)
    mask = jnp.ones((1, 3), bool)
    read, meant, base = (called(each, tokens, mask) for each in (again, adapted, model))
    np.testing.assert_allclose(read, meant, atol=1e-6)
    np.testing.assert_allclose(read, base, atol=1e-5)


def test_what_peft_could_not_train_on_from_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"start is 'olora', which takes an offset"):
        written("bert_classes", tmp_path, "olora")
    timm = FIXTURES / "timm_vit"
    model = models.load(timm, heads=2)
    made = bridge.bridge(model, timm)
    with pytest.raises(ValueError, match="'blocks/0/attention/query' is no Linear layer of its"):
        bridge.check_bridge(model, "**/query", "pissa", made)
    bridge.check_bridge(model, "**/mlp/*", "pissa", made)
    models.save(model, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="own, which no torch model loads"):
        bridge.bridge(model, tmp_path / "own.safetensors")


def test_an_encoder_under_a_head_of_our_own_is_named_by_itself():
    source = FIXTURES / "bert_encoder"
    model = models.load(source, classes=3, pool="mean")
    made = bridge.bridge(model, source)
    assert made.heads == () and made.task_type == "FEATURE_EXTRACTION"
    assert not any(name.startswith("bert.") for rule in made.rules for name in rule.theirs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    letters = "abcdefgh"
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for name in ("bert_classes", "llama_tied"):
        shutil.copytree(FIXTURES / name, folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
        told = {"eos_token": "[SEP]", "pad_token": "[PAD]"}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(told))
    rng = np.random.default_rng(0)
    rows = [rng.choice(list(letters), rng.integers(3, 9)) for _ in range(48)]
    lines = [f"{' '.join(row)}\t{int('a' in row)}\n" for row in rows]
    (folder / "rows.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    lines = [{"prompt": f"{a} {b} ", "completion": f"{b} {a}"} for a, b, *_ in rows]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def command(folder, name, rows, *arguments):
    given = ["--model", str(folder / name), "--data", str(folder / rows), "--hold-out", "25"]
    return [*given, "--head-epochs", "1", "--samples", "32", *map(str, arguments)]


def asked(folder, out, *arguments):
    options = ("--rule", "energy", "--max-rank", "3", "--budget", "100", "--out", out / "ranks")
    rank = command(folder, "bert_classes", "rows.tsv", *options, "--peft", out / "peft")
    return ["rank", *rank, *arguments]


@pytest.mark.slow
def test_the_command_writes_what_it_chose(folder, tmp_path, capsys):
    assert main(asked(folder, tmp_path, "--start", "lora_one")) == 0
    assert "PEFT's configuration and the start 'lora_one'" in capsys.readouterr().out
    ranks = json.loads((tmp_path / "ranks" / "ranks.json").read_text())["layers"]
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    found = {name: x.shape[0] for name, x in tensors.items() if name.endswith("lora_A.weight")}
    assert sorted(found.values()) == sorted(each["rank"] for each in ranks.values() if each["rank"])
    # Two classes were asked for, of a base with three.
    assert tensors["base_model.model.classifier.weight"].shape == (2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", "olora"], "--start is 'olora', which takes an offset"),
        (["--start", "nowhere"], "nowhere"),
    ],
)
def test_refusals_come_before_long_work(folder, tmp_path, arguments, message, capsys, monkeypatch):
    def fit_head(*_, **__):
        raise ZeroDivisionError("the head is fitted")

    monkeypatch.setattr(finetune, "fit_head", fit_head)
    assert main(asked(folder, tmp_path, *arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert main(["rank", "--start", "lora", "--out", str(tmp_path)]) == 2
    assert "--start is 'lora'; it goes with --peft DIR" in capsys.readouterr().err
    assert main(["rank", "--peft", str(tmp_path / "a"), "--out", str(tmp_path)]) == 2
    assert "--model is 'vit-fashion-mnist', a file of this package's" in capsys.readouterr().err


# From here on: PEFT itself.

TOKENS = np.asarray([[4, 7, 9, 11, 5], [6, 6, 8, 10, 4]], np.int32)
PIXELS = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)


def torch_model(name, **changes):
    peers.load_torchvision()
    transformers = pytest.importorskip("transformers")
    kinds = {
        "bert_classes": transformers.BertForSequenceClassification,
        "llama_tied": transformers.LlamaForCausalLM,
        "huggingface_vit": transformers.ViTForImageClassification,
    }
    options = {"ignore_mismatched_sizes": True} if changes else {}
    return kinds[pathlib.Path(name).name].from_pretrained(name, **changes, **options).eval()


def torch_logits(model, name):
    import torch

    with torch.no_grad():
        if name == "huggingface_vit":
            shape = models.load(FIXTURES / name).config
            pixels = PIXELS[:, : shape.image_size[0], : shape.image_size[1], : shape.channels]
            return model(pixel_values=torch.tensor(np.moveaxis(pixels, -1, 1))).logits.numpy()
        return model(input_ids=torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def our_logits(model, name):
    if name == "huggingface_vit":
        height, width = model.config.image_size
        return np.asarray(
            called(model, jnp.asarray(PIXELS[:, :height, :width, : model.config.channels]))
        )
    return np.asarray(called(model, jnp.asarray(TOKENS), jnp.ones(TOKENS.shape, bool)))


def ranks_in_torch(model):
    return {
        name: (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


@pytest.mark.formats
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(RANKS))
@pytest.mark.parametrize("start", [None, "orthogonal", "pissa"])
def test_peft_loads_ranks_and_starts_onto_that_very_model(name, start, tmp_path):
    peft = pytest.importorskip("peft")
    model, adapted, _ = written(name, tmp_path, start)
    if start is None:
        config = peft.LoraConfig.from_pretrained(tmp_path)
        theirs = peft.get_peft_model(torch_model(FIXTURES / name), config)
    else:
        base = torch_model(FIXTURES / name)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
        if start == "orthogonal":
            # At the start nothing shows: B moves, here as there.
            _move(theirs, adapted)
    found = ranks_in_torch(theirs)
    assert sorted(r for r, _ in found.values()) == sorted(RANKS[name].values())
    assert {scaling for _, scaling in found.values()} == {1.0}
    assert any(p.requires_grad for n, p in theirs.named_parameters() if "lora_" in n)
    want = our_logits(model if start is None else adapted, name)
    # PEFT takes PiSSA's offset by a float32 decomposition of its own.
    close = 1e-5 * max(1.0, float(np.abs(want).max())) if start == "pissa" else 1e-5
    np.testing.assert_allclose(torch_logits(theirs.eval(), name), want, rtol=0, atol=close)


def _move(theirs, adapted):
    """The same constant to every B."""
    import torch

    with torch.no_grad():
        for each, parameter in theirs.named_parameters():
            if "lora_B" in each:
                parameter += 0.1
    for layer in adapters.layers(adapted).values():
        b = layer.adapters["default"].b
        b.set_value(b[...] + jnp.asarray(0.1, b[...].dtype))


@pytest.mark.formats
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "rows"), [("bert_classes", "rows.tsv"), ("llama_tied", "rows.jsonl")]
)
def test_a_trained_adapter_loads_in_peft_and_back(folder, name, rows, tmp_path):
    peft = pytest.importorskip("peft")
    options = ("--epochs", 2, "--batch-size", 12, "--rank", 2, "--probes", 1, "--checkpoints", 1)
    given = command(folder, name, rows, *options, "--out", tmp_path)
    assert main(["finetune", *given]) == 0
    changes = {"num_labels": 2} if name == "bert_classes" else {}
    theirs = peft.PeftModel.from_pretrained(
        torch_model(folder / name, **changes), tmp_path / "adapter"
    )
    model = models.load(folder / name, **({"classes": 2} if changes else {}))
    made = bridge.bridge(model, folder / name)
    ours = adapters.load_peft(model, tmp_path / "adapter", rules=made.rules)
    before, after = our_logits(model, name), our_logits(ours, name)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(torch_logits(theirs.eval(), name), after, atol=1e-5)
    theirs.save_pretrained(tmp_path / "back")
    again = adapters.load_peft(model, tmp_path / "back", rules=made.rules)
    np.testing.assert_allclose(our_logits(again, name), after, atol=1e-6)
    assert isinstance(nnx.state(again), nnx.State)


@pytest.mark.parametrize(
    ("name", "heads", "fits"),
    [
        ("huggingface_vit", ["head", "embeddings"], False),
        ("huggingface_vit", ["head"], True),
        ("dinov2", ["head", "embeddings"], True),  # whose table stays whole
    ],
)
def test_positions_of_another_image_size_do_not_fit_the_base(name, heads, fits, tmp_path):
    source = FIXTURES / name
    model = models.load(source, image_size=8)
    adapted = adapters.adapt(model, "**/query", rank=1, key=jax.random.key(0))
    why = bridge.save_adapter(adapted, tmp_path, source, heads)
    assert why is None if fits else "'embeddings' trained at another size" in (why or "")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (str(source) if fits else None)
