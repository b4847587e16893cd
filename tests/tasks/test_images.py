"""What images are asked, and how scores add up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorajax import models, tasks

RNG = np.random.default_rng(0)
TASK = tasks.Images((0.5,), (0.25,), channels=3, image_size=(8, 8))
BATCH = {
    "images": RNG.integers(0, 256, (6, 10, 12, 1), dtype=np.uint8),
    "labels": np.arange(6, dtype=np.int32) % 3,
}


class Scorer:
    """A model that sees the mean brightness alone."""

    dtype = None

    def __call__(self, pixels):
        return pixels.mean((1, 2)) * jnp.asarray([[1, -1, 2]], jnp.float32)


def test_images_are_brought_to_what_the_model_takes(key):
    plain = TASK.prepare(BATCH)
    assert plain["pixels"].shape == (6, 8, 8, 3) and plain["pixels"].dtype == jnp.float32
    as_they_come = tasks.Images((0.5,), (0.25,), channels=1).prepare(BATCH)
    want = (BATCH["images"] / 255 - 0.5) / 0.25
    np.testing.assert_allclose(as_they_come["pixels"], want, atol=1e-5)
    # A key augments, where the task says so, and says the same again.
    np.testing.assert_array_equal(TASK.prepare(BATCH, key)["pixels"], plain["pixels"])
    moved = tasks.Images((0.5,), (0.25,), image_size=(8, 8), augment="crop-flip")
    once, again = (moved.prepare(BATCH, key)["pixels"] for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, plain["pixels"])


def test_the_task_of_a_model_is_read_off_its_configuration():
    config = models.config("vit-ti/4", image_size=(8, 8), classes=3)
    found = tasks.Images.of(config, smoothing=tasks.SMOOTHING)
    assert found == tasks.Images(config.mean, config.std, 3, (8, 8), smoothing=0.1)
    assert hash(found) == hash(tasks.Images.of(config, smoothing=0.1))
    assert tasks.Images.of(models.config("cifar-resnet20")).image_size is None
    assert isinstance(found, tasks.Task) and found.unit == "images"


def test_smoothing_trains_and_is_not_reported():
    model, batch = Scorer(), TASK.prepare(BATCH)
    plain = TASK.scores(model, batch)
    np.testing.assert_allclose(plain.objective, plain.loss, rtol=1e-5)
    logits = model(batch["pixels"])
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    np.testing.assert_allclose(plain.loss, entropy, rtol=1e-5)
    np.testing.assert_array_equal(plain.hits, np.asarray(logits).argmax(-1) == BATCH["labels"])
    smooth = tasks.classified(logits, batch["labels"], 0.3)
    np.testing.assert_allclose(smooth.loss, plain.loss, rtol=1e-5)
    flat = -jax.nn.log_softmax(logits).mean(-1)
    np.testing.assert_allclose(smooth.objective, 0.7 * entropy + 0.3 * flat, rtol=1e-5)


def test_totals_of_weighted_batches_are_those_of_all_samples():
    scores = tasks.Scores(*(jnp.asarray(RNG.random(6), jnp.float32) for _ in range(4)))
    whole = tasks.totals(scores)
    filled = [
        tasks.totals(jax.tree.map(lambda x, i=i: x[jnp.asarray(i)], scores), jnp.asarray(w))
        for i, w in (([0, 1, 2, 3], np.ones(4, "f")), ([4, 5, 4, 4], np.float32([1, 1, 0, 0])))
    ]
    for name in whole._fields:
        parts = sum(float(getattr(each, name)) for each in filled)
        assert parts == pytest.approx(float(getattr(whole, name)), rel=1e-6)
    nothing = tasks.totals(scores, jnp.zeros(6, jnp.float32))
    assert float(nothing.mean("loss")) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": "mixup"}, "augment is 'mixup'; it must be one of none, crop"),
        ({"smoothing": 1.0}, "smoothing is 1.0"),
        ({"smoothing": float("nan")}, "smoothing is nan"),
    ],
)
def test_bad_tasks(changes, message):
    with pytest.raises(ValueError, match=message):
        tasks.Images((0.5,), (0.5,), **changes)


def test_mixing_trains_on_two_classes_in_the_shares_of_their_pictures(key):
    task = tasks.Images((0.5,), (0.25,), image_size=(8, 8), smoothing=0.1, mixup=0.4)
    plain, mixed = task.prepare(BATCH)["pixels"], task.prepare(BATCH, key)
    share = np.asarray(mixed["share"])
    assert share.shape == (6,) and 0.5 <= share.min() < share.max() <= 1
    weight = share[:, None, None, None]
    other = np.concatenate([plain[-1:], plain[:-1]])
    np.testing.assert_allclose(mixed["pixels"], weight * plain + (1 - weight) * other, atol=1e-5)
    scores = task.scores(Scorer(), mixed)
    logits = np.asarray(Scorer()(mixed["pixels"]), np.float64)
    chances = np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    aims = np.eye(3)[BATCH["labels"]] * share[:, None]
    aims += np.eye(3)[np.roll(BATCH["labels"], 1)] * (1 - share[:, None])
    expected = -((0.9 * aims + 0.1 / 3) * chances).sum(-1)
    np.testing.assert_allclose(scores.objective, expected, rtol=1e-5)
    np.testing.assert_allclose(scores.loss, -chances[np.arange(6), BATCH["labels"]], rtol=1e-4)
    # Nothing is mixed where nothing is trained, and the augmentation's draws stay.
    assert "share" not in task.prepare(BATCH)
    moved, both = (
        tasks.Images((0.5,), (0.25,), image_size=(8, 8), augment="flip", mixup=alpha)
        for alpha in (0.0, 1e-6)  # so small an α leaves nearly nothing of the other
    )
    once, twice = (each.prepare(BATCH, key)["pixels"] for each in (moved, both))
    np.testing.assert_allclose(once, twice, atol=1e-4)
    with pytest.raises(ValueError, match="mixup is -1"):
        tasks.Images((0.5,), (0.25,), mixup=-1.0)
