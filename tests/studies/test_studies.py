"""Studies are found from their folder, told their parameters, and say what does not fit."""

import inspect
import subprocess
import sys

import numpy as np
import pytest

from lorajax import studies


def test_the_parameters_of_a_study_are_those_of_its_sweep():
    assert set(studies.names()) == {
        "flow",
        "init-scale",
        "rank-rule",
        "rank-scale",
        "spectrum-gap",
    }
    for name in studies.names():
        study = studies.find(name)
        assert [p.name for p in study.parameters] == list(inspect.signature(study.make).parameters)
        for parameter in study.parameters:
            assert parameter.about and parameter.check(parameter.default) == parameter.default


def test_the_default_values_are_the_decades_and_steps_they_stand_for():
    scales = {p.name: p.default for p in studies.find("init-scale").parameters}["scales"]
    assert tuple(scales) == (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    ratios = {p.name: p.default for p in studies.find("spectrum-gap").parameters}["ratios"]
    np.testing.assert_array_equal(ratios, np.linspace(0.1, 1.0, 19))


def test_studies_are_listed_without_jax():
    code = (
        "import sys; from lorajax import studies; studies.names(); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("nothing", {}, "must be one of flow"),
        ("flow", {"sizes": 3}, "no parameter 'sizes'"),
        ("flow", {"scales": (-1.0,)}, "scales has -1.0; it must be above 0"),
        ("flow", {"scales": (float("nan"),)}, "scales has nan"),
        ("flow", {"seeds": 3}, "seeds is 3; give a list"),
        ("flow", {"seeds": ()}, "seeds is empty"),
        ("flow", {"seeds": (1, 1)}, "has 1 twice"),
        ("flow", {"ranks": (0,)}, "ranks has 0"),
        ("flow", {"ranks": (1.5,)}, "ranks has 1.5; it must be an integer"),
        ("flow", {"ranks": (50,)}, "rank is 50"),
        ("flow", {"shape": (4,)}, r"shape is \(4,\)"),
        ("flow", {"starts": ("pissa",), "scales": (1.0,)}, "no parameter 'scale'"),
        ("flow", {"starts": ("nope",)}, "start is 'nope'"),
        ("flow", {"observe": ("everything",)}, "must be one of losses"),
        ("init-scale", {"target": "left"}, "must be one of generic"),
        ("init-scale", {"starts": ("pissa",)}, "no parameter 'scale'"),
    ],
)
def test_what_does_not_fit_is_named(name, given, words):
    with pytest.raises(ValueError, match=words):
        studies.find(name).prepare(**given)
