"""Linear, LinearGeneral and Einsum: layers that contract their input with the kernel."""

import math
import string
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from lorajax.adapters.layouts.base import Axes, kernel_variable
from lorajax.environment.judging import judged


def _letters(count: int, taken: str = "") -> str:
    return "".join([c for c in string.ascii_letters if c not in taken][:count])


class Contraction:
    """Linear, LinearGeneral and Einsum: the layer contracts its input with the kernel.

    Args:
      module: the layer.
      axes: overrides which kernel axes are inputs and outputs. Inputs must be among the axes that
        the layer contracts, outputs among those it does not.
    """

    @judged
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
        self.slice_axes = tuple(i for i in range(rank) if i not in inputs + outputs)

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
        slices = [x[a] for a in sorted(int(a) % ndim for a in tuple(module.batch_axis))]
        ins = [x[a] for a in axis]
        outs = list(_letters(len(module.out_features), "".join(x)))
        free = [c for c in x if c not in ins and c not in slices]
        return "".join(x), "".join(slices + ins + outs), "".join(slices + free + outs)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): rows and columns of one matrix."""
        size = self.kernel_shape
        return (
            math.prod(size[i] for i in self.axes.inputs),
            math.prod(size[i] for i in self.axes.outputs),
        )

    @property
    def slices(self) -> tuple[int, ...]:
        """Sizes of the kernel axes that are neither inputs nor outputs."""
        return tuple(self.kernel_shape[i] for i in self.slice_axes)

    def matrix(self, kernel: Array) -> Array:
        """The kernel as (*stack, *slices, m, n)."""
        lead = kernel.ndim - len(self.kernel_shape)
        order = [*self.slice_axes, *self.axes.inputs, *self.axes.outputs]
        moved = jnp.transpose(kernel, [*range(lead), *(lead + i for i in order)])
        return moved.reshape(kernel.shape[:lead] + self.slices + self.shape)

    def kernel(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""
        lead = matrix.ndim - 2 - len(self.slices)
        order = [*self.slice_axes, *self.axes.inputs, *self.axes.outputs]
        moved = matrix.reshape(matrix.shape[:lead] + tuple(self.kernel_shape[i] for i in order))
        back = np.argsort(order)
        return jnp.transpose(moved, [*range(lead), *(lead + int(i) for i in back)])

    def apply(self, x: Array, a: Array, b: Array, out_sharding: Any = None) -> Array:
        """The layer's output for the kernel `a b`, which is never formed."""
        x_term, kernel, out = self.terms(x.ndim)
        slices = "".join(kernel[i] for i in self.slice_axes)
        ins = "".join(kernel[i] for i in self.axes.inputs)
        outs = "".join(kernel[i] for i in self.axes.outputs)
        (r,) = _letters(1, x_term + kernel + out)
        size = dict(zip(kernel, self.kernel_shape, strict=True))
        a = a.reshape([*(size[c] for c in slices + ins), a.shape[-1]])
        b = b.reshape([*(size[c] for c in slices), b.shape[-2], *(size[c] for c in outs)])
        kept = "".join(c for c in x_term if c not in ins and (c in out + kernel or c == "."))
        middle = kept + "".join(c for c in slices if c not in kept) + r
        precision = self.module.precision  # type: ignore[attr-defined]
        hidden = jnp.einsum(f"{x_term},{slices + ins + r}->{middle}", x, a, precision=precision)
        sharding = {} if out_sharding is None else {"out_sharding": out_sharding}
        return jnp.einsum(
            f"{middle},{slices + r + outs}->{out}", hidden, b, precision=precision, **sharding
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
        if self.slices:
            raise ValueError("a layer with slices sees different inputs in each of them.")
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
