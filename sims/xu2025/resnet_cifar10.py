"""Xu et al. 2025, figure 2: a pretrained ResNet on CIFAR-10, small against spectral start.

Loss and accuracy on training and held-out images, alignment with the gradient's top direction and
norm of the factors, mean ± one standard deviation over repetitions. The paper's ResNet and sizes
are not known: ResNet-20, pretrained on the clean images, goes on with lossy JPEG copies of them, on
which it has lost ten points. It needs `cifar10_jpg.npz` and `cifar_resnet20.safetensors` in the
folder that LORAJAX_DATA names, and is skipped without them.
"""

import dataclasses
import os
import pathlib

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import _starts as starts  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from lorajax import data, finetune, models, plots, sweeps, tasks  # noqa: E402
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
SCALE = 1e-2
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
    _, watched = data.hold_out(found.test, profile.watched, seed)
    lane = starts.run_of(
        model,
        task,
        found.train,
        gradients,
        profile,
        RATE,
        seed=seed,
        targets=TARGETS,
        watch=watched,
        orders=profile.repetitions,
    )
    axes = {
        "start": range(len(starts.STARTS)),
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
    with plots.style():
        for i, start in enumerate(starts.STARTS):
            starts.draw(panels, swept.isel(start=i), profile, f"C{i}", start)
        starts.finish(panels)
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3)
        figure.suptitle(
            f"ResNet-20 on CIFAR-10 (JPEG), rank {starts.RANK}, α = {SCALE:g}, "
            f"{profile.repetitions} repetitions, {profile.steps} steps of {profile.batch}",
        )
    return figure


def statements(swept) -> dict[str, list[float]]:
    """What the figure shows, in numbers: mean and standard deviation over repetitions."""
    return {
        f"{start}: {name}": values
        for i, start in enumerate(starts.STARTS)
        for name, values in starts.numbers(swept.isel(start=i)).items()
    }


def run(profile: Profile, seed: int):
    """The figure and what it shows."""
    swept = simulate(profile, seed)
    return draw(profile, swept), statements(swept)


if __name__ == "__main__":
    if missing := [name for name in (DATA, MODEL) if not (FOLDER / name).is_file()]:
        print(f"Skipped: {FOLDER} (LORAJAX_DATA) has no {' and no '.join(missing)}.")
    else:
        simulation.command(__doc__ or "", PROFILES, run, "xu2025/resnet_cifar10")
