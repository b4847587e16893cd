"""Simulations show what their captions say, on a small form."""

import importlib.util
import pathlib

import numpy as np
import pytest

from lorajax import data, models

SIMS = pathlib.Path(__file__).resolve().parents[1] / "sims"


def load(path: str):
    """A simulation as a module."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, SIMS / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_run_is_stuck_above_the_threshold_and_some_are_below():
    sim = load("jang2024/stuck_map.py")
    profile = sim.Profile(samples=(3, 6, 20), ranks=(2, 3, 4, 6, 7), instances=3, starts=4)
    found = sim.simulate(profile)
    assert dict(found.sizes) == {"samples": 3, "rank": 5, "instance": 3, "start": 4}
    numbers = sim.statements(found)
    # 3 samples: ranks 3, 4, 6, 7; 6 samples: 4, 6, 7; 20 samples: 6, 7.
    assert numbers["runs above the threshold"] == 9 * 12
    assert numbers["of them not certified global"] == 0
    assert numbers["of them stuck above the best of their rank, share"] > 0
    assert numbers["runs that do not rest"] == 0
    # What is stuck is above the global minimum, and an instance's best run is never stuck.
    assert np.all(found["stuck"].values <= found["uncertified"].values)
    assert np.all(found["stuck"].values.min(axis=-1) == 0)
    assert len(sim.draw(found).axes) == 4  # two maps and their color bars


class Sudden(Exception):
    """A run is killed."""


@pytest.mark.slow
def test_pretraining_goes_on_where_it_was_and_its_first_stage_can_be_made_longer(
    tmp_path, monkeypatch
):
    sim = load("pretrain_vit.py")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60).astype(np.int32)
    images = rng.integers(0, 90, (60, 16, 16, 3), dtype=np.uint8)
    images[np.arange(60), labels * 4] += 150
    table = data.Table({"images": images, "labels": labels})
    found = data.Dataset("rows", table, table, ("a", "b", "c"))
    monkeypatch.setattr(sim.data, "load", lambda source, folder=None: found)
    config = models.ViTConfig((16, 16), 4, 16, 1, 2, classes=3)
    plan = sim.Plan("rows", "rows", config, ((8, 1),), 20, 1e-3, "zoom-flip", 0.1, "muon", 1)
    monkeypatch.setitem(sim.PLANS, "rows", plan)

    def train(name, stages, stop=None):
        def stepped(self, record):
            if record.step == stop:
                raise Sudden

        monkeypatch.setattr(sim.Teller, "stepped", stepped)
        out = tmp_path / f"{name}.safetensors"
        sim.run("rows", "full", None, out, tmp_path / name, stages)
        return models.notes(out), models.tensors(models.load(out))

    stages = ((8, 2), (16, 2))
    notes, whole = train("whole", stages)
    with pytest.raises(Sudden):
        train("cut", stages, stop=5)
    _, resumed = train("cut", stages)
    for name, each in whole.items():
        np.testing.assert_array_equal(resumed[name], each)
    assert notes["data"].startswith("rows; 60") and '"side": 16' in notes["stages"]
    with pytest.raises(ValueError, match="has taken 6 steps of stage 0 already"):
        train("cut", ((8, 1), (16, 2)))
    # A first stage may go on, to another end.
    train("cut", ((8, 3), (16, 1)))
    assert {each.stem for each in (tmp_path / "cut").glob("*.safetensors")} == {
        *("8x2", "8x2-16x2"),
        *("8x3", "8x3-16x1"),
    }
