"""What `lorajax finetune` and `lorajax rank` share: options, and the model they start from."""

import argparse
from pathlib import Path
from typing import Any


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of both."""
    add = parser.add_argument
    add(
        "--model",
        default="vit-fashion-mnist",
        metavar="MODEL",
        help="a checkpoint (.safetensors, .npz or a folder; Hugging Face, timm, augreg, "
        "torchvision or lorajax), owner/name on the hub, or the small ViT that comes along "
        "(default)",
    )
    add(
        "--data",
        default="mnist-sample",
        metavar="DATA",
        help="mnist-sample (comes along; default), mnist, fashion-mnist, cifar10, cifar100, an npz "
        "pack, or a folder with train/CLASS/ and test/CLASS/",
    )
    add(
        "--data-folder", metavar="DIR", help="where named sets and packs are (default LORAJAX_DATA)"
    )
    add("--image-size", type=int, metavar="PX", help="side that a ViT is brought to")
    add(
        "--targets",
        nargs="+",
        metavar="PATTERN",
        help="layers to adapt, such as '**/query' (default: all but the head)",
    )
    add(
        "--rule", choices=("split_half", "random_signs", "c_over_n", "energy"), default="split_half"
    )
    add("--constant", type=float, metavar="C", help="of the rule c_over_n")
    add("--max-rank", type=int, metavar="R", help="upper bound of every rank")
    add(
        "--budget",
        type=float,
        default=7.0,
        metavar="PERCENT",
        help="of the model's parameters that adapters may have where ranks are chosen (default 7)",
    )
    add(
        "--hold-out",
        type=float,
        default=0.0,
        metavar="PERCENT",
        help="of the training images, to measure on instead of the test set: for choosing options "
        "without looking at it (default 0)",
    )
    add("--samples", type=int, default=2048, metavar="N", help="images behind the gradient")
    add("--head", choices=("fit", "keep"), default="fit", help="fit the head first, or keep it")
    add("--head-epochs", type=int, default=3, metavar="N", help="to fit the head in (default 3)")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="of the base")
    add("--seed", type=int, default=0, help="seed of every random draw (default 0)")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError, before jax is imported, for options that mean nothing."""
    for name in ("samples", "head_epochs"):
        if getattr(args, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1."
            )
    if not 0 < args.budget <= 100:
        raise ValueError(f"--budget is {args.budget}; it must be more than 0 and at most 100.")
    if not 0 <= args.hold_out < 100:
        raise ValueError(f"--hold-out is {args.hold_out}; it must be at least 0 and below 100.")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; it must be at least 0.")
    if args.rule == "c_over_n" and args.constant is None:
        raise ValueError("--rule c_over_n needs --constant C.")
    if args.rule != "c_over_n" and args.constant is not None:
        raise ValueError(f"--constant goes with --rule c_over_n, not with {args.rule}.")
    if args.max_rank is not None and args.max_rank < 1:
        raise ValueError(f"--max-rank is {args.max_rank}; it must be at least 1.")


def prepare(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The data, the model with a head that fits, and the targets; says what it does."""
    import jax.numpy as jnp

    from lorajax import data, finetune, models

    found = data.load(args.data, folder=args.data_folder, size=args.image_size)
    kind = "test"
    if args.hold_out:
        samples = len(found.train.labels)
        count = min(max(1, round(samples * args.hold_out / 100)), samples - 1)
        # The same images for every seed, or runs that differ in it could not be compared.
        train, aside = data.hold_out(found.train, count)
        found, kind = found._replace(train=train, test=aside), "held-out"
    dtype = jnp.dtype(args.precision)
    options = {} if args.image_size is None else {"image_size": args.image_size}
    model = models.load(
        args.model,
        classes=len(found.classes),
        dtype=dtype,
        param_dtype=dtype,
        seed=args.seed,
        **options,
    )
    name = Path(args.model).name
    print(
        f"{type(model).__name__} {name} on {found.name}: {len(found.train.labels):,} training and "
        f"{len(found.test.labels):,} {kind} images, {len(found.classes)} classes",
        flush=True,
    )
    if args.head == "fit":
        model = finetune.fit_head(model, found.train, epochs=args.head_epochs, seed=args.seed)
    heads = finetune.heads(model)

    def body(path: str, layer: Any) -> bool:
        del layer
        return path.partition("/")[0] not in heads

    return found, model, args.targets or body


def choose(args: argparse.Namespace, model: Any, train: Any, targets: Any) -> Any:
    """The Selection of ranks that the options ask for."""
    import jax
    from flax import nnx

    from lorajax import finetune

    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    options = {} if args.constant is None else {"constant": args.constant}
    return finetune.select_ranks(
        model,
        train,
        targets=targets,
        rule=args.rule,
        samples=args.samples,
        seed=args.seed,
        budget=int(total * args.budget / 100),
        max_rank=args.max_rank,
        **options,
    )
