"""A run that is stopped, or whose last state is damaged, comes to the same end."""

import jax
import pytest

from lorajax import adapters, finetune, models, tasks
from lorajax.finetune import checkpoints

CONFIG = models.ViTConfig(
    (8, 8), 4, width=16, depth=1, heads=2, classes=3, channels=1, mean=(0.5,), std=(0.25,)
)
RECIPE = finetune.Recipe(steps=12, batch_size=8)


def adapted_trainer(model):
    adapted = adapters.adapt(model, "**/attention/*", key=jax.random.key(1), rank=2)
    task = tasks.Images.of(CONFIG)
    return finetune.Trainer(adapted, adapters.trainable(adapted), task, RECIPE)


def run(model, table, folder, stop=None):
    with checkpoints.Checkpoints(folder, {}, keep=3) as store:
        looks = finetune.Looks(tests=1, probes=0, checkpoints=3)
        found = finetune.run(
            adapted_trainer(model), table, table, looks=looks, store=store, stop=stop
        )
    return {name: value for name, value in found.history.items() if name != "seconds"}


def test_it_is_kept_and_goes_on(model, table, tmp_path):
    whole = run(model, table, tmp_path / "whole")
    asked = iter([False] * 4 + [True])
    with pytest.raises(finetune.Stopped, match="stopped after step 5 of 12"):
        run(model, table, tmp_path / "cut", lambda: next(asked))
    assert (tmp_path / "cut" / "5").is_dir()
    assert run(model, table, tmp_path / "cut") == whole
    # What a failing disk left of the last states is passed over, and the steps are taken again.
    for path in (tmp_path / "cut" / "12").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert run(model, table, tmp_path / "cut") == whole
    for path in (tmp_path / "cut").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no state that can be read \(step 12"):
        run(model, table, tmp_path / "cut")
