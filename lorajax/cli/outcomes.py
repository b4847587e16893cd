"""What `lorajax finetune` leaves in its folder, and how an interrupted one goes on from there."""

import argparse
import contextlib
import dataclasses
import json
import math
import shlex
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


def announce(begun: Begun, trainer: Any) -> None:
    """Says what is about to train, and for how long."""
    recipe = trainer.recipe
    print(
        f"{trainer.parameters:,} parameters train, the model has {begun.parameters:,} of its own; "
        f"{recipe.steps} steps of {recipe.batch_size} {trainer.task.unit}",
        flush=True,
    )


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


def _per_second(trainer: Any, history: dict[str, Any]) -> float:
    return trainer.recipe.batch_size * len(history["step"]) / max(history["seconds"], 1e-9)


def report(begun: Begun, trainer: Any, tuned: Any, history: dict[str, Any]) -> Any:
    """Prints how a run ended; its updates against their thresholds, None without adapters."""
    import numpy as np

    from lorajax import adapters, finetune

    last = {name: history[f"test_{name}"][-1] for name in ("loss", "accuracy")}
    rate = _per_second(trainer, history)
    print(
        f"\n{begun.kind} loss {last['loss']:.4f}, {begun.kind} accuracy "
        f"{100 * last['accuracy']:.2f} %\n{trainer.parameters:,} trainable parameters "
        f"({100 * trainer.parameters / begun.parameters:.1f} % of the model's), "
        f"{rate:,.0f} {trainer.task.unit}/s"
    )
    for name, value in history["metrics"].items():
        print(f"{begun.kind} {name} {value:.4f}")
    if (ends := finetune.ends(np.asarray(history["loss"], float))).higher:
        print(
            f"The loss of training ended higher ({ends.last:.3f}) than it began "
            f"({ends.first:.3f}):\ntake a smaller --learning-rate."
        )
    stable = finetune.stable_ranks(history)
    if stable is not None:
        print(
            f"stable rank of the updates: {stable.mean():.2f} on average, {stable.max():.2f} at "
            "most"
        )
    if not adapters.layers(tuned):
        return None
    intruders = adapters.intruders(tuned)
    print(f"\nUpdates against the thresholds of their weights:\n{intruders}")
    return intruders


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


def explained(
    recipe: Any, start: Any, tuned: Any, history: dict[str, Any], gradients: Any, intruders: Any
) -> list[dict[str, Any]]:
    """What each adapted layer shows, as plain numbers; none without adapters."""
    from lorajax import finetune

    if intruders is None:
        return []
    found = finetune.insights(start, tuned, history, recipe, gradients, intruders)
    return [each._asdict() for each in found]


def check_linearized(args: argparse.Namespace, task: Any) -> None:
    """Raises ValueError where --linearized asks what the task does not offer."""
    from lorajax import finetune

    if args.linearized is not None:
        try:
            finetune.check_linear(task)
        except ValueError as error:
            raise ValueError(f"--linearized is {args.linearized}, but {error}") from error


def linearized(args: argparse.Namespace, begun: Begun, base: Any, tuned: Any) -> Any:
    """What the linearized model would have reached, where it is asked for; says so."""
    from lorajax import finetune

    if args.linearized is None:
        return None
    found = finetune.linear_optimum(
        base,
        tuned,
        begun.plain,
        begun.data.train,
        begun.data.test,
        decay=args.linearized,
        seed=args.seed,
    )
    ended = "" if found["converged"] else f"; the solver stopped short at {found['steps']} steps"
    print(
        f"\nLinearized at its start, with decay {found['decay']:g}, the model would have reached "
        f"{begun.kind} accuracy {100 * found['test_accuracy']:.2f} % ({found['samples']} samples; "
        f"objective {found['objective']:.4g}, within {found['gap']:.2g} of the global minimum"
        f"{ended})"
    )
    return found


def _plain(value: Any) -> Any:
    """A value as strict JSON has it: what is no finite number is null."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _again(given: list[str]) -> str:
    """The command that repeats a run."""
    return shlex.join(word for word in given if word != "--resume")


def explain(
    args: argparse.Namespace,
    begun: Begun,
    trainer: Any,
    history: dict[str, Any],
    base: Any,
    start: Any,
    tuned: Any,
    gradients: Any,
    intruders: Any,
) -> list[str]:
    """Writes `run.json` and `report.html`; their names."""
    from lorajax import environment, finetune
    from lorajax.cli import training
    from lorajax.environment import files
    from lorajax.report import runs

    last = {name: history[f"test_{name}"][-1] for name in ("loss", "accuracy")}
    run = {
        "schema": runs.SCHEMA,
        "environment": environment.versions(),
        "command": _again(args.given),
        "settings": training.settings(args),
        "model": {
            "name": Path(args.model).name,
            "kind": type(begun.model).__name__,
            "parameters": begun.parameters,
            "trained": trainer.parameters,
        },
        "data": {
            "name": begun.data.name,
            "kind": begun.kind,
            "unit": trainer.task.unit,
            "train": len(begun.data.train),
            "test": len(begun.data.test),
        },
        "recipe": dataclasses.asdict(trainer.recipe),
        "results": last | history["metrics"],
        "seconds": history["seconds"],
        "per_second": _per_second(trainer, history),
        "law": {
            "why": finetune.why_no_law(trainer.recipe),
            "caveats": finetune.caveats(trainer.recipe, trainer.task),
        },
        "layers": explained(trainer.recipe, start, tuned, history, gradients, intruders),
        "linearized": linearized(args, begun, base, tuned),
    }
    run = _plain(run)
    folder = Path(args.out)
    files.write(folder / "run.json", json.dumps(run, indent=1, allow_nan=False) + "\n")
    files.write(folder / "report.html", runs.to_html(run, history))
    return ["report.html", "run.json"]
