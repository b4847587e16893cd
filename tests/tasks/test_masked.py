"""Hidden tokens: how many, what takes their place, and what is asked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorajax import data, finetune, models, tasks

WORDS, HIDDEN, BEGIN = 1000, 3, 1
TASK = tasks.MaskedTokens(WORDS, HIDDEN, special=(BEGIN, HIDDEN))


def rows(count=400, length=100):
    tokens = np.random.default_rng(0).integers(10, WORDS, (count, length)).astype(np.int32)
    tokens[:, 0] = BEGIN
    mask = np.ones(tokens.shape, bool)
    mask[:, length // 2 :] = False
    return {"tokens": tokens, "mask": mask}


def test_a_share_is_chosen_and_eight_tenths_of_it_hidden():
    batch = rows()
    found = TASK.prepare(batch, jax.random.key(0))
    chosen, tokens = np.asarray(found["chosen"]), np.asarray(found["tokens"])
    np.testing.assert_array_equal(found["wanted"], batch["tokens"])
    assert not chosen[:, 0].any() and not chosen[:, 50:].any()
    np.testing.assert_array_equal(tokens[~chosen], batch["tokens"][~chosen])
    # Four standard deviations of binomials of 19,600 places and of some 2,940 chosen ones.
    assert abs(chosen[:, 1:50].mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / 19600)
    masked = (tokens[chosen] == HIDDEN).mean()
    kept = (tokens[chosen] == batch["tokens"][chosen]).mean()
    assert abs(masked - 0.8) < 4 * np.sqrt(0.16 / 2940)
    assert abs(kept - 0.1) < 4 * np.sqrt(0.09 / 2940)


def test_training_draws_anew_and_an_evaluation_does_not():
    batch = rows(4)

    def chosen(key=None):
        return np.asarray(TASK.prepare(batch, key)["chosen"])

    np.testing.assert_array_equal(chosen(), chosen())
    np.testing.assert_array_equal(chosen(jax.random.key(1)), chosen(jax.random.key(1)))
    assert (chosen(jax.random.key(1)) != chosen(jax.random.key(2))).any()


def test_scores_are_those_of_the_chosen_tokens():
    batch = TASK.prepare(rows(3, 20), jax.random.key(0))
    logits = np.random.default_rng(1).standard_normal((3, 20, WORDS)).astype(np.float32)
    chosen = np.asarray(batch["chosen"])
    logits[~chosen] = np.nan
    scores = TASK.scores(lambda tokens, *, mask: jnp.asarray(logits), batch)
    wanted = np.asarray(batch["wanted"])
    for i in range(3):
        each = optax.softmax_cross_entropy_with_integer_labels(
            jnp.asarray(logits[i][chosen[i]]), jnp.asarray(wanted[i][chosen[i]])
        )
        np.testing.assert_allclose(scores.loss[i], each.sum(), rtol=1e-5)
    assert scores.count.tolist() == chosen.sum(-1).tolist()


def test_a_bert_learns_which_words_stand_beside_which():
    config = models.BertConfig(vocabulary=20, width=16, depth=1, heads=2, context=12, head="words")
    model = models.Bert(config, rngs=nnx.Rngs(0))
    first = np.random.default_rng(0).integers(4, 20, (64, 1))
    tokens = np.repeat(first, 12, axis=1).astype(np.int32)  # a text repeats one word
    table = data.Table({"tokens": tokens, "mask": np.ones(tokens.shape, bool)})
    task = tasks.MaskedTokens(20, 3, special=(0, 1, 2, 3), share=0.3)
    recipe = finetune.Recipe(steps=60, batch_size=32, learning_rate=1e-2)
    trainer = finetune.Trainer(model, nnx.Param, task, recipe)
    before = trainer.evaluate(trainer.init(), table)
    after = trainer.evaluate(finetune.fit(trainer, table), table)
    assert after.loss < before.loss / 2 and after.accuracy > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": 7}, "mask is 7; it must be a token below vocabulary = 7"),
        ({"special": (9,)}, "special is 9"),
        ({"share": 1.0}, "share is 1.0; it must be"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.MaskedTokens(**({"vocabulary": 7, "mask": 3} | options))
