"""Fine-tune a model with LoRA, with the start and the ranks that the theory prescribes.

While it trains, the theory's quantities are recorded in every layer: the spectrum of the update,
the factors' norm, their alignment with the gradient's top direction, and their imbalance. Results
are report.html, which explains the run with the source of every number (run.json has them), and
curves.png, probes.png, history.json and the adapter in PEFT's format; samples.png shows the first
batch of images as the model sees it. `lorajax compare` puts several runs side by side. A run that
was interrupted goes on where it was when the same command is given again with --resume.
"""

import argparse

from lorajax.cli import finetuning, outcomes, planning, resuming, training
from lorajax.cli.interrupts import saying
from lorajax.cli.output import output_folder, prepare_jax

HELP = "fine-tune a ViT, ResNet, VGG or language model and record the theory's quantities"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    finetuning.configure(parser)
    training.configure(parser)
    planning.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Prepares, trains, and writes what came out."""
    with saying(lambda: outcomes.left(args.out)):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    training.check(args)
    if args.dry_run:
        return planning.run(args)
    folder = output_folder(args.out)
    outcomes.check_free(args)
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
        finetune.order_of(begun.data.train, recipe)
        finetune.check_metrics(task, args.metric)
        outcomes.check_linearized(args, task)
        sharding.check_batch(recipe.batch_size, recipe.accumulate, args.devices)
        rank = None if args.rank == "auto" else int(args.rank)
        if lora:
            finetune.targets_of(begun.model, args.targets, args.also, rank)
    planning.recompute(args, begun.model)
    base = finetuning.fitted(args, begun)
    model, wrt, gradients, heads = base, nnx.Param, None, ()
    if lora:
        model, wrt, heads, gradients = finetune.prepare(
            base,
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
    outcomes.announce(begun, trainer)
    sheet = outcomes.sheet(begun, trainer, folder)
    states, settings = folder / "checkpoints", training.settings(args)
    store = Checkpoints(states, settings, neutral=resuming.neutral())
    if older := resuming.assumed(store.assumed):
        print(older)
    with store, Lines(recipe, task.unit) as lines, outcomes.going_on(args.out) as stop:
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
    found.history["metrics"] = finetune.judge(
        trainer, found.state, begun.data.test, args.metric, 2 * at_once
    )
    tuned = trainer.model(found.state)
    written = outcomes.write(args, folder, tuned, found.history, heads)
    intruders = outcomes.report(begun, trainer, tuned, found.history)
    written += outcomes.explain(
        args, begun, trainer, found.history, base, tuned, gradients, intruders
    )
    print(f"Written to {folder}: {', '.join([*sheet, *written])}")
    return 0
