"""Xu et al. 2025, figure 5: alignment and norms early in fine-tuning, for ResNet, ViT and VGG.

The paper goes from ImageNet to MNIST and CIFAR-10. Here the embedded ViT goes from Fashion-MNIST to
MNIST, and a small ResNet and a small VGG, pretrained on the spot on the digits 0 to 4 of the
embedded sample, go to the digits 5 to 9: small and spectral starts of several scales, by plain
descent, mean ± one standard deviation over repetitions. The prediction is the linearization at zero
(derived): every layer aligns with its gradient's top direction before its norm grows.
"""

import dataclasses
import os

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import _starts as starts  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from lorajax import data, finetune, models, plots, sweeps, tasks  # noqa: E402
from lorajax.studies import simulation  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Profile:
    steps: int
    every: int
    repetitions: int
    batch: int
    samples: int
    epochs: int
    widths: tuple[int, ...]
    bucket: int | None


# On a CPU convolutions with a kernel a lane are slow, so that lanes run one after the other there.
PROFILES = {
    "quick": Profile(24, 6, 2, 16, 256, 1, (8, 16, 32), 1),
    "full": Profile(300, 10, 30, 100, 5000, 10, (32, 64, 128), None),
}
NETWORKS = ("ViT", "ResNet", "VGG")
SCALES = (1e-1, 1e-2, 1e-3)
RATE = 0.1
"""Learning rate times the largest singular value of any layer's gradient."""
TARGETS = {"ViT": "blocks/**", "ResNet": "stages/**", "VGG": ["convs/*", "hidden/*"]}


def digits(table: data.Table, first: int) -> data.Table:
    """The images of five digits, their classes counted from `first`."""
    labels = np.asarray(table.columns["labels"])
    chosen = table[(labels >= first) & (labels < first + 5)]
    return data.Table({**chosen, "labels": chosen["labels"] - np.int32(first)})


def pretrained(name: str, profile: Profile, seed: int):
    """A network in evaluation mode and the images that it goes on with."""
    found = data.load("mnist-sample").train
    if name == "ViT":
        return models.load("vit-fashion-mnist"), found
    common = {"classes": 5, "channels": 1, "mean": (0.13,), "std": (0.31,)}
    if name == "ResNet":
        config = models.config(
            "cifar-resnet20", depths=(1, 1, 1), widths=profile.widths, stem_width=0, **common
        )
    else:
        config = models.VGGConfig(
            (1, 1, 1), profile.widths, batch_norm=True, hidden=64, grid=3, dropout=0.0, **common
        )
    before = digits(found, 0)
    steps = profile.epochs * (len(before) // 50)
    recipe = finetune.Recipe(steps=steps, batch_size=50, learning_rate=3e-3, seed=seed)
    model, task = models.build(config, rngs=nnx.Rngs(seed)), tasks.Images.of(config)
    trainer = finetune.Trainer(model, nnx.Param, task, recipe)
    model = trainer.model(finetune.fit(trainer, before))
    model.eval()
    return model, digits(found, 5)


def simulate(name: str, profile: Profile, seed: int = 0):
    """Curves of every lane by start, and the gradient's top singular value of every layer."""
    model, train = pretrained(name, profile, seed)
    task = tasks.Images.of(model.config)
    model = finetune.fit_head(model, task, train, epochs=1)
    targets = TARGETS[name]
    gradients = finetune.gradients_of(
        model, task, train, targets=targets, samples=profile.samples, seed=seed
    )
    rates = {path: float(each.norm) for path, each in gradients.items()}
    lane = starts.run_of(model, task, train, gradients, profile, RATE, seed=seed, targets=targets)
    # The spectral start has no randomness, and so no repetitions.
    lanes = [(0, scale, i) for scale in SCALES for i in range(profile.repetitions)]
    lanes += [(1, scale, 0) for scale in SCALES]
    start, scale, repetition = zip(*lanes, strict=True)
    axes = {
        "lane": {
            "start": np.asarray(start),
            "scale": np.asarray(scale, np.float32),
            "seed": np.asarray(repetition),
        }
    }
    bucket = None if name == "ViT" else profile.bucket
    key = jax.random.key(seed)
    swept = sweeps.sweep(lane, axes, key=key, fold=("seed",), bucket=bucket)
    keep = {
        (starts.STARTS[i], a): [n for n, (j, b, _) in enumerate(lanes) if (i, a) == (j, b)]
        for i in range(len(starts.STARTS))
        for a in SCALES
    }
    return {cell: swept.isel(lane=index) for cell, index in keep.items()}, rates


def draw(profile: Profile, results):
    """Loss, alignment and norm against steps, a row a network; spectral starts are dashed."""
    figure, panels = plots.figure(len(results), 3, size=(3.4, 2.5))
    probed = np.arange(0, profile.steps, profile.every)
    with plots.style():
        for row, (network, (cells, _)) in zip(panels, results.items(), strict=True):
            for (start, scale), lanes in cells.items():
                loss = lanes["loss"].values.reshape(lanes.sizes["lane"], -1, profile.every).mean(2)
                curves = (loss, lanes["misalignment"].values.mean(2), lanes["norm"].values.mean(2))
                style = {"small": "-", "spectral": "--"}[start]
                color = f"C{SCALES.index(scale)}"
                for panel, curve in zip(row, curves, strict=True):
                    label = f"{start}, α = {scale:g}"
                    plots.band(
                        panel,
                        probed,
                        curve,
                        style,
                        color=color,
                        label=label,
                        least=1e-12,
                        what="repetitions",
                    )
            names = ("training loss", "1 − |cos|, mean of layers", "‖[A; Bᵀ]‖₂, mean of layers")
            for panel, name in zip(row, names, strict=True):
                panel.set_ylabel(name)
            for panel in row[1:]:
                panel.set_yscale("log")
            row[0].set_title(network)
            row[1].set_ylim(bottom=1e-4)  # spectral starts begin at rounding
        for panel in panels.ravel():
            panel.set_xlabel("step")
            panel.xaxis.get_major_locator().set_params(integer=True)
        handles = panels[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=5)
        figure.suptitle(
            f"rank {starts.RANK}, {profile.repetitions} repetitions, {profile.steps} steps of "
            f"{profile.batch}; convolutions of {'/'.join(map(str, profile.widths))} channels",
        )
    return figure


def statements(results) -> dict[str, float]:
    """What the figure shows, in numbers: means over layers and repetitions."""
    numbers = {}
    for network, (cells, _) in results.items():
        for (start, scale), lanes in cells.items():
            angle, norm = lanes["misalignment"].values, lanes["norm"].values
            at = f"{network}, {start}, {scale:g}"
            numbers[f"{at}: misalignment at the start"] = float(angle[:, 0].mean())
            numbers[f"{at}: lowest misalignment of a layer"] = float(angle.min(axis=1).mean())
            numbers[f"{at}: growth of the norm"] = float((norm[:, -1] / norm[:, 0]).mean())
    return numbers


def run(profile: Profile, seed: int):
    """The figure and what it shows, with the rates at which layers grow."""
    results = {name: simulate(name, profile, seed) for name in NETWORKS}
    rates = {name: found for name, (_, found) in results.items()}
    return draw(profile, results), {**statements(results), "growth rates": rates}


if __name__ == "__main__":
    simulation.command(__doc__ or "", PROFILES, run, "xu2025/finetuning")
