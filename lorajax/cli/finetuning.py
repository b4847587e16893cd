"""What `lorajax finetune` and `lorajax rank` share: options, their limits, and where they begin."""

import argparse
import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorajax.cli import texts
from lorajax.environment.text import WIDTH

MOST = 2**31 - 1
"""The largest number of anything: steps, samples and ranks are counted in 32 bits."""
LARGEST = 1e30
"""The largest real number, well inside of float32."""
GRAY, COLORED = "vit-fashion-mnist", "vit-tiny-imagenet"
"""The models that come along, for gray pictures and for those in color."""
RATES = {"lora": 1.5e-3, "full": 1e-3}
"""Learning rates for the latter by method: the best of three on held-out pictures, which were few
(`sims/transfer.py`), and a usual one. The tuned ones are the former's, and too large for it."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options of both."""
    add = parser.add_argument
    add(
        "--model",
        metavar="MODEL",
        help="a checkpoint (.safetensors, .npz or a folder; Hugging Face, timm, augreg, "
        "torchvision or lorajax), owner/name on the hub, or one of the small ViTs that come along: "
        f"{COLORED} (default for pictures in color), {GRAY} (for gray ones)",
    )
    add(
        "--data",
        default="mnist-sample",
        metavar="DATA",
        help="mnist-sample (default) and cifar10-sample, which come along, mnist, fashion-mnist, "
        "cifar10, cifar100, an npz pack (MedMNIST's, too), a folder with train/CLASS/ and "
        "test/CLASS/ or with CLASS/ alone, of IDX files, or a .csv of paths and labels; for a "
        "language model texts: a .tsv, .csv, .jsonl or .txt file, or a folder of .txt files",
    )
    add(
        "--data-folder", metavar="DIR", help="where named sets and packs are (default LORAJAX_DATA)"
    )
    add("--image-size", type=int, metavar="PX", help="side that a ViT is brought to")
    add(
        "--targets",
        nargs="+",
        metavar="PATTERN",
        help="layers to adapt, such as '**/query' (default: all but what trains in full)",
    )
    add(
        "--rule",
        default="split_half",
        metavar="RULE",
        help="that ranks are chosen by: split_half (default), random_signs, whitened, c_over_n, "
        "energy",
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
        "--fill",
        action="store_true",
        help="spend all of the budget: where the rule finds less above the noise, ranks take the "
        "gradient's next directions as well",
    )
    add(
        "--hold-out",
        type=float,
        default=0.0,
        metavar="PERCENT",
        help="of the training samples, to measure on instead of the test set: for choosing options "
        "without looking at it (default 0); of each class where images have no test set",
    )
    add(
        "--pool",
        choices=("mean", "cls", "first", "cls+mean", "attention"),
        help="what the head reads, where the file does not tell. Of texts: the mean of the tokens "
        "(sentence-transformers), the first by a trained pooler (cls), or by a new one (first). Of "
        "a CLIP, SigLIP or DINOv2: mean, cls, attention or cls+mean",
    )
    add("--samples", type=int, default=2048, metavar="N", help="samples behind the gradient")
    add("--head", choices=("fit", "keep"), default="fit", help="fit the head first, or keep it")
    add("--head-epochs", type=int, default=3, metavar="N", help="to fit the head in (default 3)")
    add(
        "--precision",
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the base; what trains is in float32 with LoRA",
    )
    add("--seed", type=int, default=0, help="seed of every random draw (default 0)")
    texts.configure(parser)


def bounded(
    args: argparse.Namespace,
    name: str,
    low: float | int,
    high: float | int = LARGEST,
    *,
    above: bool = False,
) -> None:
    """Raises ValueError unless an option is missing or lies within its limits.

    Args:
      args: the options.
      name: of the option.
      low: the least value.
      high: the greatest.
      above: whether the least value itself is out.
    """
    value = getattr(args, name)
    if value is None or (low <= value <= high and not (above and value == low)):
        return
    if above and low == 0:
        wanted = "positive"
    else:
        wanted = f"{'more than' if above else 'at least'} {low:,}"
    if high == math.nextafter(100, 0):
        wanted += " and below 100"
    elif math.isnan(value) or value > high:
        wanted += f" and at most {high:,}"
    raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {wanted}.")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError, before jax is imported, for options that mean nothing."""
    for name in ("samples", "head_epochs", "max_rank", "max_length"):
        bounded(args, name, 1, MOST)
    texts.check(args)
    bounded(args, "image_size", 1, 2**14)
    if args.data_folder is not None and not Path(args.data_folder).is_dir():
        raise ValueError(f"--data-folder is {args.data_folder!r}; it must be a folder that exists.")
    bounded(args, "budget", 0, 100, above=True)
    bounded(args, "hold_out", 0, math.nextafter(100, 0))
    bounded(args, "seed", 0, MOST)
    bounded(args, "constant", 0, above=True)
    if args.rule == "c_over_n" and args.constant is None:
        raise ValueError("--rule c_over_n needs --constant C.")
    if args.rule != "c_over_n" and args.constant is not None:
        raise ValueError(f"--constant goes with --rule c_over_n, not with {args.rule}.")


class Begun(NamedTuple):
    """Data, a model for it, and what is asked of it.

    Attributes:
      data: the data set; what is held out takes the place of its test set.
      model: with a head of as many classes, not fitted yet.
      kind: of what is measured on: "test" or "held-out".
      parameters: of the model.
      task: to train on.
      plain: the task neither augmented nor smoothed, as ranks and heads want it.
      rates: learning rates by method, where the tuned ones are of another kind of model.
      at_once: samples that gradients are taken of at a time.
    """

    data: Any
    model: Any
    kind: str
    parameters: int
    task: Any
    plain: Any
    rates: dict[str, float]
    at_once: int


def begin(args: argparse.Namespace) -> Begun:
    """Loads data and model, and says so."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lorajax import data, finetune, models, ranks

    ranks.rule(args.rule).check(constant=args.constant)
    dtype = jnp.dtype(args.precision)
    options = {"dtype": dtype, "param_dtype": dtype, "seed": args.seed}
    where = texts.source(args)
    texts.refuse(args, of_texts=where is not None)
    if where is None:
        found, model, task, plain, words = _images(args, **options)
        rates, at_once = RATES if args.model == COLORED else {}, 128
    else:
        found, model, task, words = texts.begin(args, where, **options)
        plain = type(task)() if hasattr(task, "smoothing") else task
        asked = words.partition(" ")[0]
        rates, at_once = texts.RATES[asked], texts.AT_ONCE[asked]
    kind = getattr(found, "kind", "test")
    if args.hold_out and kind == "test":
        samples = len(found.train)
        count = min(max(1, round(samples * args.hold_out / 100)), samples - 1)
        # The same samples for every seed, or runs that differ in it could not be compared.
        train, aside = data.hold_out(found.train, count)
        found, kind = found._replace(train=train, test=aside), "held-out"
    told = f"{type(model).__name__} {Path(args.model).name} on {found.name}:"
    counts = f"{len(found.train):,} training and {len(found.test):,} {kind} {task.unit}, {words}"
    fits = len(told) + len(counts) < WIDTH
    print(f"{told} {counts}" if fits else f"{told}\n  {counts}", flush=True)
    if found.kind == "held-out":
        print(f"held out: {args.hold_out:g} % of each class, the same for every seed")
    if found.left_out:
        print(f"{len(found.left_out)} left out of --data: {_some(found.left_out)}")
    if unread := models.unread(args.model, model.config):
        print(f"left out of --model, as the model has no use for it: {_some(unread)}")
    if args.precision != "float32" and getattr(args, "method", "lora") == "lora":
        model = finetune.widened(model, finetune.in_full(model, getattr(args, "also", None)))
    # What full fine-tuning would train.
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return Begun(found, model, kind, parameters, task, plain, rates, at_once)


def _images(args: argparse.Namespace, **options: Any) -> tuple[Any, Any, Any, Any, str]:
    """Images, a model for them, the task, the plain one, and in words what is asked for."""
    from lorajax import models, tasks

    if args.image_size is not None:
        options["image_size"] = args.image_size
    if args.pool is not None:
        options["pool"] = args.pool
    found, args.model = _pictures(args)
    model = models.load(args.model, classes=len(found.classes), **options)
    if tasks.takes(model) != "images":
        raise ValueError(
            f"--model is {args.model}, a {type(model).__name__}, which takes texts; name a file or "
            "a folder of texts by --data."
        )
    names = ("augment", "smoothing", "mixup")
    policy = {name: getattr(args, name) for name in names if name in args}
    task, plain = tasks.Images.of(model.config, **policy), tasks.Images.of(model.config)
    return found, model, task, plain, f"{len(found.classes)} classes"


def _pictures(args: argparse.Namespace) -> tuple[Any, str]:
    """The images, and the model that was named, or that comes along for such images."""

    def load(model: str) -> Any:
        from lorajax import data

        return data.load(
            args.data,
            folder=args.data_folder,
            size=args.image_size,
            fallback=_size(args, model),
            hold_out=args.hold_out / 100,
        )

    with _naming_hold_out(args):
        found = load(args.model or COLORED)
        if args.model is not None or found.train[slice(0, 1)]["images"].shape[-1] == 3:
            return found, args.model or COLORED
        # Again, as pictures of several sizes are brought to that of the model.
        return found if _size(args, GRAY) is None else load(GRAY), GRAY


def _size(args: argparse.Namespace, model: str) -> tuple[int, int] | None:
    """(height, width) of the images that a model takes, where it takes one size."""
    from lorajax import data, models

    arrays = args.data in (*data.EMBEDDED, *data.NAMED) or args.data.endswith(".npz")
    if args.image_size is not None or arrays:
        return None
    pool = {} if args.pool is None else {"pool": args.pool}
    return getattr(models.abstract(model, classes=2, **pool).config, "image_size", None)


def usual_model(source: str) -> str:
    """The model that comes along for data of which only the name is looked at."""
    return GRAY if source in ("mnist-sample", "mnist", "fashion-mnist") else COLORED


@contextlib.contextmanager
def _naming_hold_out(args: argparse.Namespace) -> Iterator[None]:
    """Names the option in what a block raises about the share to hold out."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"\bhold_out, the share of each class", "--hold-out PERCENT", str(error))
        text = text.replace("(or hold_out)", "(or --hold-out)").replace(
            "or hold_out.", "or --hold-out."
        )
        raise ValueError(text.replace("give the size", "give --image-size")) from error


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" * (len(names) > limit)
    return ", ".join(names[:limit]) + more


def fitted(args: argparse.Namespace, begun: Begun) -> Any:
    """The model with its head fitted, unless it is to be kept."""
    from lorajax import finetune

    if args.head == "keep" or not begun.model.heads:
        return begun.model
    # Neither augmented nor smoothed, as little as the gradient that ranks are read off.
    return finetune.fit_head(
        begun.model, begun.plain, begun.data.train, epochs=args.head_epochs, seed=args.seed
    )


def selection(args: argparse.Namespace, begun: Begun) -> dict[str, Any]:
    """The options of `finetune.select_ranks` that were given."""
    return {
        "rule": args.rule,
        "budget": int(begun.parameters * args.budget / 100),
        "fill": args.fill,
        "max_rank": args.max_rank,
        **({} if args.constant is None else {"constant": args.constant}),
    }
