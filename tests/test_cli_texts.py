"""The commands finetune and rank on texts, by toy models that are registered for the occasion."""

import dataclasses
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import data, finetune, models
from lorajax.cli import main

pytestmark = pytest.mark.slow  # they train
tokenizers = pytest.importorskip("tokenizers")

LETTERS = "abcdefgh"


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    vocabulary: int = 16
    context: int = 16
    classes: int = 2


class Reader(models.Model):
    """Mean of what is unmasked, linear; what it takes is said by a class attribute."""

    takes = "texts"

    def __init__(self, config, *, rngs, **dtypes):
        super().__init__(config, rngs=rngs, **dtypes)
        self.words = nnx.Embed(config.vocabulary, 8, rngs=rngs, **dtypes)
        self.body = nnx.Linear(8, 8, rngs=rngs, **dtypes)
        self.head = nnx.Linear(8, config.classes, rngs=rngs, **dtypes)

    def __call__(self, tokens, mask, types):
        mask = mask.astype(jnp.float32)
        x = (self.words(tokens) * mask[..., None]).sum(1)
        return self.head(jnp.tanh(self.body(x / jnp.maximum(mask.sum(1, keepdims=True), 1))))


@dataclasses.dataclass(frozen=True)
class WriterConfig:
    vocabulary: int = 16
    context: int = 16


class Writer(models.Model):
    """Logits of what follows from the token alone."""

    takes, heads = "tokens", ()

    def __init__(self, config, *, rngs, **dtypes):
        super().__init__(config, rngs=rngs, **dtypes)
        self.words = nnx.Embed(config.vocabulary, 8, rngs=rngs, **dtypes)
        self.body = nnx.Linear(8, config.vocabulary, rngs=rngs, **dtypes)

    def __call__(self, tokens, *, mask, positions, segments):
        return self.body(self.words(tokens))


@pytest.fixture(autouse=True)
def double_precision_afterwards():
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    words = {word: i for i, word in enumerate(["[UNK]", "[EOS]", *LETTERS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for name, model, config in (
        ("reader", Reader, ReaderConfig()),
        ("writer", Writer, WriterConfig()),
    ):
        models.register(models.Family(f"test-{name}", model, type(config)))
        (folder / name).mkdir()
        made = models.build(config, rngs=nnx.Rngs(0))
        models.save(made, folder / name / "model.safetensors")
        tokenizer.save(str(folder / name / "tokenizer.json"))
        (folder / name / "tokenizer_config.json").write_text('{"eos_token": "[EOS]"}')
    rng = np.random.default_rng(0)
    for name, count in (("train", 48), ("test", 20)):
        rows = [rng.choice(list(LETTERS), rng.integers(3, 12)) for _ in range(count)]
        for end, label in (
            ("", lambda row: int("a" in row)),
            ("_num", lambda row: (row < "d").sum() / 2),
        ):
            lines = [f"{' '.join(row)}\t{label(row)}\n" for row in rows]
            (folder / f"{name}{end}.tsv").write_text("sentence\tlabel\n" + "".join(lines))
        lines = [{"prompt": f"{a} {b} ", "completion": f"{b} {a}"} for a, b, *_ in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def command(folder, model, data, out, *arguments):
    given = ["--model", str(folder / model), "--data", str(folder / data)]
    if not {"--test", "--hold-out"} & {*arguments}:
        given += ["--test", data.replace("train", "test")]
    return [*given, "--head-epochs", "1", "--samples", "32", *arguments, "--out", str(out)]


FAST = ("--epochs", "2", "--batch-size", "16", "--rank", "2", "--probes", "2", "--checkpoints", "1")


def test_classes_are_learned_and_judged(folder, tmp_path, capsys):
    arguments = (*FAST, "--metric", "matthews", "f1", "--accumulate", "2")
    assert main(["finetune", *command(folder, "reader", "train.tsv", tmp_path, *arguments)]) == 0
    out = capsys.readouterr().out
    assert "48 training and 20 test texts, classes from sentence, label: 0, 1" in out
    assert "test matthews " in out and "texts/s" in out and "steps of 16 texts" in out
    history = json.loads((tmp_path / "history.json").read_text())
    assert set(history["metrics"]) == {"matthews", "f1"} and len(history["loss"]) == 6
    assert history["layers"] == ["body"] and (tmp_path / "adapter").is_dir()


def test_numbers_and_next_tokens_are_asked_for(folder, tmp_path, capsys):
    arguments = (*FAST, "--metric", "spearman")
    out = tmp_path / "numbers"
    assert main(["finetune", *command(folder, "reader", "train_num.tsv", out, *arguments)]) == 0
    assert "numbers from sentence, label" in capsys.readouterr().out
    out = tmp_path / "tokens"
    arguments = (*FAST, "--batch-size", "4", "--pack", "--hold-out", "25")
    assert main(["finetune", *command(folder, "writer", "train.jsonl", out, *arguments)]) == 0
    said = capsys.readouterr().out
    assert "held-out sequences, tokens from prompt, completion" in said
    history = json.loads((out / "history.json").read_text())
    assert history["test_loss"][-1] < history["test_loss"][0]


def test_texts_of_similar_length_share_a_batch(folder, tmp_path, monkeypatch):
    seen, run = [], finetune.run

    def watched(trainer, train, *arguments, **options):
        order = finetune.order_of(train, trainer.recipe)
        lengths = data.text.lengths(train)
        seen.append([lengths[order(step)] for step in range(3)])
        return run(trainer, train, *arguments, **options)

    monkeypatch.setattr(finetune, "run", watched)
    for window in (0, 3):
        given = command(folder, "reader", "train.tsv", tmp_path / str(window), *FAST)
        assert main(["finetune", *given, "--window", str(window)]) == 0
    shuffled, sorted_ones = ([np.ptp(each) for each in batches] for batches in seen)
    assert sum(sorted_ones) < sum(shuffled)
    # An epoch of three batches is one window: the same samples, and no two batches overlap.
    assert sorted(np.concatenate(seen[0])) == sorted(np.concatenate(seen[1]))
    ends = sorted((each.min(), each.max()) for each in seen[1])
    assert ends[0][1] <= ends[1][0] and ends[1][1] <= ends[2][0]


DEVICES = """
    import json, pathlib, sys
    import numpy as np
    from flax import nnx
    from lorajax import models
    from lorajax.cli import main
    folder = pathlib.Path(sys.argv[1])
    config = models.BertConfig(
        vocabulary=16, width=16, depth=1, heads=2, mlp_width=32, context=16, pool="mean"
    )
    models.save(models.build(config, rngs=nnx.Rngs(0)), folder / "reader" / "model.safetensors")
    given = ["finetune", "--model", str(folder / "reader"), "--data", str(folder / "train.tsv")]
    given += ["--test", "test.tsv", "--rank", "2", "--batch-size", "16", "--epochs", "2"]
    given += ["--probes", "2", "--checkpoints", "1", "--learning-rate", "1e-2", "--samples", "32"]
    losses = {}
    for layout in (None, "data", "full"):
        out = folder / f"out-{layout}"
        more = [] if layout is None else ["--devices", "4", "--layout", layout]
        assert main([*given, *more, "--out", str(out)]) == 0
        history = json.loads((out / "history.json").read_text())
        losses[layout] = history["loss"] + history["test_loss"]
        assert (out / "adapter" / "adapter_model.safetensors").is_file()
    for layout in ("data", "full"):
        np.testing.assert_allclose(losses[layout], losses[None], rtol=0, atol=1e-5)
    assert losses[None][0] != losses[None][5]
    print("agree")
"""


@pytest.mark.apart
def test_a_run_on_four_devices_is_that_on_one(folder, tmp_path, virtual):
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "reader").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "reader" / name).write_text((folder / "reader" / name).read_text())
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DEVICES), str(tmp_path)],
        env=virtual(4),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.strip().endswith("agree"), found.stdout + found.stderr


def test_pickled_weights_and_an_untold_pool_are_refused_with_what_helps(folder, tmp_path, capsys):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "pickled" / name).write_text((folder / "reader" / name).read_text())
    given = command(folder, "reader", "train.tsv", tmp_path / "new")
    given[1] = str(tmp_path / "pickled")
    assert main(["finetune", *given]) == 2
    error = capsys.readouterr().err
    assert "pytorch_model.bin is pickled" in error and "safetensors" in error
    # An encoder as Hugging Face has it, of which no file tells what its head should read.
    config = models.BertConfig(vocabulary=16, width=16, depth=1, heads=2, context=16, head="none")
    (tmp_path / "pickled" / "pytorch_model.bin").unlink()
    path = tmp_path / "pickled" / "model.safetensors"
    models.save(models.build(config, rngs=nnx.Rngs(0)), path, layout="huggingface")
    assert main(["finetune", *given]) == 2
    error = capsys.readouterr().err
    assert "does not tell pool" in error and error.rstrip().endswith("give --pool.")


def test_ranks_are_chosen_for_texts(folder, tmp_path):
    given = command(folder, "reader", "train.tsv", tmp_path, "--rule", "energy")
    assert main(["rank", *given]) == 0
    assert list(json.loads((tmp_path / "ranks.json").read_text())["layers"]) == ["body"]


@pytest.mark.parametrize(
    ("model", "data", "arguments", "message"),
    [
        ("reader", "train.tsv", ["--test", "no.tsv"], "--test is 'no.tsv', which does not exist"),
        ("reader", "no.tsv", [], "which does not exist"),
        ("reader", "train.tsv", ["--text", "text"], "--text is 'text', but"),
        ("reader", "train.tsv", ["--label", "labels"], "--label is 'labels', but"),
        ("reader", "train.tsv", ["--metric", "pearson"], "--metric is 'pearson'; Texts offers"),
        ("reader", "train.tsv", ["--max-length", "17"], "--max-length is 17; the model takes 16"),
        ("reader", "train.tsv", ["--accumulate", "3", "--batch-size", "16"], "--accumulate is 3"),
        ("reader", "train.tsv", ["--pack"], "--pack goes with next tokens"),
        ("reader", "train.tsv", ["--augment", "crop"], "--augment is crop, but --data"),
        ("reader", "train.jsonl", [], "a Reader, which is no model for tokens of texts"),
        ("writer", "train.tsv", [], "a Writer, which is no model for classes of texts as"),
        ("reader", "train.tsv", ["--window", "-1"], "--window is -1; it must be at least 0"),
        ("reader", "train.tsv", ["--devices", "0"], "--devices is 0; it must be positive"),
        ("reader", "train.tsv", ["--devices", "99"], "--devices is 99; there are "),
        ("reader", "train.tsv", ["--tokenizer", "nowhere"], "--tokenizer is 'nowhere', which has"),
        ("reader", "train.tsv", ["--text", "a", "b", "c"], "--text is a b c; it takes one column"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    folder, tmp_path, model, data, arguments, message, capsys, monkeypatch
):
    def fit_head(*_, **__):
        raise ZeroDivisionError("the head is fitted")

    monkeypatch.setattr(finetune, "fit_head", fit_head)
    given = command(folder, model, data, tmp_path / "new", *arguments)
    assert main(["finetune", *given]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_options_of_texts_are_refused_for_images(tmp_path, capsys):
    assert main(["rank", "--max-length", "9", "--out", str(tmp_path)]) == 2
    assert "--max-length is 9, but --data mnist-sample is no file" in capsys.readouterr().err
    assert main(["rank", "--max-length", "0", "--out", str(tmp_path)]) == 2
    assert "--max-length is 0; it must be at least 1" in capsys.readouterr().err
