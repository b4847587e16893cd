"""A problem on which fine-tuning is quick: which of three rows of an image is bright."""

import numpy as np
import pytest
from flax import nnx

from lorajax import data, finetune, models


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60).astype(np.int32)
    images = rng.integers(0, 90, (60, 8, 8, 1), dtype=np.uint8)
    images[np.arange(60), labels * 2] += 150
    return data.Table({"images": images, "labels": labels})


@pytest.fixture(scope="module")
def model(request):
    """A ViT in evaluation mode, of the configuration that the test's module names."""
    model = models.build(request.module.CONFIG, rngs=nnx.Rngs(0))
    model.eval()
    return model


@pytest.fixture(scope="session")
def losses_of():
    """Trains, and returns the state at the end with the loss of every step."""

    def train(trainer, table, **options):
        losses = []
        state = finetune.fit(
            trainer, table, callback=lambda r: losses.append(float(r.metrics.loss)), **options
        )
        return state, np.array(losses)

    return train
