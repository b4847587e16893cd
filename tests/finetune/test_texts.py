"""A toy text classifier through the same functions as the ViT: no image anywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import adapters, data, finetune, sweeps, tasks
from lorajax.finetune import checkpoints, recipes

pytestmark = pytest.mark.slow  # they train

WORDS, LENGTH, CLASSES = 12, 7, 3
KEY = jax.random.key(2)


@dataclasses.dataclass(frozen=True)
class Texts:
    """What each asked question about a text has for an answer; a text has none to two of them."""

    unit: str = "texts"
    dropped: float = 0.0

    def prepare(self, batch, key=None):
        tokens = jnp.asarray(batch["tokens"])
        if key is not None and self.dropped:
            kept = jax.random.bernoulli(key, 1 - self.dropped, tokens.shape)
            tokens = jnp.where(kept, tokens, 0)
        return {**batch, "tokens": tokens}

    def scores(self, model, batch):
        logits = model(batch["tokens"])
        asked = jnp.asarray(batch["asked"], jnp.float32)
        one = tasks.classified(logits, jnp.asarray(batch["answer"]), smoothing=0.05)
        return tasks.Scores(*(jnp.asarray(column * asked) for column in one))


class Reader(nnx.Module):
    """Embedding, mean over tokens, linear."""

    heads = ("head",)
    beside = ("words",)

    def __init__(self, rngs):
        self.words = nnx.Embed(WORDS, 8, rngs=rngs)
        self.body = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, tokens):
        return self.head(jnp.tanh(self.body(self.words(tokens).mean(1))))


TASK = Texts()


@pytest.fixture(scope="module")
def reader():
    model = Reader(nnx.Rngs(0))
    model.eval()
    return model


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    answer = rng.integers(0, CLASSES, 48).astype(np.int32)
    tokens = rng.integers(1, WORDS, (48, LENGTH)).astype(np.int32)
    tokens[:, :3] = 1 + answer[:, None]  # three words give the answer away
    asked = rng.integers(0, 3, 48).astype(np.int32)
    return data.Table({"tokens": tokens, "answer": answer, "asked": asked})


@pytest.fixture(scope="module")
def prepared(reader, table):
    fitted = finetune.fit_head(reader, TASK, table, epochs=1, batch_size=16)
    options = {"rule": "energy", "max_rank": 2, "samples": 40}
    return finetune.prepare(fitted, TASK, table, key=KEY, start="spectral", **options)


def trainer_of(prepared, task=TASK, steps=12):
    recipe = recipes.lora(steps, batch_size=16, learning_rate=3e-2)
    return finetune.Trainer(prepared.model, prepared.wrt, task, recipe)


def test_ranks_are_chosen_and_starts_lie_along_the_gradient(prepared):
    assert list(prepared.gradients) == ["body"] and prepared.heads == ("head", "words")
    assert 1 <= adapters.layers(prepared.model)["body"].adapters["default"].rank <= 2
    probe = finetune.measure(prepared.model, finetune.directions(prepared.gradients))
    # One direction of the two is the top one, which spectral starts share out evenly.
    assert probe.misalignment.shape == (1,) and np.isfinite(probe.misalignment).all()


def test_gradients_are_means_over_answers_however_they_are_batched(reader, table):
    found = [
        finetune.gradients_of(reader, TASK, table, targets="body", samples=48, batch_size=size)
        for size in (24, 6)
    ]
    scores = TASK.scores(reader, table[:])
    np.testing.assert_allclose(found[0]["body"].matrix, found[1]["body"].matrix, atol=1e-6)

    def loss(model):
        sums = tasks.totals(TASK.scores(model, table[:]))
        return sums.mean("loss")

    whole = nnx.grad(loss)(reader)["body"]["kernel"][...]
    np.testing.assert_allclose(found[0]["body"].matrix, whole, atol=1e-6)
    assert float(scores.count.min()) == 0 and float(scores.count.max()) == 2


def test_evaluation_counts_answers_and_no_filling(prepared, table):
    trainer = trainer_of(prepared)
    state = trainer.init()
    sums = tasks.totals(TASK.scores(prepared.model, table[:]))
    for size in (48, 20, 7):
        found = trainer.evaluate(state, table, batch_size=size)
        assert float(found.loss) == pytest.approx(float(sums.mean("loss")), rel=1e-5)
        assert float(found.accuracy) == pytest.approx(float(sums.mean("hits")), rel=1e-5)


class Cut(Exception):
    """Ends a run in the middle."""


class CutShort(finetune.Observer):
    def stepped(self, record):
        if record.step == 8:
            raise Cut


def test_it_trains_is_probed_and_resumes_exactly(prepared, table, tmp_path):
    looks = finetune.Looks(tests=2, probes=3, checkpoints=4)
    options = {"looks": looks, "gradients": prepared.gradients}
    task = Texts(dropped=0.2)
    whole = finetune.run(trainer_of(prepared, task), table, table, **options)
    history = whole.history
    assert history["step"] == list(range(1, 13)) and history["probe_step"] == [0, 4, 8, 12]
    assert history["test_step"] == [0, 6, 12] and history["layers"] == ["body"]
    assert history["test_loss"][-1] < history["test_loss"][0]
    assert finetune.stable_ranks(history) is not None
    with checkpoints.Checkpoints(tmp_path / "run", {}) as store, pytest.raises(Cut):
        trainer = trainer_of(prepared, task)
        finetune.run(trainer, table, table, store=store, observer=CutShort(), **options)
    told = []
    observer = finetune.Observer()
    observer.resumed = told.append
    with checkpoints.Checkpoints(tmp_path / "run", {}) as store:
        trainer = trainer_of(prepared, task)
        again = finetune.run(trainer, table, table, store=store, observer=observer, **options)
    assert told == [6]
    for name in history.keys() - {"seconds"}:
        assert again.history[name] == history[name], name
    jax.tree.map(np.testing.assert_array_equal, again.state.params, whole.state.params)


def test_lanes_are_runs_of_their_own(reader, table, prepared):
    recipe = finetune.Recipe(steps=6, batch_size=16, optimizer="adam", learning_rate=1e-2)
    run = finetune.run_of(
        reader,
        TASK,
        table,
        recipe,
        targets="body",
        rank=2,
        start="small",
        heads=("head",),
        gradients=prepared.gradients,
        test=table,
        every=3,
    )
    axes = {"scale": np.float32([0.1, 1.0]), "rank": [1, 2], "seed": range(2)}
    found = sweeps.sweep(run, axes, key=KEY, fold=("seed",))
    assert found["loss"].shape == (2, 2, 2, 6) and found["misalignment"].shape == (2, 2, 2, 2, 1)
    values = found["singular_values"].values
    assert (values[:, 0, ..., 1] <= 1e-6 * values[:, 0, ..., 0]).all()
    assert float(found["test_accuracy"].min()) >= 0
    solo = run(jax.random.key(9), scale=jnp.float32(1.0), rank=2)
    again = jax.jit(run)(jax.random.key(9), scale=jnp.float32(1.0), rank=2)
    np.testing.assert_allclose(solo["loss"], again["loss"], rtol=1e-5)


@pytest.mark.parametrize("start", ["lora", "eva", "lora_one", "pissa", "orthogonal"])
def test_any_start_fills_it(reader, table, start):
    found = finetune.prepare(reader, TASK, table, key=KEY, rank=2, start=start, samples=32)
    assert set(adapters.layers(found.model)) == {"body"}


def test_what_cannot_be_is_refused_before_any_work(reader):
    with pytest.raises(ValueError, match="also holds 'feet'"):
        finetune.targets_of(reader, also=("feet",))
    with pytest.raises(ValueError, match="rank is 9; for body"):
        finetune.targets_of(reader, rank=9)
    with pytest.raises(ValueError, match="scale is 2.0, but the start 'pissa' has none"):
        finetune.check_start("pissa", 2.0)
    with pytest.raises(ValueError, match="start is 'warm'; a named start must be one of"):
        finetune.check_start("warm")
    with pytest.raises(ValueError, match="scale is nan; it must be positive"):
        finetune.check_start("small", float("nan"))
    with pytest.raises(ValueError, match="probes is -1"):
        finetune.Looks(probes=-1)
