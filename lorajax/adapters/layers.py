"""What all adapters have in common, and the layer that carries them beside an untouched base layer.

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
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lorajax.adapters.layouts import Axes, kernel_variable, with_kernel
from lorajax.environment.judging import POSITIVE, SHARE, judged


class Frozen(nnx.Variable):
    """An array of an adapter that never trains: the offset that a start takes off the weight."""


class Adapter(nnx.Module):
    """An update of a layer's kernel, with parameters of its own: the base of every kind of adapter.

    A kind says what its `kind`, `rank` and `update` are, holds its parameters as `nnx.LoRAParam`,
    and calls `super().__init__` once it has them, since the rank that alpha is divided by is read
    off them. `__call__` and `attend` are right as they are; a kind that can do without forming the
    update overrides them.

    Args:
      alpha: numerator of the scaling; None for a scaling of 1.
      rslora: divide alpha by √rank instead of by the rank.
      start: name of the start, for `describe`.
      axes: which axes of the kernel are inputs and outputs; the layer's own if None.
      dropout: rate at which entries of the adapter's input are dropped in training.
      rngs: for dropout.
      attends: whether the adapter of an Embed acts in `Embed.attend`, too.

    Attributes:
      alpha: numerator of the scaling.
      dropout: drops entries of the adapter's input in training, or None.
      peft: how PEFT's files hold this kind (`adapters.PeftMethod`); None where PEFT has none.

    Raises:
      ValueError: for an alpha that is not positive and finite, or a dropout outside of [0, 1).
    """

    peft: ClassVar[Any] = None

    @judged(alpha=POSITIVE, dropout=SHARE)
    def __init__(
        self,
        alpha: float | int | None = None,
        *,
        rslora: bool = False,
        start: str = "given",
        axes: Axes | None = None,
        dropout: float | int = 0.0,
        rngs: nnx.Rngs | None = None,
        attends: bool = True,
    ):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must lie in [0, 1).")
        if alpha is None:
            # Scaling 1 at any rank, so that leaving alpha out can make nothing too strong.
            alpha = math.sqrt(self.rank) if rslora else float(self.rank)
        if not alpha > 0 or not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}; it must be positive and finite.")
        self.alpha = float(alpha)
        self.rslora = bool(rslora)
        self.start = start
        self.axes = None if axes is None else Axes(*map(tuple, axes))
        self.attends = bool(attends)
        self.dropout = nnx.data(
            nnx.Dropout(dropout, rngs=rngs if rngs is not None else nnx.Rngs(0))
            if dropout
            else None
        )

    @property
    @abc.abstractmethod
    def kind(self) -> str:
        """The method's name."""

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

    @property
    def shared(self) -> Any:
        """What several layers have in common, so that it is counted once; None for nothing."""
        return None

    def dropped(self, x: Array) -> Array:
        """The input in the adapter's dtype, some entries of it dropped in training."""
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x  # indices
        x = x.astype(self.dtype)
        return x if self.dropout is None else self.dropout(x)

    @abc.abstractmethod
    def update(self, base: nnx.Module) -> Array:
        """The change of the base's kernel, in the kernel's shape and the adapter's dtype."""

    def bias_update(self, base: nnx.Module) -> Array | None:
        """The change of the base's bias, which merging needs; None for a kind that leaves it."""
        del base
        return None

    def __call__(self, base: nnx.Module, x: Array, y: Array, out_sharding: Any = None) -> Array:
        """What is added to the base's output `y` at the input `x`, in the adapter's dtype."""
        del y
        options = {} if out_sharding is None else {"out_sharding": out_sharding}
        return with_kernel(base, self.update(base))(self.dropped(x), **options)

    def attend(self, base: nnx.Embed, query: Array) -> Array:
        """What is added to the logits of `Embed.attend`."""
        return query.astype(self.dtype) @ self.update(base).T


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

    @judged
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
        """For an Embed: logits of the query against the table, adapted where adapters attend."""
        attending = [self.adapters[name].attends for name, _ in self.active]
        if self.unmerged is not None and all(attending):
            return self.base.attend(query, *args, **kwargs)
        # One merged table cannot be both that of the lookup and that of the logits.
        base = self.base if self.unmerged is None else self.unmerged
        y = base.attend(query, *args, **kwargs)
        return self._add(
            y, lambda adapter: adapter.attend(base, query) if adapter.attends else None
        )

    def _add(self, y: Array, change: Any) -> Array:
        total = None
        for name, weight in self.active:
            term = change(self.adapters[name])
            if term is None:
                continue
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


@judged
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


def effective_bias(layer: Adapted) -> Array | None:
    """The bias that a layer, not merged, acts with; None where no active adapter changes it.

    Args:
      layer: an adapted layer.

    Returns:
      `b + Σ weight · change`, computed in the adapters' dtype and rounded once.
    """
    total = None
    for name, weight in layer.active:
        change = layer.adapters[name].bias_update(layer.base)
        if change is not None:
            change = weight * change
            total = change if total is None else total + change.astype(total.dtype)
    return None if total is None else _rounded_sum(layer.base.bias[...], total)


def _rounded_sum(x: Array, change: Array) -> Array:
    """`x + change` in the wider of their dtypes, rounded once to that of `x`."""
    # Casts are explicit throughout; only the question which dtype is wider needs the lattice.
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.promote_types(x.dtype, change.dtype)
    return (x.astype(wide) + change.astype(wide)).astype(x.dtype)
