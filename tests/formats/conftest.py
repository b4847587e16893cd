"""Helpers of this folder are no tests, and some need packages that are no part of the tests."""

import warnings

from benchmarks import peers

# Before any of these files imports one of them; what they warn of meanwhile is not of these tests.
with warnings.catch_warnings(action="ignore"):
    peers.load_torchvision()

collect_ignore = ["make_fixtures.py", "make_qwix_fixtures.py", "tiny_models.py", "written_cases.py"]
