"""Xu et al. 2025, figure 2: a pretrained ResNet on CIFAR-10, small against spectral start.

Loss and accuracy on training and held-out images, alignment with the gradient's top direction and
norm of the factors, mean ± one standard deviation over repetitions. The paper's ResNet and sizes
are not known: ResNet-20, pretrained on the clean images, goes on with lossy JPEG copies of them, on
which it has lost ten points. It needs `cifar10_jpg.npz` and `cifar_resnet20.safetensors` in the
folder that LORAJAX_DATA names, and is skipped without them.
"""

import dataclasses
import functools
import os
import pathlib

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import jax  # noqa: E402
import numpy as np  # noqa: E402

from lorajax import (  # noqa: E402
    data,
    finetune,
    initializers,
    models,
    plots,
    sweeps,
    tasks,
)
from lorajax.studies import simulation  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Profile:
    steps: int
    every: int
    batch: int
    repetitions: int
    watched: int
    samples: int
    bucket: int | None


# On a CPU convolutions with a kernel a lane are slow, so that lanes run one after the other there.
PROFILES = {
    "quick": Profile(15, 5, 16, 2, 128, 128, 1),
    "full": Profile(2000, 50, 128, 30, 5000, 4096, None),
}
STARTS = ("small", "spectral")
SCALE = 1e-2
RANK = 4
RATE = 0.3
"""Learning rate times the largest singular value of any layer's gradient."""
TARGETS = "stages/**"
DATA, MODEL = "cifar10_jpg.npz", "cifar_resnet20.safetensors"
FOLDER = pathlib.Path(os.environ.get("LORAJAX_DATA", "."))


def simulate(profile: Profile, seed: int = 0):
    """Curves of all lanes, with dimensions start and repetition first."""
    found = data.load(DATA, folder=FOLDER)
    model = models.load(FOLDER / MODEL)
    task = tasks.Images.of(model.config)
    options = {"targets": TARGETS, "samples": profile.samples, "batch_size": 64, "seed": seed}
    gradients = finetune.gradients_of(model, task, found.train, **options)
    top = max(float(each.norm) for each in gradients.values())
    recipe = finetune.Recipe(
        steps=profile.steps,
        batch_size=profile.batch,
        optimizer="sgd",
        learning_rate=RATE / top,
        schedule="constant",
        seed=seed,
    )
    _, watched = data.hold_out(found.test, profile.watched, seed)
    starts = [
        initializers.small,
        # The paper's spectral start lies along the top direction alone.
        functools.partial(initializers.spectral, directions=1),
    ]
    lane = finetune.run_of(
        model,
        task,
        found.train,
        recipe,
        targets=TARGETS,
        rank=RANK,
        start=starts,
        gradients=gradients,
        watch=watched,
        every=profile.every,
        orders=profile.repetitions,
    )
    axes = {
        "start": range(len(STARTS)),
        "scale": np.asarray([SCALE], np.float32),
        "order": range(profile.repetitions),
    }
    swept = sweeps.sweep(
        lane, axes, key=jax.random.key(seed), fold=("order",), bucket=profile.bucket
    )
    return swept.isel(scale=0)


def draw(profile: Profile, swept):
    """Loss, accuracy, alignment and norm against steps."""
    figure, grid = plots.figure(2, 2)
    panels = grid.ravel()
    steps = np.arange(0, profile.steps, profile.every)
    with plots.style():
        for color, start in enumerate(STARTS):
            lanes = swept.isel(start=color)
            count = lanes.sizes["order"]
            loss, accuracy = (
                lanes[name].values.reshape(count, -1, profile.every).mean(2)
                for name in ("loss", "accuracy")
            )
            for panel, curve, style, label in (
                (panels[0], loss, "-", f"{start}, training"),
                (panels[0], lanes["watch_loss"].values, "--", f"{start}, held-out"),
                (panels[1], accuracy, "-", None),
                (panels[1], lanes["watch_accuracy"].values, "--", None),
                (panels[2], lanes["misalignment"].values.mean(2), "-", None),
                (panels[3], lanes["norm"].values.mean(2), "-", None),
            ):
                plots.band(
                    panel, steps, curve, style, color=f"C{color}", label=label, what="repetitions"
                )
        names = ("loss", "accuracy", "1 − |cos|, mean of layers", "‖[A; Bᵀ]‖₂, mean of layers")
        for panel, name in zip(panels, names, strict=True):
            panel.set(xlabel="step", ylabel=name)
        panels[2].set_yscale("log")
        panels[2].set_ylim(bottom=1e-5)  # spectral starts begin at rounding
        panels[3].set_yscale("log")
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3)
        figure.suptitle(
            f"ResNet-20 on CIFAR-10 (JPEG), rank {RANK}, α = {SCALE:g}, {profile.repetitions} "
            f"repetitions, {profile.steps} steps of {profile.batch}",
        )
    return figure


def statements(swept) -> dict[str, list[float]]:
    """What the figure shows, in numbers: mean and standard deviation over repetitions."""
    numbers = {}
    for i, start in enumerate(STARTS):
        lanes = swept.isel(start=i)
        for name, values in (
            ("held-out loss at first", lanes["watch_loss"].values[:, 0]),
            ("held-out loss at last", lanes["watch_loss"].values[:, -1]),
            ("held-out accuracy at first", lanes["watch_accuracy"].values[:, 0]),
            ("held-out accuracy at last", lanes["watch_accuracy"].values[:, -1]),
            ("misalignment at first", lanes["misalignment"].values[:, 0].mean(1)),
            ("least misalignment", lanes["misalignment"].values.mean(2).min(1)),
            ("growth of the norm", (lanes["norm"][:, -1] / lanes["norm"][:, 0]).values.mean(1)),
        ):
            numbers[f"{start}: {name}"] = [float(values.mean()), float(values.std())]
    return numbers


def run(profile: Profile, seed: int):
    """The figure and what it shows."""
    swept = simulate(profile, seed)
    return draw(profile, swept), statements(swept)


if __name__ == "__main__":
    if missing := [name for name in (DATA, MODEL) if not (FOLDER / name).is_file()]:
        print(f"Skipped: {FOLDER} (LORAJAX_DATA) has no {' and no '.join(missing)}.")
    else:
        simulation.command(__doc__ or "", PROFILES, run, "xu2025/resnet_cifar10")
