"""A finished run explained: laws where they hold, reasons where they do not."""

import jax
import numpy as np
import pytest

from lorajax import adapters, finetune, models, spectra, tasks
from lorajax.finetune import insight, recipes

CONFIG = models.ViTConfig(
    (8, 8), 4, width=16, depth=1, heads=2, classes=3, channels=1, mean=(0.5,), std=(0.25,)
)
TASK = tasks.Images.of(CONFIG)
STEPS = 24


@pytest.fixture(scope="module")
def run(model, table):
    """Plain descent on all samples from a small start, head and embeddings frozen."""
    ready = finetune.prepare(
        model, TASK, table, key=jax.random.key(0), rank=2, start="small", targets="**/mlp/*"
    )
    recipe = finetune.Recipe(
        STEPS, batch_size=60, optimizer="sgd", learning_rate=0.3, schedule="linear", warmup=4
    )
    wrt = adapters.trainable(ready.model)
    trainer = finetune.Trainer(ready.model, wrt, TASK, recipe)
    looks = finetune.Looks(tests=1, probes=12)
    found = finetune.run(trainer, table, table, looks=looks, gradients=ready.gradients)
    start, tuned = trainer.model(trainer.init()), trainer.model(found.state)
    explained = finetune.insights(start, tuned, found.history, recipe, ready.gradients)
    return explained, start, tuned, found.history, recipe, ready.gradients


def test_the_early_law_predicts_a_small_start(run):
    explained, start, _, history, recipe, gradients = run
    assert [each.path for each in explained] == ["blocks/0/mlp/down", "blocks/0/mlp/up"]
    looks = history["probe_step"]
    for i, each in enumerate(explained):
        measured = np.array(history["probes"]["singular_values"])[:, i]
        predicted = np.array(each.predicted)
        assert predicted.shape == measured.shape == (13, 2)
        # The start is in the law, and the update grows tenfold while it holds.
        np.testing.assert_allclose(predicted[0], measured[0], rtol=1e-4, atol=1e-9)
        assert measured[looks.index(each.agrees), 0] > 10 * measured[0, 0]
        # A law of rates that are a fifth larger is left much earlier.
        adapter = adapters.layers(start)[each.path].adapters["default"]
        rates = 1.2 * insight._rates(recipe)
        wrong = insight._early(gradients[each.path], adapter, rates, looks)
        assert insight._agrees(wrong, measured, looks) <= each.agrees / 2


def test_numbers_are_those_of_the_library(run):
    explained, start, tuned, history, _, gradients = run
    for i, each in enumerate(explained):
        first, end = (
            adapters.layers(m)[each.path].adapters["default"].factors for m in (start, tuned)
        )
        values = np.asarray(spectra.singular_values(end))
        np.testing.assert_allclose(each.learned, values, rtol=1e-4)
        np.testing.assert_allclose(each.used, spectra.effective_rank(values), rtol=1e-4)
        both = jax.tree.map(lambda x, y: np.stack([x, y]), first, end)
        np.testing.assert_allclose(each.drift, spectra.imbalance_drift(both), rtol=1e-2, atol=1e-6)
        np.testing.assert_allclose(
            each.gradient[0], np.linalg.norm(gradients[each.path].matrix, 2), rtol=1e-4
        )
        assert each.misalignment == pytest.approx(history["probes"]["misalignment"][-1][i])


def test_descent_conserves_what_the_regime_is_read_off(run):
    for each in run[0]:
        assert 0 < each.regime <= 1
        assert each.drift < 1e-2


def test_the_regime_of_a_single_mode_is_that_of_the_closed_form():
    """B = 0 and A along u: λ = a², so that K(0)/K(T) = a²/√(a⁴ + 4σ²)."""
    a, s = 0.5, 0.7
    grown = np.sqrt((np.sqrt(a**4 + 4 * s**2) + a**2) / 2)

    class Pair:
        scaling, rank, offset = 1.0, 1, None

        def __init__(self, left, right):
            self.factors = np.array([[left], [0.0]]), np.array([[right, 0.0]])

    found = insight._regime(Pair(a, 0.0), Pair(grown, s / grown))
    expected = a**2 / np.sqrt(a**4 + 4 * s**2)
    assert found["regime"] == pytest.approx(expected) == found["regime_law"]


@pytest.mark.parametrize("optimizer", recipes.OPTIMIZERS)
def test_a_law_is_of_plain_descent_alone(run, optimizer):
    recipe = finetune.Recipe(STEPS, optimizer=optimizer)
    assert bool(finetune.why_no_law(recipe)) == (optimizer != "sgd")
    if optimizer == "adam":
        _, start, tuned, history, _, gradients = run
        for each in finetune.insights(start, tuned, history, recipe, gradients):
            assert each.predicted is None and each.agrees is None


def test_momentum_and_clipping_are_named():
    for changes in ({"momentum": 0.9}, {"clip": 1.0}):
        assert finetune.why_no_law(finetune.Recipe(STEPS, optimizer="sgd", **changes))


def test_caveats_name_smoothing_and_augmentation():
    task = tasks.Images.of(CONFIG, smoothing=0.1, augment="flip")
    said = " ".join(finetune.caveats(finetune.Recipe(STEPS), task))
    assert "smooths classes by 0.1" in said and "augments" in said
    assert "smooths" not in " ".join(finetune.caveats(finetune.Recipe(STEPS), TASK))


def test_the_linearized_model_has_a_certified_optimum(run, model, table):
    tuned = run[2]
    found = finetune.linear_optimum(model, tuned, TASK, table, table, decay=0.03, samples=40)
    assert found["samples"] == 40 and found["converged"]
    assert found["lower_bound"] <= found["objective"] + 1e-6
    assert found["gap"] == pytest.approx(found["objective"] - found["lower_bound"], abs=1e-6)
    assert found["objective"] == pytest.approx(found["loss"] + 0.03 * found["nuclear"], rel=1e-4)
    # No update is below the bound, the trained one least of all.
    assert found["run_objective"] > found["objective"] > found["loss"]
    assert found["loss"] < found["run_loss"]


def test_the_linearized_model_sees_all_classes_of_sorted_data(run, model, table, monkeypatch):
    labels = np.asarray(table.columns["labels"])
    ordered = table.take(np.argsort(labels, kind="stable"))
    seen, made = [], adapters.linearized

    def linearized(frozen, inputs, targets, layers):
        seen.append(np.asarray(targets).argmax(-1))
        return made(frozen, inputs, targets, layers)

    monkeypatch.setattr(adapters, "linearized", linearized)
    options = {"decay": 0.03, "samples": len(table) // 2, "max_steps": 1}
    for seed in (0, 0, 1):
        finetune.linear_optimum(model, run[2], TASK, ordered, ordered, seed=seed, **options)
    for each in seen:
        assert len(each) == len(table) // 2 and {*each} == {*labels}
    assert (seen[0] == seen[2]).all() and (seen[0] != seen[4]).any()


def test_the_linearized_model_is_of_images():
    with pytest.raises(ValueError, match="task is NextToken"):
        finetune.check_linear(tasks.NextToken())
