"""The adapters themselves, and the layer that carries them beside an untouched base layer.

Trainable leaves are `nnx.LoRAParam`, which is an `nnx.Param`: a filter on `nnx.Param` takes the
base along, so filter by the narrower type, or with `trainable`. Leaves that belong to an adapter
but never train, the offset of a start, are `Frozen`, which is not a Param at all.

Mixed precision: factors are float32 by default whatever the base is. The base computes in its own
dtype; the adapter reads the same input, computes in the dtype of its factors, and the sum is
rounded once to the dtype of the base's output. So a bfloat16 base with float32 factors is trained
with float32 gradients and optimizer state, and small updates are not lost to rounding.
"""

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lorajax.adapters.layouts import Axes, Lookup, kernel_variable, layout
from lorajax.factors import Factors
from lorajax.initializers import TuckerFactors


class Frozen(nnx.Variable):
    """An array of an adapter that never trains: the offset that a start takes off the weight."""


class Adapter(nnx.Module):
    """What the adapters have in common.

    Attributes:
      alpha: numerator of the scaling.
      rslora: divide alpha by √rank instead of by the rank.
      start: name of the start, for `describe`.
      axes: which axes of the kernel are inputs and outputs; the layer's own if None.
      dropout: drops entries of the adapter's input in training, or None.
    """

    alpha: float
    rslora: bool
    start: str
    axes: Axes | None
    dropout: nnx.Dropout | None

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """The method's name."""

    def _describe(
        self,
        alpha: float | int | None,
        rank: int,
        *,
        rslora: bool = False,
        start: str = "given",
        axes: Axes | None = None,
        dropout: float | int = 0.0,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must lie in [0, 1).")
        if alpha is None:
            # Scaling 1 at any rank, so that leaving alpha out can make nothing too strong.
            alpha = math.sqrt(rank) if rslora else float(rank)
        if not alpha > 0 or not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}; it must be positive and finite.")
        self.alpha = float(alpha)
        self.rslora = bool(rslora)
        self.start = start
        self.axes = None if axes is None else Axes(*map(tuple, axes))
        self.dropout = nnx.data(
            nnx.Dropout(dropout, rngs=rngs if rngs is not None else nnx.Rngs(0))
            if dropout
            else None
        )

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """The rank that alpha is divided by."""

    @property
    def scaling(self) -> float:
        """The factor in front of the update: alpha/r, or alpha/√r for rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def dtype(self) -> Any:
        """The dtype that the adapter computes in: that of its parameters."""
        leaves = jax.tree.leaves(nnx.state(self, nnx.LoRAParam))
        return leaves[0].dtype

    @property
    def parameters(self) -> int:
        """Number of trainable entries."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.LoRAParam)))

    def _input(self, x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x  # indices
        x = x.astype(self.dtype)
        return x if self.dropout is None else self.dropout(x)

    @abc.abstractmethod
    def update(self, base: nnx.Module) -> Array:
        """The change of the base's kernel, in the kernel's shape and the adapter's dtype."""

    @abc.abstractmethod
    def __call__(self, base: nnx.Module, x: Array, y: Array, out_sharding: Any = None) -> Array:
        """What is added to the base's output `y` at the input `x`, in the adapter's dtype."""


class LoRA(Adapter):
    """A low-rank update `s A B`, minus the offset of its start, and DoRA's magnitudes.

    The adapted kernel, read as a matrix, is `V = W − s A₀B₀ + s A B`, where `A₀B₀` is the offset,
    or with magnitudes μ it is `V diag(μ / ‖V‖)` with ‖·‖ the norm of each column. The norms are
    treated as constants in the gradient, as DoRA's paper and PEFT have it.

    Args:
      factors: A (*stack, *lanes, m, r) and B (*stack, *lanes, r, n), floating point.
      offset: the start's offset, in the same shapes; None for none.
      magnitude: μ (*stack, n) for DoRA; None for plain LoRA.
      alpha: numerator of the scaling; None for a scaling of 1.
      options: `rslora`, `start`, `axes`, `dropout`, `rngs`, as the attributes of `Adapter`.

    Source: Hu et al. 2021 (arXiv:2106.09685); Kalajdzievski 2023 (arXiv:2312.03732) for rsLoRA; Liu
    et al. 2024 (arXiv:2402.09353) for DoRA. Recalled.
    """

    def __init__(
        self,
        factors: Factors,
        offset: Factors | None = None,
        magnitude: Array | None = None,
        *,
        alpha: float | int | None = None,
        **options: Any,
    ):
        self.a = nnx.LoRAParam(factors.a)
        self.b = nnx.LoRAParam(factors.b)
        self.offset_a = nnx.data(None if offset is None else Frozen(offset.a))
        self.offset_b = nnx.data(None if offset is None else Frozen(offset.b))
        self.magnitude = nnx.data(None if magnitude is None else nnx.LoRAParam(magnitude))
        self._describe(alpha, factors.rank, **options)

    @property
    def kind(self) -> str:
        """The method's name."""
        return "LoRA" if self.magnitude is None else "DoRA"

    @property
    def rank(self) -> int:
        """The inner dimension of the factors."""
        return self.a.shape[-1]

    @property
    def factors(self) -> Factors:
        """The trainable factors as arrays, without the scaling."""
        return Factors(self.a[...], self.b[...])

    @property
    def offset(self) -> Factors | None:
        """The start's offset as arrays, or None."""
        if self.offset_a is None or self.offset_b is None:
            return None
        return Factors(self.offset_a[...], self.offset_b[...])

    def matrix_update(self) -> Array:
        """`s (A B − A₀B₀)`, without the magnitudes."""
        update = self.factors.product
        if (offset := self.offset) is not None:
            update = update - offset.product
        return self.scaling * update

    def norms(self, base: nnx.Module) -> Array:
        """The norm of each column of `W + s (A B − A₀B₀)`, (*stack, n), no matrix formed.

        Expanded, a column's squared norm is `‖w‖² + 2s wᵀ(Ab) + s² bᵀ(AᵀA)b`, so that the m×n
        products are only ever those with r columns.
        """
        view = layout(base, self.axes)
        w = view.matrix(kernel_variable(base)[...]).astype(self.dtype)
        a, b = self.factors
        if (offset := self.offset) is not None:
            a = jnp.concatenate([a, offset.a], axis=-1)
            b = jnp.concatenate([b, -offset.b], axis=-2)
        s = self.scaling
        cross = jnp.sum((a.mT @ w) * b, axis=-2)
        square = jnp.sum(((a.mT @ a) @ b) * b, axis=-2)
        return jnp.sqrt(jnp.maximum(jnp.sum(w * w, axis=-2) + 2 * s * cross + s * s * square, 0))

    def update(self, base: nnx.Module) -> Array:
        """The change of the base's kernel, in the kernel's shape and the adapter's dtype."""
        view = layout(base, self.axes)
        update = self.matrix_update()
        if self.magnitude is not None:
            w = view.matrix(kernel_variable(base)[...]).astype(self.dtype)
            gain = self.magnitude[...] / jax.lax.stop_gradient(self.norms(base))
            update = gain[..., None, :] * (w + update) - w
        return view.kernel(update)

    def __call__(self, base: nnx.Module, x: Array, y: Array, out_sharding: Any = None) -> Array:
        """What is added to the base's output `y` at the input `x`, in the adapter's dtype."""
        view = layout(base, self.axes)
        x = self._input(x)
        # The scaling goes onto B, which is smaller than anything that leads with the samples.
        a, b = self.factors
        change = view.apply(x, a, self.scaling * b, out_sharding)
        if (offset := self.offset) is not None:
            # Apart, not as one product of rank 2r: at the start the two cancel to the last bit.
            change = change - view.apply(x, offset.a, self.scaling * offset.b, out_sharding)
        if self.magnitude is None:
            return change
        gain = view.columns(self.magnitude[...] / jax.lax.stop_gradient(self.norms(base)), y)
        y = y.astype(self.dtype)
        bias = view.bias(y)
        linear = y if bias is None else y - bias.astype(self.dtype)
        return (gain - 1) * linear + gain * change

    def attend(self, base: nnx.Embed, query: Array) -> Array:
        """What is added to the logits of `Embed.attend`."""
        view = layout(base)
        assert isinstance(view, Lookup)
        query = query.astype(self.dtype)
        if self.magnitude is not None:
            table = (base.embedding[...].astype(self.dtype) + self.matrix_update()).T
            gain = self.magnitude[...] / jax.lax.stop_gradient(self.norms(base))
            weight = base.embedding[...].astype(self.dtype).T
            return query @ (gain[:, None] * table - weight)
        change = view.attend(query, *self.factors)
        if (offset := self.offset) is not None:
            change = change - view.attend(query, *offset)
        return self.scaling * change


class AdaLoRA(LoRA):
    """An update in the form of an SVD, `s P diag(E) Q`, whose entries of E are pruned to a budget.

    `a` holds P (m, r), `b` holds Q (r, n), `e` the singular values E. A pruned direction has E = 0
    and may come back while the budget is still above the final one; see `budget`.

    Args:
      factors: P and Q.
      e: E, (*stack, *lanes, r).
      alpha: numerator of the scaling; None for a scaling of 1.
      options: as for `LoRA`.

    Source: Zhang et al. 2023 (arXiv:2303.10512), recalled.
    """

    def __init__(
        self, factors: Factors, e: Array, *, alpha: float | int | None = None, **options: Any
    ):
        super().__init__(factors, alpha=alpha, **options)
        self.e = nnx.LoRAParam(e)

    @property
    def kind(self) -> str:
        """The method's name."""
        return "AdaLoRA"

    @property
    def factors(self) -> Factors:
        """`P diag(E)` and Q."""
        return Factors(self.a[...] * self.e[...][..., None, :], self.b[...])


class Tucker(Adapter):
    """A Tucker update `s core ×₁ U₁ ×₂ U₂ …` of the kernel, read as a tensor of all its axes.

    The modes are the axes of the kernel: window, inputs and outputs of a convolution; features,
    heads and head size of an attention kernel. Tied across layers, the first mode is the layer: the
    layers share core and factors, and each of them has its own row of the first factor.

    Args:
      tucker: core and factors.
      layer: for a tied update, which row of the first factor is this layer's.
      alpha: numerator of the scaling; None for a scaling of 1.
      shared: for a tied update, the adapter whose Variables this one shares.
      options: as for `LoRA`, without `axes`.

    The rank that alpha is divided by is the largest of the multilinear ranks of the kernel's modes.

    Source: Tucker-LoRA as OpenReview gg2Wb2HPOI has it, stated; the layout of its modes is this
    toolkit's.
    """

    def __init__(
        self,
        tucker: TuckerFactors,
        *,
        layer: int | None = None,
        alpha: float | int | None = None,
        shared: "Tucker | None" = None,
        **options: Any,
    ):
        self.layer = layer
        if shared is None:
            self.core = nnx.LoRAParam(tucker.core)
            self.modes = nnx.List([nnx.LoRAParam(factor) for factor in tucker.factors])
        else:
            self.core = shared.core
            self.modes = nnx.List(list(shared.modes))
        self._describe(alpha, self.rank, **options)

    @property
    def kind(self) -> str:
        """The method's name."""
        return "Tucker"

    @property
    def ranks(self) -> tuple[int, ...]:
        """The multilinear ranks, one a mode."""
        return tuple(mode.shape[-1] for mode in self.modes)

    @property
    def rank(self) -> int:
        """The largest multilinear rank, by which alpha is divided."""
        return max(self.ranks if self.layer is None else self.ranks[1:])

    @property
    def tucker(self) -> TuckerFactors:
        """Core and factors of this layer's update as arrays, without the scaling."""
        core = self.core[...]
        factors = tuple(mode[...] for mode in self.modes)
        if self.layer is None:
            return TuckerFactors(core, factors)
        return TuckerFactors(jnp.tensordot(factors[0][self.layer], core, axes=1), factors[1:])

    def update(self, base: nnx.Module) -> Array:
        """The change of the base's kernel, in the kernel's shape and the adapter's dtype."""
        stack = layout(base).stack
        tucker = self.tucker
        if not stack:
            return self.scaling * tucker.product
        product = lambda core, factors: TuckerFactors(core, factors).product  # noqa: E731
        for _ in stack:
            product = jax.vmap(product)
        return self.scaling * product(*tucker)

    def __call__(self, base: nnx.Module, x: Array, y: Array, out_sharding: Any = None) -> Array:
        """What is added to the base's output `y` at the input `x`, in the adapter's dtype."""
        core, factors = self.tucker
        return self.scaling * layout(base).apply_tucker(self._input(x), core, factors)

    def attend(self, base: nnx.Embed, query: Array) -> Array:
        """What is added to the logits of `Embed.attend`."""
        core, (rows, columns) = self.tucker
        narrow = (query.astype(self.dtype) @ columns) @ core.T
        return self.scaling * (narrow @ rows.T)


class Adapted(nnx.Module):
    """A base layer with its adapters, called as the base layer is.

    The base layer and its Variables are never written to. Attributes of the base that are no arrays
    (`in_features`, `padding`, …) can be read through this layer; its arrays cannot, since code that
    reads `layer.kernel` would silently go past the adapters: use `layer.base.kernel` or
    `effective_kernel(layer)`.

    Attributes:
      base: the layer that is adapted; while merged, a copy of it with the merged kernel.
      adapters: adapters by name.
      active: pairs of name and weight; the output is `base(x) + Σ weight · adapter(x)`.
      unmerged: while merged, the untouched base layer; else None.
    """

    def __init__(self, base: nnx.Module):
        self.base: Any = base
        self.adapters = nnx.Dict()
        self.active: tuple[tuple[str, float], ...] = ()
        self.unmerged: Any = nnx.data(None)

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        """Calls the base layer and adds what the active adapters say."""
        y = self.base(x, *args, **kwargs)  # type: ignore[operator]
        if self.unmerged is not None:
            return y
        sharding = kwargs.get("out_sharding")
        return self._add(y, lambda adapter: adapter(self.base, x, y, sharding))

    def attend(self, query: Array, *args: Any, **kwargs: Any) -> Array:
        """For an Embed: logits of the query against the adapted table."""
        y = self.base.attend(query, *args, **kwargs)  # type: ignore[attr-defined]
        if self.unmerged is not None:
            return y
        return self._add(y, lambda adapter: adapter.attend(self.base, query))

    def _add(self, y: Array, change: Any) -> Array:
        total = None
        for name, weight in self.active:
            term = change(self.adapters[name])
            term = term if weight == 1 else weight * term
            total = term if total is None else total + term.astype(total.dtype)
        if total is None:
            return y
        # One rounding, at the end, where the base computes in fewer bits than the adapter.
        return _rounded_sum(y, total)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("base", "adapters", "active", "unmerged"):
            raise AttributeError(name)
        value = getattr(self.base, name)
        if isinstance(value, (nnx.Variable, jax.Array)):
            raise AttributeError(
                f"{name} is an array of the base layer, and reading it goes past the adapters; use "
                f"layer.base.{name}, or adapters.effective_kernel(layer)."
            )
        return value


def effective_kernel(layer: Adapted) -> Array:
    """The kernel that an adapted layer acts with, in the dtype and shape of the base's.

    Args:
      layer: an adapted layer, merged or not.

    Returns:
      `W + Σ weight · update`, computed in the adapters' dtype and rounded once.
    """
    kernel = kernel_variable(layer.base)[...]
    if layer.unmerged is not None:
        return kernel
    total = None
    for name, weight in layer.active:
        update = weight * layer.adapters[name].update(layer.base)
        total = update if total is None else total + update.astype(total.dtype)
    if total is None:
        return kernel
    return _rounded_sum(kernel, total)


def _rounded_sum(x: Array, change: Array) -> Array:
    """`x + change` in the wider of their dtypes, rounded once to that of `x`."""
    # Casts are explicit throughout; only the question which dtype is wider needs the lattice.
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.promote_types(x.dtype, change.dtype)
    return (x.astype(wide) + change.astype(wide)).astype(x.dtype)


__all__ = [
    "AdaLoRA",
    "Adapted",
    "Adapter",
    "Frozen",
    "LoRA",
    "Tucker",
    "effective_kernel",
]
