"""Picks the defaults of `lorajax finetune` on images held out of training, then checks them.

`python sims/pick_defaults.py --profile full` takes its decisions on 1,000 of the 5,000 training
images of the MNIST sample, which the embedded ViT is not trained on meanwhile: start and learning
rate of the adapters together; the smoothing of the labels; what trains in full beside the adapters,
and how much faster than A it learns (B learns 4 times as fast); the share of parameters that
`--rank auto` may spend; the learning rate of full fine-tuning, with the same smoothing. Each goes
to the highest mean accuracy on the held-out images, the others being as decided before or as they
stand below. The test set is looked at once, at the end: LoRA against full fine-tuning with what was
picked, on all training images, over `--seeds` orders and starts.
"""

import argparse
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("NPROC", "16")  # see "Good to know" in the README

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from lorajax import data, finetune, models, sweeps, tasks  # noqa: E402
from lorajax.finetune import recipes  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Profile:
    images: int
    held_out: int
    epochs: int
    orders: int


PROFILES = {"quick": Profile(500, 100, 1, 1), "full": Profile(5000, 1000, 6, 4)}
STARTS = ("orthogonal", "lora", "spectral")
RATES = {"lora": (5e-3, 7e-3, 1e-2, 1.4e-2), "full": (4e-3, 8e-3, 1.2e-2)}
SMOOTHINGS = (0.0, 0.1, 0.2)
BESIDE = {"head": ("head",), "head, embeddings": ("head", "embeddings")}
FACTORS = (1.0, 2.0, 4.0, 8.0)
BUDGETS = (2.0, 4.0, 7.0)
BATCH = 50


@dataclasses.dataclass(frozen=True)
class Choice:
    """Options of the command; the values are those that stand until they are decided."""

    start: str = "orthogonal"
    rate: float = 1e-2
    smoothing: float = 0.1
    beside: str = "head, embeddings"
    factor: float = 4.0
    budget: float = 7.0
    full_rate: float = 8e-3


class Trial:
    """A pretrained model with a head for the task, and what its gradient says about ranks."""

    def __init__(self, train: data.Table, test: data.Table, epochs: int):
        self.train, self.test, self.epochs = train, test, epochs
        model = models.load("vit-fashion-mnist")
        self.task = tasks.Images.of(model.config)
        self.model = finetune.fit_head(model, self.task, train)
        params = nnx.state(self.model, nnx.Param)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self.selections = {
            budget: finetune.select_ranks(
                self.model,
                self.task,
                train,
                targets="blocks/**",
                budget=int(self.parameters * budget / 100),
            )
            for budget in BUDGETS
        }

    @property
    def steps(self) -> int:
        """Of a run."""
        return self.epochs * (len(self.train) // BATCH)

    def smoothed(self, choice: Choice) -> tasks.Images:
        """The task with the smoothing that was chosen."""
        return dataclasses.replace(self.task, smoothing=choice.smoothing)

    def lora(
        self,
        choice: Choice,
        orders: int,
        *,
        starts: Sequence[str] = (),
        rates: Sequence[float] = (),
        budgets: Sequence[float] = (),
    ):
        """Accuracy of adapters as chosen, or for each of several starts, rates or budgets."""
        budgets = budgets or (choice.budget,)
        run = finetune.run_of(
            self.model,
            self.smoothed(choice),
            self.train,
            # The sweep multiplies the learning rate of 1.
            recipes.lora(self.steps, batch_size=BATCH, learning_rate=1.0, beside=choice.factor),
            start=starts or (choice.start,),
            heads=BESIDE[choice.beside],
            gradients=self.selections[budgets[0]].gradients,
            test=self.test,
            every=0,
            orders=orders,
            allocations=[self.selections[budget].ranks for budget in budgets],
        )
        axes = {
            "start": range(len(starts) or 1),
            "rate": np.asarray(rates or (choice.rate,), np.float32),
            "allocation": range(len(budgets)),
            "order": range(orders),
        }
        found = sweeps.sweep(run, axes, key=jax.random.key(0), fold=("order",))
        return found["test_accuracy"].values

    def full(self, choice: Choice, orders: int, rates: Sequence[float] = ()):
        """Accuracy where every parameter trains, as chosen or for each of several rates."""
        model = nnx.clone(self.model)
        model.train()
        run = finetune.run_of(
            model,
            self.smoothed(choice),
            self.train,
            recipes.full(self.steps, batch_size=BATCH, learning_rate=1.0),
            targets=None,
            test=self.test,
            every=0,
            orders=orders,
        )
        axes = {
            "rate": np.asarray(rates or (choice.full_rate,), np.float32),
            "order": range(orders),
        }
        found = sweeps.sweep(run, axes, key=jax.random.key(0), fold=("order",))
        return found["test_accuracy"].values

    def trainable(self, choice: Choice) -> int:
        """Parameters that train with adapters."""
        beside = sum(
            leaf.size
            for name in BESIDE[choice.beside]
            for leaf in jax.tree.leaves(nnx.state(getattr(self.model, name), nnx.Param))
        )
        return self.selections[choice.budget].parameters + beside


def part(table: data.Table, images: int) -> data.Table:
    """As many images of a set that is sorted by class, spread over it."""
    return table.take(np.arange(0, len(table), len(table) // images)[:images])


def pick(profile: Profile) -> tuple[Choice, dict[str, dict[str, float]]]:
    """The decisions, with the held-out accuracy of all candidates."""
    found = data.load("mnist-sample")
    rest, aside = data.hold_out(part(found.train, profile.images), profile.held_out)
    trial, orders = Trial(rest, aside, profile.epochs), profile.orders
    choice, tables = Choice(), {}

    def decide(name: str, candidates: dict[str, dict[str, Any]], accuracies: np.ndarray) -> None:
        nonlocal choice
        means = accuracies.mean(-1).ravel()
        tables[name] = dict(zip(candidates, map(float, means), strict=True))
        choice = dataclasses.replace(choice, **list(candidates.values())[means.argmax()])
        print(f"{name}: {tables[name]}", flush=True)

    decide(
        "start and learning rate",
        {f"{s}, {r:g}": {"start": s, "rate": r} for s in STARTS for r in RATES["lora"]},
        trial.lora(choice, orders, starts=STARTS, rates=RATES["lora"]).squeeze(2),
    )
    for name, each in (
        ("smoothing of the labels", {f"{x:g}": {"smoothing": x} for x in SMOOTHINGS}),
        ("what trains in full beside the adapters", {name: {"beside": name} for name in BESIDE}),
        ("learning rate of that over that of A", {f"{x:g}": {"factor": x} for x in FACTORS}),
    ):
        scores = [trial.lora(dataclasses.replace(choice, **x), orders) for x in each.values()]
        decide(name, each, np.stack(scores))
    decide(
        "budget of the adapters [%]",
        {f"{b:g}": {"budget": b} for b in BUDGETS},
        trial.lora(choice, orders, budgets=BUDGETS),
    )
    decide(
        "learning rate of full fine-tuning",
        {f"{r:g}": {"full_rate": r} for r in RATES["full"]},
        trial.full(choice, orders, RATES["full"]),
    )
    return choice, tables


def check(profile: Profile, choice: Choice, seeds: int):
    """Test accuracy of what was picked, a number a seed, of LoRA and of full fine-tuning."""
    found = data.load("mnist-sample")
    trial = Trial(part(found.train, profile.images), found.test, profile.epochs)
    lora, full = trial.lora(choice, seeds), trial.full(choice, seeds)
    return lora.ravel(), full.ravel(), trial.trainable(choice) / trial.parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/pick_defaults.json"))
    args = parser.parse_args()
    profile = PROFILES[args.profile]
    choice, tables = pick(profile)
    print(f"picked: {choice}", flush=True)
    lora, full, share = check(profile, choice, args.seeds)
    difference, half = finetune.interval(full - lora)
    print(f"test accuracy of LoRA {lora.mean():.4f}, of full fine-tuning {full.mean():.4f}")
    print(f"full − LoRA: {difference:.4f} ± {half:.4f} (95 %), {args.seeds} seeds")
    print(f"LoRA trains {share:.1%} of the parameters (adapters, {choice.beside})")
    result = {
        "profile": args.profile,
        "held-out accuracy": tables,
        "picked": dataclasses.asdict(choice),
        "test accuracy": {"lora": lora.tolist(), "full": full.tolist()},
        "full - lora": [difference, half],
        "trainable share": share,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"Written: {args.out}")


if __name__ == "__main__":
    main()
