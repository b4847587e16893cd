"""Fine-tune a model with LoRA, with the start and the ranks that the theory prescribes.

While it trains, the theory's quantities are recorded in every layer: the spectrum of the update,
the factors' norm, their alignment with the gradient's top direction, and their imbalance. Results
are curves.png, probes.png, history.json and the adapter in PEFT's format. A run that was
interrupted goes on where it was when the same command is given again with --resume.
"""

import argparse
import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorajax.cli import finetuning, planning, training
from lorajax.cli.interrupts import Interrupted, Stop, saying
from lorajax.cli.output import output_folder, prepare_jax

HELP = "fine-tune a ViT, ResNet, VGG or language model and record the theory's quantities"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    finetuning.configure(parser)
    training.configure(parser)
    planning.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Prepares, trains, and writes what came out."""
    with saying(lambda: _left(args)):
        return _run(args)


def _left(args: argparse.Namespace) -> str:
    again = " with --resume" if _saved(args.out) else ""
    there = f"a state is saved in {args.out}" if again else "no state is saved yet"
    return f"{there}, and the same command{again} goes on from there."


def _saved(out: str) -> bool:
    """Whether a folder holds the states of a run."""
    saved = Path(out) / "checkpoints"
    return saved.is_dir() and any(each.name.isdecimal() for each in saved.iterdir())


def _run(args: argparse.Namespace) -> int:
    training.check(args)
    if args.dry_run:
        return planning.run(args)
    folder = output_folder(args.out)
    saved = folder / "checkpoints"
    if _saved(args.out) and not args.resume:
        raise ValueError(
            f"--out is {args.out!r}, which holds a run already; give --resume to go on with it, or "
            "another folder."
        )
    prepare_jax(x64=False)

    import jax
    from flax import nnx

    from lorajax import adapters, finetune
    from lorajax.cli.lines import Lines
    from lorajax.finetune import sharding
    from lorajax.finetune.checkpoints import Checkpoints

    lora = args.method == "lora"
    with training.naming_options():
        mesh = planning.mesh(args)
        start = finetune.check_start(args.start, args.scale) if lora else args.start
        begun = finetuning.begin(args)
        task, at_once = begun.task, begun.at_once
        recipe = training.recipe(args, len(begun.data.train), task.unit, begun.rates)
        finetune.check_metrics(task, args.metric)
        sharding.check_batch(recipe.batch_size, recipe.accumulate, args.devices)
        rank = None if args.rank == "auto" else int(args.rank)
        if lora:
            finetune.targets_of(begun.model, args.targets, args.also, rank)
    planning.recompute(args, begun.model)
    model, wrt, gradients, heads = finetuning.fitted(args, begun), nnx.Param, None, ()
    if lora:
        model, wrt, heads, gradients = finetune.prepare(
            model,
            task,
            begun.data.train,
            key=jax.random.key(args.seed),
            rank=rank,
            start=start,
            alpha=args.alpha,
            targets=args.targets,
            also=args.also,
            samples=args.samples,
            batch_size=at_once,
            seed=args.seed,
            **(finetuning.selection(args, begun) if rank is None else {}),
        )
        print(adapters.describe(model))
    else:
        model.train()
    trainer = finetune.Trainer(model, wrt, task, recipe, mesh=mesh, layout=args.layout)
    print(
        f"{trainer.parameters:,} parameters train, the model has {begun.parameters:,} of its own; "
        f"{recipe.steps} steps of {recipe.batch_size} {task.unit}",
        flush=True,
    )
    store = Checkpoints(saved, training.settings(args))
    with store, Lines(recipe, task.unit) as lines, going_on(args) as stop:
        found = finetune.run(
            trainer,
            begun.data.train,
            begun.data.test,
            looks=training.looks(args),
            gradients=gradients,
            store=store,
            observer=lines,
            test_batch=2 * at_once,
            stop=stop,
        )
    judged = finetune.judge(trainer, found.state, begun.data.test, args.metric, 2 * at_once)
    found.history["metrics"] = judged
    _write(args, folder, trainer.model(found.state), found.history, heads)
    _report(begun, trainer, found.history)
    written = ["curves.png", "history.json", "adapter" if lora else "model"]
    print(f"Written to {folder}: {', '.join(written)}" + ", probes.png" * lora)
    return 0


@contextlib.contextmanager
def going_on(args: argparse.Namespace) -> Iterator[Stop]:
    """Within the block the first signal lets a step end, and its state is saved."""
    from lorajax.finetune.runs import Stopped

    with Stop() as stop:
        try:
            yield stop
        except Stopped as error:
            raise Interrupted(
                f"step {error.step} of {error.last} is saved in {args.out}, and the same command "
                "with --resume goes on from there.",
                signal=stop.signal or signal.SIGINT,
            ) from None


def _report(begun: finetuning.Begun, trainer: Any, history: dict[str, Any]) -> None:
    from lorajax import finetune

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


def _write(
    args: argparse.Namespace, folder: Any, tuned: Any, history: dict[str, Any], heads: Any
) -> None:
    from lorajax import models, plots
    from lorajax.environment import files
    from lorajax.finetune import bridge
    from lorajax.plots import finetune as figures

    files.write(folder / "history.json", json.dumps(history) + "\n")
    plots.save(figures.curves(history), folder / "curves.png")
    if args.method == "full":
        models.save(tuned, folder / "model" / "model.safetensors")
        return
    figure = figures.quantities(history["probe_step"], history["layers"], history["probes"])
    plots.save(figure, folder / "probes.png")
    if why := bridge.save_adapter(tuned, folder / "adapter", args.model, heads):
        print(f"adapter/ has this package's names, for {why}")
