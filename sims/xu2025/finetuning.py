"""Alignment and norms while a real network is fine-tuned: small against spectral start.

After figure 5 of Xu et al. 2025 (arXiv:2503.06982), whose networks (ResNet, ViT and VGG pretrained
on ImageNet), sizes and step sizes are not known. Here: the small ViT that comes with the package,
from Fashion-MNIST to MNIST, LoRA of rank 4 in every block, plain gradient descent; all scales and
repetitions train at once over one frozen base. Lines are means over layers and repetitions, bands
one standard deviation over repetitions. The prediction is the linearization at zero (derived):
every layer aligns with its gradient's top direction before its norm grows.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib

os.environ.setdefault("NPROC", "16")  # see "Good to know" in the README

import jax  # noqa: E402
import numpy as np  # noqa: E402

from lorajax import data, finetune, initializers, models, plots, sweeps  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Profile:
    steps: int
    every: int
    repetitions: int
    batch: int


PROFILES = {"quick": Profile(60, 6, 3, 50), "full": Profile(300, 10, 30, 100)}
SCALES = (1e-1, 1e-2, 1e-3)
STARTS = ("small", "spectral")
RANK = 4
LEARNING_RATE = 0.3
TARGETS = "blocks/**"


def simulate(profile: Profile, seed: int = 0):
    """Curves of every lane by start, and the gradient's top singular value of every layer."""
    found = data.load("mnist-sample")
    model = finetune.fit_head(models.load("vit-fashion-mnist"), found.train)
    gradients = finetune.gradients_of(model, found.train, targets=TARGETS, seed=seed)
    recipe = finetune.Recipe(
        steps=profile.steps,
        batch_size=profile.batch,
        optimizer="sgd",
        learning_rate=LEARNING_RATE,
        schedule="constant",
        seed=seed,
    )
    results = {}
    for start in STARTS:
        initializer = getattr(initializers, start)
        if start == "spectral":
            # The paper's spectral start lies along the top direction alone.
            initializer = functools.partial(initializer, directions=1)
        run = finetune.run_of(
            model,
            found.train,
            recipe,
            targets=TARGETS,
            rank=RANK,
            start=initializer,
            gradients=gradients,
            every=profile.every,
        )
        repetitions = profile.repetitions if start == "small" else 1  # the other has no randomness
        axes = {"scale": np.asarray(SCALES, np.float32), "seed": range(repetitions)}
        key = jax.random.key(seed)
        results[start] = sweeps.sweep(run, axes, key=key, fold=("seed",))
    rates = {path: float(each.singular_values[0]) for path, each in gradients.items()}
    return results, rates


def draw(profile: Profile, results):
    """Loss, alignment and norm against steps; small starts solid, spectral ones dashed."""
    figure, panels = plots.figure(1, 3, size=(4.4, 3.4))
    probed = np.arange(0, profile.steps, profile.every)
    with plots.style():
        for start, style in (("small", "-"), ("spectral", "--")):
            for color, scale in enumerate(SCALES):
                lane = results[start].isel(scale=color)
                loss = lane["loss"].values.reshape(lane.sizes["seed"], -1, profile.every).mean(2)
                curves = (loss, lane["misalignment"].values.mean(2), lane["norm"].values.mean(2))
                for panel, curve in zip(panels, curves, strict=True):
                    mean, deviation = curve.mean(0), curve.std(0)
                    label = f"{start}, α = {scale:g}"
                    panel.plot(probed, mean, style, color=f"C{color}", label=label)
                    if start == "small":
                        low = np.maximum(mean - deviation, 1e-12)
                        panel.fill_between(
                            probed, low, mean + deviation, color=f"C{color}", alpha=0.2
                        )
        for panel, name in zip(panels, ("training loss", "1 − |cos|", "‖[A; Bᵀ]‖₂"), strict=True):
            panel.set_yscale("log")
            panel.set_ylabel(name)
            panel.set_xlabel("step")
        panels[1].set_ylim(bottom=1e-4)  # spectral starts begin at rounding
        panels[0].legend(fontsize="x-small")
    return figure


def statements(results) -> dict[str, float]:
    """What the figure shows, in numbers."""
    small = results["small"]
    angle, norm = small["misalignment"].values, small["norm"].values
    growing = norm[..., -1, :] / norm[..., 0, :]
    numbers = {}
    for i, scale in enumerate(SCALES):
        numbers[f"small, {scale:g}: lowest misalignment, mean over layers"] = float(
            angle[i].min(axis=1).mean()
        )
        numbers[f"small, {scale:g}: at the start"] = float(angle[i, :, 0].mean())
        numbers[f"small, {scale:g}: growth of the norm"] = float(growing[i].mean())
    spectral = results["spectral"]["misalignment"].values
    numbers["spectral: largest misalignment at the start"] = float(spectral[:, :, 0].max())
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/xu2025"))
    args = parser.parse_args()
    profile = PROFILES[args.profile]
    results, rates = simulate(profile, args.seed)
    numbers = statements(results)
    args.out.mkdir(parents=True, exist_ok=True)
    plots.save(draw(profile, results), args.out / "finetuning.png")
    text = json.dumps(
        {"profile": args.profile, "numbers": numbers, "growth rates": rates}, indent=2
    )
    (args.out / "finetuning.json").write_text(text + "\n", encoding="utf-8")
    for name, value in numbers.items():
        print(f"{name}: {value:.3g}")
    print(f"Written: {args.out / 'finetuning.png'}")


if __name__ == "__main__":
    main()
