"""How the kernel of each kind of Flax layer is read as a matrix, and applied through its factors.

A `Layout` is the only thing that knows what a layer's kernel looks like. It says which axes are the
matrix's rows (inputs), which its columns (outputs), and which are *lanes*: axes along which every
slice is a matrix of its own, such as the heads of an attention kernel. Everything else in this room
speaks of factors `a` (*stack, *lanes, m, r) and `b` (*stack, *lanes, r, n), where `stack` are the
leading axes that `nnx.vmap` puts in front of every parameter and that `nnx.scan` takes off again.
"""

import math
import string
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array


class Axes(NamedTuple):
    """Which axes of a kernel are inputs and which are outputs; the others are lanes.

    Attributes:
      inputs: axes of the kernel that make the rows of the matrix.
      outputs: axes of the kernel that make its columns.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Layout(Protocol):
    """A kernel as a stack of matrices. `shape`, `lanes`, `stack` are known without its values."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): rows and columns of one matrix."""
        ...

    @property
    def lanes(self) -> tuple[int, ...]:
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
        """The kernel as (*stack, *lanes, m, n)."""
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


def kernel_variable(module: nnx.Module) -> nnx.Variable:
    """The Variable that holds a layer's kernel: `embedding` for an Embed, else `kernel`."""
    return module.embedding if isinstance(module, nnx.Embed) else module.kernel  # type: ignore


def kernel_name(module: nnx.Module) -> str:
    """The name of the attribute that `kernel_variable` reads."""
    return "embedding" if isinstance(module, nnx.Embed) else "kernel"


def _letters(count: int, taken: str = "") -> str:
    return "".join([c for c in string.ascii_letters if c not in taken][:count])


class Contraction:
    """Linear, LinearGeneral and Einsum: the layer contracts its input with the kernel.

    Args:
      module: the layer.
      axes: overrides which kernel axes are inputs and outputs. Inputs must be among the axes that
        the layer contracts, outputs among those it does not.
    """

    def __init__(self, module: nnx.Module, axes: Axes | None = None):
        self.module = module
        kernel = self.terms(None)[1]
        contracted = self.contracted
        shape = kernel_variable(module).shape
        self.stack = tuple(shape[: len(shape) - len(kernel)])
        self.kernel_shape = tuple(shape[len(self.stack) :])
        x, _, out = self.terms(None)
        produced = [i for i, c in enumerate(kernel) if i not in contracted and c not in x]
        summed = [i for i, c in enumerate(kernel) if c not in x and c not in out]
        if summed:
            raise ValueError(
                f"the einsum of the layer sums axis {summed[0]} of its kernel away, so that no "
                "low-rank path through the factors exists; leave the layer out of the targets."
            )
        if axes is None:
            axes = Axes(tuple(contracted), tuple(produced))
        rank = len(kernel)
        inputs, outputs = (_normalized(a, rank, len(self.stack)) for a in axes)
        if not set(inputs) <= set(contracted) or not set(outputs) <= set(produced):
            raise ValueError(
                f"axes are inputs {axes.inputs} and outputs {axes.outputs}; of the layer's kernel "
                f"of shape {self.kernel_shape} only {tuple(contracted)} are contracted with the "
                f"input and only {tuple(produced)} go to the output."
            )
        if not inputs or not outputs:
            raise ValueError(
                f"axes are inputs {inputs} and outputs {outputs}; a matrix needs at least one axis "
                "of each."
            )
        self.axes = Axes(inputs, outputs)
        self.lane_axes = tuple(i for i in range(rank) if i not in inputs + outputs)

    @property
    def contracted(self) -> list[int]:
        """Kernel axes that are summed over together with an axis of the input."""
        x, kernel, out = self.terms(None)
        return [i for i, c in enumerate(kernel) if c in x and c not in out]

    def terms(self, ndim: int | None) -> tuple[str, str, str]:
        """The einsum terms of input, kernel and output, for an input of `ndim` axes.

        Without `ndim` any representative will do, since the roles of the kernel's axes do not
        depend on it.
        """
        module = self.module
        if isinstance(module, nnx.Linear):
            return "...a", "ab", "...b"
        if isinstance(module, nnx.Einsum):
            if module.einsum_str is None:
                raise ValueError(
                    "the Einsum layer takes its equation at the call, so its axes are unknown; "
                    "give it an einsum_str."
                )
            left, out = module.einsum_str.split("->")
            x, kernel = left.split(",")
            if "." in kernel or len(set(kernel)) < len(kernel):
                raise ValueError(
                    f"the equation {module.einsum_str!r} has an ellipsis or a repeated index in "
                    "its kernel; only kernels whose axes are all named can be adapted."
                )
            return x, kernel, out
        assert isinstance(module, nnx.LinearGeneral)
        batch = len(module.batch_axis)
        if ndim is None:
            ndim = 1 + batch + max([len(module.axis), *(-a for a in module.axis), *module.axis])
        x = list(_letters(ndim))
        axis = sorted(int(a) % ndim for a in module.axis)
        # Flax sorts the contracted axes, and puts batch axes first in the output.
        lanes = [x[a] for a in sorted(int(a) % ndim for a in tuple(module.batch_axis))]
        ins = [x[a] for a in axis]
        outs = list(_letters(len(module.out_features), "".join(x)))
        free = [c for c in x if c not in ins and c not in lanes]
        return "".join(x), "".join(lanes + ins + outs), "".join(lanes + free + outs)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): rows and columns of one matrix."""
        size = self.kernel_shape
        return (
            math.prod(size[i] for i in self.axes.inputs),
            math.prod(size[i] for i in self.axes.outputs),
        )

    @property
    def lanes(self) -> tuple[int, ...]:
        """Sizes of the kernel axes that are neither inputs nor outputs."""
        return tuple(self.kernel_shape[i] for i in self.lane_axes)

    def matrix(self, kernel: Array) -> Array:
        """The kernel as (*stack, *lanes, m, n)."""
        lead = kernel.ndim - len(self.kernel_shape)
        order = [*self.lane_axes, *self.axes.inputs, *self.axes.outputs]
        moved = jnp.transpose(kernel, [*range(lead), *(lead + i for i in order)])
        return moved.reshape(kernel.shape[:lead] + self.lanes + self.shape)

    def kernel(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""
        lead = matrix.ndim - 2 - len(self.lanes)
        order = [*self.lane_axes, *self.axes.inputs, *self.axes.outputs]
        moved = matrix.reshape(matrix.shape[:lead] + tuple(self.kernel_shape[i] for i in order))
        back = np.argsort(order)
        return jnp.transpose(moved, [*range(lead), *(lead + int(i) for i in back)])

    def apply(self, x: Array, a: Array, b: Array, out_sharding: Any = None) -> Array:
        """The layer's output for the kernel `a b`, which is never formed."""
        x_term, kernel, out = self.terms(x.ndim)
        lanes = "".join(kernel[i] for i in self.lane_axes)
        ins = "".join(kernel[i] for i in self.axes.inputs)
        outs = "".join(kernel[i] for i in self.axes.outputs)
        (r,) = _letters(1, x_term + kernel + out)
        size = dict(zip(kernel, self.kernel_shape, strict=True))
        a = a.reshape([*(size[c] for c in lanes + ins), a.shape[-1]])
        b = b.reshape([*(size[c] for c in lanes), b.shape[-2], *(size[c] for c in outs)])
        kept = "".join(c for c in x_term if c not in ins and (c in out + kernel or c == "."))
        middle = kept + "".join(c for c in lanes if c not in kept) + r
        precision = self.module.precision  # type: ignore[attr-defined]
        hidden = jnp.einsum(f"{x_term},{lanes + ins + r}->{middle}", x, a, precision=precision)
        sharding = {} if out_sharding is None else {"out_sharding": out_sharding}
        return jnp.einsum(
            f"{middle},{lanes + r + outs}->{out}", hidden, b, precision=precision, **sharding
        )

    def apply_tucker(self, x: Array, core: Array, factors: tuple[Array, ...]) -> Array:
        """The layer's output for the kernel `core ×_i factors[i]`, which is never formed."""
        x_term, kernel, out = self.terms(x.ndim)
        ranks = _letters(len(kernel), x_term + kernel + out)
        # Inputs first and outputs last keeps the largest intermediate at the size of the ranks;
        # einsum finds that order, and any better one, by itself.
        modes = ",".join(c + r for c, r in zip(kernel, ranks, strict=True))
        equation = f"{x_term},{modes},{ranks}->{out}"
        return jnp.einsum(
            equation,
            x,
            *factors,
            core,
            precision=self.module.precision,  # type: ignore[attr-defined]
            optimize="optimal",
        )

    def rows(self, x: Array) -> Array:
        """The inputs as the matrix's left factor sees them, shape (samples, m)."""
        if self.lanes:
            raise ValueError("a layer with lanes sees different inputs in each of them.")
        x_term, kernel, out = self.terms(x.ndim)
        ins = "".join(kernel[i] for i in self.axes.inputs)
        kept = "".join(c for c in x_term if c not in ins and (c in out or c == "."))
        moved = jnp.einsum(f"{x_term}->{kept}{ins}", x)
        return moved.reshape(-1, self.shape[0])

    def bias(self, y: Array) -> Array | None:
        """The layer's bias, shaped to be added to the output `y`; None without one."""
        variable = self.module.bias  # type: ignore[attr-defined]
        if variable is None:
            return None
        kernel, out = self._output(y.ndim)
        size = dict(zip(kernel, self.kernel_shape, strict=True))
        return variable[...].reshape([size.get(c, 1) for c in out])

    def columns(self, scale: Array, y: Array) -> Array:
        """A number for each column, (n,), shaped to be multiplied with the output `y`."""
        kernel, out = self._output(y.ndim)
        outs = [kernel[i] for i in self.axes.outputs]
        size = dict(zip(kernel, self.kernel_shape, strict=True))
        scale = scale.reshape([size[c] for c in outs])
        order = sorted(range(len(outs)), key=lambda i: out.index(outs[i]))
        scale = jnp.transpose(scale, order)
        return scale.reshape([size[c] if c in outs else 1 for c in out])

    def _output(self, ndim: int) -> tuple[str, str]:
        """Kernel and output term for an output of `ndim` axes, ellipsis written out."""
        if isinstance(self.module, nnx.LinearGeneral):
            added = len(self.module.out_features) - len(self.module.in_features)
            _, kernel, out = self.terms(ndim - added)
            return kernel, out
        _, kernel, out = self.terms(None)
        named = len(out.replace(".", ""))
        return kernel, out.replace("...", "." * (ndim - named))


class Convolution:
    """Conv: rows are the kernel's window and the input channels of one group, columns the outputs.

    With `feature_group_count` g the kernel is (*window, in/g, out), so that A is shared by the
    groups and each column of B belongs to one of them. The update is a rank-r matrix whatever the
    stride, padding, dilation and number of spatial axes, since those say how the kernel is applied.
    """

    def __init__(self, module: nnx.Conv, axes: Axes | None = None):
        if axes is not None:
            raise ValueError("axes are given for a Conv, whose inputs and outputs are fixed.")
        if module.mask is not None:
            raise ValueError(
                "the Conv layer has a mask, and a masked low-rank update is not low-rank; leave "
                "the layer out of the targets."
            )
        self.module = module
        shape = module.kernel.shape
        rank = len(module.kernel_size) + 2
        self.stack = tuple(shape[: len(shape) - rank])
        self.kernel_shape = tuple(shape[len(self.stack) :])
        self.groups = module.feature_group_count
        self.lanes: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(window · in / groups, out)."""
        return math.prod(self.kernel_shape[:-1]), self.kernel_shape[-1]

    def matrix(self, kernel: Array) -> Array:
        """The kernel as (*stack, m, n)."""
        return kernel.reshape(kernel.shape[: -len(self.kernel_shape)] + self.shape)

    def kernel(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""
        return matrix.reshape(matrix.shape[:-2] + self.kernel_shape)

    def convolve(self, x: Array, kernel: Array, **changes: Any) -> Array:
        """The layer's own convolution, padding and all, with another kernel and no bias."""
        layer = self.module
        stand_in = SimpleNamespace(
            kernel=kernel,
            kernel_shape=kernel.shape,
            bias=None,
            use_bias=False,
            mask=None,
            dtype=kernel.dtype,
            **{
                name: getattr(layer, name)
                for name in (
                    "in_features",
                    "kernel_size",
                    "strides",
                    "padding",
                    "input_dilation",
                    "kernel_dilation",
                    "feature_group_count",
                    "conv_general_dilated",
                    "precision",
                    "promote_dtype",
                    "preferred_element_type",
                )
            },
        )
        vars(stand_in).update(changes)
        # Flax's own code, so that its padding modes can never be read differently here.
        return nnx.Conv.__call__(stand_in, x)  # type: ignore[arg-type]

    def apply(self, x: Array, a: Array, b: Array, out_sharding: Any = None) -> Array:
        """The layer's output for the kernel `a b`, which is never formed."""
        kernel = a.reshape([*self.kernel_shape[:-1], a.shape[-1]])
        return self._expand(self._grouped(x, kernel), b, out_sharding)

    def apply_tucker(self, x: Array, core: Array, factors: tuple[Array, ...]) -> Array:
        """The layer's output for the kernel `core ×_i factors[i]`, which is never formed."""
        *window, inputs, outputs = factors
        kernel = core
        for axis, factor in enumerate(window):
            kernel = jnp.moveaxis(jnp.tensordot(factor, kernel, axes=(1, axis)), 0, axis)
        g = self.groups
        channels = x.reshape([*x.shape[:-1], g, x.shape[-1] // g])
        narrow = jnp.einsum("...gc,cr->...gr", channels, inputs)
        narrow = narrow.reshape([*x.shape[:-1], -1])
        hidden = self._grouped(narrow, kernel, in_features=narrow.shape[-1])
        return self._expand(hidden, outputs.T)

    def _grouped(self, x: Array, kernel: Array, **changes: Any) -> Array:
        """Convolves every group with the same kernel; shape (..., groups · r)."""
        if self.groups > 1:
            kernel = jnp.concatenate([kernel] * self.groups, axis=-1)
        return self.convolve(x, kernel, **changes)

    def _expand(self, hidden: Array, b: Array, out_sharding: Any = None) -> Array:
        sharding = {} if out_sharding is None else {"out_sharding": out_sharding}
        precision = self.module.precision
        if self.groups == 1:
            return jnp.einsum("...r,rn->...n", hidden, b, precision=precision, **sharding)
        r, n = b.shape
        hidden = hidden.reshape([*hidden.shape[:-1], self.groups, r])
        b = b.reshape(r, self.groups, n // self.groups)
        y = jnp.einsum("...gr,rgn->...gn", hidden, b, precision=precision)
        return y.reshape([*y.shape[:-2], n])

    def rows(self, x: Array) -> Array:
        """Every window of the input as a row; the groups' windows are samples of their own."""
        m = self.shape[0]
        # The identity as the kernel of a convolution copies each window into the channels.
        patches = self._grouped(x, jnp.eye(m, dtype=x.dtype).reshape(*self.kernel_shape[:-1], m))
        return patches.reshape(-1, m)

    def bias(self, y: Array) -> Array | None:
        """The layer's bias, shaped to be added to the output `y`; None without one."""
        if self.module.bias is None:
            return None
        return self.module.bias[...].reshape([1] * (y.ndim - 1) + [-1])

    def columns(self, scale: Array, y: Array) -> Array:
        """A number for each column, (n,), shaped to be multiplied with the output `y`."""
        return scale.reshape([1] * (y.ndim - 1) + [-1])


class Lookup:
    """Embed: rows are the tokens, columns the features."""

    def __init__(self, module: nnx.Embed, axes: Axes | None = None):
        if axes is not None:
            raise ValueError("axes are given for an Embed, whose rows and columns are fixed.")
        self.module = module
        shape = module.embedding.shape
        self.stack = tuple(shape[:-2])
        self.kernel_shape = tuple(shape[-2:])
        self.lanes: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """(number of embeddings, features)."""
        return self.kernel_shape[0], self.kernel_shape[1]

    def matrix(self, kernel: Array) -> Array:
        """The embedding itself."""
        return kernel

    def kernel(self, matrix: Array) -> Array:
        """The embedding itself."""
        return matrix

    def take(self, x: Array, table: Array) -> Array:
        """Rows of a table, with the one row of a table of one for every index, as Flax has it."""
        return jnp.take(table, jnp.zeros_like(x) if self.shape[0] == 1 else x, axis=0)

    def apply(self, x: Array, a: Array, b: Array, out_sharding: Any = None) -> Array:
        """The rows of `a b` at the indices `x`."""
        sharding = {} if out_sharding is None else {"out_sharding": out_sharding}
        return jnp.einsum("...r,rn->...n", self.take(x, a), b, **sharding)

    def attend(self, query: Array, a: Array, b: Array) -> Array:
        """The logits `query (a b)ᵀ`."""
        return jnp.einsum("...n,rn,vr->...v", query, b, a, optimize="optimal")

    def apply_tucker(self, x: Array, core: Array, factors: tuple[Array, ...]) -> Array:
        """The rows of `U₁ core U₂ᵀ` at the indices `x`."""
        return self.take(x, factors[0]) @ (core @ factors[1].T)

    def rows(self, x: Array) -> Array:
        """An Embed's inputs are indices, not vectors."""
        raise ValueError("an Embed's inputs are indices, which have no second moment.")

    def bias(self, y: Array) -> Array | None:
        """An Embed has none."""
        return None

    def columns(self, scale: Array, y: Array) -> Array:
        """A number for each column, (n,), shaped to be multiplied with the output `y`."""
        return scale.reshape([1] * (y.ndim - 1) + [-1])


_LAYOUTS = {
    nnx.Linear: Contraction,
    nnx.LinearGeneral: Contraction,
    nnx.Einsum: Contraction,
    nnx.Conv: Convolution,
    nnx.Embed: Lookup,
}
ADAPTABLE = ", ".join(kind.__name__ for kind in _LAYOUTS)


def is_adaptable(module: Any) -> bool:
    """Whether an adapter fits the module: one of Flax's layers, called as Flax calls it.

    A subclass with a `__call__` of its own is left out, since what it does with the kernel is its
    own business.
    """
    return any(
        isinstance(module, kind) and type(module).__call__ is kind.__call__ for kind in _LAYOUTS
    )


def layout(module: nnx.Module, axes: Axes | None = None) -> Contraction | Convolution | Lookup:
    """The layout of a layer.

    Args:
      module: a Linear, LinearGeneral, Einsum, Conv or Embed of Flax NNX.
      axes: for Linear, LinearGeneral and Einsum, which kernel axes are inputs and outputs; the
        layer's own contraction if None. Axes in neither are lanes with factors of their own.

    Returns:
      The Layout that reads the layer's kernel as a matrix.

    Raises:
      ValueError: for another kind of module, or axes that do not fit the layer.

    Example:
      >>> from flax import nnx
      >>> from lorajax.adapters import Axes, layout
      >>> query = nnx.LinearGeneral(16, (4, 8), rngs=nnx.Rngs(0))
      >>> layout(query).shape, layout(query, Axes((0,), (2,))).lanes
      ((16, 32), (4,))
    """
    for kind, reader in _LAYOUTS.items():
        if isinstance(module, kind) and is_adaptable(module):
            return reader(module, axes)  # type: ignore[arg-type]
    raise ValueError(f"a {type(module).__name__} cannot be adapted; these can: {ADAPTABLE}.")


def _normalized(axes: tuple[int, ...], rank: int, stack: int) -> tuple[int, ...]:
    """Kernel axes counted from 0 behind the stack."""
    for axis in axes:
        if not -rank <= axis < rank:
            raise ValueError(
                f"axes name {axis}; the kernel has {rank} axes"
                + (f" behind its {stack} stacked ones." if stack else ".")
            )
    found = tuple(axis % rank for axis in axes)
    if len(set(found)) < len(found):
        raise ValueError(f"axes name {axes}; each axis may be named once.")
    return found
