"""Xu et al. 2025, figures 2 and 5, with a ViT that knows pictures: small against spectral start.

The embedded ViT goes from Tiny ImageNet to CIFAR-10: loss and accuracy on training and held-out
pictures, alignment of every layer with its gradient's top direction, and the norm of its factors,
for several scales of both starts, by plain descent; mean ± one standard deviation over repetitions.
The prediction is the linearization at zero (derived): a layer aligns before its norm grows, and the
spectral start is aligned from the first step on. The profiles quick and sample take the pictures
that come with the package, full takes `cifar10_jpg.npz` from the folder that LORAJAX_DATA names.
What has been computed is kept in `out/` and not computed again.
"""

import dataclasses
import os

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import _starts as starts  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from lorajax import data, finetune, models, plots, sweeps, tasks  # noqa: E402
from lorajax.studies import simulation  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Profile:
    """How much is done.

    Attributes:
      source: of the pictures.
      steps: of descent.
      every: steps between looks.
      batch: pictures a step.
      repetitions: draws of the small start; a start and a scale share the orders of pictures.
      watched: held-out pictures.
      samples: behind the gradient.
      side: that pictures are brought to.
      targets: layers that are adapted.
      store: whether lanes are kept.
    """

    source: str
    steps: int
    every: int
    batch: int
    repetitions: int
    watched: int
    samples: int
    side: int
    targets: str = "blocks/**"
    store: bool = True


PROFILES = {
    "quick": Profile("cifar10-sample", 15, 5, 8, 2, 64, 128, 32, "blocks/5/**", store=False),
    "sample": Profile("cifar10-sample", 300, 15, 32, 30, 250, 1000, 32),
    "full": Profile("cifar10_jpg.npz", 1000, 25, 100, 30, 1000, 4096, 64),
}
SCALES = (1e-1, 1e-2, 1e-3)
RATE = 0.1
"""Learning rate times the largest singular value of any layer's gradient."""
MODEL = "vit-tiny-imagenet"


def simulate(profile: Profile, seed: int = 0, model: str = MODEL):
    """Curves of all lanes by start and scale, repetitions first."""
    found = data.load(profile.source)
    _, watched = data.hold_out(found.test, profile.watched, seed)
    network = models.load(model, classes=10, image_size=profile.side)
    task = tasks.Images.of(network.config)
    network = finetune.fit_head(network, task, found.train.take(_spread(found.train)), epochs=2)
    options = {
        "targets": profile.targets,
        "samples": profile.samples,
        "batch_size": 64,
        "seed": seed,
    }
    gradients = finetune.gradients_of(network, task, found.train, **options)
    lane = starts.run_of(
        network,
        task,
        found.train,
        gradients,
        profile,
        RATE,
        seed=seed,
        targets=profile.targets,
        watch=watched,
        orders=profile.repetitions,
    )
    # The spectral start has no randomness but that of the batches.
    axes = {
        "start": range(len(starts.STARTS)),
        "scale": np.asarray(SCALES, np.float32),
        "order": range(profile.repetitions),
    }
    return sweeps.sweep(
        lane,
        axes,
        key=jax.random.key(seed),
        fold=("order",),
        store=f"out/xu2025/colored_vit-{seed}.zarr" if profile.store else None,
        settings={"profile": repr(profile)},
    )


def _spread(table: data.Table, most: int = 5000) -> np.ndarray:
    """Indices of so many samples, spread over a table that is sorted by class."""
    count = min(most, len(table))
    return np.arange(count) * len(table) // count


def draw(profile: Profile, swept):
    """Loss, accuracy, alignment and norm against steps, a row a scale."""
    figure, panels = plots.figure(len(SCALES), 4, size=(3.4, 2.3))
    with plots.style():
        for row, scale in zip(panels, range(len(SCALES)), strict=True):
            for i, start in enumerate(starts.STARTS):
                lanes = swept.isel(start=i, scale=scale)
                starts.draw(row, lanes, profile, f"C{i}", start)
            starts.finish(row)
            row[0].set_title(f"α = {SCALES[scale]:g}")
        handles = panels[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=5)
        figure.suptitle(
            f"ViT, Tiny ImageNet → CIFAR-10 (JPEG), rank {starts.RANK}, {profile.repetitions} "
            f"repetitions, {profile.steps} steps of {profile.batch}",
        )
    return figure


def statements(swept) -> dict[str, list[float]]:
    """What the figure shows, in numbers: mean and standard deviation over repetitions."""
    numbers = {}
    for i, start in enumerate(starts.STARTS):
        for j, scale in enumerate(SCALES):
            for name, values in starts.numbers(swept.isel(start=i, scale=j)).items():
                numbers[f"{start}, {scale:g}: {name}"] = values
    for j, scale in enumerate(SCALES):
        loss = swept["watch_loss"].values[:, j, :, -1]
        numbers[f"{scale:g}: small − spectral, held-out loss at last, ± 95 %"] = list(
            finetune.interval(loss[0] - loss[1])
        )
    return numbers


def run(profile: Profile, seed: int):
    """The figure and what it shows."""
    swept = simulate(profile, seed)
    return draw(profile, swept), statements(swept)


if __name__ == "__main__":
    simulation.command(__doc__ or "", PROFILES, run, "xu2025/colored_vit")
