"""Building the adapter of one layer, or of several tied ones, from the options it was given."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lorajax import initializers
from lorajax.adapters import starts
from lorajax.adapters.layers import AdaLoRA, LoRA, Tucker
from lorajax.adapters.layouts import Axes, Convolution, kernel_variable, layout
from lorajax.factors import Factors, any_nonzero, check_rank, is_traced
from lorajax.initializers import PRNGKey
from lorajax.initializers.tensors import check_ranks


@dataclasses.dataclass(frozen=True)
class Options:
    """How one layer is adapted; every field can be set for all layers, or for those of a pattern.

    Attributes:
      rank: r; for `kind="tucker"` also one rank for each axis of the kernel, None for a full one.
        0 leaves the layer alone.
      alpha: numerator of the scaling; None for a scaling of 1 at any rank.
      start: an initializer, or its name; None for the default of the kind: `lora`; `balanced` of
        scale 1 for AdaLoRA; `tucker` for Tucker.
      kind: "lora", "adalora" or "tucker".
      rslora: divide alpha by √r instead of by r.
      dora: train a magnitude for each column of the kernel as well.
      axes: which axes of the kernel are inputs and outputs; the others are lanes with factors of
        their own. None for the layer's own contraction.
      dropout: rate at which entries of the adapter's input are dropped in training.
      recenter: freeze a copy of the start as its offset, so that starts whose product is not zero
        leave the function where it was as well.
      tied: for `kind="tucker"`, one update for all the layers of the entry, which becomes a tensor
        with the layer as its first mode; `rank` then leads with the rank of that mode.
      dtype: dtype of the adapter's parameters, in which it computes too.
    """

    rank: int | Sequence[int | None] = 8
    alpha: float | int | None = None
    start: str | Callable[..., Any] | None = None
    kind: str = "lora"
    rslora: bool = False
    dora: bool = False
    axes: Axes | None = None
    dropout: float | int = 0.0
    recenter: bool = False
    tied: bool = False
    dtype: Any = jnp.float32

    def merged_with(self, entry: Any, path: str) -> "Options":
        """These options with those of a target entry: a rank, a mapping of fields, or None."""
        if entry is None:
            return self
        if isinstance(entry, Options):
            return entry
        if isinstance(entry, Mapping):
            fields = {field.name for field in dataclasses.fields(self)}
            unknown = sorted(set(entry) - fields)
            if unknown:
                raise ValueError(
                    f"targets give {path!r} the option {unknown[0]!r}; options are "
                    f"{', '.join(sorted(fields))}."
                )
            return dataclasses.replace(self, **entry)
        return dataclasses.replace(self, rank=entry)

    def check(self, path: str) -> None:
        """Raises ValueError for a combination that means nothing."""
        if self.kind not in ("lora", "adalora", "tucker"):
            raise ValueError(
                f"kind of {path!r} is {self.kind!r}; it must be 'lora', 'adalora' or 'tucker'."
            )
        if self.kind != "lora" and self.dora:
            raise ValueError(f"dora of {path!r} is set; magnitudes go with kind='lora' only.")
        if self.kind == "adalora" and self.rslora:
            raise ValueError(f"rslora of {path!r} is set; AdaLoRA divides alpha by the rank.")
        if self.kind == "tucker" and self.axes is not None:
            raise ValueError(f"axes of {path!r} are set; a Tucker update has a mode for each axis.")
        if self.tied and self.kind != "tucker":
            raise ValueError(f"tied of {path!r} is set; only a Tucker update spans several layers.")
        if self.recenter and self.kind == "tucker":
            raise ValueError(
                f"recenter of {path!r} is set; a Tucker update starts at zero as it is."
            )
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype of {path!r} is {self.dtype}; it must be floating point.")
        if self.kind != "tucker" and isinstance(self.rank, Sequence):
            raise ValueError(f"rank of {path!r} is {self.rank}; it must be one integer.")


def key_of(key: PRNGKey, path: str) -> PRNGKey:
    """A key that depends on the layer's path alone, whatever the other targets are."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _rngs_of(key: PRNGKey, spec: Options) -> nnx.Rngs | None:
    return nnx.Rngs(dropout=jax.random.fold_in(key, 1)) if spec.dropout else None


def _matrix_of(gradient: Any) -> Array | None:
    """A gradient as an array, whether it came as one or as an estimate that can make one."""
    return gradient if gradient is None or isinstance(gradient, jax.Array) else gradient.matrix


def low_rank(
    layer: nnx.Module, path: str, spec: Options, key: PRNGKey, gradient: Any, moment: Array | None
) -> LoRA:
    """The LoRA, DoRA or AdaLoRA adapter of one layer; raises ValueError where it does not fit."""
    view = layout(layer, spec.axes)
    assert not isinstance(spec.rank, Sequence)
    try:
        check_rank(spec.rank, view.shape)
    except ValueError as error:
        raise ValueError(f"layer {path!r}: {error}") from None
    rank = int(spec.rank)
    weight = view.matrix(kernel_variable(layer)[...]).astype(spec.dtype)
    gradient = _matrix_of(gradient)
    if gradient is not None and gradient.shape[-2:] != view.shape:
        raise ValueError(
            f"gradients hold a matrix of shape {gradient.shape} for {path!r}, whose kernel reads "
            f"as {view.shape}; estimate them on this model."
        )
    default = functools.partial(initializers.balanced, scale=1.0)
    start = spec.start or ("lora" if spec.kind == "lora" else default)
    rngs = _rngs_of(key, spec)
    common: dict[str, Any] = dict(
        alpha=spec.alpha,
        start=starts.name_of(start),
        axes=spec.axes,
        dropout=spec.dropout,
        rngs=rngs,
    )
    scaling = 1.0
    if spec.alpha is not None:
        scaling = spec.alpha / (math.sqrt(rank) if spec.rslora else rank)
    site = starts.Site(
        path=path,
        key=key,
        shape=view.shape,
        lead=view.stack + view.lanes,
        rank=rank,
        scaling=scaling,
        dtype=spec.dtype,
        weight=weight,
        gradient=gradient,
        inputs=moment,
    )
    factors, offset = starts.fill(start, site)
    factors, offset = _sharded(factors, layer, view), _sharded(offset, layer, view)
    if spec.kind == "adalora":
        # The singular values start at 0, so both frames have to be there for one of them to move.
        if not is_traced(factors) and not all(any_nonzero(factor) for factor in factors):
            raise ValueError(
                f"the start of {path!r} leaves a factor zero; AdaLoRA's singular values start at 0 "
                "and need both frames, such as start='balanced'."
            )
        e = jnp.zeros(view.stack + view.lanes + (rank,), spec.dtype)
        return AdaLoRA(factors, e, **common)
    if spec.recenter:
        offset = factors
    offset = offset if offset.rank else None
    if not spec.dora:
        return LoRA(factors, offset, rslora=spec.rslora, **common)
    if view.lanes:
        raise ValueError(f"dora of {path!r} is set; columns of a kernel with lanes have no norm.")
    adapter = LoRA(
        factors,
        offset,
        jnp.zeros(view.stack + view.shape[1:], spec.dtype),
        rslora=spec.rslora,
        **common,
    )
    norms = adapter.norms(layer)
    if not is_traced(norms) and not bool(jnp.all(norms > 0)):
        raise ValueError(
            f"dora of {path!r} is set, and {int(jnp.sum(norms == 0))} columns of its kernel are "
            "zero, so that their direction is undefined; leave the layer out of the targets."
        )
    assert adapter.magnitude is not None
    adapter.magnitude.set_value(norms)
    return adapter


def _ranks(spec: Options, shape: tuple[int, ...], window: int, path: str) -> tuple[int, ...]:
    """The multilinear ranks that `rank` means for a tensor whose first `window` modes are full."""
    if isinstance(spec.rank, Sequence):
        if len(spec.rank) != len(shape):
            raise ValueError(
                f"rank of {path!r} is {tuple(spec.rank)}; its update has modes of sizes {shape}, "
                f"so it must be one integer or {len(shape)} of them."
            )
        ranks = [n if r is None else r for r, n in zip(spec.rank, shape, strict=True)]
        try:
            check_ranks(tuple(ranks), shape)
        except ValueError as error:
            raise ValueError(f"layer {path!r}: {error}") from None
        return tuple(ranks)
    if isinstance(spec.rank, bool) or not isinstance(spec.rank, int) or spec.rank < 1:
        raise ValueError(f"rank of {path!r} is {spec.rank!r}; it must be an integer of at least 1.")
    ranks = [n if i < window else min(spec.rank, n) for i, n in enumerate(shape)]
    for _ in ranks:
        ranks = [min(r, math.prod(ranks) // r) for r in ranks]
    return tuple(ranks)


def single_tucker(
    layer: nnx.Module, path: str, spec: Options, key: PRNGKey, gradient: Any
) -> Tucker:
    """The Tucker adapter of one layer."""
    view = layout(layer)
    window = len(view.kernel_shape) - 2 if isinstance(view, Convolution) else 0
    ranks = _ranks(spec, view.kernel_shape, window, path)
    start = spec.start or "tucker"
    matrix = _matrix_of(gradient)
    kernel = None if matrix is None else view.kernel(matrix)
    count = math.prod(view.stack)
    keys = jax.random.split(key, count) if view.stack else [key]
    kernels = [None] * count
    if kernel is not None:
        kernels = list(kernel.reshape((count, *view.kernel_shape)))
    filled = [
        starts.fill_tucker(start, path, k, view.kernel_shape, ranks, spec.dtype, tensor)
        for k, tensor in zip(keys, kernels, strict=True)
    ]
    tucker = jax.tree.map(lambda *x: jnp.stack(x).reshape(view.stack + x[0].shape), *filled)
    return Tucker(
        tucker,
        alpha=spec.alpha,
        rslora=spec.rslora,
        start=starts.name_of(start),
        dropout=spec.dropout,
        rngs=_rngs_of(key, spec),
    )


def tied_tucker(
    bases: Mapping[str, nnx.Module], spec: Options, key: PRNGKey, gradients: Mapping[str, Any]
) -> dict[str, Tucker]:
    """The Tucker adapters of several layers that share one tensor, by path."""
    views = {path: layout(base) for path, base in bases.items()}
    first, *_ = bases
    shape = views[first].kernel_shape
    for path, view in views.items():
        if view.kernel_shape != shape or type(bases[path]) is not type(bases[first]) or view.stack:
            raise ValueError(
                f"tied layers must be of one kind and shape; {path!r} is a "
                f"{type(bases[path]).__name__} of {view.stack + view.kernel_shape}, {first!r} a "
                f"{type(bases[first]).__name__} of {shape}."
            )
    full = (len(bases), *shape)
    window = len(shape) - 2 if isinstance(views[first], Convolution) else 0
    if isinstance(spec.rank, Sequence):
        ranks = _ranks(spec, full, 0, first)
    else:
        inner = _ranks(spec, shape, window, first)
        ranks = (min(len(bases), math.prod(inner)), *inner)
    matrices = [_matrix_of(gradients.get(path)) for path in bases]
    stacked = None
    if all(matrix is not None for matrix in matrices):
        pairs = zip(views.values(), matrices, strict=True)
        stacked = jnp.stack([view.kernel(matrix) for view, matrix in pairs])  # type: ignore
    start = spec.start or "tucker"
    tucker = starts.fill_tucker(start, first, key_of(key, first), full, ranks, spec.dtype, stacked)
    shared: Tucker | None = None
    made: dict[str, Tucker] = {}
    for index, path in enumerate(bases):
        made[path] = Tucker(
            tucker,
            layer=index,
            shared=shared,
            alpha=spec.alpha,
            rslora=spec.rslora,
            start=starts.name_of(start),
            dropout=spec.dropout,
            rngs=_rngs_of(key_of(key, path), spec),
        )
        shared = shared or made[path]
    return made


def _sharded(factors: Factors, layer: nnx.Module, view: Any) -> Factors:
    """Places factors beside a sharded kernel: A split as its rows are, B as its columns are."""
    kernel = kernel_variable(layer)[...]
    placed = getattr(kernel, "sharding", None)
    if is_traced(kernel) or not isinstance(placed, jax.sharding.NamedSharding):
        return factors
    if not any(placed.spec) or view.lanes or not factors.rank:
        return factors
    spec = [*placed.spec, *[None] * (kernel.ndim - len(placed.spec))]
    stack = spec[: len(view.stack)]
    rest = spec[len(view.stack) :]
    axes = getattr(view, "axes", None) or Axes(tuple(range(len(rest) - 1)), (len(rest) - 1,))

    def outermost(group: tuple[int, ...]) -> Any:
        # Axes that are merged into one stay split only along the outermost of them.
        return rest[group[0]]

    rows, columns = outermost(axes.inputs), outermost(axes.outputs)
    mesh = placed.mesh
    named = functools.partial(jax.sharding.NamedSharding, mesh)
    partition = jax.sharding.PartitionSpec
    return Factors(
        jax.device_put(factors.a, named(partition(*stack, rows, None))),
        jax.device_put(factors.b, named(partition(*stack, None, columns))),
    )
