"""The JAX flags that every test and doctest runs under; the library itself never sets one."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
# Independent LAPACK calls in one program can wait for each other forever in XLA's thread pool when
# it has a thread for each of two cores only (lorajax/cli/output.py does the same for the command).
os.environ.setdefault("NPROC", "16")

import jax  # noqa: E402
import pytest  # noqa: E402

from lorajax import environment  # noqa: E402

# Before the first computation, which is when XLA reads its flags. Tests compile hundreds of small
# programs and run each for milliseconds: LLVM's optimizations cost more than they save. (A compile
# cache would cost less still, but jaxlib 0.10.1 has crashed while it wrote an entry.)
if "xla_backend_optimization_level" not in environment.guard():
    os.environ["XLA_FLAGS"] = f"{environment.guard()} --xla_backend_optimization_level=0".strip()

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keeps the tests of a file in one worker, where they share what has been compiled."""
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
