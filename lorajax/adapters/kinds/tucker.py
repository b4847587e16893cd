"""Tucker-LoRA: an update of the kernel as a tensor of all its axes, tied across layers or not."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lorajax.adapters import starts
from lorajax.adapters.kinds.base import Spec
from lorajax.adapters.layers import Adapter
from lorajax.adapters.layouts import Convolution, Layout, layout
from lorajax.adapters.starts import Site
from lorajax.environment.judging import POSITIVE, SHARE, at_least, judged
from lorajax.initializers import TuckerFactors
from lorajax.initializers.tensors import check_ranks


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

    @judged(alpha=POSITIVE)
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
        super().__init__(alpha, **options)

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
    def shared(self) -> Any:
        """The core that tied layers have in common."""
        return None if self.layer is None else self.core

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
        return self.scaling * layout(base).apply_tucker(self.dropped(x), core, factors)

    def attend(self, base: nnx.Embed, query: Array) -> Array:
        """What is added to the logits of `Embed.attend`."""
        core, (rows, columns) = self.tucker
        narrow = (query.astype(self.dtype) @ columns) @ core.T
        return self.scaling * (narrow @ rows.T)


@judged(alpha=POSITIVE, dropout=SHARE, rank=at_least(0))
@dataclasses.dataclass(frozen=True, kw_only=True)
class TuckerSpec(Spec):
    """Tucker-LoRA: a core and one factor for each axis of the kernel.

    Attributes:
      rank: one rank for all axes but those of a convolution's window, which stay whole, or one for
        each axis, None for a whole one. 0 leaves the layer alone.
      start: "tucker" if None, or "hosvd", or a function as `starts.fill_tucker` takes it.
      rslora: divide alpha by √r instead of by r.
      tied: one update for all the layers of the target, which becomes a tensor with the layer as
        its first mode; `rank` then leads with the rank of that mode.
    """

    name = "tucker"

    rank: int | Sequence[int | None] = 8
    start: str | Callable[..., Any] | None = None
    rslora: bool = False
    tied: bool = False

    @property
    def skips(self) -> bool:
        """Whether the rank is 0."""
        return isinstance(self.rank, int) and self.rank == 0 and not isinstance(self.rank, bool)

    def common(self, site: Site) -> dict[str, Any]:
        """What `Adapter.__init__` is told of these options."""
        name = starts.name_of(self.start or "tucker")
        return super().common(site) | {"rslora": self.rslora, "start": name}

    def build(self, site: Site) -> Tucker:
        """The Tucker adapter of one layer, with its stack in front of core and factors."""
        view = layout(site.base)
        ranks = self._ranks(view.kernel_shape, _window(view), site.path)
        count = math.prod(view.stack)
        keys = jax.random.split(site.key, count) if view.stack else [site.key]
        kernels: list[Array | None] = [None] * count
        if site.gradient is not None:
            kernel = view.kernel(site.gradient)
            kernels = list(kernel.reshape((count, *view.kernel_shape)))
        filled = [
            self._filled(site.path, key, view.kernel_shape, ranks, tensor)
            for key, tensor in zip(keys, kernels, strict=True)
        ]
        tucker = jax.tree.map(lambda *x: jnp.stack(x).reshape(view.stack + x[0].shape), *filled)
        return Tucker(tucker, **self.common(site))

    def build_all(self, sites: Sequence[Site]) -> dict[str, Adapter]:
        """The adapters of one target, which share one tensor where they are tied."""
        if not self.tied:
            return super().build_all(sites)
        first, views = sites[0], [layout(site.base) for site in sites]
        shape = views[0].kernel_shape
        for site, view in zip(sites, views, strict=True):
            same = view.kernel_shape == shape and type(site.base) is type(first.base)
            if not same or view.stack:
                raise ValueError(
                    f"tied layers must be of one kind and shape; {site.path!r} is a "
                    f"{type(site.base).__name__} of {view.stack + view.kernel_shape}, "
                    f"{first.path!r} a {type(first.base).__name__} of {shape}."
                )
        full = (len(sites), *shape)
        if isinstance(self.rank, int):
            inner = self._ranks(shape, _window(views[0]), first.path)
            ranks = (min(len(sites), math.prod(inner)), *inner)
        else:
            ranks = self._ranks(full, 0, first.path)
        matrices = [site.gradient for site in sites]
        stacked = None
        if all(matrix is not None for matrix in matrices):
            pairs = zip(views, matrices, strict=True)
            stacked = jnp.stack([view.kernel(matrix) for view, matrix in pairs])  # type: ignore
        tucker = self._filled(first.path, first.key, full, ranks, stacked)
        made: dict[str, Adapter] = {}
        shared: Tucker | None = None
        for index, site in enumerate(sites):
            tied = Tucker(tucker, layer=index, shared=shared, **self.common(site))
            made[site.path], shared = tied, shared or tied
        return made

    def _filled(self, path: str, key: Any, shape: Any, ranks: Any, tensor: Any) -> TuckerFactors:
        start = self.start or "tucker"
        return starts.fill_tucker(start, path, key, shape, ranks, self.dtype, tensor)

    def _ranks(self, shape: tuple[int, ...], window: int, path: str) -> tuple[int, ...]:
        """The multilinear ranks of a tensor whose first `window` modes are whole."""
        if isinstance(self.rank, Sequence):
            if len(self.rank) != len(shape):
                raise ValueError(
                    f"rank of {path!r} is {tuple(self.rank)}; its update has modes of sizes "
                    f"{shape}, so it must be one integer or {len(shape)} of them."
                )
            ranks = [n if r is None else r for r, n in zip(self.rank, shape, strict=True)]
            try:
                check_ranks(tuple(ranks), shape)
            except ValueError as error:
                raise ValueError(f"layer {path!r}: {error}") from None
            return tuple(ranks)
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(
                f"rank of {path!r} is {self.rank!r}; it must be an integer of at least 1."
            )
        ranks = [n if i < window else min(self.rank, n) for i, n in enumerate(shape)]
        for _ in ranks:
            ranks = [min(r, math.prod(ranks) // r) for r in ranks]
        return tuple(ranks)


def _window(view: Layout) -> int:
    """How many of the kernel's first axes are the window of a convolution."""
    return len(view.kernel_shape) - 2 if isinstance(view, Convolution) else 0
