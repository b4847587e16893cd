"""Ways to choose ranks against each other: at equal parameters, and at equal time."""

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from lorajax import data, sweeps
from lorajax.adapters import paths
from lorajax.adapters.surgery import Targets
from lorajax.environment import content, files
from lorajax.environment.judging import judged
from lorajax.finetune.allocations import METHODS, TRAINING, Signals, Spread, check_methods, spread
from lorajax.finetune.experiments import Run, interval, run_of
from lorajax.finetune.recipes import Recipe
from lorajax.initializers import PRNGKey
from lorajax.tasks import METRICS, Task


class Contestant(NamedTuple):
    """What one way to choose ranks came to.

    Attributes:
      scores: on the test set, one number a seed; larger is better.
      held_out: mean score on the held-out samples, by the rate that was tried.
      rate: multiple of the recipe's learning rate with the best of them.
      ranks: of the layers by path; for AdaLoRA the mean over seeds at the end of training.
      parameters: of the adapters at the end of training, one number a seed.
      trained: of the adapters while they train; more than that for AdaLoRA, which prunes.
      filled: of them, those of directions that the method had not found above noise.
      steps: of training.
      choosing: what choosing ranks took before training, in forward passes of one sample.
      training: what training took, likewise.
    """

    scores: Float[np.ndarray, " seeds"]
    held_out: dict[float, float]
    rate: float
    ranks: dict[str, float]
    parameters: Float[np.ndarray, " seeds"]
    trained: int
    filled: int
    steps: int
    choosing: float
    training: float


class Verdict(NamedTuple):
    """How one contestant compares with another.

    Attributes:
      mean: of the differences of their scores, paired by seed.
      half: of the 95 % interval of this mean.
      said: "better", "worse", or "not told apart" where the interval has 0 in it.
    """

    mean: float
    half: float
    said: str


@judged
def verdict(scores: Any, others: Any, level: float = 0.95) -> Verdict:
    """Whether scores are better than others, seed by seed.

    Args:
      scores: one number a seed, larger is better; two at least.
      others: of the same seeds.
      level: of the interval.

    Returns:
      A Verdict. One of 20 pairs that do not differ is told apart by chance, at a level of 95 %.

    Raises:
      ValueError: for other numbers of seeds, and as `interval`.

    Example:
      >>> from lorajax.finetune import contest
      >>> contest.verdict([0.8, 0.9, 0.85], [0.7, 0.8, 0.76]).said
      'better'
    """
    x, y = (np.asarray(each, np.float64).ravel() for each in (scores, others))
    if x.shape != y.shape:
        raise ValueError(f"scores are of {len(x)} seeds and others of {len(y)}; they are paired.")
    mean, half = interval(x - y, level)
    said = "better" if mean > half else "worse" if mean < -half else "not told apart"
    return Verdict(mean, half, said)


class _Group(NamedTuple):
    """Methods that one program trains: of one start, and of equally many steps."""

    names: tuple[str, ...]
    steps: int


@judged
@dataclasses.dataclass(frozen=True, eq=False)
class Contest:
    """Trains adapters of one budget whose ranks come from different places.

    The budget is what the same rank `uniform` in every layer costs, and all spend it to the last
    parameter (`allocations.spread`); AdaLoRA, whose ranks are known at the end only, to less than
    one direction. Each takes the learning rate that serves it best on the held-out samples, in
    orders that are not measured afterwards, and all train the heads in full. Ranks are chosen once;
    seeds differ in starts and in the order of the samples, and pairs of one seed share both where
    they can.

    Attributes:
      model: a pretrained model with a fitted head, in evaluation mode.
      task: what a batch means to it.
      train: what to train on, and to choose ranks on.
      held_out: what learning rates are chosen on.
      test: what is reported.
      recipe: how to train; AdaLoRA takes Adam instead of LoRA+.
      key: of the starts.
      whole: the recipe of full fine-tuning; `recipe` with AdamW if None.
      metric: a name of `tasks.METRICS`; or "loss", of which the score is the negative.
      uniform: the rank that sets the budget.
      seeds: starts and orders of the samples that are measured.
      tries: others of them that learning rates are chosen by.
      rates: multiples of the recipe's learning rate to choose from; for all, or by kind ("lora",
        "adalora", "full").
      methods: names among `allocations.METHODS`.
      targets: layers to adapt.
      heads: path patterns of what trains in full.
      samples: that gradients and input moments are averaged over.
      at_once: samples that are measured at a time.
      bucket: lanes of one call; one at a time on a CPU if None.
      store: folder of what has been trained, to go on from; None keeps nothing.
      settings: what else determines the results, for the store.
      progress: called with the name of a sweep and its Progress, as it goes.

    Raises:
      ValueError: for an unknown method or metric, rates that lack a kind, or fewer than one seed.
    """

    model: Any
    task: Task
    train: data.Table
    held_out: data.Table
    test: data.Table
    recipe: Recipe
    _: dataclasses.KW_ONLY
    key: PRNGKey
    whole: Recipe | None = None
    metric: str = "accuracy"
    uniform: int = 3
    seeds: int = 5
    tries: int = 1
    rates: Sequence[float] | Mapping[str, Sequence[float]] = (0.3, 1.0, 3.0)
    methods: Sequence[str] = ("rule", "uniform", "EVA", "AdaLoRA")
    targets: Targets = "blocks/**"
    heads: tuple[str, ...] = ("head",)
    samples: int = 2048
    at_once: int = 250
    bucket: int | None = None
    store: str | os.PathLike[str] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    progress: Callable[[str, sweeps.Progress], None] | None = None

    def __post_init__(self):
        check_methods(self.methods)
        if self.metric not in (*METRICS, "loss"):
            known = ", ".join((*METRICS, "loss"))
            raise ValueError(f"metric is {self.metric!r}; it must be one of {known}.")
        for name in ("seeds", "tries", "uniform"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in self.methods:
            if not len(self._rates(METHODS[name].kind)):
                raise ValueError(f"rates name none for {METHODS[name].kind!r}, of {name!r}.")

    def _rates(self, kind: str) -> Sequence[float]:
        return self.rates.get(kind, ()) if isinstance(self.rates, Mapping) else self.rates

    @functools.cached_property
    def signals(self) -> Signals:
        """What the methods look at."""
        return Signals(self.model, self.task, self.train, self.targets, self.samples)

    @property
    def budget(self) -> int:
        """Parameters that each method's adapters have."""
        return self.uniform * sum(self.signals.costs.values())

    @functools.cached_property
    def spreads(self) -> dict[str, Spread]:
        """What each method makes of the budget."""
        found = {}
        for name in self.methods:
            method = METHODS[name]
            if method.worth is not None:
                share, costs = int(method.share * self.budget), self.signals.costs
                exact = method.share == 1
                found[name] = spread(*method.worth(self.signals), costs, share, exact=exact)
        return found

    def at_equal_parameters(self) -> dict[str, Contestant]:
        """Every method trains for the recipe's steps.

        Returns:
          A Contestant by method.

        Raises:
          ValueError: as `run_of`, and for a store of another contest.
        """
        return dict(self._even)

    @functools.cached_property
    def _even(self) -> dict[str, Contestant]:
        return self._measured({name: self.recipe.steps for name in self.methods}, "steps")

    def at_equal_time(self) -> dict[str, Contestant]:
        """Every method has as many passes as `uniform` in the recipe's steps, choosing included.

        Passes are counted as `allocations.Method` and `TRAINING` say, in forward passes of one
        sample. Learning rates are those of `at_equal_parameters`, and so are the runs of methods
        that have all of the recipe's steps.

        Returns:
          A Contestant by method, of those that have the whole budget.

        Raises:
          ValueError: as `at_equal_parameters`, and where choosing takes the time of all training.
        """
        whole = [name for name in self.methods if METHODS[name].share == 1]
        steps = {name: self._affordable(name) for name in whole}
        fewer = {name: n for name, n in steps.items() if n != self.recipe.steps}
        found = self._even | self._measured(fewer, "time")
        return {name: found[name] for name in whole}

    def _choosing(self, name: str) -> float:
        passes = METHODS[name].passes
        return passes * self.signals.samples if passes else 0.0

    def _affordable(self, name: str) -> int:
        batch = self.recipe.batch_size
        left = self.recipe.steps * batch * TRAINING["lora"] - self._choosing(name)
        steps = math.floor(left / (batch * TRAINING[METHODS[name].kind]))
        if steps < 1:
            raise ValueError(
                f"choosing ranks by {name!r} on {self.signals.samples} samples takes as long as "
                f"all {self.recipe.steps} steps of training; give fewer samples, or more steps."
            )
        return steps

    def _groups(self, steps: Mapping[str, int]) -> list[_Group]:
        """Methods by kind, start and steps: those that agree in all are lanes of one program."""
        groups: dict[Any, list[str]] = {}
        for name, count in steps.items():
            method = METHODS[name]
            groups.setdefault((method.kind, method.start, count), []).append(name)
        return [_Group(tuple(names), key[2]) for key, names in groups.items()]

    def _recipe(self, kind: str, steps: int) -> Recipe:
        recipe = self.recipe
        if kind == "full":
            plain = {"optimizer": "adamw", "beside": 1.0}
            recipe = self.whole or dataclasses.replace(recipe, **plain)
        elif kind == "adalora" and recipe.optimizer == "lora-plus":
            recipe = dataclasses.replace(recipe, optimizer="adam")
        warmup = recipe.warmup * steps // recipe.steps
        return dataclasses.replace(recipe, steps=steps, warmup=warmup)

    @functools.cached_property
    def _run(self) -> Callable[[_Group], Run]:
        # On the object: a cache of the class would hold every contest's model for good.
        return functools.cache(self._made)

    def _made(self, group: _Group) -> Run:
        method = METHODS[group.names[0]]
        options: dict[str, Any] = {"targets": None, "heads": ()}
        if method.kind != "full":
            several = [self.spreads[name].ranks for name in group.names]
            named = {paths.escape(path): rank for path, rank in several[0].items() if rank}
            options = {"heads": self.heads, "start": method.start, "targets": named}
            if len(several) > 1:
                options |= {"allocations": several, "targets": ()}
            if "moments" in method.needs:
                options["inputs"] = self.signals.moments
            elif method.start != "orthogonal" and method.needs:
                options["gradients"] = self.signals.gradients
        if method.kind == "adalora":
            wide = math.ceil(1.5 * self.uniform)
            options["targets"] = dict.fromkeys(map(paths.escape, self.signals.costs), wide)
            options["final_parameters"] = self.budget
        return run_of(
            self.model,
            self.task,
            self.train,
            self._recipe(method.kind, group.steps),
            test={"held_out": self.held_out, "test": self.test},
            every=0,
            orders=self.seeds + self.tries,
            predicting=self.metric not in ("accuracy", "loss"),
            at_once=self.at_once,
            **options,
        )

    def _swept(self, group: _Group, axes: dict[str, Any], name: str) -> Any:
        """The lanes of a group, trained or read from the store."""
        lone = jax.default_backend() == "cpu"
        bucket = self.bucket or (1 if lone else None)
        given: dict[str, Any] = {"bucket": bucket, "chunk": bucket}
        if self.store is not None:
            where = Path(self.store) / f"{name}.zarr"
            given |= {"store": where, "settings": self._settings(group)}
            clock = _Clock(Path(self.store) / "seconds.json")

            def report(progress: sweeps.Progress) -> None:
                clock(name, progress)
                if self.progress is not None:
                    self.progress(name, progress)

            given["progress"] = report
        return sweeps.sweep(self._run(group), axes, key=self.key, fold=("order",), **given)

    @functools.cached_property
    def _content(self) -> str:
        """Of the weights and of what is trained and measured on."""
        tables = [getattr(self, name) for name in ("train", "held_out", "test")]
        columns = [{name: np.asarray(c[:]) for name, c in x.columns.items()} for x in tables]
        return content.digest((nnx.state(self.model), columns))

    def _settings(self, group: _Group) -> dict[str, Any]:
        """What determines a group's results, as JSON."""
        made = {name: self.spreads[name].ranks for name in group.names if name in self.spreads}
        recipe = self._recipe(METHODS[group.names[0]].kind, group.steps)
        sizes = {name: len(getattr(self, name)) for name in ("train", "held_out", "test")}
        return {
            **self.settings,
            "methods": group.names,
            "ranks": made,
            "recipe": dataclasses.asdict(recipe),
            "samples": sizes,
            "content": self._content,
            "budget": self.budget,
            "heads": self.heads,
        }

    def _scores(self, swept: Any, table: str) -> np.ndarray:
        """Larger is better."""
        if self.metric in ("accuracy", "loss"):
            values = np.asarray(swept[f"{table}_{self.metric}"].values, np.float64)
            return -values if self.metric == "loss" else values
        answers = self._answers(table)
        measure = METRICS[self.metric]
        predictions = swept[f"{table}_predictions"].values
        return np.apply_along_axis(lambda x: measure(x, answers), -1, predictions)

    @functools.cached_property
    def _answers(self) -> Callable[[str], np.ndarray]:
        return functools.cache(self._told)

    def _told(self, table: str) -> np.ndarray:
        """The right answers, as the task tells them; the model itself is not run for that."""
        task: Any = self.task

        @jax.jit
        def told(batch: Any) -> Any:
            return task.predictions(self.model, task.prepare(batch))[1]

        whole = getattr(self, table)
        pairs = data.batches(whole, min(self.at_once, len(whole)))
        return np.concatenate([np.asarray(told(batch))[weights > 0] for batch, weights in pairs])

    @functools.cached_property
    def _chosen(self) -> dict[str, dict[float, float]]:
        """Mean held-out score by rate, of each method."""
        found = {}
        for group in self._groups({name: self.recipe.steps for name in self.methods}):
            rates = self._rates(METHODS[group.names[0]].kind)
            many = {"allocation": range(len(group.names))} if len(group.names) > 1 else {}
            axes = {
                **many,
                "rate": np.asarray(rates, np.float32),
                "order": range(self.seeds, self.seeds + self.tries),
            }
            swept = self._swept(group, axes, f"rates-{'+'.join(group.names)}")
            scores = self._scores(swept, "held_out")
            means = scores.reshape(len(group.names), len(rates), -1).mean(axis=-1)
            for name, row in zip(group.names, means, strict=True):
                found[name] = dict(zip(map(float, rates), row.tolist(), strict=True))
        return found

    def _measured(self, steps: Mapping[str, int], label: str) -> dict[str, Contestant]:
        """Methods at their best rates, for so many steps each."""
        found: dict[str, Contestant] = {}
        for group in self._groups(steps):
            best = [_best(self._chosen[name]) for name in group.names]
            lanes: dict[str, Any] = {"rate": np.asarray(best, np.float32)}
            if len(group.names) > 1:
                lanes["allocation"] = range(len(group.names))
            axes = {"method": lanes, "order": range(self.seeds)}
            swept = self._swept(group, axes, f"{label}-{'+'.join(group.names)}")
            for i, name in enumerate(group.names):
                found[name] = self._contestant(name, swept.isel(method=i), group.steps)
        return {name: found[name] for name in steps}

    def _contestant(self, name: str, lane: Any, steps: int) -> Contestant:
        tried = self._chosen[name]
        kind, costs = METHODS[name].kind, self.signals.costs
        made = self.spreads.get(name, Spread({}, 0, 0))
        ranks: dict[str, float] = {path: float(rank) for path, rank in made.ranks.items()}
        parameters = np.full(self.seeds, float(made.parameters))
        trained = made.parameters
        if kind == "adalora":
            # The order in which the run reports them is the model's, and so is that of the costs.
            alive = np.asarray(lane["ranks"].values, np.float64)
            ranks = dict(zip(costs, alive.mean(axis=0).tolist(), strict=True))
            each = np.array([cost + 1 for cost in costs.values()])
            parameters = alive @ each
            trained = math.ceil(1.5 * self.uniform) * int(each.sum())
        return Contestant(
            scores=self._scores(lane, "test"),
            held_out=tried,
            rate=_best(tried),
            ranks=ranks,
            parameters=parameters,
            trained=trained,
            filled=made.filled,
            steps=steps,
            choosing=self._choosing(name),
            training=steps * self.recipe.batch_size * TRAINING[kind],
        )


def _best(tried: Mapping[float, float]) -> float:
    """The rate with the best score; one that diverged has none."""
    return max(tried, key=lambda rate: tried[rate] if np.isfinite(tried[rate]) else -np.inf)


class _Clock:
    """Adds up the processor seconds of a sweep in a file, over all runs that went on with it."""

    def __init__(self, path: Path):
        self.path = path
        self.last = time.process_time()

    def __call__(self, name: str, progress: sweeps.Progress) -> None:
        now = time.process_time()
        spent, self.last = now - self.last, now
        if progress.done > progress.resumed:
            known = seconds(self.path.parent)
            known[name] = (progress.done, known.get(name, (0, 0.0))[1] + spent)
            files.write(self.path, json.dumps(known, indent=1))


@judged
def seconds(store: str | os.PathLike[str]) -> dict[str, tuple[int, float]]:
    """Lanes and processor seconds of a contest's sweeps, by name, as its store tells them.

    Args:
      store: folder that a Contest wrote to.

    Returns:
      By the name of the sweep; empty where nothing has been trained.
    """
    path = Path(store) / "seconds.json"
    if not path.exists():
        return {}
    return {name: tuple(each) for name, each in json.loads(path.read_text("utf-8")).items()}
