"""What a kernel looks like: its axes, and the protocol through which it is read as a matrix."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import nnx
from jaxtyping import Array

from lorajax.environment.judging import judged


class Axes(NamedTuple):
    """Which axes of a kernel are inputs and which are outputs; the others are slices.

    Attributes:
      inputs: axes of the kernel that make the rows of the matrix.
      outputs: axes of the kernel that make its columns.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@runtime_checkable
class Layout(Protocol):
    """A kernel as a stack of matrices. `shape`, `slices`, `stack` are known without its values."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): rows and columns of one matrix."""
        ...

    @property
    def slices(self) -> tuple[int, ...]:
        """Sizes of the axes along which each slice has its own factors."""
        ...

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading axes that `nnx.vmap` has put in front."""
        ...

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """Shape of the kernel without its stack: the modes of a Tucker update."""
        ...

    def matrix(self, kernel: Array) -> Array:
        """The kernel as (*stack, *slices, m, n)."""
        ...

    def kernel(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""
        ...

    def apply(self, x: Array, a: Array, b: Array, out_sharding: Any = None) -> Array:
        """The layer's output for the kernel `a b`, which is never formed."""
        ...

    def apply_tucker(self, x: Array, core: Array, factors: tuple[Array, ...]) -> Array:
        """The layer's output for the kernel `core ×_i factors[i]`, which is never formed."""
        ...

    def rows(self, x: Array) -> Array:
        """The inputs as the matrix's left factor sees them, shape (samples, m)."""
        ...

    def bias(self, y: Array) -> Array | None:
        """The layer's bias, shaped to be added to the output `y`; None without one."""
        ...

    def columns(self, scale: Array, y: Array) -> Array:
        """A number for each column, (n,), shaped to be multiplied with the output `y`."""
        ...


@judged
def kernel_variable(module: nnx.Module) -> Any:
    """The Variable that holds a layer's kernel: `embedding` for an Embed, else `kernel`.

    Where Qwix has quantized the layer it is Qwix's own holder, which has a shape and no array.
    """
    return module.embedding if isinstance(module, nnx.Embed) else module.kernel  # type: ignore


@judged
def kernel_of(module: nnx.Module) -> Array:
    """A layer's kernel as an array: the embedding of an Embed, else the kernel."""
    return kernel_variable(module)[...]


@judged
def kernel_name(module: nnx.Module) -> str:
    """The name of the attribute that `kernel_variable` reads."""
    return "embedding" if isinstance(module, nnx.Embed) else "kernel"


@judged
def with_kernel(module: nnx.Module, kernel: Array) -> nnx.Module:
    """The layer as it would be with another kernel, no bias, and the kernel's dtype.

    Args:
      module: a layer that can be adapted. It is not changed.
      kernel: in the shape of the layer's.

    Returns:
      A new layer.
    """
    changed = nnx.clone(module)
    kernel_variable(changed).set_value(kernel)
    changed.dtype = kernel.dtype  # type: ignore[attr-defined]
    if not isinstance(module, nnx.Embed):
        changed.bias = nnx.data(None)  # type: ignore[attr-defined]
        changed.use_bias = False  # type: ignore[attr-defined]
    return changed
