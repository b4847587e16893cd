"""The models of transformers; and their writers of fixtures kept out of the doctests."""

import importlib.util
import pathlib
import sys

import pytest

from benchmarks import peers

# They need torch.
collect_ignore = ["references.py", "text_references.py"]


@pytest.fixture(scope="session")
def library():
    """`text_references.py` as a module; skips without torch or transformers."""
    peers.load_torchvision()
    for name in ("torch", "transformers"):
        pytest.importorskip(name, exc_type=(ImportError, RuntimeError))
    path = pathlib.Path(__file__).with_name("text_references.py")
    spec = importlib.util.spec_from_file_location("lorajax_text_references", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
