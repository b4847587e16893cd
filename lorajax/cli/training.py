"""The options of `lorajax finetune` that say how to train, and their limits."""

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lorajax.cli import finetuning, texts
from lorajax.cli.finetuning import MOST, bounded

OF_PAIRS = ("lora-plus", "riemannian", "reflora", "lora-rite", "spectral")
"""Optimizers that act on adapters' pairs."""
POLICIES = ("none", "crop", "flip", "crop-flip", "zoom-flip", "resized-crop")
"""What `--augment` offers."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of training."""
    _what(parser.add_argument_group("what trains").add_argument)
    _how(parser.add_argument_group("how it trains").add_argument)
    _seen(parser.add_argument_group("what is looked at and written").add_argument)


def _what(add: Callable[..., Any]) -> None:
    add("--method", choices=("lora", "full"), default="lora", help="what trains beside the head")
    add(
        "--rank", default="auto", metavar="R", help="a number, or auto (default) for lorajax rank's"
    )
    add(
        "--start",
        default="orthogonal",
        metavar="START",
        help="a function of lorajax.initializers, such as lora, small, spectral, lora_one, lora_ga,"
        " pissa (default orthogonal: A with orthonormal columns, B zero)",
    )
    add("--scale", type=float, metavar="A", help="of the start; the initializer's own if not given")
    add(
        "--also",
        nargs="*",
        metavar="MODULE",
        help="what trains in full beside the head (default: a ViT's embeddings)",
    )
    add(
        "--beside",
        type=float,
        metavar="F",
        help="learning rate of head and --also over A's (default with lora-plus: 4, as for B)",
    )
    add("--alpha", type=float, help="numerator of the scaling alpha/rank (default: scaling 1)")


def _said(rates: Mapping[str, float]) -> str:
    return f"{rates['lora']:g}; full: {rates['full']:g}"


def _how(add: Callable[..., Any]) -> None:
    add("--epochs", type=float, default=6.0, help="times through the data (default 6)")
    add("--batch-size", type=int, help="samples a step (default 50, or what --devices divide)")
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="parts that a batch is taken through in, to save memory; the step is the same",
    )
    add(
        "--window",
        type=int,
        metavar="BATCHES",
        help="of texts, sorted by length together so that batches hold little filling (default 0: "
        "shuffled whatever their length)",
    )
    add(
        "--optimizer",
        choices=("adamw", "adam", "sgd", "muon", *OF_PAIRS),
        metavar="NAME",
        help=f"adamw, adam, sgd, muon, {', '.join(OF_PAIRS)} (default lora-plus: B learns 4 "
        "times as fast as A); full: adamw, adam, sgd or muon",
    )
    add(
        "--learning-rate",
        type=float,
        help=f"at its peak (default 7e-3; full: 8e-3; for {finetuning.COLORED} "
        f"{_said(finetuning.RATES)}; for texts {_said(texts.RATES['classes'])}; for next tokens "
        f"{_said(texts.RATES['tokens'])})",
    )
    add(
        "--schedule",
        choices=("constant", "linear", "cosine"),
        default="cosine",
        help="of the learning rate, after the warm-up (default cosine)",
    )
    add("--warmup", type=int, metavar="STEPS", help="steps (default a twentieth)")
    add("--weight-decay", type=float, default=0.0, help="decoupled, of matrices (default 0)")
    add("--smoothing", type=float, default=0.1, help="of the labels in training (default 0.1)")
    add(
        "--augment",
        choices=POLICIES,
        default="none",
        metavar="HOW",
        help=f"images in training: {', '.join(POLICIES)} (default none)",
    )
    add(
        "--mixup",
        type=float,
        default=0.0,
        metavar="A",
        help="mix each image with another in training, in shares from Beta(A, A) (default 0: none)",
    )


def _seen(add: Callable[..., Any]) -> None:
    add(
        "--metric",
        nargs="+",
        default=[],
        metavar="NAME",
        help="to report at the end: accuracy, f1, matthews; of numbers: pearson, spearman",
    )
    add(
        "--linearized",
        type=float,
        nargs="?",
        const=1e-3,
        metavar="DECAY",
        help="also find what the model linearized in its adapted kernels would have reached with "
        "this decay of LoRA's factors (1e-3 if none is given), with a certificate; of images",
    )
    add("--probes", type=int, default=30, metavar="N", help="looks at the quantities (default 30)")
    add("--checkpoints", type=int, default=5, metavar="N", help="saved on the way (default 5)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--out", default="lorajax-finetune", metavar="DIR", help="folder for the results")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError, before jax is imported, for options that mean nothing."""
    finetuning.check(args)
    if args.rank != "auto" and not (args.rank.isdecimal() and 0 < int(args.rank) <= MOST):
        raise ValueError(f"--rank is {args.rank!r}; it must be 'auto' or an integer of at least 1.")
    for name in ("scale", "beside", "alpha", "learning_rate", "linearized"):
        bounded(args, name, 0, above=True)
    bounded(args, "epochs", 0, 1e6, above=True)
    for name in ("batch_size", "accumulate", "probes", "checkpoints", "devices"):
        bounded(args, name, 0, MOST, above=True)
    bounded(args, "warmup", 0, MOST)
    bounded(args, "window", 0, MOST)
    bounded(args, "weight_decay", 0)
    bounded(args, "mixup", 0)
    if not 0 <= args.smoothing < 1:
        raise ValueError(f"--smoothing is {args.smoothing}; it must lie in [0, 1).")
    if args.method == "full" and (args.beside is not None or args.optimizer in OF_PAIRS):
        given = f"--beside is {args.beside}" if args.beside else f"--optimizer is {args.optimizer}"
        raise ValueError(f"{given} with --method full; it goes with lora.")
    if args.linearized is not None and args.method == "full":
        raise ValueError(
            f"--linearized is {args.linearized} with --method full; it goes with lora."
        )
    if args.fill and (args.rank != "auto" or args.method == "full"):
        given = "--method full" if args.method == "full" else f"--rank {args.rank}"
        raise ValueError(f"--fill with {given}; it goes with ranks that are chosen.")
    decays = args.optimizer in ("adamw", "muon")
    if args.weight_decay and not decays and args.method == "lora":
        raise ValueError(
            f"--weight-decay is {args.weight_decay}; it goes with --optimizer adamw or muon."
        )


@contextlib.contextmanager
def naming_options() -> Iterator[None]:
    """Names arguments as the options that they came from, in what a block raises."""
    try:
        yield
    except ValueError as error:
        names = "scale|rank|warmup|batch_size|accumulate|metric|steps|also|start|model|devices"
        names += "|max_length"
        text = re.sub(
            f"^({names})(?= is | holds )",
            lambda found: "--" + found[0].replace("_", "-"),
            re.sub("^length(?= is )", "max_length", str(error)),
        )
        raise ValueError(text) from error


def _default_batch(usual: int, samples: int, args: argparse.Namespace) -> int:
    """The usual batch size, or the next multiple that devices and parts divide; says so then."""
    usual, parts = min(usual, samples), args.devices * args.accumulate
    found = -(-usual // parts) * parts
    if found > samples:
        found = max(samples // parts * parts, parts)
    if found != usual:
        of = f"{args.devices} devices" + f" times {args.accumulate} parts" * (args.accumulate > 1)
        print(f"batch size {found}: a multiple of {of}, instead of the usual {usual}")
    return found


def recipe(args: argparse.Namespace, samples: int, unit: str, rates: dict[str, float]) -> Any:
    """The library's tuned recipe with what was given in place of it.

    Args:
      args: the options.
      samples: to train on.
      unit: what they are called.
      rates: learning rates by method, in place of the tuned ones.
    """
    from lorajax.finetune import recipes

    tuned = recipes.lora if args.method == "lora" else recipes.full
    batch = args.batch_size or _default_batch(tuned(1).batch_size, samples, args)
    if batch > samples:
        raise ValueError(f"batch_size is {batch}; there are {samples:,} {unit} to train on.")
    steps = max(1, round(args.epochs * (samples // batch)))
    if steps > MOST:
        raise ValueError(
            f"--epochs is {args.epochs}; that makes {steps:,} steps, {MOST:,} at most."
        )
    names = ("optimizer", "learning_rate", "warmup", "beside")
    given: dict[str, Any] = {"learning_rate": rates[args.method]} if rates else {}
    given |= {name: value for name in names if (value := getattr(args, name)) is not None}
    return tuned(
        steps,
        batch_size=batch,
        schedule=args.schedule,
        weight_decay=args.weight_decay,
        accumulate=args.accumulate,
        window=args.window or 0,
        seed=args.seed,
        **given,
    )


def looks(args: argparse.Namespace) -> Any:
    """How often the run is looked at."""
    from lorajax import finetune

    # The embedded default has twice as many images to test on as to train on.
    tests = max(1, min(20, round(args.epochs / 2)))
    return finetune.Looks(tests=tests, probes=args.probes, checkpoints=args.checkpoints)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What determines a run: every option but where it is written and how often it is looked at."""
    skipped = {"out", "resume", "command", "run", "given", "data_folder", "checkpoints"}
    skipped |= {"linearized"}  # what is computed of a run that has ended
    # Where it is computed, not what.
    skipped |= {"devices", "layout", "remat", "dry_run"}
    skipped |= {"distributed", "coordinator", "processes", "process"}
    return {name: value for name, value in sorted(vars(args).items()) if name not in skipped}
