"""Fixtures that the tests share."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

CHEAP = ("--xla_cpu_parallel_codegen_split_count", "--xla_cpu_use_fusion_emitters")
"""The flags that ../conftest.py adds so that tests compile fast."""
TRACE_EVENT = "/jax/core/compile/jaxpr_trace_duration"


def pytest_ignore_collect(collection_path: pathlib.Path) -> bool | None:
    """Looks for doctests in the package only: helper scripts beside the tests may need peers."""
    if collection_path.suffix == ".py" and not collection_path.name.startswith("test_"):
        return True
    return None


@pytest.fixture
def key() -> jax.Array:
    """A fixed PRNG key; split it for more."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data and weights that LORAJAX_DATA names; skips without one."""
    name = os.environ.get("LORAJAX_DATA")
    if not name:
        pytest.skip("LORAJAX_DATA is unset: it names the folder of data sets and checkpoints.")
    folder = pathlib.Path(name)
    assert folder.is_dir(), f"LORAJAX_DATA is {name!r}; it must name a folder."
    return folder


@pytest.fixture(scope="session")
def virtual() -> Callable[..., dict[str, str]]:
    """The environment of a process for which XLA makes so many devices of one CPU.

    Its other flags are those of the tests, which make compiling cheap, or those of the command.
    """

    def environment(devices: int, optimized: bool = False) -> dict[str, str]:
        flags = os.environ.get("XLA_FLAGS", "").split()
        if optimized:
            flags = [flag for flag in flags if not flag.startswith(CHEAP)]
        flags.append(f"--xla_force_host_platform_device_count={devices}")
        cheap = {"JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(not optimized))}
        return os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"} | cheap

    return environment


@pytest.fixture(scope="session")
def little() -> Callable[[pathlib.Path, int], pathlib.Path]:
    """Fills a folder with `vit.safetensors` and `rows.npz`: a model and pictures of a moment.

    The class of a picture is its bright row; there are as many to train on as asked for, and 30 to
    measure on.
    """

    def fill(folder: pathlib.Path, samples: int) -> pathlib.Path:
        from flax import nnx

        from lorajax import models

        rng = np.random.default_rng(0)
        arrays = {}
        for kind, count in (("train", samples), ("test", 30)):
            labels = rng.integers(0, 3, count)
            images = rng.integers(0, 90, (count, 8, 8), dtype=np.uint8)
            images[np.arange(count), labels * 2] += 150
            arrays |= {f"{kind}_x": images, f"{kind}_y": labels}
        np.savez(folder / "rows.npz", **arrays)
        config = models.ViTConfig(
            (8, 8), 4, width=16, depth=1, heads=2, classes=3, channels=1, mean=(0.5,), std=(0.25,)
        )
        models.save(models.build(config, rngs=nnx.Rngs(0)), folder / "vit.safetensors")
        return folder

    return fill


@pytest.fixture
def traces() -> Callable[[], contextlib.AbstractContextManager[list[str]]]:
    """Opens a block that lists the name of every function JAX traces inside it.

    `with traces() as names: run_again()` and `assert not names` show that nothing is traced twice.
    """

    @contextlib.contextmanager
    def block() -> Iterator[list[str]]:
        names: list[str] = []

        def listen(event: str, _seconds: float, **details: object) -> None:
            if event == TRACE_EVENT:
                names.append(str(details.get("fun_name")))

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield names
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return block
