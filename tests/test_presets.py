"""The papers' sweeps: what the captions of Xu et al.'s figures say, in numbers."""

import numpy as np
import pytest

from lorajax import presets, sweeps
from lorajax.plots.sweeps import init_scale_figure


@pytest.fixture(scope="module", params=["generic", "top", "bottom"])
def figure(request):
    """Target, and the sweep of its figure in a small form."""
    preset = presets.init_scale(8, 2, 5, 5, target=request.param)
    found = sweeps.sweep(preset.function, preset.axes, settings=preset.settings, **preset.options)
    return request.param, found, presets.init_scale_statements(found)


def test_smaller_starts_escape_later_and_align_better(figure):
    _, found, numbers = figure
    assert not found["status"].any()
    assert np.all(np.diff(numbers["escape"]) > 0)
    assert np.all(np.diff(np.log(numbers["least misalignment"])) < 0)


def test_along_a_principal_component_smaller_is_lower_and_spectral_is_exponential(figure):
    target, _, numbers = figure
    if target == "generic":
        # There the rank-one start leaves a tail: recorded, and contradicted in no caption we know.
        assert np.all(numbers["spectral final loss"] > 1e-13)
        return
    assert np.all(np.diff(np.log(numbers["final loss"])) < 0)
    # The starts that had time enough after their escape fall exponentially to rounding.
    assert np.all(numbers["spectral final loss"][:3] < 1e-13)
    np.testing.assert_allclose(numbers["spectral steadiness"][:3], 1, atol=0.05)


def test_a_power_of_the_time_is_no_exponential():
    times = np.linspace(1.0, 1e3, 4000)
    assert presets._steadiness(times, times**-5.0) < 0.5
    assert abs(presets._steadiness(times, np.exp(-times / 20)) - 1) < 1e-6
    assert np.isnan(presets._steadiness(times, np.full_like(times, 1e-5)))


def test_the_figure_has_a_curve_for_every_scale_and_start(figure):
    _, found, _ = figure
    left, middle, right = init_scale_figure(found).axes
    assert len(left.lines) == 2 * 4 and len(middle.lines) == 4 and len(right.lines) == 3
