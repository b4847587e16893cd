"""Figures: functions take an Axes and return it, name its axes, and can be read in print."""

import importlib
import inspect
import itertools
import pkgutil

import matplotlib
import numpy as np
import pytest
import xarray
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from lorajax import plots
from lorajax.plots import finetune, sweeps

SMALLEST = 8.0  # points, in a column of 3.4 inches
DRAWS = np.random.default_rng(0)
STEPS = [0, 5, 10]
HISTORY = {
    "step": list(range(10)),
    "loss": np.geomspace(2, 0.1, 10),
    "accuracy": np.linspace(0.1, 0.9, 10),
    "test_step": STEPS,
    "test_loss": [2.0, 0.8, 0.3],
    "test_accuracy": [0.1, 0.5, 0.8],
}
LAYERS = [f"blocks/{i}/attention/value" for i in range(5)]
PROBE = {
    "singular_values": DRAWS.uniform(0.1, 1, (3, 5, 2)),
    **{n: DRAWS.uniform(0.1, 1, (3, 5)) for n in ("norm", "misalignment", "imbalance")},
}


def swept(**sizes):
    """Positive numbers over named axes."""
    coords = {name: np.geomspace(1, 2, size) for name, size in sizes.items()}
    values = DRAWS.uniform(0.5, 2, tuple(sizes.values()))
    return xarray.DataArray(values, coords, tuple(sizes), name="losses")


# A call of every public function that draws on an Axes.
CALLS = {
    "plots.band": lambda axes: plots.band(
        axes, np.arange(4.0), DRAWS.uniform(1, 2, (3, 4)), color="C0", label="x"
    ),
    "plots.sweeps.curves": lambda axes: sweeps.curves(axes, swept(time=4, scale=2, seed=3)),
    "plots.sweeps.band": lambda axes: sweeps.band(axes, swept(time=4, seed=3), label="x"),
    "plots.sweeps.heat": lambda axes: sweeps.heat(
        axes, swept(rank=4, scale=3, seed=3), x="rank", y="scale"
    ),
    "plots.finetune.curve": lambda axes: finetune.curve(axes, HISTORY, "loss"),
    "plots.finetune.spectra": lambda axes: finetune.spectra(
        axes, STEPS, LAYERS, PROBE["singular_values"], [0, 3]
    ),
    "plots.finetune.quantity": lambda axes: finetune.quantity(
        axes, STEPS, PROBE["norm"], [0, 3], "norm"
    ),
}
# What joins others draw names the axes itself.
UNNAMED = {"plots.band"}
FIGURES = {
    "plots.panel": lambda: plots.panel(CALLS["plots.sweeps.band"]),
    "plots.finetune.curves": lambda: finetune.curves(HISTORY),
    "plots.finetune.quantities": lambda: finetune.quantities(STEPS, LAYERS, PROBE),
    "plots.finetune.sheet": lambda: finetune.sheet(
        DRAWS.uniform(-1, 1, (8, 6, 6, 1)), ["digit"] * 8, [0.5], [0.5]
    ),
}


def public_functions():
    """Public functions of the room, by name, with what they return."""
    modules = [plots] + [
        importlib.import_module(info.name)
        for info in pkgutil.iter_modules(plots.__path__, "lorajax.plots.")
    ]
    for module in modules:
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                if not name.startswith("_"):
                    yield f"{module.__name__.removeprefix('lorajax.')}.{name}", value


def test_every_function_that_takes_axes_is_called_here_and_returns_them():
    takers, makers = set(), set()
    for name, function in public_functions():
        signature = inspect.signature(function)
        if next(iter(signature.parameters), "") == "axes" and name != "plots.explain":
            takers.add(name)
            assert signature.return_annotation is Axes, name
        elif signature.return_annotation is Figure:
            makers.add(name)
    assert takers == set(CALLS) and makers == set(FIGURES)


def fonts(figure):
    """Sizes of all letters on a figure, in points."""
    figure.draw_without_rendering()
    shown = [each for each in figure.findobj(Text) if each.get_text() and each.get_visible()]
    return [each.get_fontsize() for each in shown]


@pytest.mark.parametrize("name", CALLS)
def test_it_draws_on_the_axes_that_it_is_given_and_names_them(name):
    with plots.style():
        figure, axes = plots.figure()
        assert CALLS[name](axes) is axes
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    assert axes.has_data()
    assert name in UNNAMED or (axes.get_xlabel() and axes.get_ylabel())
    assert min(fonts(figure)) >= SMALLEST


@pytest.mark.parametrize("name", FIGURES)
def test_every_panel_is_named_and_can_be_read(name):
    figure = FIGURES[name]()
    for axes in figure.axes:
        assert not axes.axison or (axes.get_xlabel() and axes.get_ylabel())
    assert min(fonts(figure)) >= SMALLEST


def test_letters_that_are_too_small_are_caught():
    with plots.style():
        figure, axes = plots.figure()
        axes.set_xlabel("time [1/s]", fontsize="x-small")
    assert min(fonts(figure)) < SMALLEST


def test_a_band_says_once_what_it_is_and_a_single_curve_has_none():
    with plots.style():
        _, axes = plots.figure()
        for color in ("C0", "C1"):
            sweeps.band(axes, swept(time=4, seed=3), color=color, label=color)
        labels = axes.get_legend_handles_labels()[1]
        assert sorted(labels) == ["C0", "C1", "± 1 sd of the log, 3 seeds"]
        _, axes = plots.figure()
        sweeps.band(axes, swept(time=4, seed=1), label="alone")
        assert axes.get_legend_handles_labels()[1] == ["alone"]


def test_a_heat_map_says_what_it_is_the_mean_over():
    figure, axes = plots.figure()
    sweeps.heat(axes, swept(rank=4, scale=3, seed=5), x="rank", y="scale", label="loss")
    assert figure.axes[1].get_ylabel() == "loss\n(mean over 5 seeds)"


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_the_same_data_gives_the_same_bytes(tmp_path, ending):
    for name in ("a", "b"):
        plots.save(finetune.curves(HISTORY), tmp_path / f"{name}{ending}")
    first, second = ((tmp_path / f"{name}{ending}").read_bytes() for name in ("a", "b"))
    assert first == second and len(first) > 1000


def test_further_formats_lie_beside_the_first(tmp_path):
    path = plots.save(finetune.curves(HISTORY), tmp_path / "x.png", ".pdf", ".svg")
    assert path == tmp_path / "x.png"
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")
    assert "step</text>" in (tmp_path / "x.svg").read_text(encoding="utf-8")


def test_a_notebook_shows_a_figure_and_keeps_its_own_style():
    before = dict(matplotlib.rcParams)
    figure, axes = plots.figure()
    axes.plot([0, 1])
    png, shown = figure._repr_png_()
    assert png.startswith(b"\x89PNG") and shown == {"width": 408, "height": 300}
    assert dict(matplotlib.rcParams) == before


# Machado, Oliveira, Fernandes 2009, severity 1: linear RGB as someone without one kind of cone
# sees it.
SIGHT = {
    "all cones": np.eye(3),
    "no L cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216]]
    + [[-0.003882, -0.048116, 1.051998]],
    "no M cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413]]
    + [[-0.01182, 0.04294, 0.968881]],
}


def lab(rgb, sight):
    """CIE L*a*b* (D65) of an sRGB color."""
    rgb = np.asarray(rgb)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(sight) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.asarray(to_xyz) @ seen / [0.9505, 1.0, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
def test_colors_are_told_apart(sight):
    """By 10 units of CIE L*a*b*, four times what is just noticed; red and green are not."""
    colors = [to_rgb(each["color"]) for each in plots.STYLE["axes.prop_cycle"]]
    points = [lab(color, SIGHT[sight]) for color in colors]
    gaps = [np.linalg.norm(a - b) for a, b in itertools.combinations(points, 2)]
    assert min(gaps) > 10
    if sight == "no M cones":
        red, green = lab((0.6, 0.3, 0.1), SIGHT[sight]), lab((0.4, 0.45, 0.1), SIGHT[sight])
        assert np.linalg.norm(red - green) < 10
