"""From Tiny ImageNet to CIFAR-10: LoRA, full fine-tuning and a linear probe, over several seeds.

`python sims/transfer.py --profile quick` takes the sample of CIFAR-10 that comes with the package
and few steps; `sample` the same pictures in earnest; `part` a fifth of CIFAR-10 (`cifar10_jpg.npz`
in LORAJAX_DATA, lossy copies), `full` all of it. All methods begin at one fitted head and see
the same batches; learning rates are chosen on a fifth of the training pictures, held out, and the
test set is looked at with the chosen ones alone. A run that was cut off goes on where it was.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("NPROC", "16")  # see "Good to know" in the README

import jax  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from lorajax import adapters, data, finetune, models, sweeps, tasks  # noqa: E402
from lorajax.finetune import recipes  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Profile:
    """How much is done.

    Attributes:
      source: of the pictures.
      images: to train on, and as many to measure on at most.
      side: that pictures are brought to.
      epochs: through them.
      seeds: orders of the pictures and draws of the start.
      rates: learning rates that are tried, by method; with one nothing is chosen.
    """

    source: str
    images: int
    side: int
    epochs: int
    seeds: int
    rates: dict[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Method:
    """What trains.

    Attributes:
      rates: whose learning rates it tries.
      beside: what trains in full beside the adapters, as path patterns.
      filled: whether the ranks are filled up to the budget.
    """

    rates: str
    beside: tuple[str, ...]
    filled: bool = False

    @property
    def adapters(self) -> bool:
        """Whether it has any."""
        return self.rates == "LoRA"


BESIDE = ("head", "embeddings")
SMALL = ("**/norm*", "**/bias")
"""Norms and biases, which PEFT's `bias="all"` and BitFit train as well; 0.8 % of the model."""
METHODS = {
    "LoRA": Method("LoRA", BESIDE),
    "LoRA, filled": Method("LoRA", BESIDE, filled=True),
    "LoRA, filled, norms and biases": Method("LoRA", BESIDE + SMALL, filled=True),
    "full": Method("full", ("**",)),
    "probe": Method("probe", BESIDE[:1]),
}
RATES = {
    "LoRA": (2e-4, 6e-4, 1.5e-3, 3e-3),
    "full": (1e-4, 3e-4, 1e-3, 3e-3),
    "probe": (1e-3, 3e-3, 1e-2),
}
PROFILES = {
    "quick": Profile("cifar10-sample", 200, 32, 1, 2, {k: v[1:2] for k, v in RATES.items()}),
    "sample": Profile("cifar10-sample", 1000, 32, 6, 5, RATES),
    # An hour of a core.
    "part": Profile("cifar10_jpg.npz", 10_000, 32, 6, 5, RATES),
    "full": Profile("cifar10_jpg.npz", 50_000, 64, 6, 5, RATES),
}
SHARE = 0.099
"""Of the model's parameters that may train with adapters, head and embeddings among them. The rule
takes what it tells from noise; filled up are its ranks with the gradient's next directions."""
BEHIND = 8192
"""Pictures behind the ranks at most: the more there are, the smaller the directions they tell from
chance."""
PAIRS = tuple(
    pair
    for name, method in METHODS.items()
    if method.adapters
    for pair in ((name, "probe"), ("full", name))
)
BATCH = 50


def part(table: data.Table, images: int) -> data.Table:
    """As many images of a set that is sorted by class, spread over it."""
    count = min(images, len(table))
    return table.take(np.arange(count) * len(table) // count)


class Trial:
    """The pretrained model with a head that fits, and the ranks of its adapters."""

    def __init__(self, source: str, profile: Profile, train: data.Table, test: data.Table):
        self.profile, self.train, self.test = profile, train, test
        model = models.load(source, classes=10, image_size=profile.side)
        self.task = tasks.Images.of(model.config)
        self.model = finetune.fit_head(model, self.task, train, batch_size=BATCH)
        self.parameters = _count(self.model)
        self.selection = finetune.select_ranks(
            self.model,
            self.task,
            train,
            targets="blocks/**",
            samples=BEHIND,
            budget=self._left("LoRA"),
        )

    def _in_full(self, name: str) -> int:
        """Parameters that a method trains in full."""
        trains = nnx.filterlib.All(nnx.Param, adapters.Trainable((), METHODS[name].beside))
        return _count(self.model, trains)

    def _left(self, name: str) -> int:
        """Parameters that its adapters may have."""
        return int(SHARE * self.parameters) - self._in_full(name)

    def ranks(self, name: str) -> dict[str, int]:
        """Of the layers by path, for a method with adapters."""
        if not METHODS[name].filled:
            return self.selection.ranks
        return self.selection.filled(self._left(name)).ranks

    def trainable(self, name: str) -> int:
        """Parameters that train."""
        costs = {each.path: each.cost for each in self.selection.layers}
        ranks = self.ranks(name) if METHODS[name].adapters else {}
        return self._in_full(name) + sum(rank * costs[path] for path, rank in ranks.items())

    def run(self, name: str, orders: int) -> finetune.Run:
        """Training by a method, its learning rate a multiple of the recipe's 1."""
        task = dataclasses.replace(self.task, augment="flip", smoothing=tasks.SMOOTHING)
        steps = self.profile.epochs * (len(self.train) // BATCH)
        method = METHODS[name]
        kind = recipes.lora if method.adapters else recipes.full
        recipe = kind(steps, batch_size=BATCH, learning_rate=1.0)
        options: dict[str, Any] = {"targets": None}
        if method.adapters:
            options = {
                "start": "orthogonal",
                "heads": method.beside,
                "gradients": self.selection.gradients,
                "allocations": [self.ranks(name)],
            }
        elif name == "probe":
            options = {"targets": (), "heads": method.beside}
        return finetune.run_of(
            self.model, task, self.train, recipe, test=self.test, every=0, orders=orders, **options
        )

    def accuracy(self, method: str, rates: tuple[float, ...], orders: int, store: pathlib.Path):
        """Accuracy on what is measured on, a row a learning rate and a column a seed."""
        axes = {"rate": np.asarray(rates, np.float32), "order": range(orders)}
        if METHODS[method].adapters:
            axes = {"allocation": range(1), **axes}
        found = sweeps.sweep(
            self.run(method, orders),
            axes,
            key=jax.random.key(0),
            fold=("order",),
            bucket=1,
            chunk=1,
            store=store,
            settings={"profile": repr(dataclasses.replace(self.profile, rates={}))},
            progress=lambda done: print(f"  {store.name}: {done.done} of {done.total}", flush=True),
        )
        return found["test_accuracy"].values.reshape(len(rates), orders)


def _count(module: Any, which: Any = nnx.Param) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, which)))


def compare(
    source: str, profile: Profile, names: Sequence[str], folder: pathlib.Path
) -> dict[str, Any]:
    """Chooses the learning rates on held-out pictures, then measures all methods of these names."""
    found = data.load(profile.source)
    train, test = part(found.train, profile.images), part(found.test, profile.images)
    grids = {name: profile.rates[METHODS[name].rates] for name in names}
    chosen = {method: rates[0] for method, rates in grids.items()}
    tried: dict[str, dict[str, float]] = {}
    if any(len(rates) > 1 for rates in grids.values()):
        trial = Trial(source, profile, *data.hold_out(train, len(train) // 5))
        for method, rates in grids.items():
            scores = trial.accuracy(method, rates, 1, folder / f"{method}-rates.zarr")[:, 0]
            chosen[method] = rates[int(scores.argmax())]
            tried[method] = {f"{r:g}": float(s) for r, s in zip(rates, scores, strict=True)}
            print(f"{method}, held-out accuracy by learning rate: {tried[method]}", flush=True)
    trial = Trial(source, profile, train, test)
    scores = {
        method: trial.accuracy(method, (rate,), profile.seeds, folder / f"{method}.zarr")[0]
        for method, rate in chosen.items()
    }
    return {
        "held-out accuracy": tried,
        "learning rate": chosen,
        "test accuracy": {method: each.tolist() for method, each in scores.items()},
        "differences": {
            f"{one} − {other}": finetune.interval(scores[one] - scores[other])
            for one, other in PAIRS
            if one in scores and other in scores
        },
        "trainable share": {m: trial.trainable(m) / trial.parameters for m in chosen},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--profile", choices=PROFILES, default="quick")
    add("--model", default="vit-tiny-imagenet", help="a ViT as for lorajax.models.load")
    add("--images", type=int, help="instead of the profile's")
    add("--epochs", type=int, help="likewise")
    add("--side", type=int, help="likewise")
    add("--seeds", type=int, help="likewise")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    add("--out", type=pathlib.Path, default=pathlib.Path("out/transfer"), help="folder")
    args = parser.parse_args()
    given = {k: v for k in ("images", "epochs", "side", "seeds") if (v := getattr(args, k))}
    profile = dataclasses.replace(PROFILES[args.profile], **given)
    model = models.load(args.model)
    digest = hashlib.sha256(
        b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    ).hexdigest()[:8]
    # Other weights or another profile are another experiment.
    folder = args.out / f"{args.profile}-{digest}"
    result = {"model": args.model, "weights": digest, "profile": dataclasses.asdict(profile)}
    result |= compare(args.model, profile, args.methods, folder)
    for method, each in result["test accuracy"].items():
        share = result["trainable share"][method]
        print(f"{method}: test accuracy {100 * np.mean(each):.2f} %, {share:.2%} of the parameters")
    for name, (mean, half) in result["differences"].items():
        print(f"{name}: {100 * mean:.2f} ± {100 * half:.2f} points (95 %), {profile.seeds} seeds")
    path = folder / "result.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
