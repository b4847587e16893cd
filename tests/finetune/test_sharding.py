"""Training on eight devices, which XLA makes of one CPU, or in two processes changes nothing."""

import socket
import subprocess
import sys
import textwrap

import pytest

from lorajax.finetune import sharding

SETUP = """
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from jax.sharding import PartitionSpec as P
    from lorajax import adapters, data, finetune, models, tasks
    from lorajax.finetune import checkpoints, sharding
    config = models.LlamaConfig(
        vocabulary=32, width=16, depth=1, heads=4, groups=2, mlp_width=32, context=16
    )
    model = models.build(config, rngs=nnx.Rngs(0))
    model = adapters.adapt(model, "blocks/**", key=jax.random.key(1), rank=2)
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 32, (32, 8)).astype(np.int32)
    tokens[:, 4:] = tokens[:, :4]
    rows = {
        "tokens": tokens,
        "targets": np.ones((32, 8), bool),
        "positions": np.tile(np.arange(8, dtype=np.int32), (32, 1)),
        "segments": np.ones((32, 8), np.int32),
    }
    table = data.Table(rows)
    recipe = finetune.Recipe(20, batch_size=16, learning_rate=1e-2)
    def train(recipe=recipe, **options):
        trainer = finetune.Trainer(
            model, adapters.trainable(model), tasks.NextToken(), recipe, **options
        )
        losses = []
        note = lambda record: losses.append(float(record.metrics.loss))
        state = finetune.fit(trainer, table, callback=note)
        return trainer, state, losses
"""
DEVICES = """
    assert len(jax.devices()) == 8
    plain, end, losses = train()
    assert losses[-1] < losses[0] - 0.01, losses
    mesh = sharding.mesh_of(8)
    for layout in sharding.LAYOUTS:
        trainer, state, found = train(mesh=mesh, layout=layout)
        np.testing.assert_allclose(found, losses, atol=1e-5)
        for a, b in zip(jax.tree.leaves(end.params), jax.tree.leaves(state.params)):
            np.testing.assert_allclose(a, b, atol=1e-5)
        measured = [t.evaluate(s, table, 12).loss for t, s in ((plain, end), (trainer, state))]
        np.testing.assert_allclose(*measured, atol=1e-5)
        kernel = nnx.state(trainer.model(state))["blocks"][0]["mlp"]["up"]["base"]["kernel"][...]
        a = nnx.state(trainer.model(state))["blocks"][0]["mlp"]["up"]["adapters"]["default"]["a"]
        wanted = {"data": (P(), P()), "full": (P(None, "data"), P("data", None))}[layout]
        got = [x.sharding.spec for x in (kernel, a[...])]
        for spec, want in zip(got, wanted):
            assert tuple(s for s in spec if s) == tuple(s for s in want if s), (layout, got)
        if layout == "full":
            assert kernel.addressable_shards[0].data.size * 8 == kernel.size
            moments = [x for x in jax.tree.leaves(state.optimizer) if x.shape == (16, 2)]
            assert moments and all(m.addressable_shards[0].data.shape == (2, 2) for m in moments)
    try:
        train(finetune.Recipe(2, batch_size=12), mesh=mesh)
    except ValueError as error:
        assert "batch_size is 12; it must be a multiple of the 8 devices" in str(error)
    else:
        raise AssertionError
    print("agree")
"""


# Each process has two devices and sees of the other's only its own part of a batch and of weights.
JOIN = """
    import sys, jax
    jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
"""
PROCESSES = """
    from jax.experimental import multihost_utils
    assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
    plain, end, losses = train()
    assert losses[-1] < losses[0] - 0.01, losses
    mesh = sharding.mesh_of()
    for layout in sharding.LAYOUTS:
        trainer, state, found = train(mesh=mesh, layout=layout)
        np.testing.assert_allclose(found, losses, rtol=0, atol=1e-5)
        whole = multihost_utils.process_allgather(state.params, tiled=True)
        for a, b in zip(jax.tree.leaves(end.params), jax.tree.leaves(whole)):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        measured = [t.evaluate(s, table, 12).loss for t, s in ((plain, end), (trainer, state))]
        np.testing.assert_allclose(*measured, rtol=0, atol=1e-5)
        split = [x for x in jax.tree.leaves(state.params) if not x.is_fully_replicated]
        assert bool(split) == (layout == "full")
        assert not any(x.is_fully_addressable for x in split)
    print("agree")
"""


@pytest.mark.slow
@pytest.mark.apart
def test_sharded_training_agrees_with_plain_training(virtual):
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SETUP) + textwrap.dedent(DEVICES)],
        env=virtual(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.strip().endswith("agree"), found.stdout + found.stderr


@pytest.mark.slow
@pytest.mark.apart
def test_training_in_two_processes_agrees_with_plain_training(virtual):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    code = "".join(map(textwrap.dedent, (JOIN, SETUP, PROCESSES)))
    # The first waits for the other at JAX's coordinator, and either ends when the other has died.
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, address, str(process)],
            env=virtual(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        said = [each.communicate(timeout=600)[0] for each in both]
    finally:
        for each in both:
            each.kill()
    assert all("agree" in each for each in said), "\n".join(said)


def test_arrays_are_split_along_the_longest_axis_that_can_be():
    assert tuple(sharding.spec((6, 16), 8, "full")) == (None, "data")
    assert tuple(sharding.spec((16, 16), 8, "full")) == ("data", None)
    assert tuple(sharding.spec((6, 9), 8, "full")) == tuple(sharding.spec((16,), 8, "data")) == ()
    assert tuple(sharding.spec((), 8, "full")) == ()
    assert sharding.share((6, 16), 8, "full") == 12 and sharding.share((6, 16), 8, "data") == 96
    with pytest.raises(ValueError, match="layout is 'rows'; it must be one of data, full"):
        sharding.spec((8,), 8, "rows")
    with pytest.raises(ValueError, match="devices is 99; there are"):
        sharding.mesh_of(99)
