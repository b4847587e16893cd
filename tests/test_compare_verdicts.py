"""The comparison of two runs of the main job."""

import copy
import importlib.util
import pathlib

import pytest

from lorajax import claims

PATH = pathlib.Path(__file__).with_name("compare_verdicts.py")
SPEC = importlib.util.spec_from_file_location("compare_verdicts", PATH)
assert SPEC is not None and SPEC.loader is not None
compare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare)

CLAIM = {"id": "a.b", "verdict": "confirmed", "error": 0.1, "tolerance": 1.0}
REPORT = {"claims": [CLAIM | {"control": {"verdict": "refuted"}}]}


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({}, 0),
        ({"error": 0.12}, 0),
        ({"error": 0.2}, 1),
        ({"error": float("nan")}, 1),
        ({"verdict": "refuted"}, 1),
        ({"control": {"verdict": "confirmed"}}, 1),
        ({"id": "a.c"}, 2),
    ],
)
def test_what_differs_is_told(change, count):
    other = copy.deepcopy(REPORT)
    other["claims"][0].update(change)
    assert len(compare.differences(REPORT, other)) == count


@pytest.mark.parametrize(("error", "count"), [(-2.41, 0), (-2.45, 0), (-2.1, 1)])
def test_a_tolerance_of_zero_leaves_room_for_rounding(error, count):
    one, other = (copy.deepcopy(REPORT) for _ in range(2))
    one["claims"][0].update(error=-2.4, tolerance=0.0)
    other["claims"][0].update(error=error, tolerance=0.0)
    assert len(compare.differences(one, other)) == count


@pytest.mark.parametrize(
    ("derivation", "error", "count"),
    [
        ("rounding: eps times the dimension", 5.3e-15, 0),
        ("rounding: eps times the dimension", 4.0e-14, 1),
        ("solver error, 2 · steps · rtol", 5.3e-15, 0),
        ("order of the next term, and solver error", 5.3e-15, 1),
    ],
)
def test_a_tolerance_of_rounding_alone_leaves_all_of_it(derivation, error, count):
    one, other = (copy.deepcopy(REPORT) for _ in range(2))
    for report, each in ((one, 2.9e-15), (other, error)):
        report["claims"][0].update(error=each, tolerance=2e-14, derivation=derivation)
    assert len(compare.differences(one, other)) == count


def test_claims_say_where_their_tolerance_is_rounding_alone():
    words = [claim.tolerance for claim in claims.REGISTRY.values()]
    alone = [each for each in words if each.startswith(compare.OWN)]
    assert 0 < len(alone) < len(words)
    # What is more than that begins with what is more.
    assert not [each for each in alone if "standard error" in each or "next term" in each]
