"""Known faults of JAX, the flag that avoids one, and canaries that show them.

jaxlib 0.11.1 to 0.12.0.1 computes garbage on CPU, silently, for a matrix product with a broadcast
scalar as one operand that is multiplied and then summed, from about 4096 entries on. One flag of
XLA avoids it. The command and the tests set it (`guard`); a library does not change the flags of
the process that it is imported into, so there `warn` says what to set.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from lorajax.environment import flags

FLAG = "xla_cpu_experimental_ynn_fusion_type"
GUARD = f"--{FLAG}=-reduce"
"""What XLA_FLAGS must have before JAX starts, so that products on CPU are right."""
# The guard stays for releases that nobody here has tried: there is no release yet that is mended.
# The first that passes `scalar_product` without the guard bounds `affected` from above.
FIRST_AFFECTED = (0, 11, 1)


def affected(version: str) -> bool:
    """Whether this jaxlib needs the guard on CPU: 0.11.1 does, and every later one so far."""
    return flags.numbers(version) >= FIRST_AFFECTED


def accepts_guard(version: str) -> bool:
    """Whether this jaxlib knows the guard's flag: XLA ends the process on one that it does not.

    Of a release newer than those tried, its library is searched for the flag's name.
    """
    return flags.numbers(version) <= flags.TRIED or flags.known(FLAG)


def guard() -> str:
    """Adds the guard to `XLA_FLAGS` where the installed jaxlib is affected and accepts it.

    Call it before the first computation: XLA reads its flags once. What is set already stays, a
    choice of the same flag too, and so does the name of a file of flags.

    Returns:
      `XLA_FLAGS` as it is now.
    """
    version = metadata.version("jaxlib")
    return flags.add_flags(*[GUARD] * (affected(version) and accepts_guard(version)))


def guarded() -> bool:
    """Whether `XLA_FLAGS`, or the file that it names, has the guard."""
    given = os.environ.get("XLA_FLAGS", "")
    if given.strip() and not given.lstrip().startswith("-"):
        try:
            given = Path(given).read_text()
        except OSError:
            return False
    return GUARD in given


def _on_cpu() -> bool:
    """Whether JAX would compute on CPU, as far as is known without starting a device."""
    import jax

    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if platforms:
        return platforms.partition(",")[0] == "cpu"
    return not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))


_warned = False


def warn() -> None:
    """Warns once a process where JAX is affected, computes on CPU and is not guarded.

    Called by the first module of lorajax that imports jax; imports it.
    """
    global _warned
    if _warned:
        return
    _warned = True
    import jaxlib

    version = jaxlib.version.__version__
    if affected(version) and not guarded() and _on_cpu():
        warnings.warn(
            f"jaxlib {version} computes wrong numbers on CPU for some products that are summed; "
            f"set XLA_FLAGS={GUARD} in the environment, or call lorajax.environment.guard() "
            f"before the first computation. `lorajax doctor` tells more.",
            stacklevel=2,
        )


def vmapped_product(
    shape: tuple[int, int] = (4, 3), rows: int = 32_769, dtype: Any = None
) -> float:
    """The first canary: `jit(vmap(sum((M @ row)**2)))`, wrong on CPU in jax 0.10.2.

    The fault needs just over 2**14 rows in float64 and 2**15 in float32, and few columns.
    Source: https://github.com/jax-ml/jax/issues/39103.

    Args:
      shape: of M.
      rows: how many.
      dtype: float32 or float64; by default the widest that is switched on.

    Returns:
      The largest error over its roundoff bound: infinity for NaN: at most 1 where JAX computes
      right.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    dtype = _dtype(dtype)
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal(shape).astype(dtype)
    x = rng.standard_normal((rows, shape[1])).astype(dtype)
    got = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(x)
    wide_x, wide = x.astype(np.float64), matrix.astype(np.float64)
    want = np.sum((wide_x @ wide.T) ** 2, axis=1)
    # Each entry takes at most 2 columns + rows + 2 roundings of terms whose absolute values add up
    # to `size`.
    size = np.sum((np.abs(wide_x) @ np.abs(wide).T) ** 2, axis=1)
    return _excess(got, want, (2 * shape[1] + shape[0] + 2) * np.finfo(dtype).eps * size)


def scalar_product(side: int = 128, *, vmapped: bool = False, dtype: Any = None) -> float:
    """The second canary: `sum((E @ full_like(E, c)) * E)`, wrong on CPU in jax 0.11.1 to 0.12.0.1.

    Args:
      side: E is side×side; the fault begins at 64.
      vmapped: over three matrices at once.
      dtype: float32 or float64; by default the widest that is switched on.

    Returns:
      The largest error over its roundoff bound, infinity for NaN: at most 1 where JAX computes
      right.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    def row_sums(matrix, scalar):
        return jnp.sum((matrix @ jnp.full_like(matrix, scalar)) * matrix, axis=-1)

    dtype = _dtype(dtype)
    rng = np.random.default_rng(0)
    leading = (3,) if vmapped else ()
    matrix = rng.standard_normal((*leading, side, side)).astype(dtype)
    scalar = np.full(leading, 0.7).astype(dtype)
    got = jax.jit(jax.vmap(row_sums) if vmapped else row_sums)(matrix, scalar)
    wide = matrix.astype(np.float64)
    times = scalar.astype(np.float64)[..., None]
    want = times * np.sum(wide, axis=-1) ** 2
    # side + 1 roundings of each product, side + 1 of the sum over them.
    size = times * np.sum(np.abs(wide), axis=-1) ** 2
    return _excess(got, want, 2 * (side + 1) * np.finfo(dtype).eps * size)


def _dtype(dtype: Any) -> Any:
    import jax
    import numpy as np

    return np.dtype(dtype or jax.dtypes.canonicalize_dtype(np.float64))


def _excess(got: Any, want: Any, bound: Any) -> float:
    import numpy as np

    ratio = np.abs(np.asarray(got, np.float64) - want) / bound
    return float(np.max(np.where(np.isnan(ratio), np.inf, ratio)))


CANARIES: dict[str, Callable[[], float]] = {
    "product of rows": vmapped_product,
    "product with a scalar": scalar_product,
    "the same, vmapped": lambda: scalar_product(vmapped=True),
}
"""Products whose value is known: error over bound, at most 1 where JAX computes right."""
