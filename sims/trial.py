"""The rank rule on trial: ways to choose ranks at equal parameters and at equal time.

Every way trains the same model on the same samples with adapters of exactly as many parameters, in
the same orders; learning rates are chosen on training samples that were set aside; differences are
paired by seed, with 95 % intervals. A second time all have the same count of passes through the
model, choosing ranks included. The control, the rule with a tenth of the parameters, runs through
the same code. `--profile quick` takes the two image tasks of the package in small; `images`,
`texts` and `full` are what the page is about. A run that was cut off goes on where it was. Texts
need the folder LORAJAX_DATA and the extra `text`.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

os.environ.setdefault("NPROC", "16")  # see "Good to know" in the README

import jax  # noqa: E402
import numpy as np  # noqa: E402

import lorajax  # noqa: E402
from lorajax import data, environment, finetune, models, tasks  # noqa: E402
from lorajax.data import text  # noqa: E402
from lorajax.environment import files  # noqa: E402
from lorajax.finetune import recipes  # noqa: E402
from lorajax.finetune.allocations import METHODS, TRAINING  # noqa: E402
from lorajax.finetune.contest import Contest, Contestant, seconds, verdict  # noqa: E402
from lorajax.studies import simulation  # noqa: E402

AGAINST = ("rule", "uniform")
"""What every way is compared with."""


@dataclasses.dataclass(frozen=True)
class Part:
    """How much of a task is run.

    Attributes:
      train: samples to train on, to choose ranks on and to fit the head on.
      held_out: others of the training set, that learning rates are chosen on.
      tests: samples of the test set; 0 for all.
      steps: of training.
      batch: samples a step.
      uniform: the rank everywhere whose parameters all ways have.
      behind: samples that ranks are read off.
      rates: learning rates to choose from: "lora", "adalora", "full".
      seeds: that are measured.
      tries: other seeds that learning rates are chosen by.
      side: that pictures are brought to, or tokens that texts are cut at; 0 for the model's.
      methods: that take part.
    """

    train: int
    held_out: int
    tests: int
    steps: int
    batch: int
    uniform: int
    behind: int
    rates: dict[str, tuple[float, ...]]
    seeds: int = 5
    tries: int = 1
    side: int = 0
    methods: tuple[str, ...] = tuple(METHODS)


def _rates(lora: float, adalora: float, full: float, steps: int = 4) -> dict[str, Any]:
    """Grids in steps of √10, from what is given upwards."""
    given = {"lora": lora, "adalora": adalora, "full": full}
    factors = 10 ** (0.5 * np.arange(steps))
    return {
        kind: tuple(float(f"{x:.3g}") for x in first * factors) for kind, first in given.items()
    }


_FEW = ("uniform", "rule", "starved")
_QUICK = {"lora": (3e-3,)}
IMAGES = {
    "mnist": Part(1000, 500, 0, 200, 50, 2, 512, _rates(1e-3, 3e-3, 8e-4)),
    "cifar10": Part(800, 200, 0, 80, 40, 2, 256, _rates(2e-4, 6e-4, 1e-4), side=32),
}
TEXTS = {
    "stsb": Part(1024, 256, 700, 64, 16, 4, 384, _rates(1.26e-3, 4e-3, 6.3e-5), side=48),
    # In 64 steps of 16 no way leaves chance: Matthews × 100 of -1.3 to 1.8, five seeds, and a tenth
    # of the budget the best of them. An epoch comes to 10, three are the least that tell anything.
    "cola": Part(8000, 500, 0, 750, 32, 4, 4096, _rates(4e-4, 1.3e-3, 2e-5), side=24),
    "qnli": Part(1024, 256, 700, 64, 16, 4, 384, _rates(1.26e-3, 4e-3, 6.3e-5), side=64),
    "instructions": Part(400, 64, 128, 48, 4, 4, 64, _rates(3.2e-4, 1e-3, 1.6e-5, 3), side=96),
}
PROFILES = {
    "quick": {
        name: Part(160, 40, 100, 8, 20, 1, 32, _QUICK, 2, 1, side, _FEW)
        for name, side in (("mnist", 0), ("cifar10", 16))
    },
    "images": IMAGES,
    "texts": TEXTS,
    "full": IMAGES | TEXTS,
}


class Arena(NamedTuple):
    """A model and what it is trained on.

    Attributes:
      model: its head fitted to the training samples.
      task: what a batch means to it.
      tables: to train on, to choose learning rates on, and to measure on.
      metric: what is measured.
      at_once: samples that are measured at a time.
      options: of the recipes.
    """

    model: Any
    task: Any
    tables: tuple[data.Table, data.Table, data.Table]
    metric: str
    at_once: int = 250
    options: Mapping[str, Any] = {}


def _spread_over(table: data.Table, count: int) -> data.Table:
    """As many samples of a set that is sorted by class, spread over it; all for 0."""
    count = min(count or len(table), len(table))
    return table.take(np.arange(count) * len(table) // count)


def _pictures(source: str, weights: str, part: Part) -> Arena:
    found = data.load(source)
    whole = _spread_over(found.train, part.train + part.held_out)
    train, held_out = data.hold_out(whole, len(whole) - part.train)
    options: dict[str, Any] = {"image_size": part.side} if part.side else {}
    model = models.load(weights, classes=len(found.classes), **options)
    task = tasks.Images.of(model.config)
    model = finetune.fit_head(model, task, train, batch_size=part.batch)
    return Arena(model, task, (train, held_out, _spread_over(found.test, part.tests)), "accuracy")


def _dense(table: data.Table, part: Part, count: int) -> data.Table:
    """Some texts at one length, drawn at random, the same ones every time."""
    if count and count < len(table):
        table = table.take(np.sort(data.Order(len(table), count, 0)(0)))
    return data.Table(table[:])


MINILM, SMOLLM2 = pathlib.Path("minilm-l6"), pathlib.Path("smollm2-135m")
INSTRUCTIONS = pathlib.Path("text") / "instruct_1100.jsonl"


class Glue(NamedTuple):
    """Where a task's texts are, what is asked, and what GLUE reports of it."""

    train: str
    test: str
    kind: str
    metric: str


GLUE = {
    "stsb": Glue("glue/stsb_train.tsv", "glue/stsb_test.tsv", "numbers", "spearman"),
    "cola": Glue("glue/cola_train.tsv", "glue/cola_dev.tsv", "classes", "matthews"),
    "qnli": Glue("glue/qnli_sub_train.tsv", "glue/qnli_dev.tsv", "classes", "accuracy"),
}


def _glue(name: str, part: Part, shelf: pathlib.Path) -> Arena:
    glue = GLUE[name]
    asked = text.read_texts(shelf / glue.train, shelf / glue.test, kind=glue.kind)
    folder = shelf / MINILM
    model = models.load(folder, classes=len(asked.classes) or 1, pool="mean")
    limits = text.Limits(model.config.vocabulary, model.config.longest, part.side)
    found, test = text.tables(asked, text.Tokenizer(folder), limits)
    whole = _dense(found, part, part.train + part.held_out)
    train, held_out = data.hold_out(whole, part.held_out)
    labels = np.asarray(train.columns["labels"][:], np.float64)
    task: Any = tasks.Texts()
    if glue.kind == "numbers":
        task = tasks.Regression(float(labels.mean()), float(labels.std()))
    model = finetune.fit_head(model, task, train, epochs=1, batch_size=part.batch)
    tables = train, held_out, _dense(test, part, part.tests)
    return Arena(model, task, tables, glue.metric, 100)


def _instructions(part: Part, shelf: pathlib.Path) -> Arena:
    folder = simulation.first_model(shelf, (str(SMOLLM2),))
    model, tokenizer = models.load(folder), text.Tokenizer(folder)
    template = text.chat_template(folder, tokenizer)
    asked = text.read_texts(shelf / INSTRUCTIONS)
    limits = text.Limits(model.config.vocabulary, model.config.context)
    table, _ = text.tables(asked, tokenizer, limits, template=template)
    table = table.take(np.flatnonzero(text.lengths(table) <= part.side))
    rest, test = data.hold_out(table, part.tests)
    whole = _dense(rest, part, part.train + part.held_out)
    train, held_out = data.hold_out(whole, part.held_out)
    return Arena(model, tasks.NextToken(), (train, held_out, data.Table(test[:])), "loss", 8)


class Trial(NamedTuple):
    """A pair of a model and a data set.

    Attributes:
      said: for a reader.
      make: of a Part and the folder of models and texts.
      reads: files of the model and the data, in the package or in that folder.
      unit: what scores are in, and what they are multiplied by.
      texts: whether it needs that folder.
    """

    said: str
    make: Callable[[Part, pathlib.Path], Arena]
    reads: tuple[pathlib.Path, ...]
    unit: tuple[str, float] = ("%", 100.0)
    texts: bool = True


def _of_pictures(said: str, source: str, weights: str) -> Trial:
    inside = pathlib.Path(lorajax.__file__).parent
    reads = (
        inside / "models" / "embedded" / f"{weights}.safetensors",
        inside / "data" / "embedded" / f"{source.replace('-', '_')}.npz",
    )
    return Trial(said, lambda part, _: _pictures(source, weights, part), reads, texts=False)


def _of_glue(said: str, name: str, **options: Any) -> Trial:
    reads = MINILM, pathlib.Path(GLUE[name].train), pathlib.Path(GLUE[name].test)
    return Trial(said, functools.partial(_glue, name), reads, **options)


TASKS = {
    "mnist": _of_pictures(
        "Fashion-MNIST ViT → MNIST sample, accuracy", "mnist-sample", "vit-fashion-mnist"
    ),
    "cifar10": _of_pictures(
        "Tiny ImageNet ViT → CIFAR-10 sample, accuracy", "cifar10-sample", "vit-tiny-imagenet"
    ),
    "stsb": _of_glue("MiniLM → STS-B, Spearman × 100", "stsb", unit=("", 100.0)),
    "cola": _of_glue("MiniLM → CoLA, Matthews × 100", "cola", unit=("", 100.0)),
    "qnli": _of_glue("MiniLM → QNLI, accuracy", "qnli"),
    "instructions": Trial(
        "SmolLM2-135M → instructions, −loss of held-out answers, millinats a token",
        _instructions,
        (SMOLLM2, INSTRUCTIONS),
        ("", 1000.0),
    ),
}


def contest_of(name: str, part: Part, shelf: pathlib.Path, store: pathlib.Path) -> Contest:
    """The contest of a task: model, tables and recipes; nothing is trained but the head."""
    arena = TASKS[name].make(part, shelf)
    train, held_out, test = arena.tables
    targets, heads = finetune.targets_of(arena.model)
    options: dict[str, Any] = {"batch_size": part.batch, "learning_rate": 1.0}
    begin = time.perf_counter()

    def told(sweep: str, progress: Any) -> None:
        spent = time.perf_counter() - begin
        print(f"  {name}, {sweep}: {progress.done} of {progress.total}, {spent:.0f} s", flush=True)

    return Contest(
        arena.model,
        arena.task,
        train,
        held_out,
        test,
        recipes.lora(part.steps, **options),
        whole=recipes.full(part.steps, **options),
        key=jax.random.key(0),
        metric=arena.metric,
        uniform=part.uniform,
        seeds=part.seeds,
        tries=part.tries,
        rates=part.rates,
        methods=part.methods,
        targets=targets,
        heads=heads,
        samples=part.behind,
        at_once=arena.at_once,
        store=store,
        settings={"task": name, "part": json.loads(json.dumps(dataclasses.asdict(part)))},
        progress=told,
    )


def plain(found: Mapping[str, Contestant]) -> dict[str, Any]:
    """Contestants as JSON."""
    return {
        name: {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in each._asdict().items()
        }
        for name, each in found.items()
    }


def inputs(name: str, shelf: pathlib.Path | None) -> str | None:
    """Fingerprint of what a task reads; None where that is not there."""
    paths = [(shelf or pathlib.Path()) / path for path in TASKS[name].reads]
    return simulation.fingerprint(*paths) if all(path.exists() for path in paths) else None


def known(
    name: str,
    part: Part,
    folder: pathlib.Path,
    published: pathlib.Path | None,
    reads: str | None = None,
) -> Any:
    """A task's results, where they are in the folder or in a file of numbers; else None.

    Those of other amounts, and of other files where `reads` tells what they hold, are others.
    """
    path, asked = folder / f"{name}.json", json.loads(json.dumps(dataclasses.asdict(part)))
    places = [json.loads(path.read_text("utf-8"))] if path.exists() else []
    if published is not None and published.exists():
        places.append(json.loads(published.read_text("utf-8"))["tasks"].get(name))
    for found in places:
        if found and found["part"] == asked and reads in (None, found.get("inputs")):
            return found
    return None


def tried(name: str, part: Part, shelf: pathlib.Path, folder: pathlib.Path) -> None:
    """Makes a task's results and writes them into the folder."""
    path = folder / f"{name}.json"
    print(f"{name}: {TASKS[name].said}", flush=True)
    contest = contest_of(name, part, shelf, folder / name)
    even = contest.at_equal_parameters()
    timed = contest.at_equal_time()
    spent = seconds(folder / name)
    found = {
        "task": TASKS[name].said,
        "inputs": inputs(name, shelf),
        "part": dataclasses.asdict(part),
        "budget": contest.budget,
        "looked at": contest.signals.samples,
        "heads": list(contest.heads),
        "equal parameters": plain(even),
        "equal time": plain(timed),
        "choosing, processor seconds": contest.signals.seconds,
        "training, processor seconds": {k: {"runs": n, "s": s} for k, (n, s) in spent.items()},
    }
    files.write(path, json.dumps(found, indent=1) + "\n")


def judged(found: Mapping[str, Any], which: str) -> dict[str, dict[str, Any]]:
    """Of each way the verdicts against those in AGAINST that took part, paired by seed."""
    scores = {name: each["scores"] for name, each in found[which].items()}
    return {
        name: {
            other: verdict(mine, scores[other])._asdict()
            for other in AGAINST
            if other in scores and other != name
        }
        for name, mine in scores.items()
    }


def _number(value: float) -> str:
    return f"{value:+.2f}"


def _compared(verdicts: Mapping[str, Any], other: str, factor: float) -> str:
    if other not in verdicts:
        return ""
    each = verdicts[other]
    return f"{factor * each['mean']:+.2f} ± {factor * each['half']:.2f}, {each['said']}"


def table(name: str, found: Mapping[str, Any], which: str) -> list[str]:
    """Markdown of a task: a line a way."""
    unit, factor = TASKS[name].unit
    lines = [
        f"| {which} | parameters | steps | rate | score{f' [{unit}]' if unit else ''} | "
        "less rule | less uniform |",
        "|---|---|---|---|---|---|---|",
    ]
    verdicts = judged(found, which)
    for method, each in found[which].items():
        scores = factor * np.array(each["scores"])
        size = np.array(each["parameters"])
        words = f"{size[0]:,.0f}" if np.ptp(size) == 0 else f"{size.min():,.0f} … {size.max():,.0f}"
        rates = sorted(map(float, each["held_out"]))
        edge = "\\*" if len(rates) > 1 and each["rate"] in (rates[0], rates[-1]) else ""
        lines.append(
            f"| {METHODS[method].said} | {words if method != 'full' else 'all of the model'} | "
            f"{each['steps']} | {each['rate']:g}{edge} | "
            f"{scores.mean():.2f} ± {scores.std(ddof=1):.2f} | "
            f"{_compared(verdicts[method], 'rule', factor)} | "
            f"{_compared(verdicts[method], 'uniform', factor)} |"
        )
    return lines


def costs(found: Mapping[str, Any]) -> list[str]:
    """Markdown of a task: what choosing and training took."""
    lines = [
        "| | above noise | choosing, passes | training, passes | choosing, s | training, s a run |",
        "|---|---|---|---|---|---|",
    ]
    spent = found["training, processor seconds"]
    for method, each in found["equal parameters"].items():
        own = [v for k, v in spent.items() if method in k.split("-", 1)[1].split("+")]
        runs, total = sum(x["runs"] for x in own), sum(x["s"] for x in own)
        behind = found["choosing, processor seconds"]
        chose = sum(behind[need] for need in METHODS[method].needs)
        size = max(1.0, float(np.mean(each["parameters"])))
        above = "" if method in ("full", "AdaLoRA") else f"{1 - each['filled'] / size:.0%}"
        lines.append(
            f"| {METHODS[method].said} | {above} | {each['choosing']:,.0f} | "
            f"{each['training']:,.0f} | {chose:.1f} | {total / max(1, runs):.1f} |"
        )
    return lines


def summary(results: Mapping[str, Any]) -> list[str]:
    """Markdown: the verdict of each way in each task, and how often each was said."""
    lines = []
    for other in AGAINST:
        lines += [
            f"Against **{METHODS[other].said}** (equal parameters / equal time):",
            "",
            "| | " + " | ".join(results) + " |",
            "|---|" + "---|" * len(results),
        ]
        for method in METHODS:
            cells = []
            for found in results.values():
                said = [
                    judged(found, which).get(method, {}).get(other, {}).get("said", "")
                    for which in ("equal parameters", "equal time")
                ]
                cells.append(" / ".join(each or "–" for each in said) if any(said) else "")
            if any(cells):
                lines.append(f"| {METHODS[method].said} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def allocators(results: Mapping[str, Any]) -> str:
    """In words: how ranks by the gradient alone, from one start, compare with one rank."""
    names = [n for n in ("rule", "signs", "whitened", "energy")]
    said = [
        verdicts[name]["uniform"]["said"]
        for found in results.values()
        for verdicts in [judged(found, "equal parameters")]
        for name in names
        if "uniform" in verdicts.get(name, {})
    ]
    counts = {word: said.count(word) for word in ("better", "worse", "not told apart")}
    return (
        "At equal parameters, ranks by the gradient's spectrum (split half, random signs, "
        "whitened, energy; all with the start of uniform) were better than one rank everywhere in "
        f"{counts['better']} of {len(said)} pairs, worse in {counts['worse']} and not told apart "
        f"in {counts['not told apart']}; of pairs that do not differ, one in 20 is told apart by "
        "chance."
    )


def control(results: Mapping[str, Any]) -> str:
    """In words: whether the control came out as it must."""
    said = {
        name: judged(found, "equal parameters").get("starved", {}).get("rule", {}).get("said")
        for name, found in results.items()
    }
    blind = [name for name, word in said.items() if word and word != "worse"]
    return (
        "The control against the rule it starves: "
        + "; ".join(f"{name} {word}" for name, word in said.items() if word)
        + "."
        + (
            f" Where a tenth of the budget is not worse ({', '.join(blind)}), it is not shown that "
            "ranks can be told apart at all: that other ways are not says nothing of them."
            if blind
            else ""
        )
    )


def page(results: Mapping[str, Any], profile: str) -> str:
    """Markdown: the whole report."""
    wanted = PROFILES[profile]
    left = [f"{TASKS[name].said}" for name in wanted if name not in results]
    lines = [
        "# The rank rule on trial",
        "",
        f"Made by `python sims/trial.py --profile {profile} --page docs/trial.md --json "
        "benchmarks/results/trial.json`; no result here is typed by hand.",
        "",
        "Every way to choose ranks trains the same model, with the same fitted head, on the same "
        "batches in the same orders. The budget is what one rank in every layer costs, and every "
        "way spends it **to the last parameter**: directions go by worth for each parameter until "
        "the next does not fit, and what is left over is spent by the exchange that moves the "
        "fewest parameters. What a rule finds above noise comes first; where that is less than the "
        "budget, its next directions fill it. AdaLoRA's ranks are known at the end only: its "
        "budget counts parameters, its singular values among them, and it ends less than one "
        "direction below. It trains half again as many on the way, as its paper has it. Full "
        "fine-tuning has no budget.",
        "",
        allocators(results),
        "",
        control(results),
        "",
        *summary(results),
        "## How to read it",
        "",
        "- Scores are means over seeds ± their standard deviation; differences are paired by seed, "
        '± half of the 95 % interval of their mean (Student\'s t). "Better" and "worse" say that '
        "0 is outside of it. Seeds differ in the start and the order of samples; ranks are chosen "
        "once, on one draw, and the test set is one draw, too.",
        "- Learning rates were chosen for each way and task on training samples that were set "
        "aside, in orders that are not among those measured; \\* marks one at the edge of its "
        "grid. No test set was looked at. Nothing else was chosen.",
        "- Equal time counts passes of one sample through the model: forward 1, backward 1, the "
        "kernels' gradients 1, so that a step of adapters is "
        f"{TRAINING['lora']:g} a sample, one of full fine-tuning {TRAINING['full']:g}, and the "
        "gradient that ranks are read off 3 (random signs 5, whitened 4, EVA's inputs 1). All have "
        "what `uniform` has in the given steps, choosing included, at the rate of equal "
        "parameters. The count is the same on every machine; it leaves out factorizations of "
        "matrices and AdaLoRA's bookkeeping, which the measured processor seconds have. Those of "
        "choosing compile its programs, too, and those of training, with measuring, do not; both "
        "depend on what else the machine does.",
        '- Lines "rank rule" and "energy" share uniform\'s start (orthonormal A, B = 0), so that '
        "ranks alone differ; EVA, GoRA and LoRA-GA bring their own start. GoRA goes without its "
        "bounds on ranks and with γ = 0.05.",
        "",
    ]
    for name, found in results.items():
        part = found["part"]
        lines += [
            f"## {found['task']}",
            "",
            f"{part['train']:,} samples to train on, {part['held_out']:,} set aside, "
            f"{part['tests'] or 'all'} of the test set; {part['steps']} steps of {part['batch']}, "
            f"{part['seeds']} seeds; ranks from {found['looked at']} samples; a budget of "
            f"{found['budget']:,} parameters (rank {part['uniform']} everywhere), beside "
            f"{', '.join(found['heads']) or 'no head'} in full.",
            "",
            *table(name, found, "equal parameters"),
            "",
            *table(name, found, "equal time"),
            "",
            *costs(found),
            "",
        ]
    lines += [
        "## What is missing",
        "",
        f"Not run: {'; '.join(left)}." if left else f"All of the profile {profile} was run.",
    ]
    absent = [each.said for name, each in TASKS.items() if name not in wanted]
    if absent:
        lines.append(f"Not in the profile: {'; '.join(absent)} (`--profile full`).")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--profile", choices=PROFILES, default="quick")
    add("--tasks", nargs="+", choices=TASKS, help="default: the profile's")
    add("--show", action="store_true", help="write what there is, and run nothing")
    add("--page", type=pathlib.Path, help="a report to write")
    add("--json", type=pathlib.Path, help="its numbers; tasks it has are not repeated")
    add("--seed", type=int, default=0, help="accepted as by other figures")
    add("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    if args.profile == "quick":  # which compiles for longer than it computes
        environment.compile_fast()
    profile, folder = PROFILES[args.profile], args.out / "trial" / args.profile
    if unknown := set(args.tasks or ()) - set(profile):
        parser.error(f"--tasks is {', '.join(sorted(unknown))}, not in profile {args.profile}.")
    wanted = [name for name in profile if args.tasks is None or name in args.tasks]
    shelf = None
    if not args.show and any(TASKS[name].texts for name in wanted):
        shelf = simulation.real_texts("tokenizers", "jinja2")
        if shelf is None:
            wanted = [name for name in wanted if not TASKS[name].texts]
    folder.mkdir(parents=True, exist_ok=True)
    if not args.show:
        for name in wanted:
            if known(name, profile[name], folder, args.json, inputs(name, shelf)) is None:
                tried(name, profile[name], shelf or pathlib.Path(), folder)
    # Whatever is there of the profile, also what was not asked for now.
    there = {name: known(name, part, folder, args.json) for name, part in profile.items()}
    results = {name: found for name, found in there.items() if found}
    if not results:
        print("Nothing of this profile has been finished yet.")
        return
    content = {
        "profile": args.profile,
        "tasks": results,
        "verdicts": {
            name: {which: judged(found, which) for which in ("equal parameters", "equal time")}
            for name, found in results.items()
        },
    }
    where = args.page or folder / "trial.md", args.json or folder / "trial.json"
    files.write(where[0], page(results, args.profile))
    files.write(where[1], json.dumps(content, indent=1) + "\n")
    for name, found in results.items():
        print("\n".join([f"{name}: {found['task']}", *table(name, found, "equal parameters")]))
    print(control(results))
    print(f"written: {where[0]}, {where[1]}")


if __name__ == "__main__":
    main()
