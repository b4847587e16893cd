"""What a step takes by its trace alone, held against what XLA says of its program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import adapters, finetune, models, tasks
from lorajax.cli import main
from lorajax.finetune import recipes, traces

LLAMA = models.LlamaConfig(
    vocabulary=256, width=128, depth=2, heads=4, groups=2, mlp_width=352, context=128
)
BERT = models.BertConfig(vocabulary=256, width=128, depth=2, heads=4, mlp_width=512, context=128)
VIT = models.ViTConfig((32, 32), 4, width=128, depth=2, heads=4, classes=10)


def abstract(config, dtype=jnp.float32):
    return nnx.eval_shape(
        lambda: models.build(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    )


def prepared(config, *, batch_size=8, length=None, dtype=jnp.float32):
    model, wrt, _ = finetune.abstract_lora(abstract(config, dtype), rank=8)
    task, batch = tasks.expected(model, batch_size, length)
    return model, wrt, task, recipes.lora(10, batch_size=batch_size), batch


def lowered(model, wrt, task, recipe, batch):
    trainer = finetune.Trainer(model, wrt, task, recipe)
    state = jax.eval_shape(trainer.init)
    return trainer.lower(state, batch)


@pytest.mark.slow
@pytest.mark.apart
@pytest.mark.parametrize(("config", "length"), [(LLAMA, 64), (BERT, 64), (VIT, None)])
def test_predicted_bytes_and_operations_are_those_of_xla(config, length):
    given = prepared(dataclasses.replace(config, depth=4), length=length)
    found = finetune.footprint(*given)
    program = lowered(*given).compile()
    measured = program.memory_analysis()
    # What is given, but for the batch.
    batch = sum(x.size * x.dtype.itemsize for x in given[-1].values())
    assert measured.argument_size_in_bytes - batch == pytest.approx(found.held, abs=64)
    used = measured.temp_size_in_bytes + found.held
    print(f"{type(config).__name__}: predicted / measured = {found.total / used:.3f}")
    assert found.total == pytest.approx(used, rel=0.1)
    assert found.flops == pytest.approx(program.cost_analysis()["flops"], rel=0.1)
    if found.recomputed is None:
        return
    given[0].remat = True
    again = lowered(*given).compile().memory_analysis().temp_size_in_bytes
    print(f"computed again: {(found.held + found.recomputed) / (found.held + again):.3f}")
    # XLA schedules: it may compute the next block again before it is done with the last.
    assert found.held + found.recomputed == pytest.approx(found.held + again, rel=0.2)
    assert again < 0.6 * measured.temp_size_in_bytes


@pytest.mark.slow
def test_bytes_are_those_of_each_device_and_half_precision_halves_the_base():
    given = prepared(LLAMA, length=32)
    one = finetune.footprint(*given)
    data, full = (finetune.footprint(*given, devices=8, layout=x) for x in ("data", "full"))
    assert (data.weights, data.trained, data.optimizer) == one[3:6]
    assert full.held == pytest.approx(one.held / 8, rel=0.01)
    assert data.activations < one.activations / 6
    assert one.flops == data.flops == full.flops
    assert one.recomputed < 0.7 * one.activations
    model = given[0]
    assert one.base + one.adapters == sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    assert one.beside == 0 and not model.remat
    half = finetune.footprint(*prepared(LLAMA, length=32, dtype=jnp.bfloat16))
    assert half.weights == one.weights / 2 and half.trained == one.trained
    with pytest.raises(ValueError, match="batch_size is 8; it must be a multiple of the 3 devices"):
        finetune.footprint(*given, devices=3)


def test_operations_of_products_are_counted_in_calls_and_loops():
    def f(x, kernel):
        def step(x, _):
            return jax.nn.relu(x @ x), None

        x, _ = jax.lax.scan(step, x, None, length=5)
        window = ("NHWC", "HWIO", "NHWC")
        return x, jax.lax.conv_general_dilated(kernel, kernel, (1, 1), "SAME", None, None, window)

    shapes = jax.ShapeDtypeStruct((4, 4), "float32"), jax.ShapeDtypeStruct((3, 3, 3, 3), "float32")
    program = jax.make_jaxpr(jax.jit(f))(*shapes).jaxpr
    assert traces.flops(program) == 5 * 2 * 4**3 + 2 * 3**4 * 27


def test_values_take_memory_from_where_they_are_made_to_where_they_are_read():
    def f(x):
        first = jnp.tanh(x) @ x  # tanh is read by a product: three arrays with this one
        second = 2 * first + 1  # fused into its reader
        return (second @ x).sum()

    x = jax.ShapeDtypeStruct((64, 64), "float32")
    # At the second product: what it reads, and what it makes; the sum reads that alone.
    assert traces.peak(jax.make_jaxpr(f)(x).jaxpr) == 2 * 64 * 64 * 4


def test_a_step_of_a_full_size_llama_lowers_from_shapes():
    model = models.abstract("llama-3-8b", depth=2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model.remat = True
    model, wrt, _ = finetune.abstract_lora(model, rank=8)
    task, batch = tasks.expected(model, 8, 512)
    text = lowered(model, wrt, task, recipes.lora(10, batch_size=8), batch).as_text()
    assert "tensor<4096x14336xbf16>" in text and "tensor<4096x8xf32>" in text


@pytest.mark.slow
@pytest.mark.apart
def test_all_blocks_of_a_full_size_llama_are_planned_without_their_bytes():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = models.abstract("llama-3-8b", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model, wrt, _ = finetune.abstract_lora(model, rank=8)
    task, batch = tasks.expected(model, 8, 512)
    recipe = recipes.lora(10, batch_size=8)
    found = finetune.footprint(model, wrt, task, recipe, batch, devices=8, layout="full")
    assert found.base == 8_030_261_248
    # Forward, and backward to the inputs: four operations a weight and token, and attention's.
    assert found.flops == pytest.approx(4 * found.base * 8 * 512, rel=0.1)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 2e9


def test_what_trains_in_full_is_widened_alone():
    config = dataclasses.replace(VIT, depth=1)
    model = models.build(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    wide = finetune.widened(model, finetune.in_full(model))
    assert wide.head.kernel[...].dtype == wide.embeddings.positions[...].dtype == jnp.float32
    assert wide.blocks[0].mlp.up.kernel[...].dtype == model.head.kernel[...].dtype == jnp.bfloat16
    images = jnp.zeros((1, 32, 32, 3), jnp.bfloat16)
    both = [nnx.jit(lambda m, x: m(x))(each, images) for each in (model, wide)]
    assert both[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in both), atol=0.05)
    shapes = finetune.widened(abstract(VIT, jnp.bfloat16), ["head"])
    assert shapes.head.kernel.get_value().dtype == jnp.float32


def test_the_command_prints_it(capsys):
    given = ["finetune", "--dry-run", "--rank", "4", "--devices", "2", "--layout", "full"]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "vit-fashion-mnist in float32, adapters of rank 4" in out
    assert "mesh: 2 devices on one axis, weights split among them" in out
    assert "activations and gradients" in out and "--remat" not in out
    for more, message in (
        (["--batch-size", "7"], "--batch-size is 7; it must be a multiple of the 2 devices"),
        (["--max-length", "9"], "--max-length is 9; a ViT takes images"),
        (["--model", "nowhere"], "source is 'nowhere', which does not exist"),
        (["--rank", "999"], "--rank is 999"),
        (["--devices", "0"], "--devices is 0; it must be positive"),
    ):
        assert main([*given, *more]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    jax.config.update("jax_enable_x64", True)


def test_adapters_keep_their_precision_over_a_base_in_half():
    model, *_ = prepared(LLAMA, length=32, dtype=jnp.bfloat16)
    dtypes = {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))}
    assert dtypes == {np.dtype("float32")}
    assert adapters.layers(model)
