"""Fine-tune a model with LoRA, with the start and the ranks that the theory prescribes.

While it trains, the theory's quantities are recorded in every layer: the spectrum of the update,
the factors' norm, their alignment with the gradient's top direction, and their imbalance. Results
are curves.png, probes.png, history.json and the adapter in PEFT's format; samples.png shows the
first batch of images as the model sees it. A run that was interrupted goes on where it was when the
same command is given again with --resume.
"""

import argparse
import json
from typing import Any

from lorajax.cli import finetuning, planning, training
from lorajax.cli.output import output_folder, prepare_jax

HELP = "fine-tune a ViT, ResNet, VGG or language model and record the theory's quantities"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    finetuning.configure(parser)
    training.configure(parser)
    planning.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Prepares, trains, and writes what came out."""
    training.check(args)
    if args.dry_run:
        return planning.run(args)
    folder = output_folder(args.out)
    saved = folder / "checkpoints"
    if saved.exists() and any(saved.iterdir()) and not args.resume:
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
    model, wrt, gradients = finetuning.fitted(args, begun), nnx.Param, None
    heads: tuple[str, ...] = ()
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
    sheet = _sheet(begun, trainer, folder)
    with Checkpoints(saved, training.settings(args)) as store, Lines(recipe, task.unit) as lines:
        found = finetune.run(
            trainer,
            begun.data.train,
            begun.data.test,
            looks=training.looks(args),
            gradients=gradients,
            store=store,
            observer=lines,
            test_batch=2 * at_once,
        )
    judged = finetune.judge(trainer, found.state, begun.data.test, args.metric, 2 * at_once)
    found.history["metrics"] = judged
    written = _write(args, folder, tuned := trainer.model(found.state), found.history, heads)
    _report(begun, trainer, tuned, found.history)
    print(f"Written to {folder}: {', '.join([*sheet, *written])}")
    return 0


def _sheet(begun: finetuning.Begun, trainer: Any, folder: Any) -> list[str]:
    """Writes the first batch of images as the model sees it; the file's name, none for texts."""
    from lorajax import data, plots, tasks
    from lorajax.plots import finetune as figures

    if not isinstance(begun.task, tasks.Images):
        return []
    recipe, train = trainer.recipe, begun.data.train
    batch = train[data.Order(len(train), recipe.batch_size, recipe.seed)(0)]
    titles = [begun.data.classes[label] for label in batch["labels"]]
    pixels = trainer.seen(batch)["pixels"]
    figure = figures.sheet(pixels, titles, begun.task.mean, begun.task.std)
    plots.save(figure, folder / "samples.png")
    return ["samples.png"]


def _report(begun: finetuning.Begun, trainer: Any, tuned: Any, history: dict[str, Any]) -> None:
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


def _write(
    args: argparse.Namespace, folder: Any, tuned: Any, history: dict[str, Any], heads: Any
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
