"""The options of `lorajax finetune` and `lorajax rank` for texts, and where those begin."""

import argparse
import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ANSWERS = {"lora": 1e-3, "full": 2e-4}
RATES = {"tokens": {"lora": 1e-3, "full": 5e-5}, "classes": _ANSWERS, "numbers": _ANSWERS}
"""Learning rates for pretrained language models by what is asked for and method: usual ones for
next tokens; for classes and numbers chosen on training samples that were set aside, with MiniLM
(`python sims/spectral_dynamics/glue.py --choose`): full fine-tuning's on 2,000 samples of SST-2 and
of STS-B; LoRA's on 16,000 of SST-2 and all of STS-B, where the best of four was the largest, 4e-3.
Large rates win short runs and lose long ones: on all 67,349 samples of SST-2 that one ends at
chance in an epoch, and 2e-3 does in three, at ranks up to 11. So half of that stands here."""
AT_ONCE = {"tokens": 8, "classes": 64, "numbers": 64}
"""Samples that are measured at a time; logits of next tokens are large."""
_OPTIONS = ("test", "text", "label", "kind", "max_length", "tokenizer", "pack", "window")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument_group("texts").add_argument
    add("--test", metavar="FILE", help="texts to measure on, of the columns of --data")
    add(
        "--text",
        nargs="+",
        metavar="COLUMN",
        help="one column of text or two, where the header leaves open which",
    )
    add("--label", metavar="COLUMN", help="the column of answers, likewise")
    add(
        "--kind",
        choices=("classes", "numbers", "tokens"),
        help="what is asked for: a class, a number, or each next token (default: by the labels)",
    )
    add(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help="to cut texts at (default: texts longer than the model takes are refused)",
    )
    add("--tokenizer", metavar="DIR", help="with tokenizer.json (default: the model's folder)")
    add("--pack", action="store_true", help="several texts a row, where next tokens are asked for")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError, before jax is imported, for options that mean nothing."""
    if args.text is not None and len(args.text) > 2:
        raise ValueError(f"--text is {' '.join(args.text)}; it takes one column or two.")
    if args.pack and args.kind in ("classes", "numbers"):
        raise ValueError(f"--pack goes with next tokens, not with --kind {args.kind}.")


def source(args: argparse.Namespace) -> Path | None:
    """Where --data is a file or folder of texts; None for images, and for names of sets."""
    from lorajax import data

    if args.data in data.NAMED or args.data in data.EMBEDDED:
        return None
    shelf = args.data_folder or os.environ.get("LORAJAX_DATA")
    places = [Path(args.data), *([Path(shelf) / args.data] if shelf else [])]
    found = next((each for each in places if each.exists()), None)
    if found is None and places[0].suffix.lower() in data.text.SUFFIXES:
        raise ValueError(f"--data is {args.data!r}, which does not exist.")
    if found is None or not data.text.is_text(found) or data.shows_images(found):
        return None
    return found


def refuse(args: argparse.Namespace, of_texts: bool) -> None:
    """Raises ValueError for options that go with the other kind of data."""
    others = (
        {"image_size": None, "augment": "none", "mixup": 0.0}
        if of_texts
        else dict.fromkeys(_OPTIONS)
    )
    for name, default in others.items():
        value = getattr(args, name, default)
        if value != default and value is not False:
            given = f"--{name.replace('_', '-')}" + ("" if value is True else f" is {value}")
            what = "texts" if of_texts else "no file or folder of texts"
            raise ValueError(f"{given}, but --data {args.data} is {what}; leave it out.")


@contextlib.contextmanager
def naming_options() -> Iterator[None]:
    """Names arguments as the options that they came from, in what a block raises."""
    try:
        yield
    except ImportError as error:
        raise ValueError(str(error)) from error
    except ValueError as error:
        text = str(error)
        for name in ("text", "label", "kind", "max_length", "tokenizer"):
            option = "--" + name.replace("_", "-")
            text = re.sub(rf"^{name}(?= is )", option, text)
            text = re.sub(rf"\b(by|give|larger) {name}\b", rf"\1 {option}", text)
        text = text.replace("give models.load(…, pool=…).", "give --pool.")
        raise ValueError(text) from error


def _files(args: argparse.Namespace, found: Path) -> tuple[Path, Path | None]:
    """What to train on and what to measure on; None where a part is held out."""
    train, test = found, None if args.test is None else Path(args.test)
    if (found / "train").is_dir():
        train = found / "train"
        inside = (found / name for name in ("test", "val") if (found / name).is_dir())
        test = test or next(inside, None)
    if test is not None and not test.exists():
        aside = found.parent / test
        if not aside.exists():
            raise ValueError(f"--test is {args.test!r}, which does not exist.")
        test = aside
    if test is None and not args.hold_out:
        raise ValueError(
            f"--data is {args.data}; give --test FILE to measure on, or --hold-out PERCENT of it."
        )
    return train, None if args.hold_out else test


def begin(args: argparse.Namespace, found: Path, **options: Any) -> tuple[Any, Any, Any, str]:
    """Reads texts and loads a model for them.

    Args:
      args: the options.
      found: of `source`.
      **options: for `models.load`.

    Returns:
      The data set, the model, the task, and in words what is asked for.
    """
    from lorajax import data

    if args.model is None:
        raise ValueError(
            f"--data is {args.data}, which is of texts; give --model, a language model's folder."
        )
    with naming_options():
        asked = data.text.read_texts(
            *_files(args, found), text=args.text, label=args.label, kind=args.kind
        )
        if args.pack and asked.kind != "tokens":
            raise ValueError(f"--pack goes with next tokens; {args.data} has {asked.kind}.")
        folder = Path(args.tokenizer or args.model)
        if args.tokenizer is None and folder.is_file():
            folder = folder.parent
        tokenizer = data.text.Tokenizer(folder)
    if asked.kind != "tokens":
        options["classes"] = len(asked.classes) or 1
    if args.pool is not None:
        options["pool"] = args.pool
    with naming_options():
        model = _model(args, asked.kind, **options)
    with naming_options():
        limits = data.text.Limits(
            getattr(model.config, "vocabulary", None),
            getattr(model.config, "longest", getattr(model.config, "context", None)),
            args.max_length,
        )
        template = data.text.chat_template(tokenizer.folder, tokenizer)
        train, test = data.text.tables(
            asked, tokenizer, limits, template=template, packed=args.pack
        )
    columns = [*asked.columns.texts, *([asked.columns.label] if asked.columns.label else [])]
    words = f"{asked.kind} from {', '.join(columns)}"
    if asked.classes:
        words += f": {', '.join(asked.classes[:5])}" + " …" * (len(asked.classes) > 5)
    found_data = data.Dataset(found.stem, train, test, asked.classes)
    return found_data, model, _task(args, asked.kind, train), words


def _model(args: argparse.Namespace, kind: str, **options: Any) -> Any:
    """A model for what is asked for; raises ValueError for one that is none."""
    from lorajax import models, tasks

    needs = f"which is no model for {kind} of texts as {args.data} asks for."
    try:
        model = models.load(args.model, **options)
    except ValueError as error:
        if found := re.match(r"classes is not a field of (\w+)Config;", str(error)):
            raise ValueError(f"--model is {args.model}, a {found[1]}, {needs}") from error
        raise
    if tasks.takes(model) != ("tokens" if kind == "tokens" else "texts"):
        raise ValueError(f"--model is {args.model}, a {type(model).__name__}, {needs}")
    return model


def _task(args: argparse.Namespace, kind: str, train: Any) -> Any:
    from lorajax import tasks

    if kind == "tokens":
        return tasks.NextToken()
    if kind == "classes":
        return tasks.Texts(getattr(args, "smoothing", 0.0))
    if args.head == "keep":
        # A head that was trained before answers in units of its own.
        return tasks.Regression()
    labels = train.labels.astype("float64")
    return tasks.Regression(float(labels.mean()), float(labels.std()) or 1.0)
