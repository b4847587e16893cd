"""Singular values of every layer's update in a real fine-tuning run, against what theory predicts.

The spectral-dynamics paper states that singular values grow one after the other, the largest first;
in a network each layer has the spectrum of its own gradient. The embedded ViT goes from
Fashion-MNIST to MNIST by plain descent with batches, from a small start: solid lines are the
singular values of A B in the layers that grow fastest, dashed ones those of the linear law Z(k) =
(I + η H(M))^k Z(0), which knows the gradient before training alone (theory section 4), and dots the
times at which each passes a level of its own, against the gradient's singular values.
"""

import dataclasses
import os
from typing import Any

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lorajax import (  # noqa: E402
    adapters,
    data,
    finetune,
    initializers,
    laws,
    models,
    plots,
    spectra,
    tasks,
)
from lorajax.studies import simulation  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Profile:
    steps: int
    every: int
    batch: int
    samples: int


PROFILES = {"quick": Profile(200, 4, 50, 2048), "full": Profile(2000, 10, 500, 5000)}
SCALE = 1e-2
RANK = 4
RATE = 0.1
"""Learning rate times the largest singular value of any layer's gradient."""
LEVEL = 0.005
"""A singular value counts as learned once it passes this share of the run's largest."""
TARGETS = "blocks/**"
SHOWN = 4


def simulate(profile: Profile, seed: int = 0):
    """Singular values measured and predicted, and those of the gradient, by layer."""
    found = data.load("mnist-sample")
    model = models.load("vit-fashion-mnist")
    task = tasks.Images.of(model.config)
    model = finetune.fit_head(model, task, found.train)
    return follow(model, task, found.train, profile, seed)


def follow(
    model: Any, task: Any, train: data.Table, profile: Profile, seed: int, at_once: int = 128
):
    """The same of any model with blocks, its head fitted; gradients are taken `at_once` samples."""
    gradients = finetune.gradients_of(
        model,
        task,
        train,
        targets=TARGETS,
        samples=profile.samples,
        seed=seed,
        batch_size=at_once,
    )
    rate = RATE / max(float(each.norm) for each in gradients.values())
    recipe = finetune.Recipe(
        steps=profile.steps,
        batch_size=profile.batch,
        optimizer="sgd",
        learning_rate=rate,
        schedule="constant",
        seed=seed,
    )
    options = {"targets": TARGETS, "rank": RANK, "start": initializers.small}
    run = finetune.run_of(
        model, task, train, recipe, gradients=gradients, every=profile.every, **options
    )
    key = jax.random.key(seed)
    lane = jax.jit(run)(key, scale=np.float32(SCALE))
    start = finetune.adapt(
        model,
        TARGETS,
        key=key,
        rank=RANK,
        start=lambda key, shape, rank, dtype: initializers.small(
            key, shape, rank, SCALE, dtype=dtype
        ),
    )
    measured, predicted, tops = {}, {}, {}
    probed = np.arange(0, profile.steps, profile.every)
    for i, path in enumerate(finetune.paths(start)):
        factors = adapters.layers(start)[path].adapters["default"].factors
        m = -np.asarray(gradients[path].matrix, np.float32)
        measured[path] = np.asarray(lane["singular_values"][:, i])
        law = laws.early_descent(jnp.asarray(m), factors, rate, probed)
        predicted[path] = np.asarray(spectra.singular_values(law))
        tops[path] = np.linalg.svd(m, compute_uv=False)[:RANK]
    return measured, predicted, tops


def passing_times(profile: Profile, measured) -> dict[str, np.ndarray]:
    """Steps at which the singular values of each layer pass the level; NaN where they do not."""
    level = LEVEL * max(float(each.max()) for each in measured.values())
    found = {}
    for path, values in measured.items():
        above = values >= level
        first = np.where(above.any(axis=0), above.argmax(axis=0) * profile.every, np.nan)
        found[path] = first
    return found


def statements(profile: Profile, results) -> dict[str, float]:
    """What the figure shows, in numbers."""
    measured, predicted, tops = results
    times = passing_times(profile, measured)
    pairs = [
        late - early
        for each in times.values()
        for early, late in zip(each[:-1], each[1:], strict=True)
        if np.isfinite(early)
    ]
    # A value that never passes comes after all that do.
    flat_times = np.concatenate([np.nan_to_num(each, nan=np.inf) for each in times.values()])
    flat_tops = np.concatenate([tops[path] for path in times])
    correlation = spectra.rank_correlation(flat_times, -flat_tops)
    half = profile.steps // profile.every // 4
    gaps = [np.abs(np.log(measured[path][half, 0] / predicted[path][half, 0])) for path in measured]
    return {
        "values that pass the level": float(np.isfinite(flat_times).sum()),
        "share of neighbors in one layer that pass in order": float(
            np.mean([not gap < 0 for gap in pairs])
        ),
        "rank correlation of passing times with the gradient's singular values": correlation,
        "median |ln(measured/predicted)| of the first value after a quarter of the run": float(
            np.median(gaps)
        ),
    }


def draw(profile: Profile, results, title: str = "ViT", unit: str = "images"):
    """Singular values of the layers that grow fastest, and passing times of all."""
    measured, predicted, tops = results
    figure, panels = plots.figure(1, SHOWN + 1)
    steps = np.arange(0, profile.steps, profile.every)
    times = passing_times(profile, measured)
    chosen = sorted(measured, key=lambda path: -tops[path][0])[:SHOWN]
    with plots.style():
        for panel, path in zip(panels, chosen, strict=False):
            for i in range(RANK):
                panel.semilogy(steps, measured[path][:, i], color=f"C{i}", label=f"σ{i + 1}")
                panel.semilogy(steps, predicted[path][:, i], "--", color=f"C{i}", linewidth=1)
            panel.set_title(path)
            panel.set_ylim(1e-5, 3 * max(each.max() for each in measured.values()))
            panel.set(xlabel="step", ylabel="singular values of A B")
        panels[0].legend()
        for i in range(RANK):
            x = [tops[path][i] for path in times]
            panels[-1].semilogx(x, [times[path][i] for path in times], "o", color=f"C{i}", ms=4)
        panels[-1].set(xlabel="singular value of the gradient", ylabel="step at the level")
        figure.suptitle(
            f"{title}, {profile.steps} steps of {profile.batch} {unit}, α = {SCALE:g}; "
            "dashed: linear law",
        )
    return figure


def run(profile: Profile, seed: int):
    """The figure and what it shows."""
    results = simulate(profile, seed)
    return draw(profile, results), statements(profile, results)


if __name__ == "__main__":
    simulation.command(__doc__ or "", PROFILES, run, "spectral_dynamics/real_spectra")
