"""Figures of a fine-tuning run: its curves, and the theory's quantities layer by layer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lorajax import plots


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
        for axes, name in ((left, "loss"), (right, "accuracy")):
            values = np.asarray(history[name])
            axes.plot(history["step"], values, alpha=0.35, label="training batch")
            axes.plot(history["test_step"], history[f"test_{name}"], "o-", label="test")
            axes.set_xlabel("step")
            axes.set_ylabel(name)
        left.set_yscale("log")
        left.legend()
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
                axes.set_title(titles[i][:20], fontsize="x-small")
    return figure


def quantities(steps: Sequence[int], layers: Sequence[str], probe: dict[str, Any]) -> Figure:
    """Spectra, norms, alignment and imbalance of every layer against steps.

    Args:
      steps: of the probes.
      layers: paths of the layers.
      probe: fields of `finetune.Probe`, each with a leading axis of steps.

    Returns:
      A figure with four panels. Of the spectra, the four layers with the largest updates are drawn.
    """
    figure, axes = plots.figure(2, 2)
    values = np.asarray(probe["singular_values"])
    # Layers of smaller rank are padded with zeros, which are no singular values of theirs.
    values = np.where(values.max(axis=0) > 0, values, np.nan)
    largest = np.argsort(-values[-1, :, 0])[:4]
    with plots.style():
        panel = axes[0, 0]
        for color, layer in enumerate(largest):
            for i in range(values.shape[2]):
                label = layers[layer] if i == 0 else None
                alpha = max(0.25, 1 - 0.25 * i)
                panel.plot(steps, values[:, layer, i], f"C{color}", alpha=alpha, label=label)
        panel.set_ylabel("singular values of the update")
        panel.legend(fontsize="x-small")
        for panel, name, label in (
            (axes[0, 1], "norm", "‖[A; Bᵀ]‖₂"),
            (axes[1, 0], "misalignment", "1 − |cos| to the gradient's top direction"),
            (axes[1, 1], "imbalance", "‖AᵀA − BBᵀ‖"),
        ):
            found = np.asarray(probe[name])
            for layer in range(found.shape[1]):
                bold = layer in largest
                color = f"C{list(largest).index(layer)}" if bold else "0.6"
                width = 1.6 if bold else 0.7
                panel.plot(steps, found[:, layer], color=color, linewidth=width)
            panel.set_ylabel(label)
            if np.all(found[np.isfinite(found)] > 0) and np.isfinite(found).any():
                panel.set_yscale("log")
        for panel in axes[1]:
            panel.set_xlabel("step")
    return figure
