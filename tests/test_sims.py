"""Simulations show what their captions say, on a small form."""

import importlib.util
import pathlib

import numpy as np

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
