"""The models that come with the package: what their files say, and their logits by hand."""

import json
import math
import pathlib
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import data, finetune, models, tasks

ROOT = pathlib.Path(models.__file__).resolve().parents[2]
LARGEST = 12 * 1000**2
"""Bytes of all files that are committed and no text."""


def logits(arrays, config, images):
    """A pre-norm ViT of mean-pooled patches in NumPy, from Dosovitskiy et al. 2020 (stated)."""
    side, width = config.patch_size, config.width
    (rows, columns), count = config.grid, len(images)
    x = (images / 255 - np.array(config.mean)) / np.array(config.std)
    x = (
        x.reshape(count, rows, side, columns, side, 3)
        .swapaxes(2, 3)
        .reshape(count, -1, 3 * side**2)
    )

    def linear(x, name):
        return x @ arrays[f"{name}.kernel"] + arrays[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.epsilon)
        return x * arrays[f"{name}.scale"] + arrays[f"{name}.bias"]

    def heads(x):
        return x.reshape(count, -1, config.heads, width // config.heads).swapaxes(1, 2)

    x = linear(x, "embeddings.patches") + arrays["embeddings.positions"]
    for i in range(config.depth):
        at = f"blocks.{i}."
        y = norm(x, at + "norm1")
        query, key, value = (
            heads(linear(y, f"{at}attention.{k}")) for k in ("query", "key", "value")
        )
        scores = np.exp(query @ key.swapaxes(2, 3) / math.sqrt(width // config.heads))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ value
        x = x + linear(mixed.swapaxes(1, 2).reshape(x.shape), at + "attention.out")
        y = linear(norm(x, at + "norm2"), at + "mlp.up")
        y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
        x = x + linear(y, at + "mlp.down")
    return linear(norm(x.mean(1), "norm"), "head")


def test_the_colored_vit_gives_the_logits_of_a_vit_by_hand():
    model = models.load("vit-tiny-imagenet")
    config = model.config
    assert (config.channels, config.classes, config.pool) == (3, 200, "mean")
    pictures = data.load("cifar10-sample").test.take(slice(0, 1000, 250)).images[:]
    pictures = np.asarray(data.resize(jnp.asarray(pictures), config.image_size))
    arrays = {name: x.astype(np.float64) for name, x in models.tensors(model).items()}
    expected = logits(arrays, config, pictures)
    task = tasks.Images.of(config)
    pixels = task.prepare({"images": pictures, "labels": np.zeros(4, np.int32)})["pixels"]
    found = nnx.jit(lambda model, x: model(x))(model, pixels)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_its_file_says_how_it_came_about():
    notes = models.notes("vit-tiny-imagenet")
    classes = json.loads(notes["classes"])
    assert len(classes) == 200 and classes[0] == "goldfish"
    stages = json.loads(notes["stages"])
    curve = [accuracy for stage in stages for accuracy in stage["test_accuracy"]]
    assert curve[0] < 0.02 and curve[-1] == max(curve) > 10 * curve[0]
    # Rounded to half precision, and for larger pictures than the last stage was trained on.
    assert float(notes["test_accuracy"]) > curve[-1] - 2e-3
    config = models.load("vit-tiny-imagenet").config
    assert config.image_size[0] >= stages[-1]["side"]
    assert "sims/pretrain_vit.py --model tiny-imagenet" in notes["command"]


@pytest.mark.slow
def test_it_has_the_accuracy_that_its_file_states(data_dir):
    found = data.load("tiny_imagenet_200x200.npz", folder=data_dir)
    model = models.load("vit-tiny-imagenet")
    trainer = finetune.Trainer(
        model, nnx.Param, tasks.Images.of(model.config), finetune.Recipe(steps=1)
    )
    measured = trainer.evaluate(trainer.init(), found.test, batch_size=500)
    stated = float(models.notes("vit-tiny-imagenet")["test_accuracy"])
    # Other processors round otherwise, which turns a few of the 10,000 pictures.
    assert float(measured.accuracy) == pytest.approx(stated, abs=1e-3)


@pytest.mark.apart
def test_the_colored_vit_knows_pictures():
    """Its features, frozen, tell the classes of CIFAR-10 better than a random ViT's do."""
    found = data.load("cifar10-sample")

    def probed(model):
        task = tasks.Images.of(model.config)
        model = finetune.fit_head(model, task, found.train, epochs=3)
        trainer = finetune.Trainer(model, nnx.Param, task, finetune.Recipe(steps=1))
        return float(trainer.evaluate(trainer.init(), found.test, batch_size=500).accuracy)

    model = models.load("vit-tiny-imagenet", classes=10, image_size=32)
    fresh = models.build(model.config, rngs=nnx.Rngs(0))
    fresh.eval()
    # The standard error of a difference of two shares of 1,000 pictures is at most 2.2 points.
    assert probed(model) > probed(fresh) + 0.066


def test_what_is_committed_and_no_text_is_small():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip(f"git cannot say what is committed here: {listed.stderr.strip()}")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    sizes = {}
    for file in files:
        content = file.read_bytes() if file.is_file() else b""
        if b"\0" in content:
            sizes[file.name] = len(content)
    assert {f"{name}.safetensors" for name in models.EMBEDDED} <= sizes.keys()
    assert sum(sizes.values()) < LARGEST, sorted(sizes.items(), key=lambda x: -x[1])[:5]
