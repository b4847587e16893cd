"""Figures of a fine-tuning run: its curves, and the theory's quantities layer by layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lorajax import plots

UNITS = {"loss": "loss [nats]", "accuracy": "accuracy [share]"}


def curve(axes: Axes, history: dict[str, Any], name: str) -> Axes:
    """One measure of the batches and of the test set against steps.

    Args:
      axes: to draw on.
      history: `step` and `test_step`, and the measure for both.
      name: of the measure, "loss" or "accuracy"; that of the test set is `test_<name>`.

    Returns:
      The Axes.
    """
    axes.plot(history["step"], np.asarray(history[name]), alpha=0.35, label="training batch")
    axes.plot(history["test_step"], history[f"test_{name}"], "o-", label="test")
    axes.set(xlabel="step", ylabel=UNITS.get(name, name))
    axes.legend()
    return axes


def curves(history: dict[str, Any]) -> Figure:
    """Loss and accuracy against steps.

    Args:
      history: `step`, `loss` and `accuracy` of the batches, and `test_step`, `test_loss` and
        `test_accuracy`.

    Returns:
      A figure with two panels.
    """
    figure, (left, right) = plots.figure(1, 2)
    with plots.style():
        curve(left, history, "loss").set_yscale("log")
        curve(right, history, "accuracy")
    return figure


def sheet(
    pixels: Any, titles: Sequence[str], mean: Sequence[float], std: Sequence[float]
) -> Figure:
    """The first images of a batch as a model sees them, with their classes.

    Args:
      pixels: normalized, shape (batch, height, width, 1 or 3).
      titles: of each image.
      mean: per channel, or one for all, that was taken off, in units of [0, 1].
      std: likewise, that was divided by.

    Returns:
      A figure with up to 24 panels, in the batch's order.
    """
    count = min(len(titles), 24)
    shown = np.asarray(pixels[:count], np.float32) * np.asarray(std) + np.asarray(mean)
    shown = np.clip(np.round(shown * 255), 0, 255).astype(np.uint8)
    columns = min(count, 6)
    figure, grid = plots.figure(-(-count // columns), columns, size=(1.6, 1.8))
    with plots.style():
        for i, axes in enumerate(np.ravel(grid)):
            axes.set_axis_off()
            if i < count:
                axes.imshow(shown[i].squeeze(), cmap="gray", vmin=0, vmax=255)
                axes.set_title(titles[i][:16])
    return figure


def spectra(
    axes: Axes, steps: Sequence[int], layers: Sequence[str], values: Any, largest: Sequence[int]
) -> Axes:
    """Singular values of some layers' updates against steps, the smaller ones the paler.

    Args:
      axes: to draw on.
      steps: of the probes.
      layers: paths of all layers.
      values: shape (steps, layers, rank); zeros that fill layers of smaller rank are left out.
      largest: places of the layers to draw, one color each.

    Returns:
      The Axes.
    """
    values = np.asarray(values)
    # Layers of smaller rank are padded with zeros, which are no singular values of theirs.
    values = np.where(values.max(axis=0) > 0, values, np.nan)
    for color, layer in enumerate(largest):
        for i in range(values.shape[2]):
            label, alpha = layers[layer] if i == 0 else None, max(0.25, 1 - 0.25 * i)
            axes.plot(steps, values[:, layer, i], f"C{color}", alpha=alpha, label=label)
    axes.set(xlabel="step", ylabel="singular values of the update")
    axes.legend()
    return axes


def quantity(
    axes: Axes, steps: Sequence[int], values: Any, largest: Sequence[int], label: str
) -> Axes:
    """One number of every layer against steps: some layers in color, the others gray.

    Args:
      axes: to draw on; its ordinate is logarithmic where all numbers are positive.
      steps: of the probes.
      values: shape (steps, layers).
      largest: places of the layers in color, as in `spectra`.
      label: of the ordinate.

    Returns:
      The Axes.
    """
    found, bold = np.asarray(values), list(largest)
    for layer in [i for i in range(found.shape[1]) if i not in bold] + bold:
        color = f"C{bold.index(layer)}" if layer in bold else "0.6"
        axes.plot(steps, found[:, layer], color=color, lw=1.4 if layer in bold else 0.6)
    axes.set(xlabel="step", ylabel=label)
    if np.all(found[np.isfinite(found)] > 0) and np.isfinite(found).any():
        axes.set_yscale("log")
    return axes


def quantities(steps: Sequence[int], layers: Sequence[str], probe: dict[str, Any]) -> Figure:
    """Spectra, norms, alignment and imbalance of every layer against steps.

    Args:
      steps: of the probes.
      layers: paths of the layers.
      probe: fields of `finetune.Probe`, each with a leading axis of steps.

    Returns:
      A figure with four panels. The four layers with the largest updates are in color, the others
      gray; of the spectra, those four alone are drawn.
    """
    figure, axes = plots.figure(2, 2)
    values = np.asarray(probe["singular_values"])
    largest = np.argsort(-values[-1, :, 0])[:4].tolist()
    with plots.style():
        spectra(axes[0, 0], steps, layers, values, largest)
        for panel, name, label in (
            (axes[0, 1], "norm", "norm ‖[A; Bᵀ]‖₂"),
            (axes[1, 0], "misalignment", "1 − |cos| to the gradient's top"),
            (axes[1, 1], "imbalance", "imbalance ‖AᵀA − BBᵀ‖"),
        ):
            quantity(panel, steps, probe[name], largest, label)
    return figure
