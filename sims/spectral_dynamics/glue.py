"""LoRA at the ranks that the gradient asks for against full fine-tuning, on GLUE with a real BERT.

MiniLM (6 layers, 22.7M parameters) is trained on CoLA, STS-B, QNLI and SST-2 by adapters whose
ranks are read off the gradient before training, within 5 % of the model's parameters; by PEFT in
torch from the same start (where it is installed); by adapters of one rank everywhere at the same
cost; and in full. Methods share the fitted head, and in one seed the order of the samples; points
are differences from full fine-tuning, paired by seed, with 95 % intervals. Learning rates were
chosen on training samples that were set aside (`--choose`). Whatever has finished is kept in a file
and not run again. Needs the folder LORAJAX_DATA and the extra `text`.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md
# On a busy machine torch's threads, which wait for each other, would else spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

from lorajax import adapters, data, finetune, models, plots, tasks  # noqa: E402
from lorajax.cli.texts import RATES  # noqa: E402
from lorajax.data import text  # noqa: E402
from lorajax.finetune import bridge, recipes  # noqa: E402
from lorajax.studies import simulation  # noqa: E402

METHODS = ("rule", "filled", "peft", "uniform", "full")
SAID = {
    "rule": "LoRA at the rule's ranks",
    "filled": "the rule's ranks, filled up",
    "peft": "the same by PEFT and torch",
    "uniform": "LoRA at one rank",
    "full": "full",
}
BATCH = 32
WINDOW = 32
SHARE = 0.05
"""Of the model's parameters that adapters and head may have."""
MODEL = "minilm-l6"
RATE = {"rule": 2e-3, "filled": 2e-3, "peft": 2e-3, "uniform": 2e-3, "full": 2e-4}
"""Learning rates of all runs by method; `--choose` compares others."""
SLOWER = {"rule": 1e-3, "filled": 1e-3, "peft": 1e-3, "uniform": 1e-3}
"""Of runs of thousands of steps, and the command's own."""


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
    "sst2": Glue("sst2_train.tsv", "sst2_dev.tsv", "classes", "accuracy"),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """How much of a task is run; 0 samples are all, 0 tests as well."""

    seeds: dict[str, int]
    epochs: float
    samples: int = 0
    tests: int = 0
    length: int = 128
    behind: int = 4096
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """In place of RATE's, by method."""


def _seeds(count: int, **others: int) -> dict[str, int]:
    """Of all methods."""
    return {**dict.fromkeys(METHODS, count), **others}


PROFILES = {
    "quick": {"cola": Part({"rule": 1, "full": 1}, 1, 256, 128, 16, 64)},
    # About an hour of one core; what it leaves out the profile "full" has.
    "hour": {
        "sst2": Part({"rule": 1, "full": 1}, 1, 0, 0, 64, 4096),
        "stsb": Part({"rule": 5, "peft": 5, "full": 5}, 1, 0, 0, 64, 4096),
        "cola": Part({"rule": 5, "peft": 5, "full": 5}, 1, 0, 0, 64, 4096),
        "qnli": Part({"rule": 3, "peft": 3, "full": 3}, 1, 4096, 1024, 96, 4096),
    },
    # What of LoRA's distance from full fine-tuning is due to its rate, and what to few directions.
    "slow": {"qnli": Part({"rule": 3, "filled": 3, "full": 3}, 1, 4096, 1024, 96, 4096, SLOWER)},
    # 74 minutes of a core for LoRA, whose ranks are read off all samples.
    "long": {"sst2": Part({"rule": 1, "full": 1}, 3, 0, 0, 64, 67_349, SLOWER)},
    # Both at RATE's, which short runs choose.
    "fast": {
        "sst2": Part({"rule": 1}, 3, 0, 0, 64, 67_349),
        "qnli": Part({"filled": 2}, 1, 4096, 1024, 96, 4096),
    },
    "full": {name: Part(_seeds(5), 3, rates=SLOWER) for name in ("cola", "stsb", "qnli", "sst2")},
}
WHY = {
    "slow": "What of LoRA's distance is due to its rate, and what to how many directions it has.",
    "long": "Three epochs, with ranks read off all samples.",
    "full": "Three epochs, LoRA at the slower rate.",
    "fast": "Both at the rate of the first table, which was chosen in short runs at low ranks.",
}
"""Of profiles, what they are for."""
CHOICE = {
    "sst2": Part({"rule": 1, "full": 1}, 1, 16_000, 1000, 64, 4096),
    "stsb": Part({"rule": 1, "full": 1}, 1, 0, 1000, 64, 4096),
}
"""Of the learning rates: so many training samples, and so many others, set aside, to judge by. A
rate that is best in few steps can diverge in many: of 62 steps on SST-2 4e-3 was the best for LoRA,
and an epoch with it ended at chance."""
GRID = {"rule": (5e-4, 1e-3, 2e-3, 4e-3), "full": (1e-4, 2e-4, 4e-4, 8e-4)}
HEAD = 2048
"""Samples that the head is fitted to, before ranks are read off and all methods begin."""


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
    inputs: str = ""
    """Fingerprint of the model's and the task's files."""


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
        self.metric, self.behind, self.base = glue.metric, run.behind, folder / MODEL
        self.parameters = _size(nnx.state(model, nnx.Param))
        fitted = _some(self.train, HEAD)
        self.model = finetune.fit_head(model, self.task, fitted, epochs=1, batch_size=BATCH)
        self.targets, self.heads = finetune.targets_of(self.model)
        self._trainers: dict[tuple[str, int], tuple[finetune.Trainer, Any]] = {}

    @property
    def budget(self) -> int:
        """Parameters that adapters may have, beside the head."""
        return int(SHARE * self.parameters) - _size(nnx.state(self.model.head, nnx.Param))

    @functools.cached_property
    def selection(self) -> adapters.Selection:
        """The rule's ranks within the budget."""
        return finetune.select_ranks(
            self.model,
            self.task,
            self.train,
            targets=self.targets,
            samples=self.behind,
            batch_size=32,
            budget=self.budget,
        )

    def ranks(self, method: str) -> dict[str, int]:
        """Of the layers by path.

        One everywhere is the largest that costs no more than the rule's. What fills the budget up
        are the gradient's next directions, which the rule does not tell from noise.
        """
        chosen = self.selection.ranks
        costs = {each.path: each.cost for each in self.selection.layers}
        if method == "filled":
            return self.selection.filled(self.budget).ranks
        if method != "uniform":
            return chosen
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

    def steps(self, run: Run) -> int:
        """Of a run in all."""
        return max(1, round(run.epochs * (len(self.train) // BATCH)))

    def batches(self, run: Run, recipe: finetune.Recipe) -> Iterator[dict[str, np.ndarray]]:
        """Of a run, in the order of its seed, which all methods share."""
        recipe = dataclasses.replace(recipe, seed=run.seed, window=WINDOW)
        order = finetune.order_of(self.train, recipe)
        for step in range(self.steps(run)):
            yield self.train[order(step)]

    def __call__(self, run: Run) -> dict[str, Any]:
        """Trains and measures."""
        begin, spent = time.perf_counter(), time.process_time()
        self.behind = run.behind or self.behind
        train = self._by_peft if run.method == "peft" else self._here
        (predictions, answers), losses, trained = train(run)
        return {
            "score": tasks.METRICS[self.metric](predictions, answers),
            "metric": self.metric,
            "parameters": trained,
            "share": trained / self.parameters,
            "steps": self.steps(run),
            "ranks": {} if run.method == "full" else self.ranks(run.method),
            "losses": [float(f"{each:.7g}") for each in losses],
            "seconds": time.perf_counter() - begin,
            "processor": time.process_time() - spent,
        }

    def _here(self, run: Run) -> tuple[Any, list[float], int]:
        """Predictions and answers, the loss of each step's batch before it, and what trains."""
        trainer, wrt = self.trainer(run.method, self.steps(run))
        params = nnx.split(self._adapted(run.method, run.seed), wrt, ...)[1]
        state = trainer.init()
        state = state._replace(
            params=jax.tree.map(jnp.copy, params),  # a step gives its state up
            optimizer=(state.optimizer[0], jnp.float32(run.rate)),
        )
        losses = []
        for batch in self.batches(run, trainer.recipe):
            state, metrics = trainer.step(state, batch)
            losses.append(metrics.loss)
        return trainer.predict(state, self.test, 128), list(map(float, losses)), trainer.parameters

    def _by_peft(self, run: Run) -> tuple[Any, list[float], int]:
        """The same run by PEFT and torch: base, start, head, batches, optimizer and schedule."""
        sys.path.append(str(pathlib.Path(__file__).resolve().parents[2]))
        from benchmarks import peers

        peers.load_torchvision()
        import torch  # type: ignore[import-not-found]
        from peft import PeftModel  # type: ignore[import-not-found]
        from transformers import BertModel  # type: ignore[import-not-found]

        adapted = self._adapted("peft", run.seed)
        made = bridge.bridge(adapted, self.base)
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        base = BertModel.from_pretrained(
            self.base, dtype=torch.float32, add_pooling_layer=False, **still
        )
        with tempfile.TemporaryDirectory() as folder:
            adapters.save_peft(
                adapted,
                folder,
                rules=made.rules,
                heads=made.heads,
                base_model=made.base_model,
                task_type=made.task_type,
            )
            model = PeftModel.from_pretrained(base, folder, is_trainable=True)
        kernel = torch.tensor(np.asarray(adapted.head.kernel[...]))
        head = torch.nn.Linear(*kernel.shape)
        head.load_state_dict({"weight": kernel.T, "bias": torch.tensor(adapted.head.bias[...])})

        def outputs(batch: dict[str, np.ndarray]) -> Any:
            columns = {name: torch.from_numpy(column) for name, column in batch.items()}
            tokens, mask = columns["tokens"].long(), columns["mask"]
            types = {"token_type_ids": columns["types"].long()} if "types" in columns else {}
            x = model(input_ids=tokens, attention_mask=mask.long(), **types).last_hidden_state
            weights = mask.float()[:, :, None]
            return head((x * weights).sum(1) / weights.sum(1))

        recipe = recipes.lora(self.steps(run), batch_size=BATCH, learning_rate=1.0)
        parts = {recipe.ratio: [], 1.0: []}
        for name, each in model.named_parameters():
            if each.requires_grad:
                parts[1.0 if "lora_A" in name else recipe.ratio].append(each)
        beside = {recipe.beside: list(head.parameters())}
        groups = [(factor, ps) for part in (parts, beside) for factor, ps in part.items()]
        optimizer = torch.optim.Adam([{"params": ps} for _, ps in groups])
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integer counts and floats
            rates = np.asarray(jax.vmap(recipe.rate())(jnp.arange(self.steps(run))))
        classes, losses = isinstance(self.task, tasks.Texts), []
        for batch, rate in zip(self.batches(run, recipe), rates, strict=True):
            for group, (factor, _) in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = float(rate) * run.rate * factor
            labels = torch.from_numpy(batch["labels"])
            if classes:
                loss = torch.nn.functional.cross_entropy(outputs(batch), labels.long())
                losses.append(loss.item())
            else:
                wanted = (labels.float() - self.task.mean) / self.task.std
                loss = ((outputs(batch)[:, 0] - wanted) ** 2).mean()
                losses.append(loss.item() * self.task.std**2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = []
        for batch, weights in data.batches(self.test, min(128, len(self.test))):
            with torch.no_grad():
                given = outputs(batch).numpy()
            answer = given.argmax(-1) if classes else given[:, 0] * self.task.std + self.task.mean
            found.append([x[weights > 0] for x in (answer, batch["labels"])])
        predictions, answers = map(np.concatenate, zip(*found, strict=True))
        trained = sum(p.numel() for _, ps in groups for p in ps)
        return (predictions, answers), losses, trained


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


def sizes(part: Part, method: str) -> dict[str, Any]:
    """What a run has of a part; full fine-tuning asks for no ranks, so that none are behind it."""
    names = ("epochs", "samples", "tests", "length", "behind")
    found = {name: getattr(part, name) for name in names}
    return found | {"behind": 0} if method == "full" else found


def fingerprints(folder: pathlib.Path) -> dict[str, str]:
    """What the files hold that a task's runs read, by task; of those that are there."""
    found = {}
    for name, glue in TASKS.items():
        paths = [folder / each for each in (MODEL, glue.train, glue.test)]
        if all(path.exists() for path in paths):
            found[name] = simulation.fingerprint(*paths)
    return found


def plan(
    profile: dict[str, Part],
    names: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    seeds: int | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Iterator[Run]:
    """The runs in their order: all methods of a seed before the next, so that pairs come early."""
    for task in names or profile:
        part = profile[task]
        rates = {**RATE, **part.rates}
        chosen = {m: n for m, n in part.seeds.items() if methods is None or m in methods}
        for seed in range(max(chosen.values(), default=0)):
            for method, count in chosen.items():
                if seed < (count if seeds is None else seeds):
                    run = Run(task, method, seed, rates[method], **sizes(part, method))
                    yield dataclasses.replace(run, inputs=(inputs or {}).get(task, ""))


def choices(
    grid: dict[str, Sequence[float]], inputs: Mapping[str, str] | None = None
) -> Iterator[Run]:
    """The runs that learning rates are chosen by, none of which sees a test set."""
    for task, part in CHOICE.items():
        for method, rates in grid.items():
            for rate in rates:
                for seed in range(part.seeds[method]):
                    run = Run(task, method, seed, rate, held_out=True, **sizes(part, method))
                    yield dataclasses.replace(run, inputs=(inputs or {}).get(task, ""))


def carry_out(runs: Sequence[Run], folder: pathlib.Path, journal: simulation.Journal) -> None:
    """Makes the records of runs that are missing; one task's tables are held at a time."""
    bench: tuple[str, Bench] | None = None

    def make(run: Run) -> dict[str, Any]:
        nonlocal bench
        if bench is None or bench[0] != run.task:
            bench = (run.task, Bench(folder, run))
        record = bench[1](run)
        print(
            f"{run.task}, {run.method}, rate {run.rate:g}, seed {run.seed}: "
            f"{record['score']:.4f} in {record['seconds']:.0f} s",
            flush=True,
        )
        return record

    for run in runs:
        journal(run, make)


def digest(record: dict[str, Any], found: Mapping[Run, dict[str, Any]]) -> dict[str, Any]:
    """A record without its losses, but where they began and ended.

    Of PEFT's runs also how far their losses are from those of the same run here.
    """
    if "losses" not in record:
        return record
    kept = {name: value for name, value in record.items() if name != "losses"}
    kept["ends"] = finetune.ends(record["losses"])._asdict()
    run = Run(**record["run"])
    ours = found.get(dataclasses.replace(run, method="rule"), {})
    if run.method == "peft" and "losses" in ours:
        gap = np.abs(np.subtract(ours["losses"], record["losses"]))
        kept["gap"] = {"first 50 steps": float(gap[:50].max()), "all steps": float(gap.max())}
    return kept


def published(path: pathlib.Path) -> dict[Run, dict[str, Any]]:
    """Digests of the runs that a file of numbers has, which `numbers` wrote."""
    if not path.exists():
        return {}
    records = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return {Run(**record["run"]): record for record in records}


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


def of_method(
    records: Sequence[dict[str, Any]], task: str, method: str
) -> dict[int, dict[str, Any]]:
    """Records of a task and method by seed."""
    named = (task, method)
    runs = [r for r in records if (r["run"]["task"], r["run"]["method"]) == named]
    return {r["run"]["seed"]: r for r in runs}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line a task and method."""
    lines = [
        "| task | method | trains | seeds | score | less full, paired | s a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, by_method in scores(records).items():
        less = differences(by_method)
        for method, by_seed in by_method.items():
            of = list(of_method(records, task, method).values())
            values = 100 * np.array(list(by_seed.values()))
            spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
            paired = ""
            if method in less:
                mean, half = (100 * each for each in less[method])
                paired = f"{mean:+.2f}" + (f" ± {half:.2f}" if np.isfinite(half) else "")
            # The first runs compile, too.
            cost = min(r["processor"] / r["steps"] for r in of)
            lines.append(
                f"| {task} ({of[0]['metric']}) | {SAID[method]} | {of[0]['share']:.1%} | "
                f"{len(values)} | {values.mean():.2f}{spread} | {paired} | {cost:.2f} |"
            )
    return "\n".join(lines)


def curves(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How far the losses and scores of PEFT's runs are from those of the same runs here, by task.

    `seeds` says how many runs' losses were there to compare, `unlike` how many had other ranks:
    runs of two machines, whose gradients differ by rounding, may not be the same run.
    """
    found = {}
    for task in scores(records):
        ours, theirs = (of_method(records, task, method) for method in ("rule", "peft"))
        both = [(ours[seed], theirs[seed]) for seed in sorted(set(ours) & set(theirs))]
        pairs = [(a, b) for a, b in both if a["ranks"] == b["ranks"]]
        gaps = [each["gap"] for _, each in pairs if "gap" in each]
        if gaps:
            found[task] = {
                "seeds": len(gaps),
                **{part: max(gap[part] for gap in gaps) for part in gaps[0]},
                "scores": max(abs(a["score"] - b["score"]) for a, b in pairs),
                "pairs": len(pairs),
                "unlike": len(both) - len(pairs),
            }
    return found


def statements(records: Sequence[dict[str, Any]]) -> list[str]:
    """In words, of each task: how LoRA compares with full fine-tuning, and with PEFT."""
    found = []
    for task, by_method in scores(records).items():
        less, full = differences(by_method), set(by_method.get("full", {}))
        for method in ("rule", "filled"):
            if method not in by_method:
                continue
            mine = 100 * np.mean(list(by_method[method].values()))
            words = f"{task}: {TASKS[task].metric} × 100 of {SAID[method]} is {mine:.2f}"
            if method in less:
                mean, half = (100 * each for each in less[method])
                within = "within 1 point of" if mean > -1 else "more than 1 point below"
                words += f", {within} full fine-tuning ({mean:+.2f}"
                words += f" ± {half:.2f})" if np.isfinite(half) else ", one seed)"
                if np.isfinite(half) and mean - half <= -1 < mean + half:
                    count = len(full & set(by_method[method]))
                    words += f"; {count} seeds leave open which side of 1 point it is on"
            if method == "rule" and (gap := curves(records).get(task)):
                words += (
                    f"; losses differ from PEFT's by {gap['first 50 steps']:.1e} at most in the "
                    f"first 50 steps and {gap['all steps']:.1e} in all (seeds: {gap['seeds']}), "
                    f"scores by {100 * gap['scores']:.2f} (seeds: {gap['pairs']})"
                )
                if gap["unlike"]:
                    words += f"; {gap['unlike']} runs of PEFT's had other ranks and compare nothing"
            found.append(words + ".")
        for method in by_method:
            runs = [each["ends"] for each in of_method(records, task, method).values()]
            if worse := [each for each in runs if each["higher"]]:
                found.append(
                    f"{task}: {SAID[method]} ended at a higher loss than it began with in "
                    f"{len(worse)} of {len(runs)} runs (means of the first and the last twentieth "
                    f"of the steps: {worse[0]['first']:.2f} and {worse[0]['last']:.2f}): the rate "
                    "is too large for it."
                )
    return found


def missing(profile: dict[str, Part], records: Sequence[dict[str, Any]]) -> list[str]:
    """What of a profile has not been run."""
    found = []
    for task, part in profile.items():
        for method, count in part.seeds.items():
            if (done := len(of_method(records, task, method))) < count:
                found.append(f"{task}, {SAID[method]}: {count - done} of {count} seeds")
    return found


def choice_table(records: Sequence[dict[str, Any]]) -> tuple[str, dict[str, float]]:
    """Markdown of held-out scores by rate, and the rate of each method with the best mean."""
    lines, best = [], {}
    for method in GRID:
        of = [r for r in records if r["run"]["method"] == method]
        rates = sorted({r["run"]["rate"] for r in of})
        if not rates:
            continue
        means = []
        lines += [f"| {SAID[method]}, learning rate | " + " | ".join(map("{:g}".format, rates))]
        lines[-1] += " |"
        lines += ["|---|" + "---|" * len(rates)]
        for task in CHOICE:
            named = [((r["run"]["task"], r["run"]["rate"]), r["score"]) for r in of]
            row = [[score for at, score in named if at == (task, x)] for x in rates]
            means.append([np.mean(each) if each else np.nan for each in row])
            lines.append(f"| {task}, {TASKS[task].metric} | {_points(means[-1])} |")
        mean = np.mean(means, axis=0)
        lines += [f"| mean | {_points(mean)} |", ""]
        if np.isfinite(mean).any():
            best[method] = rates[int(np.nanargmax(mean))]
    return "\n".join(lines), best


def _points(values: Sequence[float]) -> str:
    return " | ".join(f"{100 * x:.2f}" if np.isfinite(x) else "not run" for x in values)


def amounts(profile: dict[str, Part]) -> str:
    """Markdown: what a profile takes of each task."""
    lines = [
        "| task | epochs | training samples | behind the ranks | measured on | tokens at most | "
        "rates of LoRA and full |"
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for task, part in profile.items():
        where = pathlib.Path(TASKS[task].test).stem
        tests = f"{part.tests:,} of {where}" if part.tests else f"all of {where}"
        samples = f"{part.samples:,}" if part.samples else "all"
        rates = {**RATE, **part.rates}
        lines.append(
            f"| {task} | {part.epochs:g} | {samples} | {part.behind:,} | {tests} | {part.length} | "
            f"{rates['rule']:g}, {rates['full']:g} |"
        )
    return "\n".join(lines)


def results(records: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: what a profile's runs came to, as a table and in words."""
    return [table(records), "", *(f"- {each}" for each in statements(records)), ""]


def page(
    records: Sequence[dict[str, Any]],
    chosen: Sequence[dict[str, Any]],
    name: str,
    others: Mapping[str, Sequence[dict[str, Any]]] | None = None,
) -> str:
    """Markdown: the whole report of a profile, and what has been run of the others by name."""
    words, best = choice_table(chosen)
    rates = {method: RATES["classes"]["lora" if method == "rule" else method] for method in GRID}
    asked, taken = (
        " and ".join(f"{of[method]:g} ({SAID[method]})" for method in GRID) for of in (rates, RATE)
    )
    same = {*best} == {*GRID} and all(rates[method] == rate for method, rate in best.items())
    left = missing(PROFILES[name], records)
    further = []
    for other, of in (others or {}).items():
        gone = missing(PROFILES[other], of)
        further += [
            f"## Profile `{other}`",
            "",
            *([WHY[other], ""] if other in WHY else []),
            *results(of),
            amounts(PROFILES[other]),
            "",
            *([f"Not run: {'; '.join(gone)}.", ""] if gone else []),
        ]
    whole = (
        "`python sims/spectral_dynamics/glue.py --profile full` runs five seeds of three epochs."
    )
    lines = [
        "# GLUE with a real BERT: LoRA, PEFT and full fine-tuning",
        "",
        f"Made by `python sims/spectral_dynamics/glue.py --profile {name} --page docs/glue.md "
        "--json benchmarks/results/glue.json`; no result here is typed by hand.",
        "",
        "MiniLM-L6 (sentence-transformers/all-MiniLM-L6-v2, 22.7M parameters) with a new head on "
        "the mean of its tokens. Ranks are read off the gradient before training; adapters and "
        f"head have {SHARE:.0%} of the model's parameters at most, which the rule leaves mostly "
        "unspent: ranks that are filled up take the gradient's next directions as well. All "
        "methods begin with one "
        f"head, fitted on {HEAD:,} samples, and take the same batches of {BATCH} in the same "
        "order; PEFT trains in torch from the adapter that was started here. Scores are GLUE's own "
        "times 100, ± their standard deviation over seeds; differences are paired by seed, ± half "
        "of their 95 % interval. Seconds are of processor time, those of the quickest run, with "
        "its measuring.",
        "",
        *results(records),
        "## How much was run",
        "",
        amounts(PROFILES[name]),
        "",
        f"Not run: {'; '.join(left)}." if left else "All of it was run.",
        f"The profile is cut to what two busy cores have in an hour; {whole}",
        "",
        *further,
        "## Learning rates",
        "",
        "Chosen by `python sims/spectral_dynamics/glue.py --choose`, which trains on a part of the "
        "training set and judges by another part (1,000 samples), one seed, and looks at no test "
        f"set. Runs take {taken} where no other rate stands above. `lorajax finetune` takes "
        f"{asked} for texts"
        + (
            ", the best mean of each method:"
            if same
            else "; where that is not the best mean here, `lorajax.cli.texts.RATES` says why:"
        ),
        "",
        words,
    ]
    return "\n".join(lines).rstrip() + "\n"


def draw(records: Sequence[dict[str, Any]]):
    """Differences from full fine-tuning with their intervals."""
    found = scores(records)
    figure, panel = plots.figure(size=(3.4, 2.8))
    shown = [m for m in METHODS[:-1] if any(m in by_method for by_method in found.values())]
    with plots.style():
        for i, method in enumerate(shown):
            places, means, halves = [], [], []
            for j, by_method in enumerate(found.values()):
                less = differences(by_method)
                if method in less:
                    places.append(j + 0.15 * (2 * i - len(shown) + 1))
                    means.append(100 * less[method][0])
                    halves.append(100 * less[method][1])  # NaN, and no bar, for one seed
            panel.errorbar(places, means, halves, fmt="o", capsize=3, label=SAID[method])
        panel.axhline(0, color="gray", linewidth=1)
        panel.set_xticks(range(len(found)), [f"{t}\n{TASKS[t].metric}" for t in found])
        panel.set(
            xlabel="task and measure; without a bar: one seed",
            ylabel="method − full [points], 95 % interval",
        )
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))  # intervals may be anywhere
    return figure


def numbers(
    records: Sequence[dict[str, Any]], chosen: Sequence[dict[str, Any]], name: str
) -> dict[str, Any]:
    """What the page says, as plain numbers."""
    found = {}
    for task, by_method in scores(records).items():
        runs = {m: of_method(records, task, m) for m in by_method}
        found[task] = {
            "metric": TASKS[task].metric,
            "amounts": sizes(PROFILES[name][task], "rule"),
            "scores": by_method,
            "less full": differences(by_method),
            "share": {m: next(iter(of.values()))["share"] for m, of in runs.items()},
            "steps": {m: next(iter(of.values()))["steps"] for m, of in runs.items()},
            "ranks": next(iter(runs["rule"].values()))["ranks"] if "rule" in runs else {},
            "processor seconds": {
                m: [r["processor"] for r in of.values()] for m, of in runs.items()
            },
            "losses less PEFT's": curves(records).get(task),
        }
    rates = [{**r["run"], "score": r["score"]} for r in chosen]
    content = {"profile": name, "rates": RATE, "tasks": found, "choice": rates}
    return content | {"not run": missing(PROFILES[name], records)}


def finished(
    found: Mapping[Run, dict[str, Any]], name: str, inputs: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Digests of the runs that there are of a profile."""
    runs = plan(PROFILES[name], inputs=inputs)
    return [digest(found[run], found) for run in runs if run in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument("--seeds", type=int, help="of each method (default: the profile's)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: the profile's")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: the profile's")
    parser.add_argument("--choose", action="store_true", help="learning rates, on held-out samples")
    parser.add_argument("--rule-rates", nargs="+", type=float, default=GRID["rule"])
    parser.add_argument("--full-rates", nargs="+", type=float, default=GRID["full"])
    parser.add_argument("--show", action="store_true", help="write what there is, and run nothing")
    parser.add_argument("--page", type=pathlib.Path, help="a report to write, beside the table")
    parser.add_argument(
        "--json", type=pathlib.Path, help="its numbers; runs it has are not repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="accepted as by other figures")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    folder = simulation.real_texts("tokenizers")
    if folder is None:
        return
    out = args.out / "spectral_dynamics"
    journal = simulation.Journal(out / "glue.jsonl", Run)
    if args.json:
        journal.found = published(args.json) | journal.found
    profile, inputs = PROFILES[args.profile], fingerprints(pathlib.Path(folder))
    if unknown := set(args.tasks or ()) - set(CHOICE if args.choose else profile):
        parser.error(f"--tasks is {', '.join(sorted(unknown))}, not in profile {args.profile}.")
    if not args.choose:
        runs = list(plan(profile, args.tasks, args.methods, args.seeds, inputs))
    else:
        grid = {"rule": args.rule_rates, "full": args.full_rates}
        runs = [r for r in choices(grid, inputs) if args.tasks is None or r.task in args.tasks]
    if any(run.method == "peft" for run in runs) and importlib.util.find_spec("peft") is None:
        print("PEFT is left out: it is not installed.")
        runs = [run for run in runs if run.method != "peft" or run in journal.found]
    if args.show:
        runs = [run for run in runs if run in journal.found]
    carry_out(runs, pathlib.Path(folder), journal)
    if args.choose:
        words, best = choice_table([journal.found[run] for run in runs])
        print(words + f"\nbest: {best}")
        return
    # Whatever there is of the profile, also of tasks and methods that were not asked for now.
    records = finished(journal.found, args.profile, inputs)
    others = {
        p: finished(journal.found, p, inputs) for p in PROFILES if p not in ("quick", args.profile)
    }
    others = {p: of for p, of in others.items() if of}
    kinds = list(choices(dict.fromkeys(GRID, (0.0,)), inputs))
    chosen = [
        record
        for run, record in journal.found.items()
        if dataclasses.replace(run, rate=0.0) in kinds
    ]
    if not records:
        print("Nothing of this profile has been run yet.")
        return
    out.mkdir(parents=True, exist_ok=True)
    written = {
        args.page or out / f"glue_{args.profile}.md": page(records, chosen, args.profile, others),
        args.json or out / f"glue_{args.profile}.json": json.dumps(
            numbers(records, chosen, args.profile)
            | {
                "also": {p: numbers(of, [], p) for p, of in others.items()},
                "runs": [digest(record, journal.found) for record in journal.found.values()],
            },
            indent=1,
        )
        + "\n",
    }
    for path, content in written.items():
        path.write_text(content, encoding="utf-8")
    plots.save(draw(records), out / f"glue_{args.profile}.png")
    print(table(records))
    print(f"written: {', '.join(map(str, written))}, {out}/glue_{args.profile}.png")


if __name__ == "__main__":
    main()
