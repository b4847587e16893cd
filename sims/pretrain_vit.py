"""Pretrains the small ViT that comes with the package, on Fashion-MNIST.

`python sims/pretrain_vit.py --data FOLDER` with Fashion-MNIST in FOLDER (or LORAJAX_DATA; it is
downloaded otherwise) writes `vit-fashion-mnist.safetensors`, with recipe and accuracy in its
metadata. `--profile quick` takes few steps on few images and writes to `--out` alone.
"""

import argparse
import dataclasses
import json
import pathlib
import time

from flax import nnx

from lorajax import data, finetune, models, tasks

CONFIG = models.ViTConfig(
    image_size=(28, 28),
    patch_size=7,
    width=64,
    depth=4,
    heads=4,
    classes=10,
    channels=1,
    mean=(0.286,),
    std=(0.353,),
)
EPOCHS = {"quick": 1, "full": 12}
IMAGES = {"quick": 512, "full": 60_000}
BATCH = 128
EMBEDDED = pathlib.Path(models.__file__).parent / "embedded" / "vit-fashion-mnist.safetensors"


def run(profile: str, folder: str | None, out: pathlib.Path, epochs: int | None = None) -> float:
    """Trains, writes the checkpoint, and returns its test accuracy."""
    source = data.load("fashion-mnist", folder=folder)
    # Spread over the set, which some copies hold sorted by class.
    every = len(source.train) // IMAGES[profile]
    train = source.train.take(slice(None, None, every))
    epochs = epochs or EPOCHS[profile]
    steps = epochs * (len(train) // BATCH)
    recipe = finetune.Recipe(
        steps=steps,
        batch_size=BATCH,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=0.05,
        warmup=steps // 20,
        clip=1.0,
    )
    task = tasks.Images.of(CONFIG, smoothing=0.05, augment="flip")
    model = models.build(CONFIG, rngs=nnx.Rngs(0))
    trainer = finetune.Trainer(model, nnx.Param, task, recipe)
    started = time.perf_counter()

    def report(record: finetune.Record) -> None:
        if record.step % 100 == 0 or record.step == steps:
            seconds = time.perf_counter() - started
            print(
                f"step {record.step}/{steps}  loss {float(record.metrics.loss):.4f}  "
                f"accuracy {float(record.metrics.accuracy):.3f}  {seconds:.0f} s",
                flush=True,
            )

    state = finetune.fit(trainer, train, callback=report)
    measured = trainer.evaluate(state, source.test, batch_size=500)
    accuracy = float(measured.accuracy)
    notes = {
        "data": "Fashion-MNIST (MIT licence, Zalando Research), all 60,000 training images"
        if profile == "full"
        else f"Fashion-MNIST, {len(train)} training images",
        "recipe": json.dumps(dataclasses.asdict(recipe) | dataclasses.asdict(task)),
        "test_accuracy": f"{accuracy:.4f}",
        "test_loss": f"{float(measured.loss):.4f}",
        "command": f"python sims/pretrain_vit.py --profile {profile}",
    }
    models.save(trainer.model(state), out, notes=notes)
    print(f"test accuracy {accuracy:.4f}, {out.stat().st_size} bytes in {out}")
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--profile", choices=("quick", "full"), default="quick")
    parser.add_argument("--data", help="folder with Fashion-MNIST; LORAJAX_DATA if not given")
    parser.add_argument("--epochs", type=int, help="instead of the profile's")
    parser.add_argument("--out", type=pathlib.Path, help="checkpoint to write")
    arguments = parser.parse_args()
    out = arguments.out
    if out is None:
        full = arguments.profile == "full"
        out = EMBEDDED if full else pathlib.Path("out") / EMBEDDED.name
    run(arguments.profile, arguments.data, out, arguments.epochs)


if __name__ == "__main__":
    main()
