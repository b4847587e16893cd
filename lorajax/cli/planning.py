"""`lorajax finetune --dry-run`: what training would take, before anything is read or allocated."""

import argparse
from pathlib import Path
from typing import Any

from lorajax.cli import finetuning, processes, training
from lorajax.cli.output import prepare_jax
from lorajax.environment.text import filled

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of devices and memory."""
    add = parser.add_argument_group("devices").add_argument
    add("--devices", type=int, default=1, metavar="N", help="to split batches among (default 1)")
    add(
        "--layout",
        choices=("data", "full"),
        default="data",
        help="with --devices: weights whole on each (data; default), or split among all (full)",
    )
    add(
        "--remat",
        action="store_true",
        help="compute each block again in the backward pass, for less memory",
    )
    add(
        "--dry-run",
        action="store_true",
        help="say what training would take (parameters, bytes, operations) and stop; MODEL may "
        "also be a published network by name, such as llama-3-8b, and --data is not read",
    )
    processes.configure(add, "train")


def size(count: float | int) -> str:
    """Bytes in the unit that keeps the number short."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} B" if not unit else f"{count:.2f} {_UNITS[unit]}"


def _model(args: argparse.Namespace) -> Any:
    """The model of shapes alone, with a head where its task needs one."""
    import jax.numpy as jnp

    from lorajax import finetune, models, tasks

    args.model = args.model or finetuning.usual_model(args.data)
    dtype = jnp.dtype(args.precision)
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
    for name in ("image_size", "pool"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    try:
        model = models.abstract(args.model, **options)
    except ValueError as error:
        # A tower without a head gets one for as many classes as ImageNet has.
        if "does not tell classes (" not in str(error):
            raise
        model = models.abstract(args.model, classes=1000, **options)
    if tasks.takes(model) == "texts" and not model.heads:
        model = models.abstract(args.model, classes=2, **options)
    if args.precision != "float32" and args.method == "lora":
        model = finetune.widened(model, finetune.in_full(model, args.also))
    return model


def run(args: argparse.Namespace) -> int:
    """Prints what a step would take."""
    prepare_jax(x64=False)
    from flax import nnx

    from lorajax import finetune, tasks
    from lorajax.finetune import sharding

    with training.naming_options():
        model = _model(args)
        task, _ = tasks.expected(model, 1)
        recipe = training.recipe(args, 10**6, task.unit, {})
        sharding.check_batch(recipe.batch_size, recipe.accumulate, args.devices)
        task, batch = tasks.expected(model, recipe.batch_size, args.max_length)
        wrt, words = nnx.Param, "all parameters train"
        if args.method == "lora":
            own = sum(leaf.size for leaf in _leaves(model))
            model, wrt, rank = finetune.abstract_lora(
                model,
                rank=None if args.rank == "auto" else int(args.rank),
                budget=int(own * args.budget / 100),
                targets=args.targets,
                also=args.also,
            )
            words = f"adapters of rank {rank}"
            if args.rank == "auto":
                words += f", as much as the budget of {args.budget:g} % allows where all are alike"
        found = finetune.footprint(
            model, wrt, task, recipe, batch, devices=args.devices, layout=args.layout
        )
    shape = next(iter(batch.values())).shape
    each = f" of {shape[1]} tokens" if args.max_length or tasks.takes(model) != "images" else ""
    print(filled(f"{Path(args.model).name} in {args.precision}, {words}"))
    print(f"a step: {shape[0]} {task.unit}{each}, {found.flops / 1e12:,.3g} TFLOP in products")
    print(
        f"parameters: {found.base:,} frozen, {found.adapters:,} of adapters, {found.beside:,} that "
        "train in full"
    )
    placed = {"data": "whole weights on each", "full": "weights split among them"}[found.layout]
    mesh = f"{found.devices} devices on one axis, {placed}" if found.devices > 1 else "one device"
    print(f"mesh: {mesh}; on each:")
    rows = [
        ("weights", found.weights),
        ("what trains", found.trained),
        ("optimizer", found.optimizer),
        ("activations and gradients", found.activations),
        ("in all", found.total),
    ]
    if found.recomputed is not None:
        rows += [
            ("activations with --remat", found.recomputed),
            ("in all with --remat", found.held + found.recomputed),
        ]
    for name, count in rows:
        print(f"  {name:<26}{size(count):>10}")
    return 0


def _leaves(model: Any) -> Any:
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(model, nnx.Param))


def recompute(args: argparse.Namespace, model: Any) -> None:
    """Lets a model compute its blocks again; raises ValueError for one that cannot."""
    if not args.remat:
        return
    if not hasattr(model, "remat"):
        raise ValueError(f"--remat is given, but a {type(model).__name__} cannot compute it again.")
    model.remat = True
