"""Ways to choose ranks have equal budgets, the same seeds and one judge."""

import dataclasses
import functools
import inspect
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from lorajax import adapters, data, finetune, models, tasks
from lorajax.finetune import allocations
from lorajax.finetune.contest import Contest, seconds, verdict

CONFIG = models.ViTConfig(
    (8, 8), 4, width=16, depth=1, heads=2, classes=3, channels=1, mean=(0.5,), std=(0.25,)
)
TASK = tasks.Images.of(CONFIG)
KEY = jax.random.key(5)


def _cost(ranks, costs):
    return sum(rank * costs[path] for path, rank in ranks.items())


def test_budgets_are_spent_to_the_last_parameter_by_the_least_change():
    rng = np.random.default_rng(0)
    # Costs of a Llama's layers, a BERT's and a ViT's, with spectra that fall at different rates.
    for kinds in ((1152, 768, 2112), (768, 1920), (128, 320, 320)):
        costs = {f"{i}": kinds[i % len(kinds)] for i in range(12)}
        for _ in range(20):
            worth = {
                path: np.sort(rng.exponential(rng.exponential(), 16) ** 2)[::-1] for path in costs
            }
            found = {path: int(rng.integers(0, 17)) for path in costs}
            budget = 4 * sum(costs.values())
            made = allocations.spread(worth, found, costs, budget)
            assert made.parameters == budget == _cost(made.ranks, costs)
            assert all(0 <= rank <= 16 for rank in made.ranks.values())
            loose = allocations.spread(worth, found, costs, budget, exact=False)
            moved = sum(abs(made.ranks[p] - loose.ranks[p]) * costs[p] for p in costs)
            assert 0 <= budget - loose.parameters < max(kinds)
            assert moved <= 2 * math.lcm(*kinds)
            beyond = {p: max(0, r - found[p]) for p, r in made.ranks.items()}
            assert made.filled == _cost(beyond, costs)


def test_the_least_change_is_the_least_one():
    costs = {"a": 2, "b": 3, "c": 7}
    worth = {path: np.arange(3.0, 0, -1) for path in costs}
    loose = allocations.spread(worth, dict.fromkeys(costs, 3), costs, 20, exact=False)
    made = allocations.spread(worth, dict.fromkeys(costs, 3), costs, 20)
    moved = sum(abs(made.ranks[p] - loose.ranks[p]) * costs[p] for p in costs)
    every = [
        (a, b, c)
        for a in range(4)
        for b in range(4)
        for c in range(4)
        if 2 * a + 3 * b + 7 * c == 20
    ]
    least = min(
        sum(abs(r - loose.ranks[p]) * costs[p] for p, r in zip(costs, ranks, strict=True))
        for ranks in every
    )
    assert moved == least > 0


def test_budgets_that_no_ranks_spend_are_refused():
    worth = {"a": np.ones(2), "b": np.ones(2)}
    found = {"a": 2, "b": 2}
    with pytest.raises(ValueError, match="leaves 3 parameters over that no ranks spend"):
        allocations.spread(worth, found, {"a": 4, "b": 6}, 11)
    with pytest.raises(ValueError, match="all directions of all layers take 20"):
        allocations.spread(worth, found, {"a": 4, "b": 6}, 21)


def test_what_stands_above_noise_comes_before_what_does_not():
    worth = {"a": np.array([9.0, 8.0]), "b": np.array([1.0, 0.5])}
    made = allocations.spread(worth, {"a": 0, "b": 2}, {"a": 2, "b": 2}, 6)
    assert made.ranks == {"a": 1, "b": 2} and made.filled == 2


def test_verdicts_pair_by_seed_and_tell_apart_what_differs():
    rng = np.random.default_rng(1)
    hard = 0.1 * rng.standard_normal(8)  # what a seed does to all methods alike
    mine, others = 0.8 + hard, 0.78 + hard + 1e-3 * rng.standard_normal(8)
    assert verdict(mine, others).said == "better" and verdict(others, mine).said == "worse"
    assert abs(verdict(mine, others).mean - 0.02) < 0.005
    # The same numbers in another order of seeds are no pairs, and tell nothing.
    assert verdict(mine, np.roll(others, 3)).said == "not told apart"
    assert verdict(mine, mine).said == "not told apart"
    with pytest.raises(ValueError, match="they are paired"):
        verdict(mine, others[:-1])


def test_verdicts_of_equal_methods_are_wrong_as_often_as_they_say():
    rng = np.random.default_rng(2)
    said = [verdict(*rng.standard_normal((2, 5))).said for _ in range(2000)]
    apart = sum(each != "not told apart" for each in said)
    assert abs(apart - 100) < 4 * 10  # four standard deviations of 5 % of 2000


@pytest.fixture
def contest(model, table):
    recipe = finetune.Recipe(steps=6, batch_size=8, optimizer="lora-plus", learning_rate=1e-2)

    def make(**changes):
        given = dict(
            key=KEY, uniform=2, seeds=2, rates=(0.5, 1.0), samples=16,
            methods=tuple(allocations.METHODS),
        )  # fmt: skip
        return Contest(model, TASK, table, table, table, recipe, **(given | changes))

    return make


@pytest.mark.slow
@pytest.mark.apart
def test_all_methods_have_exactly_one_budget(contest):
    run = contest()
    budget = run.budget
    assert budget == 2 * (4 * 32 + 2 * 80)
    for name, made in run.spreads.items():
        if name == "starved":
            assert made.parameters <= budget // 10
        else:
            assert made.parameters == budget == _cost(made.ranks, run.signals.costs)
    assert set(run.spreads["uniform"].ranks.values()) == {2}
    found = run.at_equal_parameters()
    assert tuple(found) == tuple(allocations.METHODS)
    for name, each in found.items():
        assert each.scores.shape == (2,) and np.all((each.scores >= 0) & (each.scores <= 1))
        assert set(each.held_out) == {0.5, 1.0} and each.rate in each.held_out
        if name == "AdaLoRA":
            # What is left over would not pay for the next direction, with its singular value.
            assert np.all((budget - each.parameters >= 0) & (budget - each.parameters < 81))
            assert each.trained == 3 * (4 * 33 + 2 * 81)
        elif name not in ("full", "starved"):
            assert each.parameters.tolist() == [budget, budget]
    assert found["full"].parameters.tolist() == [0, 0] and found["full"].ranks == {}


@pytest.mark.slow
@pytest.mark.apart
def test_what_is_trained_has_the_parameters_that_are_said(contest, model):
    run = contest(methods=("rule", "GoRA", "LoRA-GA"))
    for name in run.methods:
        method, made = allocations.METHODS[name], run.spreads[name]
        taken = {path: rank for path, rank in made.ranks.items() if rank}
        adapted = finetune.adapt(
            model, taken, key=KEY, start=method.start, gradients=run.signals.gradients
        )
        trainer = finetune.Trainer(adapted, adapters.trainable(adapted), TASK, run.recipe)
        assert trainer.parameters == run.budget


# What the ways do does not depend on how many layers there are.
FEW = "**/mlp/*"


@pytest.mark.slow
@pytest.mark.apart
def test_equal_time_counts_what_choosing_took(contest):
    run = contest(methods=("uniform", "rule", "EVA", "full"), targets=FEW)
    even, timed = run.at_equal_parameters(), run.at_equal_time()
    samples = run.signals.samples
    assert samples == 16
    whole = 6 * 8 * 2.0
    for name, each in timed.items():
        method = allocations.METHODS[name]
        a_step = 8 * allocations.TRAINING[method.kind]
        assert each.choosing == method.passes * samples
        assert whole - a_step < each.choosing + each.training <= whole
        assert each.rate == even[name].rate
    assert [timed[name].steps for name in ("uniform", "rule", "EVA", "full")] == [6, 3, 5, 4]
    assert timed["uniform"].scores.tolist() == even["uniform"].scores.tolist()
    with pytest.raises(ValueError, match="choosing ranks by 'signs' on 32 samples takes as long"):
        contest(methods=("uniform", "signs"), samples=32, targets=FEW).at_equal_time()


@pytest.mark.slow
@pytest.mark.apart
def test_a_contest_goes_on_where_it_was(contest, tmp_path):
    """Half of it, then all of it, equals all at once; nothing is trained twice."""
    methods = ("uniform", "rule")
    contest = functools.partial(contest, targets=FEW)
    seen = []

    def stop(name, progress):
        seen.append(name)
        if name.startswith("steps") and progress.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        contest(methods=methods, store=tmp_path, bucket=1, progress=stop).at_equal_parameters()
    before = seconds(tmp_path)
    assert before["rates-uniform+rule"][0] == 4 and before["steps-uniform+rule"][0] == 1
    done = []

    def note(name, progress):
        done.append((name, progress.resumed, progress.done))

    resumed = contest(methods=methods, store=tmp_path, bucket=1, progress=note)
    found = resumed.at_equal_parameters()
    assert ("rates-uniform+rule", 4, 4) in done and ("steps-uniform+rule", 1, 1) in done
    alone = contest(methods=methods, bucket=1).at_equal_parameters()
    for name in methods:
        assert found[name].scores.tolist() == alone[name].scores.tolist()
        assert found[name].held_out == alone[name].held_out
    after = seconds(tmp_path)
    assert after["rates-uniform+rule"] == before["rates-uniform+rule"]
    assert after["steps-uniform+rule"][0] == 4
    json.loads((tmp_path / "seconds.json").read_text())
    # Other ranks are another contest, and so are other samples, of which there are as many.
    mine = resumed.train
    other = data.Table({**mine.columns, "labels": np.roll(mine.labels, 1)})
    for changes in ({"uniform": 3}, {"train": other}):
        with pytest.raises(ValueError, match="another|differ"):
            dataclasses.replace(resumed, progress=None, **changes).at_equal_parameters()


@pytest.mark.slow
def test_scores_are_those_of_the_metric(contest, monkeypatch):
    """By predictions for what GLUE reports; the negative of the loss where that is asked for."""
    monkeypatch.setitem(tasks.METRICS, "share of right ones", tasks.METRICS["accuracy"])
    plain, predicted, loss = (
        contest(
            methods=("uniform",), rates=(1.0,), metric=metric, targets=FEW
        ).at_equal_parameters()["uniform"]
        for metric in ("accuracy", "share of right ones", "loss")
    )
    np.testing.assert_allclose(predicted.scores, plain.scores, atol=1e-6)
    np.testing.assert_allclose(list(predicted.held_out.values()), list(plain.held_out.values()))
    assert np.all((loss.scores < 0) & (loss.scores > -3 * np.log(3)))


@pytest.mark.slow
def test_passes_are_counted_as_the_compiler_counts_operations():
    """A step of adapters and one of full fine-tuning against a forward pass, on a real ViT."""
    model = models.load("vit-fashion-mnist")
    task = tasks.Images.of(model.config)
    batch = data.load("mnist-sample").train[np.arange(8)]
    recipe = finetune.Recipe(steps=2, batch_size=8, optimizer="sgd", learning_rate=1e-2)

    def operations(model, wrt):
        trainer = finetune.Trainer(model, wrt, task, recipe)
        state = trainer.init()
        step = jax.jit(trainer.advance).lower(state, trainer.frozen, batch)
        weights = np.ones(8, np.float32)
        look = jax.jit(trainer.sums).lower(state, trainer.frozen, batch, weights)
        return [each.cost_analysis()["flops"] for each in (step, look)]

    adapted = finetune.adapt(model, "blocks/**", key=KEY, rank=1, start="orthogonal")
    step, _ = operations(adapted, adapters.trainable(adapted))
    whole, look = operations(model, nnx.Param)
    assert step / look == pytest.approx(allocations.TRAINING["lora"], rel=0.15)
    assert whole / look == pytest.approx(allocations.TRAINING["full"], rel=0.15)


def test_bad_options_are_refused(contest):
    with pytest.raises(ValueError, match="methods name 'best'"):
        contest(methods=("best",))
    with pytest.raises(ValueError, match="metric is 'speed'"):
        contest(metric="speed")
    with pytest.raises(ValueError, match="rates name none for 'full'"):
        contest(rates={"lora": (1.0,), "adalora": (1.0,)})
    with pytest.raises(ValueError, match="seeds is 0"):
        contest(seeds=0)


def test_the_fields_of_a_contest_are_all_explained():
    text = inspect.getdoc(Contest) or ""  # Python 3.13 takes the indentation away by itself
    for field in dataclasses.fields(Contest):
        assert f"\n  {field.name}: " in text, field.name
