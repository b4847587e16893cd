"""Fine-tuning: steps, resumption, many adapters at once, and probes."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorajax import adapters, data, finetune, initializers, models, spectra, sweeps, tasks
from lorajax.finetune import checkpoints, probes

CONFIG = models.ViTConfig(
    (8, 8), 4, width=16, depth=2, heads=2, classes=3, channels=1, mean=(0.5,), std=(0.25,)
)
RECIPE = finetune.Recipe(
    steps=12, batch_size=8, optimizer="adam", learning_rate=1e-2, schedule="constant"
)
TARGETS = "**/attention/*"
TASK = tasks.Images.of(CONFIG)


def adapted_trainer(model, recipe=RECIPE, task=TASK, **options):
    adapted = adapters.adapt(model, TARGETS, key=jax.random.key(1), rank=2, **options)
    return finetune.Trainer(adapted, adapters.trainable(adapted, heads="head"), task, recipe)


class TestTraining:
    def test_smoothing_changes_what_is_trained_on_and_not_what_is_reported(self, model, table):
        plain = adapted_trainer(model)
        smooth = adapted_trainer(model, task=dataclasses.replace(TASK, smoothing=0.3))
        batch = table[:8]
        (_, first), (_, second) = (each.step(each.init(), batch) for each in (plain, smooth))
        np.testing.assert_allclose(second.loss, first.loss, rtol=1e-6)
        assert abs(float(second.gradient_norm - first.gradient_norm)) > 1e-3

    def test_what_trains_beside_the_adapters_has_a_rate_of_its_own(self, model, table):
        def first_step(beside):
            recipe = dataclasses.replace(RECIPE, optimizer="sgd", beside=beside)
            trainer = adapted_trainer(model, recipe, start="small")
            state = trainer.init()
            before = jax.tree.map(np.asarray, state.params)
            after, _ = trainer.step(state, table[:8])
            return jax.tree.map(lambda a, b: np.linalg.norm(a - b), after.params, before)

        plain, fast = first_step(1.0), first_step(3.0)
        ratios = jax.tree.map(lambda a, b: float(a / b), fast, plain)
        for path, ratio in jax.tree_util.tree_leaves_with_path(ratios):
            expected = 3.0 if "head" in jax.tree_util.keystr(path) else 1.0
            assert ratio == pytest.approx(expected, rel=1e-3)

    def test_it_learns_and_leaves_the_base_alone(self, model, table, losses_of):
        before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
        recipe = finetune.Recipe(steps=150, batch_size=16, learning_rate=2e-2)
        adapted = adapters.adapt(model, "blocks/**", key=jax.random.key(1), rank=4)
        trainer = finetune.Trainer(adapted, adapters.trainable(adapted, heads="head"), TASK, recipe)
        state, losses = losses_of(trainer, table)
        assert losses[-5:].mean() < losses[:5].mean() / 2
        found = trainer.evaluate(state, table, batch_size=25)
        assert found.accuracy > 0.8  # chance is a third
        after = nnx.state(model, nnx.Param)
        jax.tree.map(np.testing.assert_array_equal, before, after)
        # The model that comes out computes what the trainer evaluates.
        tuned = trainer.model(state)
        tuned.eval()
        x = models.normalize(table.columns["images"], CONFIG.mean, CONFIG.std, channels=1)
        hits = (
            nnx.jit(lambda m, x: m(x))(tuned, x).argmax(-1).astype(jnp.int32)
            == table.columns["labels"]
        )
        assert float(hits.mean()) == pytest.approx(float(found.accuracy), abs=1e-6)

    def test_a_step_is_plain_gradient_descent(self, model, table):
        recipe = finetune.Recipe(
            steps=1, batch_size=60, optimizer="sgd", learning_rate=0.1, schedule="constant"
        )
        trainer = adapted_trainer(model, recipe)
        adapted = trainer.model(trainer.init())
        filter_ = adapters.trainable(adapted, heads="head")

        def loss(model):
            x = models.normalize(table.columns["images"], CONFIG.mean, CONFIG.std, channels=1)
            return optax.softmax_cross_entropy_with_integer_labels(
                model(x), table.columns["labels"]
            ).mean()

        value, gradient = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, filter_)))(
            adapted
        )
        before = nnx.state(adapted, filter_)
        expected = jax.tree.map(lambda p, g: p - jnp.float32(0.1) * g, before, gradient)
        state, metrics = trainer.step(trainer.init(), table[:])
        assert float(metrics.loss) == pytest.approx(float(value), rel=1e-6)
        assert float(metrics.gradient_norm) == pytest.approx(
            float(optax.tree.norm(gradient)), rel=1e-5
        )
        found = nnx.state(trainer.model(state), filter_)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)

    def test_one_program_serves_all_steps(self, model, table, traces):
        trainer = adapted_trainer(model)
        state = finetune.fit(trainer, table, until=2)
        with traces() as names:
            finetune.fit(trainer, table, state=state)
        assert names == []

    def test_only_what_trains_has_optimizer_state(self, model):
        trainer = adapted_trainer(model)
        state = trainer.init()
        entries = 2 * CONFIG.depth * 4 * 2 * 16 + 16 * 3 + 3
        assert trainer.parameters == entries
        moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
        assert moments == 2 * entries

    def test_full_training_moves_every_parameter(self, model, table):
        recipe = finetune.Recipe(steps=2, batch_size=8, learning_rate=1e-2, weight_decay=0.1)
        trainer = finetune.Trainer(model, nnx.Param, TASK, recipe)
        state = finetune.fit(trainer, table)
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), trainer.init().params, state.params)
        assert all(jax.tree.leaves(moved))

    def test_muon_moves_matrices_alike_in_all_directions(self, model, table):
        """The first step: matrices by a nearly orthogonal one, vectors as Nesterov's Adam."""
        changes = {"optimizer": "muon", "schedule": "constant", "learning_rate": 1e-3}
        recipe = finetune.Recipe(steps=1, batch_size=8, **changes)
        trainer = finetune.Trainer(model, nnx.Param, TASK, recipe)
        before = trainer.init().params
        after = finetune.fit(trainer, table).params
        moved = jax.tree.map(lambda a, b: np.asarray(a - b), after, before)
        block = moved["blocks"][0]
        for layer in (block["attention"]["value"], block["mlp"]["up"], moved["head"]):
            step = layer["kernel"][...]
            size = 0.2 * max(step.shape) ** 0.5 * recipe.learning_rate
            values = np.linalg.svd(step, compute_uv=False) / size
            # Five steps of Newton and Schulz leave singular values between 0.7 and 1.2 (stated by
            # Jordan 2024); those that are next to nothing in the gradient are not brought up.
            assert values[0] < 1.3 and np.median(values) > 0.6
        bias = moved["head"]["bias"][...]
        # Nesterov's first step of Adam (derived): 0.9·0.1/(1 − 0.9²) + 0.1/(1 − 0.9) of the sign.
        np.testing.assert_allclose(np.abs(bias), (1 + 0.09 / 0.19) * 1e-3, rtol=1e-3)
        decayed = dataclasses.replace(recipe, weight_decay=0.1)
        trainer = finetune.Trainer(model, nnx.Param, TASK, decayed)
        other = finetune.fit(trainer, table).params
        kernel = before["head"]["kernel"][...]
        shrunk = after["head"]["kernel"][...] - other["head"]["kernel"][...]
        np.testing.assert_allclose(shrunk, 1e-3 * 0.1 * kernel, atol=1e-7)

    def test_batch_statistics_and_dropout_follow_along(self, table):
        config = models.VGGConfig(
            (1, 1),
            (4, 4),
            batch_norm=True,
            hidden=8,
            grid=1,
            classes=3,
            channels=1,
            mean=(0.5,),
            std=(0.5,),
        )
        model = models.build(config, rngs=nnx.Rngs(0))
        trainer = finetune.Trainer(model, nnx.Param, tasks.Images.of(config), RECIPE)
        state = finetune.fit(trainer, table)
        tuned = trainer.model(state)
        assert float(jnp.abs(tuned.norms[0].mean[...]).max()) > 0
        assert not np.array_equal(tuned.norms[0].mean[...], model.norms[0].mean[...])
        counts = [int(x) for x in jax.tree.leaves(nnx.state(tuned, nnx.RngCount))]
        assert max(counts) >= RECIPE.steps

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"steps": 0}, "steps is 0"),
            ({"learning_rate": -1.0}, "learning_rate is -1"),
            ({"warmup": 12}, "warmup is 12"),
            ({"learning_rate": float("nan")}, "learning_rate is nan"),
            ({"steps": 2**31}, "steps is 2147483648"),
            ({"beside": 0.0}, "beside is 0"),
            ({"optimizer": "lion"}, "must be one of adamw, adam, sgd, muon, lora-plus"),
            ({"schedule": "wave"}, "must be one of constant, linear, cosine"),
            ({"optimizer": "sgd", "weight_decay": 0.1}, "weight_decay is 0.1"),
        ],
    )
    def test_recipes_are_checked(self, changes, message):
        with pytest.raises(ValueError, match=message):
            finetune.Recipe(**{"steps": 12} | changes)

    def test_schedules(self):
        for schedule, end in (("constant", 1e-3), ("linear", 0.0), ("cosine", 0.0)):
            recipe = finetune.Recipe(steps=20, warmup=5, schedule=schedule, learning_rate=1e-3)
            rate = recipe.rate()
            assert float(rate(0)) == 0
            assert float(rate(5)) == pytest.approx(1e-3)
            assert float(rate(20)) == pytest.approx(end, abs=1e-12)

    def test_nothing_to_train(self, model):
        with pytest.raises(ValueError, match="nothing would train"):
            finetune.Trainer(model, nnx.LoRAParam, TASK, RECIPE)


class TestResumption:
    @pytest.mark.parametrize("cut", [pytest.param(1, marks=pytest.mark.apart), 7])
    def test_an_interrupted_run_takes_the_same_steps(self, model, table, tmp_path, cut, losses_of):
        recipe = finetune.Recipe(steps=10, batch_size=7, learning_rate=1e-2)
        task = dataclasses.replace(TASK, augment="crop-flip")
        options = {"dropout": 0.3}

        def trainer():
            adapted = adapters.adapt(
                model, TARGETS, key=jax.random.key(1), rank=2, start="small", **options
            )
            adapted.train()
            return finetune.Trainer(adapted, adapters.trainable(adapted), task, recipe)

        whole, losses = losses_of(trainer(), table)
        settings = {"seed": 0, "targets": TARGETS}
        with checkpoints.Checkpoints(tmp_path / "run", settings) as saved:
            assert saved.restore(trainer()) is None
            state, first = losses_of(trainer(), table, until=cut)
            saved.save(state, {"loss": first.tolist()})
        with checkpoints.Checkpoints(tmp_path / "run", settings) as saved:
            assert saved.latest == cut
            again = trainer()
            state, history = saved.restore(again)
            end, second = losses_of(again, table, state=state)
        np.testing.assert_array_equal([*history["loss"], *second], losses)

        def same(a, b):
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_array_equal(a, b)

        jax.tree.map(same, end, whole)

    def test_another_run_is_refused(self, model, table, tmp_path):
        trainer = adapted_trainer(model)
        with checkpoints.Checkpoints(tmp_path / "run", {"rank": 2}) as saved:
            saved.save(trainer.init(), {})
        with pytest.raises(ValueError, match="holds a run with rank = 2, not 3"):
            checkpoints.Checkpoints(tmp_path / "run", {"rank": 3})


class TestManyAtOnce:
    RECIPE = finetune.Recipe(
        steps=50, batch_size=8, optimizer="adam", learning_rate=1e-2, schedule="constant"
    )

    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, model, table):
        return finetune.run_of(
            model,
            TASK,
            table,
            cls.RECIPE,
            targets=TARGETS,
            rank=3,
            start="small",
            heads=("head",),
            test=table,
            every=10,
        )

    @pytest.fixture(scope="class")
    @classmethod
    def swept(cls, run):
        axes = {"scale": np.float32([0.1, 1.0]), "rank": [1, 3], "seed": range(8)}
        return sweeps.sweep(run, axes, key=jax.random.key(5), fold=("seed",))

    def test_thirty_two_adapters_train_in_one_program(self, swept):
        assert swept["loss"].shape == (2, 2, 8, 50)
        assert bool((swept["status"] == 0).all())
        # Every lane learns, and no two of them are the same.
        assert bool((swept["loss"][..., -5:].mean("loss_0") < swept["loss"][..., 0]).all())
        assert len(np.unique(swept["loss"].values[..., -1])) == 32

    @pytest.mark.parametrize(("scale", "rank", "seed"), [(0, 0, 3), (1, 1, 7), (1, 0, 0)])
    def test_each_curve_is_that_of_a_run_of_its_own(
        self, model, table, swept, scale, rank, seed, losses_of
    ):
        """The trainer's own loop, at the lane's true rank, step by step."""
        value, columns = float(swept["scale"][scale]), int(swept["rank"][rank])
        axes = {"scale": np.float32([value]), "seed": [seed]}
        keys = []

        def spy(key, scale, seed):
            del scale, seed
            return jax.random.key_data(key)

        keys = sweeps.sweep(spy, axes, key=jax.random.key(5), fold=("seed",))["value"].values
        key = jax.random.wrap_key_data(jnp.asarray(keys[0, 0]))
        full = adapters.adapt(
            model,
            TARGETS,
            key=key,
            rank=3,
            start=functools.partial(initializers.small, scale=jnp.float32(value)),
        )
        solo = adapters.adapt(model, TARGETS, key=key, rank=columns)
        for path, layer in adapters.layers(solo).items():
            a, b = adapters.layers(full)[path].adapters["default"].factors
            layer.adapters["default"].a.set_value(a[:, :columns])
            layer.adapters["default"].b.set_value(b[:columns])
        trainer = finetune.Trainer(solo, adapters.trainable(solo, heads="head"), TASK, self.RECIPE)
        state, losses = losses_of(trainer, table)
        lane = swept.isel(scale=scale, rank=rank, seed=seed)
        np.testing.assert_allclose(lane["loss"], losses, atol=1e-4)
        found = trainer.evaluate(state, table)
        assert float(lane["test_accuracy"]) == pytest.approx(float(found.accuracy), abs=0.02)

    def test_unused_columns_stay_zero(self, swept):
        values = swept["singular_values"].isel(rank=0).values
        assert values.shape == (2, 8, 5, 8, 3)
        assert (values[..., 1:] <= 1e-6 * values[..., :1]).all()
        assert (swept["singular_values"].isel(rank=1).values[..., 2] > 0).all()

    def test_the_store_resumes(self, run, swept, tmp_path):
        axes = {"scale": np.float32([0.1, 1.0]), "rank": [1, 3], "seed": range(8)}
        options = {"key": jax.random.key(5), "fold": ("seed",), "chunk": 8}
        settings = {"recipe": "as above"}
        store = tmp_path / "lanes.zarr"
        seen = []

        def stop(progress):
            seen.append(progress)
            if len(seen) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sweeps.sweep(run, axes, store=store, settings=settings, progress=stop, **options)
        found = sweeps.sweep(run, axes, store=store, settings=settings, **options)
        np.testing.assert_allclose(found["loss"], swept["loss"], atol=1e-4)

    def test_a_start_with_an_offset_cannot_be_masked(self, model, table):
        run = finetune.run_of(
            model, TASK, table, self.RECIPE, targets=TARGETS, rank=2, start="pissa"
        )
        with pytest.raises(ValueError, match="has an offset"):
            run(jax.random.key(0), rank=1)

    def test_every_divides_the_steps(self, model, table):
        with pytest.raises(ValueError, match="it must divide steps = 50"):
            finetune.run_of(model, TASK, table, self.RECIPE, every=7)


class TestProbes:
    def test_they_are_the_quantities_of_the_core(self, model, key):
        adapted = adapters.adapt(model, TARGETS, key=key, rank=3, start="small", alpha=6.0)
        path = probes.paths(adapted)[1]
        factors = adapters.layers(adapted)[path].adapters["default"].factors
        matrix = jax.random.normal(key, (16, 16), jnp.float32)
        probe = jax.jit(lambda m: finetune.measure(adapted, finetune.directions({path: m})))(matrix)
        dense = np.linalg.svd(2.0 * np.asarray(factors.product), compute_uv=False)
        np.testing.assert_allclose(probe.singular_values[1], dense[:3], rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(probe.norm[1], spectra.factor_norm(factors), rtol=1e-5)
        expected = np.linalg.norm(factors.a.T @ factors.a - factors.b @ factors.b.T)
        np.testing.assert_allclose(probe.imbalance[1], expected, rtol=1e-4)
        assert np.isnan(probe.misalignment[0]) and 0 < float(probe.misalignment[1]) < 1

    def test_a_start_along_the_gradient_is_aligned(self, model, table, key, losses_of):
        def loss(model, batch):
            images, labels = batch
            x = models.normalize(images, CONFIG.mean, CONFIG.std, channels=1)
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels)

        gradients = adapters.gradients(
            model, loss, [(table.columns["images"], table.columns["labels"])], TARGETS
        )
        adapted = adapters.adapt(
            model, TARGETS, key=key, rank=1, start="spectral", gradients=gradients
        )
        probe = finetune.measure(adapted, finetune.directions(gradients))
        assert float(probe.misalignment.max()) < 1e-6
        # The factors then grow along that direction: the loss falls where theory says it does.
        trainer = finetune.Trainer(
            adapted,
            adapters.trainable(adapted),
            TASK,
            # At a thousandth of this rate the loss falls by less than float32 tells apart.
            finetune.Recipe(
                steps=5, batch_size=60, optimizer="sgd", schedule="constant", learning_rate=1.0
            ),
        )
        state, losses = losses_of(trainer, table)
        later = finetune.measure(trainer.model(state), finetune.directions(gradients))
        assert losses[-1] < losses[0]
        assert float((later.norm - probe.norm).min()) > 0

    def test_offsets_count(self, model, key):
        adapted = adapters.adapt(model, TARGETS, key=key, rank=2, start="pissa")
        probe = finetune.measure(adapted)
        np.testing.assert_allclose(probe.singular_values, 0, atol=1e-5)
        assert float(probe.norm.min()) > 0.1

    def test_gradient_flow_conserves_the_imbalance(self, model, table, key):
        """Plain descent with a small step: the drift of Λ is of the order of the step."""
        drifts = []
        for rate in (0.02, 0.01):
            adapted = adapters.adapt(model, TARGETS, key=key, rank=2, start="small")
            recipe = finetune.Recipe(
                steps=round(0.4 / rate),
                batch_size=60,
                optimizer="sgd",
                learning_rate=rate,
                schedule="constant",
            )
            trainer = finetune.Trainer(adapted, adapters.trainable(adapted), TASK, recipe)

            def factors(model):
                return [x.adapters["default"].factors for x in adapters.layers(model).values()]

            start = [spectra.imbalance(f) for f in factors(adapted)]
            state = finetune.fit(trainer, table)
            end = [spectra.imbalance(f) for f in factors(trainer.model(state))]
            drifts.append(max(float(jnp.abs(e - s).max()) for e, s in zip(end, start, strict=True)))
        assert drifts[1] == pytest.approx(drifts[0] / 2, rel=0.2)

    def test_a_model_without_adapters(self, model):
        with pytest.raises(ValueError, match="has no LoRA named 'default'"):
            finetune.measure(model)


class TestSetup:
    def test_adapting_in_one_program_changes_nothing(self, model, key):
        options = {"rank": 2, "start": "small", "alpha": 3.0}
        plain = adapters.adapt(model, TARGETS, key=key, **options)
        compiled = finetune.adapt(model, TARGETS, key=key, **options)
        assert nnx.graphdef(plain) == nnx.graphdef(compiled)

        def same(a, b):
            np.testing.assert_allclose(a, b, rtol=1e-6)

        jax.tree.map(same, nnx.state(plain, nnx.Param), nnx.state(compiled, nnx.Param))
        # The base is the old one, not a copy.
        before = model.blocks[0].mlp.up.kernel[...]
        after = compiled.blocks[0].mlp.up.kernel[...]
        assert before.unsafe_buffer_pointer() == after.unsafe_buffer_pointer()

    def test_a_start_that_cannot_move_is_refused(self, model, key):
        gradients = {
            path: jnp.zeros((16, 16), jnp.float32)
            for path in probes.paths(adapters.adapt(model, TARGETS, key=key, rank=1))
        }
        with pytest.raises(ValueError, match="leaves both factors zero"):
            finetune.adapt(model, TARGETS, key=key, rank=1, start="lora_one", gradients=gradients)

    def test_fit_head_moves_the_head_alone_and_helps(self, model, table):
        fitted = finetune.fit_head(model, TASK, table, epochs=20, batch_size=20)
        np.testing.assert_array_equal(
            fitted.blocks[0].mlp.up.kernel[...], model.blocks[0].mlp.up.kernel[...]
        )
        assert fitted.heads == ("head",)
        recipe = finetune.Recipe(steps=1)
        found = [
            trainer.evaluate(trainer.init(), table).loss
            for trainer in (
                finetune.Trainer(each, nnx.Param, TASK, recipe) for each in (model, fitted)
            )
        ]
        assert found[1] < found[0]

    def test_gradients_and_ranks_come_from_the_same_data(self, model, table):
        options = {"targets": TARGETS, "samples": 40, "batch_size": 10}
        selection = finetune.select_ranks(model, TASK, table, rule="energy", **options)
        gradients = finetune.gradients_of(model, TASK, table, **options)
        assert selection.samples == 40
        for path, gradient in gradients.items():
            np.testing.assert_allclose(selection.gradients[path].matrix, gradient.matrix, atol=1e-6)
        # By hand: the mean gradient over the very images that were drawn.
        batches = finetune.setup.batches_of(table, 40, 10)
        images, labels = (
            jnp.concatenate([batch[name] for batch in batches]) for name in ("images", "labels")
        )
        x = models.normalize(images, CONFIG.mean, CONFIG.std, channels=1)

        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        dense = nnx.jit(nnx.grad(loss))(model).blocks[0].attention.query.kernel[...]
        found = gradients["blocks/0/attention/query"].matrix
        np.testing.assert_allclose(found, dense, atol=1e-6)

    @pytest.mark.parametrize("seed", range(3))
    def test_whatever_sees_a_part_of_sorted_data_sees_all_its_classes(self, table, seed):
        """Of ranks and starts, of a step of training, and on either side of what is set aside."""
        labels = np.asarray(table.columns["labels"])
        ordered = table.take(np.argsort(labels, kind="stable"))
        batches = finetune.setup.batches_of(ordered, 20, 10, seed)
        first = data.Order(len(ordered), 16, seed)(0)
        rest, aside = data.hold_out(ordered, 20, seed)
        parts = [np.concatenate([batch["labels"] for batch in batches])]
        parts += [ordered[first]["labels"], rest[:]["labels"], aside[:]["labels"]]
        for part in parts:
            assert {*np.asarray(part).tolist()} == {*labels.tolist()}

    def test_halves_need_two_images(self, model, table):
        tiny = table.take(slice(1))
        with pytest.raises(ValueError, match="two halves need at least 2"):
            finetune.select_ranks(model, TASK, tiny)


@pytest.mark.slow
@pytest.mark.apart
def test_lanes_spread_over_devices_give_the_same_curves(tmp_path, virtual):
    """Two virtual devices against one of them, in a process of its own."""
    script = """
import sys, jax, numpy as np
from flax import nnx
from lorajax import data, finetune, models, sweeps, tasks

assert len(jax.devices()) == 2
config = models.ViTConfig((8, 8), 4, 8, 1, 2, classes=3, channels=1)
model = models.build(config, rngs=nnx.Rngs(0)); model.eval()
rng = np.random.default_rng(0)
images = rng.integers(0, 255, (30, 8, 8, 1), dtype=np.uint8)
table = data.Table({"images": images, "labels": np.arange(30, dtype=np.int32) % 3})
TASK = tasks.Images.of(config)
recipe = finetune.Recipe(steps=5, batch_size=6, learning_rate=1e-2)
options = {"targets": "**/attention/query", "rank": 2, "heads": ("head",)}
run = finetune.run_of(model, TASK, table, recipe, **options)
for count in (1, 2):
    used = jax.devices()[:count]
    found = sweeps.sweep(run, {"seed": range(4)}, key=jax.random.key(0), devices=used)
    np.save(f"{sys.argv[1]}/{count}.npy", found["loss"].values)
"""
    arguments = [sys.executable, "-c", script, str(tmp_path)]
    subprocess.run(arguments, env=virtual(2), check=True)
    losses = [np.load(tmp_path / f"{count}.npy") for count in (1, 2)]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)
