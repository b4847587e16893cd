"""Ranks by the gradient's spectrum against AdaLoRA, EVA and one rank everywhere (gg2Wb2HPOI).

The paper fine-tunes ViT-B/16 on CIFAR-100; here the embedded ViT, pretrained on Fashion-MNIST, is
fine-tuned on the embedded MNIST sample. Every method has the parameters of one rank in all layers,
takes the learning rate that serves it best on held-out images, and is measured on the test set.
"""

import dataclasses
import os

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import jax  # noqa: E402
import numpy as np  # noqa: E402

from lorajax import data, finetune, models, plots, tasks  # noqa: E402
from lorajax.finetune.contest import Contest  # noqa: E402
from lorajax.studies import simulation  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Profile:
    images: int
    held_out: int
    tests: int
    steps: int
    batch: int
    seeds: int
    rates: tuple[float, ...]
    uniform: tuple[int, ...]


PROFILES = {
    "quick": Profile(1666, 200, 2000, 40, 32, 3, (1.0, 3.0), (2,)),
    "full": Profile(5000, 1000, 10_000, 600, 50, 10, (0.1, 0.3, 1.0, 3.0, 10.0), (1, 2, 4, 8)),
}
SHOWN = ("rule", "uniform", "EVA", "AdaLoRA")


def simulate(profile: Profile, seed: int = 0):
    """Contestants by the rank that sets the budget and by method."""
    found = data.load("mnist-sample")
    every = len(found.train) // profile.images  # the set is sorted by class
    part = found.train.take(slice(None, None, every))
    train, held_out = data.hold_out(part, profile.held_out)
    test = found.test.take(slice(None, None, len(found.test) // profile.tests))
    model = models.load("vit-fashion-mnist")
    task = tasks.Images.of(model.config)
    model = finetune.fit_head(model, task, train)
    recipe = finetune.Recipe(
        steps=profile.steps,
        batch_size=profile.batch,
        optimizer="lora-plus",
        ratio=4.0,
        learning_rate=1e-2,
        warmup=profile.steps // 20,
        seed=seed,
    )
    return {
        uniform: Contest(
            model,
            task,
            train,
            held_out,
            test,
            recipe,
            key=jax.random.key(seed),
            uniform=uniform,
            seeds=profile.seeds,
            rates=profile.rates,
            methods=SHOWN,
        ).at_equal_parameters()
        for uniform in profile.uniform
    }


def draw(profile: Profile, results):
    """Accuracy against parameters and against the cost, and the ranks that were chosen."""
    figure, panels = plots.figure(1, 3, size=(3.4, 2.8))
    # From 0 on: budgets that differ by a percent would else look far apart.
    every = [x for each in results.values() for x in each.values()]
    most = [
        1.15 * max(x.parameters.mean() for x in every),
        1.15 * max(x.choosing + x.training for x in every),
    ]
    with plots.style():
        for place, (name, mark) in enumerate(zip(SHOWN, "os^D", strict=True)):
            cells = [each[name] for each in results.values()]
            means, halves = zip(*(finetune.interval(100 * x.scores) for x in cells), strict=True)
            parameters = np.array([x.parameters.mean() for x in cells])
            passes = np.array([x.choosing + x.training for x in cells])
            for panel, values, end in zip(panels, (parameters, passes), most, strict=False):
                # Methods may share a value: their points would hide each other.
                panel.errorbar(
                    values + (place - 1.5) * 0.035 * end,
                    means,
                    halves,
                    fmt=f"{mark}-",
                    color=f"C{place}",
                    capsize=2,
                    label=name,
                )
        for panel, xlabel, end in zip(
            panels, ("parameters of the adapters", "forward passes, all told"), most, strict=False
        ):
            panel.set(xlabel=xlabel, ylabel="test accuracy [%]", xlim=(0, end))
        panels[0].legend(loc="lower left")
        last = list(results.values())[-1]
        image = panels[2].imshow(
            [list(last[name].ranks.values()) for name in SHOWN], aspect="auto", cmap="viridis"
        )
        panels[2].set_yticks(range(len(SHOWN)), SHOWN)
        panels[2].grid(visible=False)
        panels[2].set(
            xlabel="layer, in the model's order",
            title=f"budget of rank {list(results)[-1]} in every layer",
        )
        figure.colorbar(image, ax=panels[2], label="rank, mean over seeds")
        figure.suptitle(
            f"embedded ViT on {profile.images:,} images of MNIST, {profile.steps} steps of "
            f"{profile.batch}, {profile.tests:,} to test on; mean and 95 % interval of "
            f"{profile.seeds} seeds; points of equal parameters or cost stand side by side",
        )
    return figure


def statements(results) -> dict[str, list[float]]:
    """What the figure shows, in numbers: mean and half-width of the 95 % interval."""
    numbers = {}
    for uniform, methods in results.items():
        for name, each in methods.items():
            at = f"budget of rank {uniform}, {name}"
            numbers[f"{at}: test accuracy [%]"] = list(finetune.interval(100 * each.scores))
            numbers[f"{at}: parameters, in training, passes"] = [
                each.parameters.mean(),
                each.trained,
                each.choosing + each.training,
            ]
            if name != "rule":
                paired = 100 * (methods["rule"].scores - each.scores)
                numbers[f"{at}: rule is better by [points]"] = list(finetune.interval(paired))
    return numbers


def run(profile: Profile, seed: int):
    """The figure and what it shows, with the held-out accuracies that rates were chosen by."""
    results = simulate(profile, seed)
    rates = {
        f"{uniform}, {name}": each.held_out
        for uniform, methods in results.items()
        for name, each in methods.items()
    }
    return draw(profile, results), {**statements(results), "held-out accuracy by rate": rates}


if __name__ == "__main__":
    simulation.command(__doc__ or "", PROFILES, run, "spectral_dynamics/rank_selection")
