"""Conv, of any number of spatial axes, with strides, dilation and groups."""

import math
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lorajax.adapters.layouts.base import Axes
from lorajax.environment.judging import judged


class Convolution:
    """Conv: rows are the kernel's window and the input channels of one group, columns the outputs.

    With `feature_group_count` g the kernel is (*window, in/g, out), so that A is shared by the
    groups and each column of B belongs to one of them. The update is a rank-r matrix whatever the
    stride, padding, dilation and number of spatial axes, since those say how the kernel is applied.
    """

    @judged
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
        self.slices: tuple[int, ...] = ()

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
