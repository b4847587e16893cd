"""How the kernel of each kind of Flax layer is read as a matrix, and applied through its factors.

A `Layout` is the only thing that knows what a layer's kernel looks like. It says which axes are the
matrix's rows (inputs), which its columns (outputs), and which are *slices*: axes along which every
slice is a matrix of its own, such as the heads of an attention kernel. Everything else in this room
speaks of factors `a` (*stack, *slices, m, r) and `b` (*stack, *slices, r, n), where `stack` are the
leading axes that `nnx.vmap` puts in front of every parameter and that `nnx.scan` takes off again.
"""

from typing import Any

from flax import nnx

from lorajax.adapters.layouts.base import (
    Axes,
    Layout,
    kernel_name,
    kernel_of,
    kernel_variable,
    with_kernel,
)
from lorajax.adapters.layouts.contraction import Contraction
from lorajax.adapters.layouts.convolution import Convolution
from lorajax.adapters.layouts.lookup import Lookup
from lorajax.environment.judging import judged

__all__ = [
    "ADAPTABLE",
    "Axes",
    "Contraction",
    "Convolution",
    "Layout",
    "Lookup",
    "is_adaptable",
    "kernel_name",
    "kernel_of",
    "kernel_variable",
    "layout",
    "with_kernel",
]

_LAYOUTS = {
    nnx.Linear: Contraction,
    nnx.LinearGeneral: Contraction,
    nnx.Einsum: Contraction,
    nnx.Conv: Convolution,
    nnx.Embed: Lookup,
}
ADAPTABLE = ", ".join(kind.__name__ for kind in _LAYOUTS)


@judged
def is_adaptable(module: Any) -> bool:
    """Whether an adapter fits the module: one of Flax's layers, called as Flax calls it.

    A subclass with a `__call__` of its own is left out, since what it does with the kernel is its
    own business.
    """
    return any(
        isinstance(module, kind) and type(module).__call__ is kind.__call__ for kind in _LAYOUTS
    )


@judged
def layout(module: nnx.Module, axes: Axes | None = None) -> Contraction | Convolution | Lookup:
    """The layout of a layer.

    Args:
      module: a Linear, LinearGeneral, Einsum, Conv or Embed of Flax NNX.
      axes: for Linear, LinearGeneral and Einsum, which kernel axes are inputs and outputs; the
        layer's own contraction if None. Axes in neither are slices with factors of their own.

    Returns:
      The Layout that reads the layer's kernel as a matrix.

    Raises:
      ValueError: for another kind of module, or axes that do not fit the layer.

    Example:
      >>> from flax import nnx
      >>> from lorajax.adapters import Axes, layout
      >>> query = nnx.LinearGeneral(16, (4, 8), rngs=nnx.Rngs(0))
      >>> layout(query).shape, layout(query, Axes((0,), (2,))).slices
      ((16, 32), (4,))
    """
    for kind, reader in _LAYOUTS.items():
        if isinstance(module, kind) and is_adaptable(module):
            return reader(module, axes)  # type: ignore[arg-type]
    raise ValueError(f"a {type(module).__name__} cannot be adapted; these can: {ADAPTABLE}.")
