"""What `lorajax finetune` leaves in its folder, and how an interrupted one goes on from there."""

import argparse
import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorajax.cli.finetuning import Begun
from lorajax.cli.interrupts import Interrupted, Stop


def saved(out: str) -> bool:
    """Whether a folder holds the states of a run."""
    states = Path(out) / "checkpoints"
    return states.is_dir() and any(each.name.isdecimal() for each in states.iterdir())


def check_free(args: argparse.Namespace) -> None:
    """Raises ValueError for a folder that holds a run which is not to be gone on with."""
    if saved(args.out) and not args.resume:
        raise ValueError(
            f"--out is {args.out!r}, which holds a run already; give --resume to go on with it, or "
            "another folder."
        )


def left(out: str) -> str:
    """How to go on with a run whose folder is `out`."""
    again = " with --resume" if saved(out) else ""
    there = f"a state is saved in {out}" if again else "no state is saved yet"
    return f"{there}, and the same command{again} goes on from there."


@contextlib.contextmanager
def going_on(out: str) -> Iterator[Stop]:
    """Within the block the first signal lets a step end, and its state is saved."""
    from lorajax.finetune.runs import Stopped

    with Stop() as stop:
        try:
            yield stop
        except Stopped as error:
            raise Interrupted(
                f"step {error.step} of {error.last} is saved in {out}, and the same command "
                "with --resume goes on from there.",
                signal=stop.signal or signal.SIGINT,
            ) from None


def sheet(begun: Begun, trainer: Any, folder: Path) -> list[str]:
    """Writes the first batch of images as the model sees it; the file's name, none for texts."""
    from lorajax import finetune, plots, tasks
    from lorajax.plots import finetune as figures

    if not isinstance(begun.task, tasks.Images):
        return []
    recipe, train = trainer.recipe, begun.data.train
    batch = train[finetune.order_of(train, recipe)(0)]
    titles = [begun.data.classes[label] for label in batch["labels"]]
    pixels = trainer.seen(batch)["pixels"]
    figure = figures.sheet(pixels, titles, begun.task.mean, begun.task.std)
    plots.save(figure, folder / "samples.png")
    return ["samples.png"]


def report(begun: Begun, trainer: Any, tuned: Any, history: dict[str, Any]) -> None:
    """Prints how a run ended."""
    from lorajax import adapters, finetune

    last = {name: history[f"test_{name}"][-1] for name in ("loss", "accuracy")}
    rate = trainer.recipe.batch_size * len(history["step"]) / max(history["seconds"], 1e-9)
    print(
        f"\n{begun.kind} loss {last['loss']:.4f}, {begun.kind} accuracy "
        f"{100 * last['accuracy']:.2f} %; {trainer.parameters:,} trainable parameters "
        f"({100 * trainer.parameters / begun.parameters:.1f} % of the model's), "
        f"{rate:,.0f} {trainer.task.unit}/s"
    )
    for name, value in history["metrics"].items():
        print(f"{begun.kind} {name} {value:.4f}")
    stable = finetune.stable_ranks(history)
    if stable is not None:
        print(
            f"stable rank of the updates: {stable.mean():.2f} on average, {stable.max():.2f} at "
            "most"
        )
    if adapters.layers(tuned):
        print(f"\nUpdates against the thresholds of their weights:\n{adapters.intruders(tuned)}")


def write(
    args: argparse.Namespace, folder: Path, tuned: Any, history: dict[str, Any], heads: Any
) -> list[str]:
    """Writes what came out of a run; the names of the files and folders."""
    from lorajax import models, plots
    from lorajax.environment import files
    from lorajax.finetune import bridge
    from lorajax.plots import finetune as figures

    files.write(folder / "history.json", json.dumps(history) + "\n")
    plots.save(figures.curves(history), folder / "curves.png")
    if args.method == "full":
        models.save(tuned, folder / "model" / "model.safetensors")
        return ["curves.png", "history.json", "model"]
    figure = figures.quantities(history["probe_step"], history["layers"], history["probes"])
    plots.save(figure, folder / "probes.png")
    if why := bridge.save_adapter(tuned, folder / "adapter", args.model, heads):
        print(f"adapter/ has this package's names, for {why}")
    return ["curves.png", "history.json", "adapter", "probes.png"]
