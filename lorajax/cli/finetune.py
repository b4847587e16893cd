"""Fine-tune a model with LoRA, with the start and the ranks that the theory prescribes.

While it trains, the theory's quantities are recorded in every layer: the spectrum of the update,
the factors' norm, their alignment with the gradient's top direction, and their imbalance. Results
are report.html, which explains the run with the source of every number (run.json has them), and
curves.png, probes.png, history.json and the adapter in PEFT's format; samples.png shows the first
batch of images as the model sees it. `lorajax compare` puts several runs side by side. A run that
was interrupted goes on where it was when the same command is given again with --resume.
"""

import argparse
import contextlib
from pathlib import Path
from typing import Any

from lorajax.cli import finetuning, outcomes, planning, processes, resuming, training
from lorajax.cli.interrupts import saying
from lorajax.cli.output import output_folder
from lorajax.environment.text import filled

HELP = "fine-tune a ViT, ResNet, VGG or language model and record the theory's quantities"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    finetuning.configure(parser)
    training.configure(parser)
    planning.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Prepares, trains, and writes what came out."""
    with saying(lambda: outcomes.left(args.out)):
        training.check(args)
        processes.check_run(args)
        if args.dry_run:
            return planning.run(args)
        if args.process == 0 or not args.distributed:
            output_folder(args.out)
            outcomes.check_free(args)
        with processes.joined(args):
            return _run(args)


def _run(args: argparse.Namespace) -> int:
    import jax
    from flax import nnx

    from lorajax import adapters, finetune
    from lorajax.finetune import processes as several
    from lorajax.finetune import sharding

    lora, folder = args.method == "lora", Path(args.out)
    with several.together(), training.naming_options():
        if several.first():
            output_folder(args.out)
            outcomes.check_free(args)
        mesh = processes.mesh(args)
        start = finetune.check_start(args.start, args.scale) if lora else args.start
        begun = finetuning.begin(args)
        task, at_once = begun.task, begun.at_once
        recipe = training.recipe(args, len(begun.data.train), task.unit, begun.rates)
        order = finetune.order_of(begun.data.train, recipe)
        finetune.check_metrics(task, args.metric)
        outcomes.check_linearized(args, task)
        sharding.check_batch(recipe.batch_size, recipe.accumulate, args.devices)
        rank = None if args.rank == "auto" else int(args.rank)
        if lora:
            finetune.targets_of(begun.model, args.targets, args.also, rank)
        planning.recompute(args, begun.model)
        batch = begun.data.train[order(0)]
    with several.together():
        sharding.check_same("data or options", (vars(recipe), len(begun.data.test), dict(batch)))
    with several.together():
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
    with several.together():
        trainer = finetune.Trainer(model, wrt, task, recipe, mesh=mesh, layout=args.layout)
    outcomes.announce(begun, trainer)
    with several.together():
        sheet = outcomes.sheet(begun, trainer, folder) if several.first() else []
    found = _trained(args, begun, trainer, gradients)
    tuned = several.model_of(trainer, found.state, model, wrt)
    begin = several.model_of(trainer, trainer.init(), model, wrt) if lora else None
    with several.together():
        if several.first():
            written = outcomes.write(args, folder, tuned, found.history, heads)
            intruders = outcomes.report(begun, trainer, tuned, found.history)
            written += outcomes.explain(
                args, begun, trainer, found.history, base, begin, tuned, gradients, intruders
            )
            print(filled(f"Written to {folder}: {', '.join([*sheet, *written])}"))
    return 0


def _trained(
    args: argparse.Namespace, begun: finetuning.Begun, trainer: Any, gradients: Any
) -> Any:
    """The outcome of the run, with the measures that are asked for in its history."""
    from lorajax import finetune
    from lorajax.cli.lines import Lines
    from lorajax.finetune import processes as several
    from lorajax.finetune.checkpoints import Checkpoints

    at_once, mine = 2 * begun.at_once, None
    with contextlib.ExitStack() as stack:
        with several.together():
            if several.first():
                states = Path(args.out) / "checkpoints"
                options = {"neutral": resuming.neutral(), "alone": args.distributed}
                mine = stack.enter_context(Checkpoints(states, training.settings(args), **options))
                if older := resuming.assumed(mine.assumed):
                    print(older)
        lines = stack.enter_context(Lines(trainer.recipe, trainer.task.unit))
        stop = stack.enter_context(outcomes.going_on(args.out))
        found = finetune.run(
            trainer,
            begun.data.train,
            begun.data.test,
            looks=training.looks(args),
            gradients=gradients,
            store=several.Shared(mine) if args.distributed else mine,
            observer=lines,
            test_batch=at_once,
            stop=several.agreed(stop),
        )
    found.history["metrics"] = finetune.judge(
        trainer, found.state, begun.data.test, args.metric, at_once
    )
    return found
