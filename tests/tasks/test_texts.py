"""What texts are asked, judged, and trained on in parts: toy models, no tokenizer."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorajax import adapters, data, finetune, tasks
from lorajax.data import text

RNG = np.random.default_rng(0)
WORDS = 11


class Reader(nnx.Module):
    """Mean over what is unmasked, a type added to each token, linear."""

    heads, beside, takes = ("head",), (), "texts"

    def __init__(self, outputs, rngs):
        self.words = nnx.Embed(WORDS, 6, rngs=rngs)
        self.kinds = nnx.Embed(2, 6, rngs=rngs)
        self.body = nnx.Linear(6, 6, rngs=rngs)
        self.head = nnx.Linear(6, outputs, rngs=rngs)

    def __call__(self, tokens, mask, types):
        mask = mask.astype(jnp.float32)
        x = jnp.tanh(self.words(tokens) + self.kinds(types)) * mask[..., None]
        return self.head(self.body(x.sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)))


class Writer(nnx.Module):
    """Logits from the token, its place, and the mean of what came before in its segment."""

    heads, beside, takes = (), (), "tokens"

    def __init__(self, rngs):
        self.words = nnx.Embed(WORDS, 6, rngs=rngs)
        self.places = nnx.Embed(16, 6, rngs=rngs)
        self.body = nnx.Linear(6, WORDS, rngs=rngs)

    def __call__(self, tokens, *, mask, positions, segments):
        seen = (segments[:, :, None] == segments[:, None, :]) & mask[:, None, :]
        seen = (seen & jnp.tri(tokens.shape[1], dtype=bool)[None]).astype(jnp.float32)
        x = self.words(tokens)
        mean = seen @ x / jnp.maximum(seen.sum(-1, keepdims=True), 1)
        return self.body(jnp.tanh(mean + self.places(positions)))


def rows(counts):
    return [RNG.integers(1, WORDS, n).astype(np.int32) for n in counts]


def texts(labels, counts=(5, 17, 3, 9, 20, 2, 4, 6)):
    tokens = rows(counts)
    return data.Table(
        {
            "tokens": text.Ragged(tokens),
            "types": text.Ragged([(np.arange(len(t)) > 2).astype(np.int32) for t in tokens]),
            "mask": text.Ragged([np.ones(len(t), bool) for t in tokens]),
            "labels": labels,
        }
    )


def test_filling_changes_nothing_and_batches_have_few_shapes():
    table = texts(np.arange(8, dtype=np.int32) % 3)
    model, task = Reader(3, nnx.Rngs(0)), tasks.Texts(smoothing=0.1)
    whole = table[np.arange(8)]
    assert whole["tokens"].shape == (8, 20) and table[np.array([0, 2])]["mask"].shape == (2, 16)
    together = task.scores(model, task.prepare(whole))
    alone = [task.scores(model, task.prepare(table[np.array([i])])) for i in range(8)]
    for name in tasks.Scores._fields:
        want = jnp.concatenate([getattr(each, name) for each in alone])
        np.testing.assert_allclose(getattr(together, name), want, atol=1e-6)
    assert together.count.tolist() == [1] * 8
    assert tasks.takes(model) == "texts" and tasks.takes(object()) == "images"
    with pytest.raises(ValueError, match="smoothing is 1.0; it must be at least 0 and less"):
        tasks.Texts(smoothing=1.0)


def test_a_window_brings_texts_of_similar_length_together():
    table = texts(np.arange(8, dtype=np.int32) % 3)
    part = table.take(np.array([1, 0, 4, 5, 2, 7]))
    assert text.lengths(table).tolist() == [5, 17, 3, 9, 20, 2, 4, 6]
    assert text.lengths(part).tolist() == [17, 5, 20, 2, 3, 6]
    recipe = finetune.Recipe(steps=3, batch_size=2, window=3)
    order = finetune.order_of(part, recipe)
    lengths = sorted(sorted(text.lengths(part)[order(step)].tolist()) for step in range(3))
    assert lengths == [[2, 3], [5, 6], [17, 20]]
    trainer = finetune.Trainer(Reader(3, nnx.Rngs(0)), nnx.Param, tasks.Texts(), recipe)
    seen = []
    finetune.fit(trainer, part, callback=lambda record: seen.append(record.step))
    assert seen == [1, 2, 3]
    with pytest.raises(ValueError, match="none of which is Ragged"):
        finetune.order_of(data.Table({"images": np.zeros((4, 2))}), recipe)


def test_numbers_train_in_units_of_their_spread_and_are_reported_in_their_own():
    labels = np.float32([0, 5, 2.5, 1, 4, 3, 2, 0.5])
    task = tasks.Regression(mean=float(labels.mean()), std=float(labels.std()), within=1.0)
    model, batch = Reader(1, nnx.Rngs(0)), texts(labels)[np.arange(8)]
    found, wanted = task.predictions(model, task.prepare(batch))
    scores = task.scores(model, task.prepare(batch))
    np.testing.assert_allclose(scores.loss, (found - wanted) ** 2, rtol=1e-5)
    np.testing.assert_allclose(scores.objective * task.std**2, scores.loss, rtol=1e-5)
    np.testing.assert_array_equal(scores.hits, np.abs(found - wanted) <= 1)
    with pytest.raises(ValueError, match="needs one output"):
        task.scores(Reader(2, nnx.Rngs(0)), task.prepare(batch))
    for options, name in (({"std": 0.0}, "std"), ({"within": -1.0}, "within")):
        with pytest.raises(ValueError, match=f"{name} is .*; it must be positive"):
            tasks.Regression(**options)


COUNTS = (5, 7, 3, 6, 2)


def written():
    tokens = rows(COUNTS)
    return [(t, RNG.random(len(t)) < 0.7) for t in tokens]


def loose(pairs):
    columns = {
        "tokens": [t for t, _ in pairs],
        "targets": [asked for _, asked in pairs],
        "positions": [np.arange(len(t), dtype=np.int32) for t, _ in pairs],
        "segments": [np.ones(len(t), np.int32) for t, _ in pairs],
    }
    return data.Table({name: text.Ragged(column) for name, column in columns.items()})


def test_next_tokens_are_asked_within_a_text_alone():
    model, task, pairs = Writer(nnx.Rngs(0)), tasks.NextToken(), written()
    scores = nnx.jit(task.scores)(model, task.prepare(loose(pairs)[np.arange(5)]))

    @nnx.jit
    def alone(model, tokens):
        ones = np.ones((1, len(tokens)), np.int32)
        places = np.arange(len(tokens))[None]
        logits = model(tokens[None], mask=ones > 0, positions=places, segments=jnp.asarray(ones))[0]
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:-1], tokens[1:])
        return logits, each

    for i, (tokens, asked) in enumerate(pairs):
        logits, each = alone(model, jnp.asarray(tokens))
        np.testing.assert_allclose(scores.loss[i], each[asked[1:]].sum(), rtol=1e-5)
        right = (np.asarray(logits)[:-1].argmax(-1) == tokens[1:]) & asked[1:]
        assert float(scores.count[i]) == asked[1:].sum() and float(scores.hits[i]) == right.sum()


def test_a_packed_row_scores_as_its_texts_apart():
    model, task, pairs = Writer(nnx.Rngs(0)), tasks.NextToken(), written()
    packed = data.Table(text.pack(pairs, 10))
    assert len(packed) == 3 and (packed.segments > 0).sum() == sum(COUNTS)
    sums = [
        tasks.totals(task.scores(model, task.prepare(table[np.arange(len(table))])))
        for table in (packed, loose(pairs))
    ]
    np.testing.assert_allclose(np.array(sums[0]), np.array(sums[1]), rtol=1e-5)
    with pytest.raises(ValueError, match="length is 6; sequence 1 has 7 tokens"):
        text.pack(pairs, 6)


def test_no_number_in_what_is_not_asked_reaches_the_loss_or_its_derivative():
    batch = {name: jnp.asarray(x) for name, x in text.pack(written()[:1], 9).items()}

    # As a softmax over no visible token at all comes out.
    logits = np.zeros((*batch["tokens"].shape, WORDS), np.float32)
    logits[np.asarray(batch["segments"]) == 0] = np.nan

    def loss(logits):
        scores = tasks.NextToken().scores(lambda tokens, **_: logits, batch)
        return tasks.totals(scores).objective

    assert np.isfinite(jax.grad(loss)(jnp.asarray(logits))).all()


def test_an_update_from_parts_is_that_of_the_whole_batch():
    # Counts differ between the parts: a mean of the parts' means would be another update.
    table = loose(written()[:4])
    batch, model, found = table[np.arange(4)], Writer(nnx.Rngs(0)), {}
    for parts in (1, 2, 4):
        recipe = finetune.Recipe(
            steps=2, batch_size=4, optimizer="sgd", learning_rate=0.1, accumulate=parts
        )
        penalty = lambda model: 0.01 * (model.body.kernel[...] ** 2).sum()  # noqa: E731
        trainer = finetune.Trainer(model, nnx.Param, tasks.NextToken(), recipe, penalty=penalty)
        state, metrics = trainer.step(trainer.init(), batch)
        state, metrics = trainer.step(state, batch)
        found[parts] = (state.params, metrics)
    for parts in (2, 4):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
            found[parts],
            found[1],
        )
    with pytest.raises(ValueError, match="accumulate is 3; it must divide batch_size = 4"):
        finetune.Recipe(steps=2, batch_size=4, accumulate=3)


def test_a_run_is_judged_by_what_its_task_offers():
    labels = np.arange(8, dtype=np.int32) % 2
    table, recipe = texts(labels), finetune.Recipe(steps=1, batch_size=4)
    trainer = finetune.Trainer(Reader(2, nnx.Rngs(0)), nnx.Param, tasks.Texts(), recipe)
    state = trainer.init()
    predictions, answers = trainer.predict(state, table, batch_size=3)
    np.testing.assert_array_equal(answers, labels)
    judged = finetune.judge(trainer, state, table, ("accuracy", "matthews"), batch_size=5)
    accuracy = trainer.evaluate(state, table, batch_size=3).accuracy
    assert judged["accuracy"] == pytest.approx(float(accuracy))
    assert judged["matthews"] == tasks.METRICS["matthews"](predictions, labels)
    assert finetune.judge(trainer, state, table, ()) == {}
    with pytest.raises(ValueError, match="metric is 'spearman'; Texts offers accuracy, f1, m"):
        finetune.check_metrics(tasks.Texts(), ["spearman"])
    with pytest.raises(ValueError, match="metric is 'f1'; NextToken offers none"):
        finetune.check_metrics(tasks.NextToken(), ["f1"])
    writer = finetune.Trainer(Writer(nnx.Rngs(0)), nnx.Param, tasks.NextToken(), recipe)
    with pytest.raises(ValueError, match="task is NextToken, which offers no predictions"):
        writer.predict(writer.init(), loose(written()))


def test_tables_of_words_are_left_alone_unless_named():
    model = Reader(2, nnx.Rngs(0))
    targets, heads = finetune.targets_of(model)
    assert [path for path in ("words", "body", "head") if targets(path, getattr(model, path))] == [
        "body"
    ]
    assert heads == ("head",)


@pytest.mark.parametrize("filling", [0, 6])
def test_what_fills_texts_up_is_no_input_of_a_layer(filling):
    """Moments behind EVA's start and whitened ranks, against sums over the tokens that stand."""
    counts = np.array([5, 3, 6, 2])
    stands = np.arange(6) < counts[:, None]
    tokens = RNG.integers(1, WORDS, (4, 6)).astype(np.int32) * stands
    places = np.tile(np.arange(6, dtype=np.int32), (4, 1))
    columns = {"tokens": tokens, "targets": stands, "positions": places, "segments": 1 * stands}
    wide = {name: np.pad(column, ((0, 0), (0, filling))) for name, column in columns.items()}
    model, task = Writer(nnx.Rngs(0)), tasks.NextToken()
    found = finetune.moments_of(model, task, data.Table(wide), targets="body", batch_size=2)
    words, kept = np.asarray(model.words.embedding[...]), []
    for row, count in zip(tokens, counts, strict=True):
        means = np.cumsum(words[row[:count]], axis=0) / np.arange(1, count + 1)[:, None]
        kept.append(np.tanh(means + np.asarray(model.places.embedding[...])[:count]))
    kept = np.concatenate(kept)
    np.testing.assert_allclose(found["body"], kept.T @ kept / counts.sum(), atol=1e-6)


def test_a_text_of_nothing_is_no_input_of_a_layer_that_sees_one_vector_a_text():
    table = texts(np.array([0, 1, 0, 1, 0, 1, 0, 1]))
    batch = {name: np.array(column) for name, column in table[np.arange(8)].items()}
    model, task = Reader(2, nnx.Rngs(0)), tasks.Texts()
    where = tasks.standing(task)
    assert where is not None and tasks.standing(tasks.Images((0.0,), (1.0,))) is None

    def moment(batch):
        options = {"forward": task.scores, "where": where}
        return adapters.input_moments(model, [batch], "body", **options)["body"]

    want = moment({name: column[:6] for name, column in batch.items()})
    batch["mask"][6:] = False
    np.testing.assert_allclose(moment(batch), want, rtol=1e-5)


class Turned(nnx.Module):
    """Reads texts with their tokens first, as recurrent models do, in one of two layers."""

    def __init__(self, rngs):
        self.body = nnx.Linear(3, 3, rngs=rngs)
        self.turned = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.turned(self.body(x).swapaxes(0, 1))


@pytest.mark.parametrize("filled", [True, False])
def test_layers_that_the_mask_does_not_fit_are_named_where_something_is_filled(filled):
    x = RNG.normal(size=(4, 5, 3)).astype(np.float32)
    stands = np.ones((4, 5), bool)
    stands[1:, 3:] = not filled
    batches = [(x[:2], stands[:2]), (x[2:], stands[2:])]
    options = {"forward": lambda m, b: m(b[0]), "where": lambda b: b[1]}
    model = Turned(nnx.Rngs(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = adapters.input_moments(model, batches, **options)
        adapters.input_moments(model, batches, "body", **options)
    said = [str(each.message) for each in caught]
    if filled:
        assert len(said) == 1 and said[0].startswith("input_moments counts all inputs of turned, ")
    else:
        assert not said
    rows = x[stands]
    np.testing.assert_allclose(found["body"], rows.T @ rows / len(rows), atol=1e-6)
