"""What arrays hold, in a line that is the same in any process: by their bytes, never as printed."""

import hashlib
from typing import Any

import numpy as np


def digest(tree: Any) -> str:
    """A digest of a tree of arrays, PRNG keys, numbers and strings.

    Args:
      tree: any nesting that JAX knows; arrays of any size, which are read once.

    Returns:
      128 bits as hexadecimal digits, of all places, kinds, dtypes, shapes and bytes.

    Raises:
      TypeError: for a leaf of another class, which only its printed form could tell.
    """
    import jax
    import jax.numpy as jnp

    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        place = jax.tree_util.keystr(path)
        if isinstance(leaf, bool | int | float | str):
            found.update(f"{place}{type(leaf).__name__} {leaf!r}\n".encode())
            continue
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
            raise TypeError(f"{place or 'the tree'} is a {type(leaf).__name__}, and no array.")
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            place += str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        found.update(f"{place}{array.dtype}{array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:32]
