"""LoRA at the ranks that the gradient asks for against full fine-tuning, on GLUE with a real BERT.

MiniLM (6 layers, 22.7M parameters) is trained on CoLA, STS-B, QNLI and SST-2 by adapters whose
ranks are read off the gradient before training, within 5 % of the model's parameters; by adapters
of one rank everywhere at the same cost; and in full. Methods share the fitted head, and in one seed
the order of the samples; points are differences from full fine-tuning, paired by seed, with 95 %
intervals. Learning rates were chosen on training samples that were set aside (`--choose`).
Whatever has finished is kept in a file and not run again. Needs the folder LORAJAX_DATA.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("NPROC", "16")  # see "Good to know" in the README

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from lorajax import adapters, data, finetune, models, plots, tasks  # noqa: E402
from lorajax.cli.texts import RATES  # noqa: E402
from lorajax.data import text  # noqa: E402
from lorajax.finetune import recipes  # noqa: E402

METHODS = ("rule", "uniform", "full")
BATCH = 32
WINDOW = 32
SHARE = 0.05
"""Of the model's parameters that adapters and head may have."""
MODEL = "minilm-l6"


@dataclasses.dataclass(frozen=True)
class Glue:
    """Where a task's texts are, what is asked, and what GLUE reports of it."""

    train: str
    test: str
    kind: str
    metric: str


TASKS = {
    "cola": Glue("glue/cola_train.tsv", "glue/cola_dev.tsv", "classes", "matthews"),
    "stsb": Glue("glue/stsb_train.tsv", "glue/stsb_test.tsv", "numbers", "spearman"),
    "qnli": Glue("glue/qnli_sub_train.tsv", "glue/qnli_dev.tsv", "classes", "accuracy"),
    "sst2": Glue("sst2_train.tsv", "sst2_test_labeled.tsv", "classes", "accuracy"),
}


@dataclasses.dataclass(frozen=True)
class Profile:
    """How much is run; 0 samples are all, 0 tests as well."""

    tasks: tuple[str, ...]
    seeds: int
    epochs: float
    samples: int
    tests: int
    length: int
    behind: int
    methods: tuple[str, ...] = METHODS


PROFILES = {
    "quick": Profile(("cola",), 1, 1, 256, 128, 16, 64, ("rule", "full")),
    "full": Profile(("cola", "stsb", "qnli", "sst2"), 5, 3, 0, 0, 128, 1024),
}
CHOICE = Profile(("cola", "stsb"), 1, 2, 2000, 500, 64, 256)
"""Of the learning rates: so many training samples, and so many others, set aside, to judge by."""
GRID = {"rule": (5e-4, 1e-3, 2e-3), "full": (5e-5, 1e-4, 2e-4)}


@dataclasses.dataclass(frozen=True)
class Run:
    """What determines a run's score; a record in the file is found by all of these."""

    task: str
    method: str
    seed: int
    rate: float
    epochs: float
    samples: int
    tests: int
    length: int
    behind: int
    held_out: bool = False


class Journal:
    """Finished runs in a file of JSON lines, one a run.

    A line that was cut off when a program was killed is passed over.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.found: dict[Run, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self.found[Run(**record["run"])] = record

    def __call__(self, run: Run, make: Callable[[Run], dict[str, Any]]) -> dict[str, Any]:
        """The record of a run, made unless it is there."""
        if run not in self.found:
            record = {"run": dataclasses.asdict(run), **make(run)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut_off = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" * cut_off + json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.found[run] = record
            print(
                f"{run.task}, {run.method}, rate {run.rate:g}, seed {run.seed}: "
                f"{record['score']:.4f} in {record['seconds']:.0f} s",
                flush=True,
            )
        return self.found[run]


class Bench:
    """A task's tables, the model with its head fitted, and ranks: what its runs share."""

    def __init__(self, folder: pathlib.Path, run: Run):
        glue = TASKS[run.task]
        asked = text.read_texts(folder / glue.train, folder / glue.test, kind=glue.kind)
        tokenizer = text.Tokenizer(folder / MODEL)
        model = models.load(folder / MODEL, classes=len(asked.classes) or 1, pool="mean")
        limits = text.Limits(model.config.vocabulary, model.config.longest, run.length)
        self.train, self.test = text.tables(asked, tokenizer, limits)
        if run.held_out:
            self.train, self.test = data.hold_out(self.train, run.tests)
        self.train, self.test = _some(self.train, run.samples), _some(self.test, run.tests)
        # Similar lengths side by side, so that little of a batch is filling.
        self.test = self.test.take(np.argsort(text.lengths(self.test), kind="stable"))
        labels = np.asarray(self.train.columns["labels"][:], np.float64)
        self.task: Any = (
            tasks.Texts()
            if glue.kind == "classes"
            else tasks.Regression(float(labels.mean()), float(labels.std()))
        )
        self.metric, self.behind = glue.metric, run.behind
        self.parameters = _size(nnx.state(model, nnx.Param))
        self.model = finetune.fit_head(model, self.task, self.train, epochs=1, batch_size=BATCH)
        self.targets, self.heads = finetune.targets_of(self.model)
        self._trainers: dict[tuple[str, int], tuple[finetune.Trainer, Any]] = {}

    @functools.cached_property
    def selection(self) -> adapters.Selection:
        """The rule's ranks within the budget."""
        head = _size(nnx.state(self.model.head, nnx.Param))
        return finetune.select_ranks(
            self.model,
            self.task,
            self.train,
            targets=self.targets,
            samples=self.behind,
            batch_size=32,
            budget=int(SHARE * self.parameters) - head,
        )

    def ranks(self, method: str) -> dict[str, int]:
        """Of the layers by path; one everywhere is the largest that costs no more than the rule."""
        chosen = self.selection.ranks
        if method == "rule":
            return chosen
        costs = {each.path: each.cost for each in self.selection.layers}
        spent = sum(rank * costs[path] for path, rank in chosen.items())
        return dict.fromkeys(costs, max(1, round(spent / sum(costs.values()))))

    def _adapted(self, method: str, seed: int) -> Any:
        """The model that a run of a method begins with."""
        if method == "full":
            return self.model
        key = jax.random.key(seed)
        return finetune.adapt(self.model, self.ranks(method), key=key, start="orthogonal")

    def trainer(self, method: str, steps: int) -> tuple[finetune.Trainer, Any]:
        """Of a method, at a learning rate of 1, with the filter of what trains."""
        if (method, steps) not in self._trainers:
            model, options = self._adapted(method, 0), {"batch_size": BATCH, "learning_rate": 1.0}
            if method == "full":
                wrt, recipe = nnx.Param, recipes.full(steps, **options)
            else:
                wrt = adapters.trainable(model, heads=self.heads)
                recipe = recipes.lora(steps, **options)
            transformation = rated(recipe.transformation())
            made = finetune.Trainer(model, wrt, self.task, recipe, transformation=transformation)
            self._trainers[method, steps] = made, wrt
        return self._trainers[method, steps]

    def __call__(self, run: Run) -> dict[str, Any]:
        """Trains and measures."""
        begin = time.perf_counter()
        steps = max(1, round(run.epochs * (len(self.train) // BATCH)))
        trainer, wrt = self.trainer(run.method, steps)
        params = nnx.split(self._adapted(run.method, run.seed), wrt, ...)[1]
        state = trainer.init()
        state = state._replace(
            params=jax.tree.map(jnp.copy, params),  # a step gives its state up
            optimizer=(state.optimizer[0], jnp.float32(run.rate)),
        )
        recipe = dataclasses.replace(trainer.recipe, seed=run.seed, window=WINDOW)
        order = finetune.order_of(self.train, recipe)
        for step in range(steps):
            state, _ = trainer.step(state, self.train[order(step)])
        found = finetune.judge(trainer, state, self.test, [self.metric], 128)
        return {
            "score": found[self.metric],
            "metric": self.metric,
            "parameters": trainer.parameters,
            "share": trainer.parameters / self.parameters,
            "steps": steps,
            "ranks": {} if run.method == "full" else self.ranks(run.method),
            "seconds": time.perf_counter() - begin,
        }


def rated(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer whose learning rate is part of its state, so that all share one program."""

    def init(params: Any) -> Any:
        return inner.init(params), jnp.float32(1)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        # Updates of all recipes are linear in the learning rate.
        updates, after = inner.update(updates, state[0], params)
        return jax.tree.map(lambda u: u * state[1].astype(u.dtype), updates), (after, state[1])

    return optax.GradientTransformation(init, update)


def _size(state: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def _some(table: data.Table, samples: int) -> data.Table:
    """As many samples of a table, drawn at random, the same ones every time."""
    if not samples or samples >= len(table):
        return table
    return table.take(np.sort(data.Order(len(table), samples, 0)(0)))


def plan(profile: Profile, seeds: int) -> Iterator[Run]:
    """The runs in their order: all methods of a seed before the next, so that pairs come early."""
    shared = {name: getattr(profile, name) for name in ("epochs", "samples", "tests", "length")}
    for task in profile.tasks:
        for seed in range(seeds):
            for method in profile.methods:
                rate = RATES["full" if method == "full" else "lora"]
                yield Run(task, method, seed, rate, behind=profile.behind, **shared)


def choices(grid: dict[str, Sequence[float]]) -> Iterator[Run]:
    """The runs that learning rates are chosen by, none of which sees a test set."""
    shared = {name: getattr(CHOICE, name) for name in ("epochs", "samples", "tests", "length")}
    for task in CHOICE.tasks:
        for method, rates in grid.items():
            for rate in rates:
                for seed in range(CHOICE.seeds):
                    yield Run(
                        task, method, seed, rate, behind=CHOICE.behind, held_out=True, **shared
                    )


def carry_out(runs: Sequence[Run], folder: pathlib.Path, journal: Journal) -> list[dict[str, Any]]:
    """The records of runs, those made that are missing; one task's tables are held at a time."""
    bench: tuple[str, Bench] | None = None
    found = []
    for run in runs:

        def make(run: Run) -> dict[str, Any]:
            nonlocal bench
            if bench is None or bench[0] != run.task:
                bench = (run.task, Bench(folder, run))
            return bench[1](run)

        found.append(journal(run, make))
    return found


def scores(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """Of each task and method, by seed."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for each in records:
        run = each["run"]
        of_task = found.setdefault(run["task"], {})
        of_task.setdefault(run["method"], {})[run["seed"]] = each["score"]
    return found


def differences(by_method: dict[str, dict[int, float]]) -> dict[str, tuple[float, float]]:
    """Mean of a method less full fine-tuning over common seeds, and half of its 95 % interval."""
    full, found = by_method.get("full", {}), {}
    for method, by_seed in by_method.items():
        common = sorted(set(by_seed) & set(full))
        if method != "full" and common:
            pairs = np.array([by_seed[seed] - full[seed] for seed in common])
            found[method] = (
                finetune.interval(pairs) if len(pairs) > 1 else (float(pairs[0]), float("nan"))
            )
    return found


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a task and method."""
    lines = [
        "| task | method | trains | seeds | score | less full, paired |",
        "|---|---|---|---|---|---|",
    ]
    for task, by_method in scores(records).items():
        less = differences(by_method)
        for method, by_seed in by_method.items():
            of = [r for r in records if (r["run"]["task"], r["run"]["method"]) == (task, method)]
            values = 100 * np.array(list(by_seed.values()))
            spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
            paired = ""
            if method in less:
                mean, half = (100 * each for each in less[method])
                paired = f"{mean:+.2f}" + (f" ± {half:.2f}" if np.isfinite(half) else "")
            lines.append(
                f"| {task} ({of[0]['metric']}) | {method} | {of[0]['share']:.1%} | {len(values)} | "
                f"{values.mean():.2f}{spread} | {paired} |"
            )
    return "\n".join(lines)


def choice_table(records: Sequence[dict[str, Any]]) -> tuple[str, dict[str, float]]:
    """Markdown of held-out scores by rate, and the rate of each method with the best mean."""
    lines, best = [], {}
    for method in GRID:
        of = [r for r in records if r["run"]["method"] == method]
        rates = sorted({r["run"]["rate"] for r in of})
        means = {}
        lines += [f"| {method}, learning rate | " + " | ".join(f"{x:g}" for x in rates) + " |"]
        lines += ["|---|" + "---|" * len(rates)]
        for task in CHOICE.tasks:
            named = [((r["run"]["task"], r["run"]["rate"]), r["score"]) for r in of]
            row = [np.mean([score for at, score in named if at == (task, x)]) for x in rates]
            means[task] = row
            numbers = " | ".join(f"{100 * x:.2f}" for x in row)
            lines.append(f"| {task}, {TASKS[task].metric} | {numbers} |")
        mean = np.mean(list(means.values()), axis=0)
        lines += ["| mean | " + " | ".join(f"{100 * x:.2f}" for x in mean) + " |", ""]
        best[method] = rates[int(np.argmax(mean))]
    return "\n".join(lines), best


def draw(records: Sequence[dict[str, Any]]):
    """Differences from full fine-tuning with their intervals."""
    found = scores(records)
    figure, panel = plots.figure(size=(6, 3.4))
    with plots.style():
        for i, method in enumerate(METHODS[:2]):
            places, means, halves = [], [], []
            for j, by_method in enumerate(found.values()):
                less = differences(by_method)
                if method in less:
                    places.append(j + 0.15 * (2 * i - 1))
                    means.append(100 * less[method][0])
                    halves.append(np.nan_to_num(100 * less[method][1]))
            panel.errorbar(places, means, halves, fmt="o", capsize=3, label=method)
        panel.axhline(0, color="gray", linewidth=1)
        panel.set_xticks(range(len(found)), [f"{t}\n{TASKS[t].metric}" for t in found])
        panel.set_ylabel("LoRA less full fine-tuning, points")
        panel.legend()
    return figure


def write(out: pathlib.Path, records: Sequence[dict[str, Any]], profile: str) -> None:
    """Table, numbers and figure of what there is."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"glue_{profile}.md").write_text(table(records) + "\n", encoding="utf-8")
    numbers = {
        task: {
            "scores": {method: list(by_seed.values()) for method, by_seed in by_method.items()},
            "less full": differences(by_method),
        }
        for task, by_method in scores(records).items()
    }
    content = {"profile": profile, "rates": RATES, "tasks": numbers, "caption": __doc__}
    (out / f"glue_{profile}.json").write_text(json.dumps(content, indent=1) + "\n")
    plots.save(draw(records), out / f"glue_{profile}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument(
        "--seeds", type=int, help="of each task and method (default: the profile's)"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: the profile's")
    parser.add_argument("--choose", action="store_true", help="learning rates, on held-out samples")
    parser.add_argument("--rule-rates", nargs="+", type=float, default=GRID["rule"])
    parser.add_argument("--full-rates", nargs="+", type=float, default=GRID["full"])
    parser.add_argument("--show", action="store_true", help="write what there is, and run nothing")
    parser.add_argument("--seed", type=int, default=0, help="accepted as by other figures")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    folder = os.environ.get("LORAJAX_DATA")
    if not folder:
        print("Nothing is run: LORAJAX_DATA, the folder with MiniLM and GLUE, is not set.")
        return
    out = args.out / "spectral_dynamics"
    journal = Journal(out / "glue.jsonl")
    if args.choose:
        grid = {"rule": args.rule_rates, "full": args.full_rates}
        runs = list(choices(grid))
    else:
        profile = PROFILES[args.profile]
        profile = dataclasses.replace(profile, tasks=tuple(args.tasks or profile.tasks))
        runs = list(plan(profile, args.seeds or profile.seeds))
    if args.show:
        runs = [run for run in runs if run in journal.found]
    records = carry_out(runs, pathlib.Path(folder), journal)
    if args.choose:
        words, best = choice_table(records)
        print(words + f"\nbest: {best}")
    elif records:
        write(out, records, args.profile)
        print(table(records))
        print(f"written: {out}/glue_{args.profile}.md, .json and .png")


if __name__ == "__main__":
    main()
