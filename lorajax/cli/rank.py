"""Which rank each layer needs, from the gradient before training: a table and a file.

A singular value of the gradient counts where it stands above the noise that two halves of the data
disagree by (--rule split_half), above C/n, or within a fraction of the energy; --budget spends a
share of the model's parameters on those that count, by energy for each parameter.
"""

import argparse

from lorajax.cli import finetuning
from lorajax.cli.output import output_folder, prepare_jax

HELP = "choose the rank of every layer of a model for a data set, before training"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    finetuning.configure(parser)
    parser.add_argument("--out", default="lorajax-rank", metavar="DIR", help="folder for results")


def run(args: argparse.Namespace) -> int:
    """Prints the table and writes ranks.json."""
    finetuning.check(args)
    folder = output_folder(args.out)
    prepare_jax(x64=False)

    import json

    import numpy as np

    from lorajax import finetune
    from lorajax.environment import files

    begun = finetuning.begin(args)
    targets, _ = finetune.targets_of(begun.model, args.targets, also=())
    selection = finetune.select_ranks(
        finetuning.fitted(args, begun),
        begun.plain,
        begun.data.train,
        targets=targets,
        samples=args.samples,
        batch_size=begun.at_once,
        seed=args.seed,
        **finetuning.selection(args, begun),
    )
    print(selection)
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
        "peft": selection.peft() if selection.ranks else None,
    }
    files.write(folder / "ranks.json", json.dumps(result, indent=2) + "\n")
    print(f"\nWritten: {folder / 'ranks.json'}")
    return 0
