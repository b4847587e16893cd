"""Fine-tune a model with LoRA, with the start and the ranks that the theory prescribes.

While it trains, the theory's quantities are recorded in every layer: the spectrum of the update,
the factors' norm, their alignment with the gradient's top direction, and their imbalance. Results
are curves.png, probes.png, history.json and the adapter in PEFT's format. A run that was
interrupted goes on where it was when the same command is given again with --resume.
"""

import argparse
from typing import Any

from lorajax.cli import finetuning
from lorajax.cli.output import output_folder, prepare_jax

HELP = "fine-tune a ViT, ResNet or VGG and record the theory's quantities"
STARTS = (
    "lora",
    "orthogonal",
    "small",
    "spectral",
    "lora_one",
    "lora_ga",
    "pissa",
    "milora",
    "olora",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommand's arguments."""
    finetuning.configure(parser)
    add = parser.add_argument
    add("--method", choices=("lora", "full"), default="lora", help="what trains beside the head")
    add(
        "--rank", default="auto", metavar="R", help="a number, or auto (default) for lorajax rank's"
    )
    add(
        "--start",
        choices=STARTS,
        default="orthogonal",
        help="initialization (default orthogonal: A with orthonormal columns, B zero)",
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
    add("--epochs", type=float, default=6.0, help="times through the data (default 6)")
    add("--batch-size", type=int, default=50, help="images a step (default 50)")
    add(
        "--optimizer",
        choices=("adamw", "adam", "sgd", "lora-plus"),
        help="default lora-plus (B learns 4 times as fast as A); full: adamw",
    )
    add("--learning-rate", type=float, help="at its peak (default 7e-3; full: 8e-3)")
    add("--schedule", choices=("constant", "linear", "cosine"), default="cosine")
    add("--warmup", type=int, metavar="STEPS", help="steps (default a twentieth)")
    add("--weight-decay", type=float, default=0.0)
    add("--smoothing", type=float, default=0.1, help="of the labels in training (default 0.1)")
    add("--augment", choices=("none", "crop", "flip", "crop-flip", "resized-crop"), default="none")
    add("--probes", type=int, default=30, metavar="N", help="looks at the quantities (default 30)")
    add("--checkpoints", type=int, default=5, metavar="N", help="saved on the way (default 5)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--out", default="lorajax-finetune", metavar="DIR", help="folder for the results")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError, before jax is imported, for options that mean nothing."""
    finetuning.check(args)
    if args.rank != "auto" and not (args.rank.isdigit() and int(args.rank) > 0):
        raise ValueError(f"--rank is {args.rank!r}; it must be 'auto' or an integer of at least 1.")
    if args.scale is not None and (not args.scale > 0 or args.start not in STARTS[:4]):
        raise ValueError(
            f"--scale is {args.scale} with --start {args.start}; it must be positive, and goes "
            f"with {', '.join(STARTS[:4])}."
        )
    if args.beside is not None and (args.method == "full" or not args.beside > 0):
        raise ValueError(
            f"--beside is {args.beside} with --method {args.method}; it must be positive, and goes "
            "with lora."
        )
    for name in ("epochs", "batch_size", "probes", "checkpoints"):
        if not getattr(args, name) > 0:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be positive."
            )


def run(args: argparse.Namespace) -> int:
    """Prepares, trains, and writes what came out."""
    check(args)
    folder = output_folder(args.out)
    saved = folder / "checkpoints"
    if saved.exists() and any(saved.iterdir()) and not args.resume:
        raise ValueError(
            f"--out is {args.out!r}, which holds a run already; give --resume to go on with it, or "
            "another folder."
        )
    prepare_jax(x64=False)

    import jax
    import numpy as np
    from flax import nnx

    from lorajax import adapters, finetune
    from lorajax.finetune.checkpoints import Checkpoints

    found, model, targets = finetuning.prepare(args)
    heads, gradients = finetune.heads(model), None
    if args.method == "lora":
        # The embeddings meet images of another kind first, and they are small.
        embedded = hasattr(model, "embeddings")
        also = args.also if args.also is not None else ["embeddings"] * embedded
        heads, targets = (*heads, *also), args.targets or _body((*heads, *also))
    if args.method == "full":
        model.train()
        wrt: Any = nnx.Param
    else:
        model, gradients = _adapt(args, model, found.train, targets)
        wrt = adapters.trainable(model, heads=heads)
        print(adapters.describe(model))
    recipe = _recipe(args, len(found.train.labels))
    trainer = finetune.Trainer(model, wrt, recipe)
    # What full fine-tuning would train: adapters are Params, too, but not the model's own.
    own = nnx.filterlib.All(nnx.Param, nnx.filterlib.Not(nnx.LoRAParam))
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, own)))
    print(
        f"{trainer.parameters:,} parameters train, the model has {total:,} of its own; "
        f"{recipe.steps} steps of {recipe.batch_size} images",
        flush=True,
    )
    towards = None if gradients is None else finetune.directions(gradients)
    with Checkpoints(saved, _settings(args)) as store:
        history = _train(args, trainer, found, store, towards)
    state = history.pop("state")
    if args.method == "lora":
        history["layers"] = list(finetune.paths(model))
    _write(args, folder, trainer, state, history, heads)
    kind = "held-out" if args.hold_out else "test"
    last = {name: history[f"test_{name}"][-1] for name in ("loss", "accuracy")}
    rate = recipe.batch_size * (len(history["step"]) / max(history["seconds"], 1e-9))
    print(
        f"\n{kind} loss {last['loss']:.4f}, {kind} accuracy {100 * last['accuracy']:.2f} %; "
        f"{trainer.parameters:,} trainable parameters "
        f"({100 * trainer.parameters / total:.1f} % of the model's), {rate:,.0f} images/s"
    )
    if args.method == "lora" and len(history["probe_step"]) > 1:
        values = np.asarray(history["probes"]["singular_values"])[-1]
        stable = (values**2).sum(1) / np.maximum(values[:, 0], 1e-30) ** 2
        print(
            f"stable rank of the updates: {stable.mean():.2f} on average, {stable.max():.2f} at "
            "most"
        )
    written = ("curves.png", "history.json", "adapter" if args.method == "lora" else "model")
    print(f"Written to {folder}: {', '.join(written)}" + ", probes.png" * (args.method == "lora"))
    return 0


def _adapt(args: argparse.Namespace, model: Any, train: Any, targets: Any) -> tuple[Any, Any]:
    """The adapted model, and the gradients that ranks, starts and probes are read off."""
    import functools

    import jax

    from lorajax import finetune, initializers

    start: Any = args.start
    if args.scale is not None:
        start = functools.partial(getattr(initializers, args.start), scale=args.scale)
    options: dict[str, Any] = {"start": start, "alpha": args.alpha}
    if args.rank != "auto":
        options["rank"] = int(args.rank)
        gradients = finetune.gradients_of(
            model, train, targets=targets, samples=args.samples, seed=args.seed
        )
    else:
        selection = finetuning.choose(args, model, train, targets)
        targets, gradients = selection.ranks, selection.gradients
        if not targets:
            raise ValueError(
                "--rank auto finds no direction above the noise in any layer; give a rank, or more "
                "--samples."
            )
    key = jax.random.key(args.seed)
    return finetune.adapt(model, targets, key=key, gradients=gradients, **options), gradients


def _body(kept: tuple[str, ...]) -> Any:
    """A predicate for every layer but those."""
    return lambda path, layer: not any(path == name or path.startswith(f"{name}/") for name in kept)


def _recipe(args: argparse.Namespace, samples: int) -> Any:
    from lorajax import finetune

    batch = min(args.batch_size, samples)
    steps = max(1, round(args.epochs * (samples // batch)))
    rate = args.learning_rate
    if rate is None:
        rate = 7e-3 if args.method == "lora" else 8e-3
    optimizer = args.optimizer or ("lora-plus" if args.method == "lora" else "adamw")
    return finetune.Recipe(
        steps=steps,
        batch_size=batch,
        optimizer=optimizer,
        ratio=4.0,
        beside=args.beside or (4.0 if optimizer == "lora-plus" else 1.0),
        learning_rate=rate,
        schedule=args.schedule,
        warmup=steps // 20 if args.warmup is None else args.warmup,
        weight_decay=args.weight_decay,
        smoothing=args.smoothing,
        augment=args.augment,
        seed=args.seed,
    )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What determines a run: every option but where it is written and how often it is looked at."""
    skipped = {"out", "resume", "command", "run", "data_folder", "checkpoints"}
    return {name: value for name, value in sorted(vars(args).items()) if name not in skipped}


def _train(args: argparse.Namespace, trainer: Any, found: Any, store: Any, towards: Any) -> dict:
    import sys
    import time

    import jax
    import numpy as np

    from lorajax import finetune

    recipe = trainer.recipe
    restored = store.restore(trainer)
    history: dict[str, Any] = {
        name: [] for name in ("step", "loss", "accuracy", "test_step", "test_loss", "test_accuracy")
    }
    history |= {"probe_step": [], "probes": {}, "seconds": 0.0}
    state = trainer.init()
    if restored is not None:
        state, history = restored
        print(f"resumed at step {int(state.step)} of {recipe.steps}", flush=True)
    marks = {
        name: {round(i * recipe.steps / count) for i in range(1, count + 1)}
        for name, count in (
            ("probe", args.probes),
            ("save", args.checkpoints),
            # The embedded default has twice as many images to test on as to train on.
            ("test", max(1, min(20, round(args.epochs / 2)))),
        )
    }
    measure = jax.jit(lambda state: finetune.measure(trainer.model(state), towards))
    live, pending = sys.stderr.isatty(), []
    begin, before = time.perf_counter(), history["seconds"]
    first = int(state.step)

    def probe(state: Any, step: int) -> None:
        history["probe_step"].append(step)
        for name, value in measure(state)._asdict().items():
            value = np.asarray(value, np.float64).tolist()
            history["probes"].setdefault(name, []).append(value)

    def collect() -> None:
        for step, metrics in pending:
            history["step"].append(step)
            history["loss"].append(float(metrics.loss))
            history["accuracy"].append(float(metrics.accuracy))
        pending.clear()

    def test(state: Any, step: int) -> None:
        measured = trainer.evaluate(state, found.test)
        history["test_step"].append(step)
        history["test_loss"].append(float(measured.loss))
        history["test_accuracy"].append(float(measured.accuracy))
        speed = recipe.batch_size * (step - first) / max(time.perf_counter() - begin, 1e-9)
        left = (recipe.steps - step) * recipe.batch_size / max(speed, 1e-9)
        line = (
            f"step {step:>{len(str(recipe.steps))}}/{recipe.steps}  "
            f"test loss {float(measured.loss):.4f}  accuracy {100 * float(measured.accuracy):.2f} %"
        )
        if step > first:
            line += f"  {speed:,.0f} images/s  {left:.0f} s left"
        print(("\r\x1b[K" if live else "") + line, file=sys.stderr, flush=True)

    if not first:
        test(state, 0)
        if args.method == "lora":
            probe(state, 0)

    def after(record: Any) -> None:
        pending.append((record.step, record.metrics))
        if live and record.step % 10 == 0:
            print(
                f"\r\x1b[Kstep {record.step}/{recipe.steps}  loss {float(record.metrics.loss):.4f}",
                end="",
                file=sys.stderr,
                flush=True,
            )
        if args.method == "lora" and record.step in marks["probe"]:
            probe(record.state, record.step)
        if record.step in marks["test"]:
            test(record.state, record.step)
        if record.step in marks["save"]:
            collect()
            history["seconds"] = before + time.perf_counter() - begin
            store.save(record.state, history)

    state = finetune.fit(trainer, found.train, state=state, callback=after)
    collect()
    if int(state.step) > first:
        history["seconds"] = before + time.perf_counter() - begin
    return {**history, "state": state}


def _write(
    args: argparse.Namespace, folder: Any, trainer: Any, state: Any, history: dict, heads: Any
) -> None:
    import json

    from lorajax import adapters, models, plots
    from lorajax.environment import files
    from lorajax.plots import finetune as figures

    files.write(folder / "history.json", json.dumps(history) + "\n")
    plots.save(figures.curves(history), folder / "curves.png")
    tuned = trainer.model(state)
    if args.method == "full":
        models.save(tuned, folder / "model" / "model.safetensors")
        return
    probes = history["probes"]
    plots.save(
        figures.quantities(history["probe_step"], history["layers"], probes),
        folder / "probes.png",
    )
    adapters.save_peft(tuned, folder / "adapter", heads=heads, base_model=args.model)
