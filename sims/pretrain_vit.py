"""Pretrains the small ViTs that come with the package.

`python sims/pretrain_vit.py --model tiny-imagenet --profile full --data FOLDER` writes
`vit-tiny-imagenet.safetensors` in float16, with recipe, curve, labels and accuracy in its metadata;
`--model fashion-mnist`, the default, `vit-fashion-mnist.safetensors`. The data are looked for in
FOLDER (or LORAJAX_DATA); Fashion-MNIST is downloaded otherwise.

Training goes in stages: small images first, at a constant learning rate, where a step costs a
fraction; then large ones, positions interpolated, while the rate falls to zero. Each stage is saved
in `--work` and goes on where it was when the same command is given again. A first stage may be made
longer at any time, by `--stages 32:40 64:4` (side : epochs), and be ended another way: its state
does not depend on how long it was meant to be. `--profile quick` takes few steps on few images.
"""

import argparse
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lorajax import data, finetune, models, tasks
from lorajax.finetune import sharding
from lorajax.finetune.checkpoints import Checkpoints

EMBEDDED = pathlib.Path(models.__file__).parent / "embedded"
Stages = tuple[tuple[int, float], ...]
"""Side of the images and epochs, one after the other."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one of the models is made.

    Attributes:
      source: a name or file that `data.load` knows.
      about: whose data they are.
      config: of the model; `image_size` is what it is written for in the end. Where cuts of the
        pictures are trained on, what they show is larger than in whole ones, which the model then
        knows best when they are larger, too (Touvron et al. 2019, arXiv:1906.06423, recalled).
      stages: in the full profile.
      batch: images a step.
      rate: learning rate at its peak.
      augment: a name of `data.POLICIES`.
      smoothing: of the labels.
      optimizer: of `finetune.Recipe`.
      warmup: steps, of a first stage that goes on at a constant rate.
      mixup: of `tasks.Images`.
      dtype: of what is written.
    """

    source: str
    about: str
    config: models.ViTConfig
    stages: Stages
    batch: int
    rate: float
    augment: str
    smoothing: float
    optimizer: str = "adamw"
    warmup: int = 100
    mixup: float = 0.0
    dtype: str = "float16"


PLANS = {
    "fashion-mnist": Plan(
        "fashion-mnist",
        "Fashion-MNIST (MIT licence, Zalando Research)",
        models.ViTConfig(
            image_size=(28, 28),
            patch_size=7,
            width=64,
            depth=4,
            heads=4,
            classes=10,
            channels=1,
            mean=(0.286,),
            std=(0.353,),
        ),
        ((28, 12),),
        batch=128,
        rate=2e-3,
        augment="flip",
        smoothing=0.05,
        dtype="float32",
    ),
    "tiny-imagenet": Plan(
        "tiny_imagenet_200x200.npz",
        "Tiny ImageNet, 200 training pictures of each of 200 classes (ImageNet's research terms; "
        "no picture of it is here)",
        models.ViTConfig(
            image_size=(48, 48),
            patch_size=8,
            width=128,
            depth=6,
            heads=4,
            classes=200,
            pool="mean",
            class_token=False,
            mean=(0.48, 0.448, 0.398),
            std=(0.277, 0.269, 0.282),
        ),
        ((32, 15), (32, 1)),
        batch=256,
        rate=4e-3,
        augment="zoom-flip",
        smoothing=0.1,
        optimizer="muon",
    ),
}
QUICK_IMAGES = 512


def recipe_of(plan: Plan, stage: int, stages: Stages, images: int) -> finetune.Recipe:
    """The recipe of a stage: the last one's rate falls by a cosine, the others' stay."""
    batch, last = min(plan.batch, images), stage == len(stages) - 1
    steps = max(2, round(stages[stage][1] * (images // batch)))
    return finetune.Recipe(
        steps=steps,
        batch_size=batch,
        optimizer=plan.optimizer,
        learning_rate=plan.rate,
        schedule="cosine" if last else "constant",
        weight_decay=0.05,
        warmup=steps // 20 if last else min(plan.warmup, steps // 2),
        clip=1.0,
        seed=stage,
    )


class Teller(finetune.Observer):
    """Prints how it goes."""

    def __init__(self, last: int):
        self.last, self.begin = last, time.perf_counter()
        self.spent = time.process_time()

    def _say(self, text: str) -> None:
        wall, spent = time.perf_counter() - self.begin, time.process_time() - self.spent
        print(f"{text}  {wall:.0f} s, of processors {spent:.0f} s", flush=True)

    def resumed(self, step: int) -> None:
        self._say(f"goes on after step {step}")

    def stepped(self, record: finetune.Record) -> None:
        if record.step % 50 == 0 or record.step == self.last:
            loss, right = float(record.metrics.loss), float(record.metrics.accuracy)
            self._say(f"step {record.step}/{self.last}  loss {loss:.4f}  accuracy {right:.3f}")

    def tested(self, step: int, metrics: finetune.Metrics, rate: float | None) -> None:
        self._say(f"step {step}: test loss {metrics.loss:.4f}, accuracy {metrics.accuracy:.4f}")


def train_stage(
    plan: Plan,
    stage: int,
    stages: Stages,
    found: data.Dataset,
    work: pathlib.Path,
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """Trains a stage to its end, saves the model in `work`, and returns what was recorded."""
    side, last = stages[stage][0], stage == len(stages) - 1
    config = dataclasses.replace(plan.config, image_size=(side, side))
    if stage == 0:
        model = models.build(config, rngs=nnx.Rngs(0))
    else:
        model = models.load(saved(work, stages[:stage]), image_size=side)
        model.train()
    task = tasks.Images.of(config, smoothing=plan.smoothing, augment=plan.augment, mixup=plan.mixup)
    recipe = recipe_of(plan, stage, stages, len(found.train))
    settings = {**dataclasses.asdict(recipe), "side": side, "augment": plan.augment}
    if plan.mixup:
        settings["mixup"] = plan.mixup
    if recipe.schedule == "constant":
        del settings["steps"]  # what it has come to after a step does not depend on the last one
    before = [list(each) for each in stages[:stage]]
    settings = {**settings, "before": before, "images": len(found.train), "model": repr(config)}
    trainer = finetune.Trainer(model, nnx.Param, task, recipe, mesh=mesh)
    epochs = max(1, round(stages[stage][1]))
    where = saved(work, stages[: stage + 1])
    # What goes on at a constant rate has one folder, however long it is meant to be.
    states = (where if last else saved(work, (*stages[:stage], (side, 0)))).with_suffix("")
    with Checkpoints(states, settings) as store:
        if store.latest is not None and store.latest > recipe.steps:
            raise ValueError(
                f"{states} has taken {store.latest} steps of stage {stage} already, more than "
                f"{recipe.steps}; give it more epochs, or another folder."
            )
        outcome = finetune.run(
            trainer,
            found.train,
            found.test,
            looks=finetune.Looks(tests=-(-epochs // 3), probes=0, checkpoints=2 * epochs),
            store=store,
            observer=Teller(recipe.steps),
            test_batch=500,
        )
    models.save(trainer.model(outcome.state), where)
    history = outcome.history
    return {
        "side": side,
        "recipe": dataclasses.asdict(recipe),
        "augment": plan.augment,
        "smoothing": plan.smoothing,
        "mixup": plan.mixup,
        "seconds": round(history["seconds"]),
        "test_step": history["test_step"],
        "test_accuracy": [round(x, 4) for x in history["test_accuracy"]],
        "train_loss": [round(x, 3) for x in _means(history["loss"], 20)],
    }


def saved(work: pathlib.Path, stages: Stages) -> pathlib.Path:
    """Where the model is saved that has gone through some stages."""
    words = [f"{side}x{epochs:g}".removesuffix("x0") for side, epochs in stages]
    return work / ("-".join(words).replace(".", "_") + ".safetensors")


def _means(values: list[float], count: int) -> list[float]:
    """Of that many stretches of equal length."""
    length = max(1, len(values) // count)
    parts = [values[i : i + length] for i in range(0, len(values) - length + 1, length)]
    return [sum(part) / len(part) for part in parts]


def rounded(source: pathlib.Path, path: pathlib.Path, plan: Plan, found: data.Dataset) -> Any:
    """Writes a model in the plan's type and for its size, and measures what was written."""
    options = {"param_dtype": jnp.dtype(plan.dtype), "image_size": plan.config.image_size}
    models.save(models.load(source, **options), path)
    model = models.load(path)
    recipe = finetune.Recipe(steps=1)
    trainer = finetune.Trainer(model, nnx.Param, tasks.Images.of(model.config), recipe)
    return trainer.evaluate(trainer.init(), found.test, batch_size=500)


def run(
    name: str,
    profile: str,
    folder: str | None,
    out: pathlib.Path,
    work: pathlib.Path,
    stages: Stages | None = None,
    devices: int = 1,
    mixup: float | None = None,
) -> float:
    """Trains, writes the checkpoint, and returns its test accuracy."""
    plan = PLANS[name] if mixup is None else dataclasses.replace(PLANS[name], mixup=mixup)
    found = data.load(plan.source, folder=folder)
    stages = stages or (plan.stages if profile == "full" else tuple((s, 1) for s, _ in plan.stages))
    if profile == "quick":
        # Spread over the set, which some copies hold sorted by class.
        thin = {kind: len(getattr(found, kind)) // QUICK_IMAGES for kind in ("train", "test")}
        parts = {k: getattr(found, k).take(slice(None, None, every)) for k, every in thin.items()}
        found = found._replace(**parts)
    mesh = sharding.mesh_of(devices)
    curves = [train_stage(plan, i, stages, found, work, mesh) for i in range(len(stages))]
    out.parent.mkdir(parents=True, exist_ok=True)
    measured = rounded(saved(work, stages), out, plan, found)
    accuracy = float(measured.accuracy)
    words = " ".join(f"{side}:{epochs:g}" for side, epochs in stages)
    notes = {
        "data": f"{plan.about}; {len(found.train):,} pictures",
        "classes": json.dumps(found.classes),
        "stages": json.dumps(curves),
        "test_accuracy": f"{accuracy:.4f}",
        "test_loss": f"{float(measured.loss):.4f}",
        "command": f"python sims/pretrain_vit.py --model {name} --profile {profile} "
        f"--stages {words}" + f" --mixup {plan.mixup:g}" * bool(plan.mixup),
    }
    models.save(models.load(out, param_dtype=jnp.dtype(plan.dtype)), out, notes=notes)
    print(f"test accuracy {accuracy:.4f}, {out.stat().st_size} bytes in {out}")
    return accuracy


def _stage(text: str) -> tuple[int, float]:
    side, _, epochs = text.partition(":")
    return int(side), float(epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", choices=PLANS, default="fashion-mnist")
    add("--profile", choices=("quick", "full"), default="quick")
    add("--data", help="folder with the data; LORAJAX_DATA if not given")
    add("--stages", nargs="+", type=_stage, metavar="SIDE:EPOCHS", help="instead of the plan's")
    add("--mixup", type=float, help="likewise")
    add("--devices", type=int, default=1, help="that batches are split among")
    add("--work", type=pathlib.Path, help="folder for what is resumed (default out/pretrain/MODEL)")
    add("--out", type=pathlib.Path, help="checkpoint to write")
    args = parser.parse_args()
    out, file = args.out, f"vit-{args.model}.safetensors"
    if out is None:
        out = EMBEDDED / file if args.profile == "full" else pathlib.Path("out") / file
    work = args.work or pathlib.Path("out") / "pretrain" / f"{args.model}-{args.profile}"
    stages = None if args.stages is None else tuple(args.stages)
    run(args.model, args.profile, args.data, out, work, stages, args.devices, args.mixup)


if __name__ == "__main__":
    main()
