"""What figures of Xu et al. 2025 on networks share: small and spectral starts, by descent."""

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from lorajax import data, finetune, initializers, plots, tasks

STARTS = ("small", "spectral")
RANK = 4
_MADE = (
    initializers.small,
    # The paper's spectral start lies along the top direction alone.
    functools.partial(initializers.spectral, directions=1),
)
_NAMES = ("loss", "accuracy", "1 − |cos|, mean of layers", "‖[A; Bᵀ]‖₂, mean of layers")


class Sizes(Protocol):
    """What is asked for of a profile: steps of descent, steps between looks, samples a step."""

    @property
    def steps(self) -> int: ...
    @property
    def every(self) -> int: ...
    @property
    def batch(self) -> int: ...


def run_of(
    network: Any,
    task: tasks.Task,
    train: data.Table,
    gradients: Mapping[str, Any],
    sizes: Sizes,
    rate: float,
    *,
    seed: int,
    **options: Any,
) -> finetune.Run:
    """A lane of plain descent from either start.

    Args:
      network: its head fitted.
      task: what a batch means to it.
      train: what to train on.
      gradients: of the layers that are adapted.
      sizes: of a profile.
      rate: learning rate times the largest singular value of any layer's gradient.
      seed: of the order.
      **options: of `finetune.run_of`: `targets`, `watch`, `orders`.

    Returns:
      The Run.
    """
    recipe = finetune.Recipe(
        steps=sizes.steps,
        batch_size=sizes.batch,
        optimizer="sgd",
        learning_rate=rate / max(float(each.norm) for each in gradients.values()),
        schedule="constant",
        seed=seed,
    )
    given = {"rank": RANK, "start": list(_MADE), "every": sizes.every, **options}
    return finetune.run_of(network, task, train, recipe, gradients=gradients, **given)


def draw(panels: Any, lanes: Any, sizes: Sizes, color: str, start: str) -> None:
    """Curves of one start into the panels for loss, accuracy, alignment and norm.

    Args:
      panels: four.
      lanes: of one start and scale, repetitions first.
      sizes: of a profile.
      color: of the start.
      start: its name.
    """
    steps, count = np.arange(0, sizes.steps, sizes.every), lanes.sizes["order"]
    loss, accuracy = (
        lanes[name].values.reshape(count, -1, sizes.every).mean(2) for name in ("loss", "accuracy")
    )
    for panel, curve, style, label in (
        (panels[0], loss, "-", f"{start}, training"),
        (panels[0], lanes["watch_loss"].values, "--", f"{start}, held-out"),
        (panels[1], accuracy, "-", None),
        (panels[1], lanes["watch_accuracy"].values, "--", None),
        (panels[2], lanes["misalignment"].values.mean(2), "-", None),
        (panels[3], lanes["norm"].values.mean(2), "-", None),
    ):
        plots.band(panel, steps, curve, style, color=color, label=label, what="repetitions")


def finish(panels: Any) -> None:
    """Names the four panels and their axes."""
    for panel, name in zip(panels, _NAMES, strict=True):
        panel.set(xlabel="step", ylabel=name)
    for panel in panels[2:]:
        panel.set_yscale("log")
    panels[2].set_ylim(bottom=1e-5)  # spectral starts begin at rounding


def numbers(lanes: Any) -> dict[str, list[float]]:
    """What curves of one start and scale show: mean and standard deviation over repetitions."""
    norm = lanes["norm"].values
    found = {
        "held-out loss at first": lanes["watch_loss"].values[:, 0],
        "held-out loss at last": lanes["watch_loss"].values[:, -1],
        "held-out accuracy at first": lanes["watch_accuracy"].values[:, 0],
        "held-out accuracy at last": lanes["watch_accuracy"].values[:, -1],
        "misalignment at first": lanes["misalignment"].values[:, 0].mean(1),
        "least misalignment of a layer": lanes["misalignment"].values.min((1, 2)),
        "growth of the norm": (norm[:, -1] / norm[:, 0]).mean(1),
    }
    return {name: [float(x.mean()), float(x.std())] for name, x in found.items()}
