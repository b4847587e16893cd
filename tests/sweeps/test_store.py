"""Sweeps on disk: resumed after a kill, refused when different, the same on any devices."""

import pathlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

from lorajax.sweeps import NOT_RUN, estimate, open_sweep, store, sweep

WORKER = pathlib.Path(__file__).with_name("worker.py")
AXES = {"scale": np.logspace(-3, 0, 4), "seed": range(45)}


def draw(scale, key):
    return {"x": scale * jax.random.normal(key, (3,))}


def test_a_store_that_was_compressed_otherwise_goes_on(tmp_path, monkeypatch):
    """Its own codec stays, as what an earlier release wrote has another, and so do its bytes."""
    options = dict(key=jax.random.key(0), store=tmp_path / "s", chunk=20)
    with monkeypatch.context() as before:
        before.setattr(store, "FAST", None)
        sweep(draw, AXES, **options)
    want, whole = open_sweep(options["store"]).load(), contents(options["store"])
    for chunk in ("status/c/0/0", "x/c/0/0/0"):
        (options["store"] / chunk).unlink()
    assert contents(options["store"]) != whole
    xarray.testing.assert_identical(sweep(draw, AXES, **options).load(), want)
    assert contents(options["store"]) == whole


@pytest.fixture
def worker(virtual) -> Callable[..., subprocess.Popen]:
    def start(*arguments: object, devices: int = 1, **options: bool) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(WORKER), *map(str, arguments)],
            env=virtual(devices, **options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process: subprocess.Popen) -> str:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out


def contents(store: pathlib.Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()
    }


def test_a_store_holds_what_memory_would(tmp_path):
    arguments = dict(key=jax.random.key(0), dims={"x": ("time",)}, coords={"time": [0.0, 1.0, 2.0]})
    run = {"seed": range(9), "pair": np.arange(18.0).reshape(9, 2), "kind": ["a", "b", "c"] * 3}
    axes = {"scale": [1.0, 2.0], "run": run}
    want = sweep(paired, axes, static=("kind",), **arguments)
    found = sweep(paired, axes, static=("kind",), store=tmp_path / "s", chunk=2, **arguments)
    xarray.testing.assert_allclose(found.load(), want, rtol=1e-14, atol=0)
    assert found["status"].attrs["flag_meanings"].split()[0] == "not_run"
    assert set(found.coords) == {"scale", "seed", "pair", "kind", "time"}


def paired(scale, pair, kind, key):
    sign = {"a": 1.0, "b": -1.0, "c": 0.0}[kind]
    return {"x": sign * scale * jnp.sum(pair) * jax.random.normal(key, (3,))}


def test_only_what_is_missing_runs(tmp_path):
    done = []

    class Stop(Exception):
        pass

    def stop(progress):
        done.append(progress.done)
        if progress.done >= 60:
            raise Stop

    options = dict(key=jax.random.key(0), store=tmp_path / "s", chunk=15)
    with pytest.raises(Stop):
        sweep(draw, AXES, progress=stop, **options)
    partial = open_sweep(tmp_path / "s")
    assert int((partial["status"] != NOT_RUN).sum()) == done[-1] == 60
    assert np.isnan(partial["x"].values[partial["status"].values == NOT_RUN]).all()
    seen = []
    found = sweep(draw, AXES, progress=seen.append, **options)
    assert seen[0].done == seen[0].resumed == 60 and seen[-1].done == 180
    # Chunks of another size are other programs, which may round the last bit differently.
    whole = sweep(draw, AXES, key=jax.random.key(0))
    np.testing.assert_allclose(found["x"], whole["x"], rtol=1e-14)
    seen.clear()
    # Without a chunk the store's own is taken.
    sweep(draw, AXES, key=jax.random.key(0), store=tmp_path / "s", progress=seen.append)
    assert [p.done for p in seen] == [180]


def test_another_configuration_is_refused_with_the_difference(tmp_path):
    store, key = tmp_path / "s", jax.random.key(0)
    sweep(draw, AXES, key=key, store=store, settings={"size": 4})
    for changed, words in [
        (dict(settings={"size": 5}), "settings.size: 4 in the store, now 5"),
        (dict(settings={}), "settings.size: 4 in the store, not there now"),
        (dict(key=jax.random.key(1)), r"key: \[0, 0\] in the store, now \[0, 1\]"),
        (dict(fold=("seed",)), "fold"),
        (dict(axes={**AXES, "scale": [1.0]}), "axes.scale.scale"),
        (dict(chunk=7), "chunk"),
    ]:
        arguments = {"axes": AXES, "key": key, "settings": {"size": 4}} | changed
        with pytest.raises(ValueError, match=words):
            sweep(draw, store=store, **arguments)


def test_what_is_no_sweep_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        sweep(draw, AXES, key=jax.random.key(0), store=tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        open_sweep(tmp_path / "none")


def test_an_estimate_tells_lanes_chunks_and_bytes_and_writes_nothing(tmp_path):
    found = estimate(draw, AXES, key=jax.random.key(0), chunk=50, store=tmp_path / "s")
    assert (found.lanes, found.chunk, found.chunks, found.programs) == (180, (1, 45), 4, 1)
    assert found.bytes == 180 * (3 * 8 + 1)
    assert found.seconds is not None and found.seconds > 0 and found.flops > 0
    assert not (tmp_path / "s").exists()
    assert estimate(draw, AXES, key=jax.random.key(0), probe=False).seconds is None


@pytest.mark.apart
def test_a_sweep_that_is_killed_and_resumed_is_the_same_bit_for_bit(tmp_path, worker):
    finish(worker("kill", tmp_path / "whole"))
    rng, kills = random.Random(5), 0
    while kills < 3:
        process = worker("kill", tmp_path / "killed")
        assert process.stdout is not None
        for _ in range(2 + rng.randrange(20)):
            process.stdout.readline()
        time.sleep(rng.random() * 0.01)
        process.kill()
        process.communicate()
        kills += 1
    finish(worker("kill", tmp_path / "killed"))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.apart
def test_devices_and_processes_agree(tmp_path, worker):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    both = [worker("processes", tmp_path / "processes", address, i) for i in range(2)]
    many = worker("devices", tmp_path / "devices", devices=8)
    assert [finish(p).split()[-2:] for p in both] == [["done", "180"]] * 2
    finish(many)
    want = open_sweep(tmp_path / "devices-1")
    for other in ("devices-2", "devices-8", "processes"):
        found = open_sweep(tmp_path / other)
        assert not found["status"].any()
        for name in ("x", "mean"):
            np.testing.assert_allclose(found[name], want[name], rtol=1e-12, atol=0)


@pytest.mark.slow
@pytest.mark.apart
def test_an_adaptive_solver_takes_the_same_steps_on_any_device(tmp_path, worker):
    # As users compile it: sums over lanes that are vectorized are those that could differ.
    finish(worker("flow", tmp_path / "flow", devices=2, optimized=True))
    want = open_sweep(tmp_path / "flow-1-180")
    assert float(want["singular_values"].max()) > 2.5
    found = open_sweep(tmp_path / "flow-2-7")
    assert not found["status"].any()
    np.testing.assert_allclose(
        found["singular_values"], want["singular_values"], rtol=0, atol=1e-12
    )


def triple(scale):
    return {"y": scale * jnp.ones(3)}


@pytest.mark.parametrize("which", ["status", "y"])
@pytest.mark.parametrize("left", [0, 9])
def test_a_damaged_chunk_is_run_again(which, left, tmp_path):
    options = dict(store=tmp_path / "s", chunk=2)
    axes = {"scale": [1.0, 2.0, 3.0, 4.0]}
    sweep(triple, axes, **options)
    chunk = sorted(p for p in (tmp_path / "s" / which / "c").rglob("*") if p.is_file())[-1]
    chunk.write_bytes(chunk.read_bytes()[:left])
    if which == "status":
        with pytest.raises(ValueError, match="damaged"):
            open_sweep(tmp_path / "s")
    seen = []
    found = sweep(triple, axes, progress=seen.append, **options)
    assert seen[0].resumed == 2
    np.testing.assert_array_equal(found["y"][:, 0], axes["scale"])


def test_a_damaged_description_is_named(tmp_path):
    sweep(triple, {"scale": [1.0]}, store=tmp_path / "s")
    (tmp_path / "s" / "zarr.json").write_text("")
    with pytest.raises(ValueError, match="damaged"):
        sweep(triple, {"scale": [1.0]}, store=tmp_path / "s")


def test_kinds_of_settings_and_generators_differ(tmp_path):
    def run(settings, key):
        sweep(draw, {"scale": [1.0]}, key=key, store=tmp_path / "s", settings=settings)

    nan = {"x": 1, "y": float("nan"), "z": 0.0}
    run(nan, jax.random.key(0, impl="rbg"))
    run(nan, jax.random.key(0, impl="rbg"))
    for other in ({**nan, "x": 1.0}, {**nan, "x": True}, {**nan, "z": -0.0}):
        with pytest.raises(ValueError, match="differs in settings"):
            run(other, jax.random.key(0, impl="rbg"))
    with pytest.raises(ValueError, match="generator"):
        run(nan, jax.random.key(0, impl="unsafe_rbg"))


def test_outputs_that_no_store_holds_are_named(tmp_path):
    def rounded(scale):
        return {"y": jnp.asarray(scale, jnp.bfloat16)}

    assert sweep(rounded, {"scale": [1.0]})["y"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="dtype bfloat16"):
        sweep(rounded, {"scale": [1.0]}, store=tmp_path / "s")


@pytest.mark.parametrize("name", ["x", "status", "scale"])
def test_a_file_that_is_gone_is_made_again(name, tmp_path):
    """Zarr reads a chunk that is not there as NaN or zeros."""
    axes = {"scale": [1.0, 2.0, 3.0]}
    sweep(draw, axes, key=jax.random.key(0), store=tmp_path / "s", chunk=1)
    want = contents(tmp_path / "s")
    gone = [path for path in want if path.startswith(f"{name}/c")]
    (tmp_path / "s" / gone[0]).unlink()
    ran = []
    found = sweep(
        draw, axes, key=jax.random.key(0), store=tmp_path / "s", chunk=1, progress=ran.append
    )
    assert contents(tmp_path / "s") == want
    assert ran[0].resumed == (3 if name == "scale" else 2)
    assert not np.isnan(found["x"]).any()


def test_a_second_writer_neither_erases_nor_is_swept_up(tmp_path):
    first = tmp_path / "s"
    sweep(draw, {"scale": [1.0, 2.0]}, key=jax.random.key(0), store=first, chunk=1)
    want = contents(first)

    def meanwhile(progress):
        if progress.done == 1:
            writing = first / "x" / "c" / "0.partial"
            writing.write_bytes(b"")
            sweep(draw, {"scale": [1.0, 2.0]}, key=jax.random.key(0), store=first, chunk=1)
            assert writing.exists()
            writing.unlink()

    (first / "x" / "c" / "1" / "0").unlink()
    sweep(
        draw,
        {"scale": [1.0, 2.0]},
        key=jax.random.key(0),
        store=first,
        chunk=1,
        progress=meanwhile,
    )
    assert contents(first) == want
