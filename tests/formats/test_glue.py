"""GLUE's figure trains in torch what it trains here: PEFT's losses and scores are those of JAX."""

import importlib.util
import pathlib

import numpy as np
import pytest

pytestmark = [pytest.mark.formats, pytest.mark.filterwarnings("ignore")]
for package in ("torch", "transformers", "peft", "tokenizers"):
    try:
        __import__(package)
    except Exception as error:  # a package whose torchvision does not load counts as missing
        pytest.skip(f"{package} does not load: {error}", allow_module_level=True)

SIM = pathlib.Path(__file__).resolve().parents[2] / "sims" / "spectral_dynamics" / "glue.py"


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_peft_takes_the_same_steps(task, data_dir):
    spec = importlib.util.spec_from_file_location("glue", SIM)
    sim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sim)
    part = sim.Part({"rule": 1, "peft": 1}, 1, 256, 128, 16, 64)
    runs = [sim.Run(task, method, 0, 1e-3, **sim.sizes(part, method)) for method in part.seeds]
    bench = sim.Bench(data_dir, runs[0])
    ours, theirs = map(bench, runs)
    assert len(ours["losses"]) == 8 and ours["losses"][-1] != ours["losses"][0]
    np.testing.assert_allclose(theirs["losses"], ours["losses"], rtol=0, atol=1e-4)
    assert theirs["parameters"] == ours["parameters"] > 0
    np.testing.assert_allclose(theirs["score"], ours["score"], atol=1e-3)
