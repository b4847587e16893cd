"""Which rank each layer needs, from the gradient before training: a table and a file.

A singular value of the gradient counts where it stands above the noise that two halves of the data
disagree by (--rule split_half), above C/n, or within a fraction of the energy; --budget spends a
share of the model's parameters on those that count, by energy for each parameter. With --peft they
are written for training in torch as well, with --start the started adapter itself. The same command
goes on where the passes over the samples were interrupted.
"""

import argparse
import signal
from pathlib import Path
from typing import Any

from lorajax.cli import finetuning, training
from lorajax.cli.interrupts import Interrupted, Stop, saying
from lorajax.cli.output import output_folder, prepare_jax

HELP = "choose the rank of every layer of a model for a data set, before training"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    finetuning.configure(parser)
    parser.add_argument("--out", default="lorajax-rank", metavar="DIR", help="folder for results")
    parser.add_argument(
        "--peft",
        metavar="DIR",
        help="folder to write for PEFT: its configuration with these ranks, for this very model",
    )
    parser.add_argument(
        "--start",
        metavar="START",
        help="with --peft, where the adapter starts: a function of lorajax.initializers, written "
        "with the fitted head (default: PEFT starts by itself)",
    )
    parser.add_argument(
        "--trial-rank",
        type=int,
        default=4,
        metavar="R",
        help="of a small trial (default 4) whose learning rate is to carry over to these ranks",
    )
    parser.add_argument(
        "--trial-rate", type=float, metavar="RATE", help="the learning rate that it found best"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table and writes ranks.json."""
    with saying(lambda: _left(args.out)):
        return _run(args)


def _left(out: str) -> str:
    """How to go on where the command has ended outside of the passes over the samples."""
    there = any(Path(out).glob("sums-*.npz"))
    how = f"goes on from its own sums in {out}" if there else "begins anew"
    return f"no rank is written yet, and the same command {how}."


def _run(args: argparse.Namespace) -> int:
    finetuning.check(args)
    if args.start is not None and args.peft is None:
        raise ValueError(f"--start is {args.start!r}; it goes with --peft DIR.")
    finetuning.bounded(args, "trial_rank", 1, finetuning.MOST)
    finetuning.bounded(args, "trial_rate", 0, above=True)
    folder = output_folder(args.out)
    prepare_jax(x64=False)

    import json

    import numpy as np

    from lorajax import finetune
    from lorajax.environment import files
    from lorajax.environment.text import filled

    begun = finetuning.begin(args)
    targets, _ = finetune.targets_of(begun.model, args.targets, also=())
    made = _bridge(args, begun, targets)
    model = finetuning.fitted(args, begun)
    selection, kept = _selected(args, begun, model, targets)
    print(selection)
    budget = finetuning.selection(args, begun)["budget"]
    if not args.fill and 2 * selection.parameters < budget:
        spent = f"{selection.parameters / budget:.0%} of the budget of {budget:,}"
        print(filled(f"{spent}; --fill spends the rest on the gradient's next directions."))
    carried = None
    if selection.ranks:
        carried = finetune.transfer(selection.ranks, args.trial_rank, args.trial_rate)
        print(filled(str(carried)))
    layers = {
        each.path: {
            "shape": list(each.shape),
            "rank": each.rank,
            "parameters": each.rank * each.cost,
            "floor": each.floor,
            "singular_values": np.asarray(each.singular_values, np.float64).tolist(),
        }
        for each in selection.layers
    }
    result = {
        "model": args.model,
        "data": args.data,
        "rule": selection.rule,
        "samples": selection.samples,
        "parameters": selection.parameters,
        "layers": layers,
        "transfer": carried._asdict() if carried is not None else None,
        "peft": selection.peft() if selection.ranks else None,
    }
    files.write(folder / "ranks.json", json.dumps(result, indent=2) + "\n")
    kept.clear()
    print(f"\nWritten: {folder / 'ranks.json'}")
    if made is not None:
        from lorajax.finetune import bridge

        bridge.write_start(
            model,
            selection,
            args.peft,
            made,
            task=begun.plain,
            train=begun.data.train,
            start=args.start,
            seed=args.seed,
            samples=args.samples,
            batch_size=begun.at_once,
        )
        what = "PEFT's configuration" + f" and the start {args.start!r}" * bool(args.start)
        print(f"Written: {args.peft}, {what}")
    return 0


def _selected(
    args: argparse.Namespace, begun: finetuning.Begun, model: Any, targets: Any
) -> tuple[Any, Any]:
    """The ranks, from sums that an interruption leaves in the folder; and what keeps those."""
    from lorajax import finetune
    from lorajax.adapters.keeping import Kept, Stopped

    stop = Stop()
    kept = Kept(args.out, settings=training.settings(args), stopping=lambda: stop)
    try:
        selection = finetune.select_ranks(
            model,
            begun.plain,
            begun.data.train,
            targets=targets,
            samples=args.samples,
            batch_size=begun.at_once,
            seed=args.seed,
            keep=kept,
            **finetuning.selection(args, begun),
        )
    except Stopped as error:
        raise Interrupted(
            f"batch {error.done} of {error.count} is summed in {args.out}, and the same command "
            "goes on from there.",
            signal=stop.signal or signal.SIGINT,
        ) from None
    for done, count in kept.resumed:
        print(f"went on after batch {done} of {count}, whose sums were in {args.out}")
    return selection, kept


def _bridge(args: argparse.Namespace, begun: finetuning.Begun, targets: Any) -> Any:
    """What the torch model is called by, where --peft asks for it; refused before long work."""
    if args.peft is None:
        return None
    from lorajax import finetune
    from lorajax.finetune import bridge

    output_folder(args.peft, "--peft")
    with training.naming_options():
        if args.start is not None:
            finetune.check_start(args.start)
        made = bridge.bridge(begun.model, args.model)
        bridge.check_bridge(begun.model, targets, args.start, made)
    if left := sorted({*begun.model.heads} - {*made.heads}):
        print(f"{', '.join(left)} is in no torch model of this kind and left out of {args.peft}")
    return made
