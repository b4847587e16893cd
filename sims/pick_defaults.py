"""Picks the defaults of `lorajax finetune` on images held out of training, then checks them.

`python sims/pick_defaults.py --profile full` takes three decisions on 1,000 of the 5,000 training
images of the MNIST sample, which the embedded ViT is not trained on meanwhile: start and learning
rate of the adapters together, the share of parameters that `--rank auto` may spend, and the
learning rate of full fine-tuning. Each goes to the highest mean accuracy on the held-out images.
The test set is looked at once, at the end: LoRA against full fine-tuning with what was picked, on
all training images, over `--seeds` orders and starts.
"""

import argparse
import dataclasses
import json
import os
import pathlib

os.environ.setdefault("NPROC", "16")  # see "Good to know" in the README

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from lorajax import data, finetune, models, sweeps  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Profile:
    images: int
    held_out: int
    epochs: int
    check_epochs: int
    orders: int


PROFILES = {"quick": Profile(500, 100, 1, 1, 1), "full": Profile(5000, 1000, 3, 6, 2)}
STARTS = ("orthogonal", "lora", "spectral")
RATES = (0.3, 1.0, 3.0)
BASE_RATE = {"lora": 1e-2, "full": 4e-3}
BUDGETS = (2.0, 4.0, 7.0)
BATCH = 50
HEADS = ("head", "patches")


def recipe_of(method: str, images: int, epochs: int) -> finetune.Recipe:
    """The command's recipe for a method at its learning rate of reference."""
    steps = epochs * (images // BATCH)
    return finetune.Recipe(
        steps=steps,
        batch_size=BATCH,
        optimizer="lora-plus" if method == "lora" else "adamw",
        ratio=4.0,
        learning_rate=BASE_RATE[method],
        warmup=steps // 20,
    )


class Trial:
    """A pretrained model with a head for the task, and what its gradient says about ranks."""

    def __init__(self, train: data.Split, test: data.Split):
        self.train, self.test = train, test
        self.model = finetune.fit_head(models.load("vit-fashion-mnist"), train)
        params = nnx.state(self.model, nnx.Param)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self.selections = {
            budget: finetune.select_ranks(
                self.model, train, targets="blocks/**", budget=int(self.parameters * budget / 100)
            )
            for budget in BUDGETS
        }

    def lora(self, epochs: int, axes, start=STARTS, budgets=BUDGETS, orders: int = 1):
        """Test accuracy of lanes of adapters."""
        run = finetune.run_of(
            self.model,
            self.train,
            recipe_of("lora", len(self.train.labels), epochs),
            start=start,
            heads=HEADS,
            gradients=self.selections[budgets[0]].gradients,
            test=self.test,
            every=0,
            orders=orders,
            allocations=[self.selections[budget].ranks for budget in budgets],
        )
        return sweeps.sweep(run, axes, key=jax.random.key(0), fold=("order",))["test_accuracy"]

    def full(self, epochs: int, axes, orders: int = 1):
        """Test accuracy of lanes that train every parameter."""
        model = nnx.clone(self.model)
        model.train()
        recipe = recipe_of("full", len(self.train.labels), epochs)
        run = finetune.run_of(
            model, self.train, recipe, targets=None, test=self.test, every=0, orders=orders
        )
        return sweeps.sweep(run, axes, key=jax.random.key(0), fold=("order",))["test_accuracy"]

    def trainable(self, budget: float) -> int:
        """Parameters that train with adapters within a budget."""
        heads = sum(
            leaf.size
            for name in HEADS
            for leaf in jax.tree.leaves(nnx.state(getattr(self.model, name), nnx.Param))
        )
        return self.selections[budget].parameters + heads


def part(split: data.Split, images: int) -> data.Split:
    """As many images of a set that is sorted by class, spread over it."""
    every = len(split.labels) // images
    return data.Split(split.images[::every][:images], split.labels[::every][:images])


def pick(profile: Profile):
    """The three decisions, with the held-out accuracy of all candidates."""
    found = data.load("mnist-sample")
    train = part(found.train, profile.images)
    rest, aside = data.hold_out(train, profile.held_out)
    trial = Trial(rest, aside)
    orders = range(profile.orders)
    first = trial.lora(
        profile.epochs,
        {
            "start": range(len(STARTS)),
            "rate": np.asarray(RATES, np.float32),
            "allocation": [len(BUDGETS) - 1],
            "order": orders,
        },
        orders=profile.orders,
    )
    first = first.mean(("allocation", "order")).values
    start, rate = np.unravel_index(first.argmax(), first.shape)
    second = trial.lora(
        profile.epochs,
        {
            "allocation": range(len(BUDGETS)),
            "rate": np.asarray([RATES[rate]], np.float32),
            "order": orders,
        },
        start=STARTS[start],
        orders=profile.orders,
    )
    second = second.mean(("rate", "order")).values
    third = trial.full(
        profile.epochs,
        {"rate": np.asarray(RATES, np.float32), "order": orders},
        orders=profile.orders,
    )
    third = third.mean("order").values
    picked = {
        "start": STARTS[start],
        "learning rate": BASE_RATE["lora"] * RATES[rate],
        "budget": BUDGETS[int(second.argmax())],
        "learning rate of full fine-tuning": BASE_RATE["full"] * RATES[int(third.argmax())],
    }
    table = {
        "start and learning rate": {
            name: {f"{BASE_RATE['lora'] * r:g}": float(x) for r, x in zip(RATES, row, strict=True)}
            for name, row in zip(STARTS, first, strict=True)
        },
        "budget": {f"{b:g} %": float(x) for b, x in zip(BUDGETS, second, strict=True)},
        "learning rate of full fine-tuning": {
            f"{BASE_RATE['full'] * r:g}": float(x) for r, x in zip(RATES, third, strict=True)
        },
    }
    return picked, table


def check(profile: Profile, picked, seeds: int):
    """Test accuracy of what was picked, a number a seed, of LoRA and of full fine-tuning."""
    found = data.load("mnist-sample")
    train = part(found.train, profile.images)
    trial = Trial(train, found.test)
    lora = trial.lora(
        profile.check_epochs,
        {
            "order": range(seeds),
            "rate": np.asarray([picked["learning rate"] / BASE_RATE["lora"]], np.float32),
            "allocation": [0],
        },
        start=picked["start"],
        budgets=(picked["budget"],),
        orders=seeds,
    )
    rate = picked["learning rate of full fine-tuning"] / BASE_RATE["full"]
    full = trial.full(
        profile.check_epochs,
        {"order": range(seeds), "rate": np.asarray([rate], np.float32)},
        orders=seeds,
    )
    share = trial.trainable(picked["budget"]) / trial.parameters
    return lora.values.ravel(), full.values.ravel(), share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/pick_defaults.json"))
    args = parser.parse_args()
    profile = PROFILES[args.profile]
    picked, table = pick(profile)
    print(json.dumps({"held-out accuracy": table, "picked": picked}, indent=2), flush=True)
    lora, full, share = check(profile, picked, args.seeds)
    difference, half = finetune.interval(full - lora)
    print(f"test accuracy of LoRA {lora.mean():.4f}, of full fine-tuning {full.mean():.4f}")
    print(f"full − LoRA: {difference:.4f} ± {half:.4f} (95 %), {args.seeds} seeds")
    print(f"LoRA trains {share:.1%} of the parameters (adapters, head, patches)")
    result = {
        "profile": args.profile,
        "held-out accuracy": table,
        "picked": picked,
        "test accuracy": {"lora": lora.tolist(), "full": full.tolist()},
        "full - lora": [difference, half],
        "trainable share": share,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"Written: {args.out}")


if __name__ == "__main__":
    main()
