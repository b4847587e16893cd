"""Putting adapters into a model and taking them out: pure functions from model to model.

Each function returns a new model. Its Variables are new objects, its arrays are the very buffers of
the old one, so that a frozen base costs no memory twice and nothing done to the new model can be
seen in the old one.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lorajax import initializers
from lorajax.adapters import paths, starts
from lorajax.adapters.layers import AdaLoRA, Adapted, Adapter, LoRA, Tucker, effective_kernel
from lorajax.adapters.layouts import Axes, Convolution, kernel_variable, layout
from lorajax.factors import Factors, any_nonzero, check_rank, is_traced
from lorajax.initializers import PRNGKey
from lorajax.initializers.tensors import check_ranks

Targets = str | Callable[[str, nnx.Module], bool] | Sequence[Any] | Mapping[str, Any]


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


def adapt(
    model: nnx.Module,
    targets: Targets = "**",
    *,
    key: PRNGKey,
    name: str = "default",
    gradients: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Float[Array, "m m"]] | None = None,
    **options: Any,
) -> Any:
    """Puts an adapter into the layers of a model that match.

    The function of the model stays what it was, at any start with a zero product or an offset, also
    where other adapters are active already; the new one becomes active beside them.

    Args:
      model: an NNX module. It is not changed.
      targets: path patterns (`"**/attention/query"`; `*` is one segment, `**` any number), a
        predicate `(path, layer) -> bool`, a sequence of these, or a mapping from patterns to a rank
        or to options: `{"**/query": 16, "**/mlp/*": {"rank": 4, "alpha": 8}}`. The first that
        matches a layer wins; one that matches nothing is an error.
      key: a PRNG key. Each layer draws from it by its path, whatever the other targets are.
      name: the adapter's name.
      gradients: for starts that need one, the gradient of each layer, from `gradients(…)`.
      inputs: for EVA, the second moment of each layer's inputs, from `input_moments(…)`.
      **options: fields of `Options` for all layers: `rank`, `alpha`, `start`, `kind`, `rslora`,
        `dora`, `axes`, `dropout`, `recenter`, `tied`, `dtype`.

    Returns:
      A new model of the same type that shares the base's arrays.

    Raises:
      ValueError: for targets without a match, ranks that do not fit a layer, unknown options, a
        start that lacks what it needs or that cannot move, or a name that the layer has already.

    Example:
      >>> import jax, optax
      >>> from flax import nnx
      >>> from lorajax import adapters
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.relu,
      ...                        nnx.Linear(16, 4, rngs=nnx.Rngs(1)))
      >>> adapted = adapters.adapt(model, {"layers/0": 4, "layers/2": 2}, key=jax.random.key(0))
      >>> optimizer = nnx.Optimizer(adapted, optax.adam(1e-3), wrt=adapters.trainable(adapted))
      >>> sorted(adapters.layers(adapted))
      ['layers/0', 'layers/2']
    """
    if not name or any(c in name for c in "/. "):
        raise ValueError(f"name is {name!r}; it must be a word without '/', '.' and spaces.")
    fields = {field.name for field in dataclasses.fields(Options)}
    if unknown := sorted(set(options) - fields):
        raise ValueError(
            f"adapt has no option {unknown[0]!r}; options are {', '.join(sorted(fields))}."
        )
    defaults = Options(**options)
    model = nnx.clone(model)
    found = paths.find(model)
    chosen: dict[str, Adapter] = {}
    groups: dict[int, list[tuple[str, Options]]] = {}
    for path, entry, index in paths.select(model, targets, found):
        layer = found[path]
        if isinstance(layer, Adapted):
            if layer.unmerged is not None:
                raise ValueError(f"the layer {path!r} is merged; unmerge the model first.")
            if name in layer.adapters:
                raise ValueError(
                    f"the layer {path!r} has an adapter {name!r} already; choose another name, or "
                    "remove that one first."
                )
            layer = layer.base
        spec = defaults.merged_with(entry, path)
        spec.check(path)
        if spec.tied:
            groups.setdefault(index, []).append((path, spec))
            continue
        if spec.rank == 0 and not isinstance(spec.rank, bool):
            continue
        path_key = _key_of(key, path)
        gradient = None if gradients is None else gradients.get(path)
        if spec.kind == "tucker":
            chosen[path] = _tucker(layer, path, spec, path_key, gradient)
        else:
            moment = None if inputs is None else inputs.get(path)
            chosen[path] = _low_rank(layer, path, spec, path_key, gradient, moment)
    for members in groups.values():
        bases = {path: getattr(found[path], "base", found[path]) for path, _ in members}
        chosen.update(_tied(bases, members[0][1], key, gradients or {}))
    if not chosen:
        raise ValueError("every rank is 0, so that no layer is adapted; give at least one a rank.")

    def visit(path: str, layer: nnx.Module) -> Any:
        adapter = chosen.get(path)
        if adapter is None:
            return layer if isinstance(layer, Adapted) else None
        adapted = layer if isinstance(layer, Adapted) else Adapted(layer)
        adapted.adapters[name] = adapter
        adapted.active = (*adapted.active, (name, 1.0))
        return adapted

    return paths.replace(model, visit)


def _key_of(key: PRNGKey, path: str) -> PRNGKey:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _rngs_of(key: PRNGKey, spec: Options) -> nnx.Rngs | None:
    return nnx.Rngs(dropout=jax.random.fold_in(key, 1)) if spec.dropout else None


def _matrix_of(gradient: Any) -> Array | None:
    """A gradient as an array, whether it came as one or as an estimate that can make one."""
    return gradient if gradient is None or isinstance(gradient, jax.Array) else gradient.matrix


def _low_rank(
    layer: nnx.Module, path: str, spec: Options, key: PRNGKey, gradient: Any, moment: Array | None
) -> LoRA:
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


def _tucker(layer: nnx.Module, path: str, spec: Options, key: PRNGKey, gradient: Any) -> Tucker:
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


def _tied(
    bases: Mapping[str, nnx.Module], spec: Options, key: PRNGKey, gradients: Mapping[str, Any]
) -> dict[str, Tucker]:
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
    tucker = starts.fill_tucker(start, first, _key_of(key, first), full, ranks, spec.dtype, stacked)
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
            rngs=_rngs_of(_key_of(key, path), spec),
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


def layers(model: nnx.Module) -> dict[str, Adapted]:
    """The adapted layers of a model by path.

    Args:
      model: an NNX module.

    Returns:
      Adapted layers in the model's order; empty if there are none.
    """
    return {path: x for path, x in paths.find(model).items() if isinstance(x, Adapted)}


def _adapted_layers(model: nnx.Module, verb: str) -> dict[str, Adapted]:
    found = layers(model)
    if not found:
        raise ValueError(f"the model has no adapters to {verb}; adapt it first.")
    return found


def names(model: nnx.Module) -> tuple[str, ...]:
    """The names of the adapters in a model, in order of appearance.

    Args:
      model: an NNX module.

    Returns:
      Names; empty if the model has no adapters.
    """
    return tuple(dict.fromkeys(n for layer in layers(model).values() for n in layer.adapters))


def _check_names(model: nnx.Module, given: Sequence[str]) -> None:
    known = names(model)
    for name in given:
        if name not in known:
            raise ValueError(
                f"the model has no adapter {name!r}; it has {', '.join(map(repr, known))}."
            )


def _edited(model: Any, edit: Callable[[Adapted], Any]) -> Any:
    """A copy of the model with each adapted layer replaced by what `edit` makes of it."""
    copy = nnx.clone(model)
    return paths.replace(copy, lambda _, x: edit(x) if isinstance(x, Adapted) else None)


def activate(model: nnx.Module, which: str | Mapping[str, float | int] | Sequence[str]) -> Any:
    """Switches to one adapter, or blends several.

    Args:
      model: an adapted model. It is not changed.
      which: a name; several, each with weight 1; or weights by name. An empty sequence switches
        every adapter off.

    Returns:
      A new model whose layers add `Σ weight · update` over the adapters they have of these. The
      weights are part of the program: each new combination compiles once.

    Raises:
      ValueError: for an unknown name, a weight that is not finite, or a model that is merged.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from lorajax import adapters
      >>> model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
      >>> both = adapters.adapt(model, key=jax.random.key(0), rank=2, name="french")
      >>> both = adapters.adapt(both, key=jax.random.key(1), rank=2, name="legal")
      >>> adapters.activate(both, {"french": 0.5, "legal": 0.5}).active
      (('french', 0.5), ('legal', 0.5))
    """
    _adapted_layers(model, "activate")
    _check_merged(model, False, "activate")
    if isinstance(which, str):
        which = (which,)
    weights = dict(which) if isinstance(which, Mapping) else dict.fromkeys(which, 1.0)
    _check_names(model, list(weights))
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} is {weight}; it must be finite.")

    def edit(layer: Adapted) -> Adapted:
        layer.active = tuple((n, float(w)) for n, w in weights.items() if n in layer.adapters)
        return layer

    return _edited(model, edit)


def _check_merged(model: nnx.Module, wanted: bool, verb: str) -> None:
    for path, layer in layers(model).items():
        if (layer.unmerged is not None) != wanted:
            state = "merged" if not wanted else "not merged"
            first = "unmerge" if not wanted else "merge"
            raise ValueError(f"cannot {verb} the layer {path!r}: it is {state}; {first} it first.")


def merge(model: nnx.Module) -> Any:
    """Computes with dense kernels, the active adapters merged in.

    The untouched base stays beside the merged kernel, so that `unmerge` gives it back bit for bit;
    `remove` afterwards leaves plain layers with the merged kernels alone.

    Args:
      model: an adapted model. It is not changed.

    Returns:
      A new model whose adapted layers hold `W + Σ weight · update`, rounded once to W's dtype.

    Raises:
      ValueError: for a model without adapters, or one that is merged.
    """
    _adapted_layers(model, "merge")
    _check_merged(model, False, "merge")

    def edit(layer: Adapted) -> Adapted:
        merged = nnx.clone(layer.base)
        kernel_variable(merged).set_value(effective_kernel(layer))
        layer.unmerged, layer.base = layer.base, merged
        return layer

    return _edited(model, edit)


def unmerge(model: nnx.Module) -> Any:
    """Undoes `merge`, exactly.

    Args:
      model: a merged model. It is not changed.

    Returns:
      A new model with the base layers and adapters as they were before `merge`.

    Raises:
      ValueError: for a model without adapters, or one that is not merged.
    """
    _adapted_layers(model, "unmerge")
    _check_merged(model, True, "unmerge")

    def edit(layer: Adapted) -> Adapted:
        layer.base, layer.unmerged = layer.unmerged, None
        return layer

    return _edited(model, edit)


def remove(model: nnx.Module, which: str | Sequence[str] | None = None) -> Any:
    """Takes adapters out.

    Args:
      model: an adapted model. It is not changed.
      which: names to remove; all if None, which leaves plain layers: with the base's kernels, or
        with the merged ones where the model is merged.

    Returns:
      A new model. Layers without any adapter left are plain layers again.

    Raises:
      ValueError: for a model without adapters, an unknown name, or names of a merged model.
    """
    _adapted_layers(model, "remove")
    if which is not None:
        which = (which,) if isinstance(which, str) else tuple(which)
        _check_names(model, which)
        _check_merged(model, False, "remove an adapter of")
    dropped = names(model) if which is None else which

    def edit(layer: Adapted) -> Any:
        for name in dropped:
            if name in layer.adapters:
                del layer.adapters[name]
        layer.active = tuple(pair for pair in layer.active if pair[0] not in dropped)
        return layer if len(layer.adapters) else layer.base

    return _edited(model, edit)


def trainable(
    model: nnx.Module,
    which: str | Sequence[str] | None = None,
    *,
    heads: str | Sequence[str] = (),
) -> paths.Trainable:
    """The NNX filter of what trains: the parameters of adapters, and of heads named by pattern.

    Use it as `nnx.Optimizer(model, tx, wrt=f)`, `nnx.value_and_grad(loss, argnums=nnx.DiffState(0,
    f))`, `nnx.state(model, f)` or `nnx.split(model, f, ...)`.

    Args:
      model: an adapted model.
      which: names of adapters; the active ones if None.
      heads: path patterns of modules or parameters that train in full, such as "classifier".

    Returns:
      A hashable filter.

    Raises:
      ValueError: for a model without adapters, an unknown name, or a head that matches no Param.
    """
    found = _adapted_layers(model, "train")
    if which is None:
        active = dict.fromkeys(name for layer in found.values() for name, _ in layer.active)
        which = tuple(active)
    which = (which,) if isinstance(which, str) else tuple(which)
    _check_names(model, which)
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    params = ["/".join(map(str, path)) for path, _ in flat]
    for head in heads:
        only = paths.Trainable((), (head,))
        if not any(only(path, value) for path, value in flat):
            near = ", ".join(map(repr, paths.near_misses(head, params)))
            raise ValueError(f"heads {head!r} matches no parameter; near misses: {near}.")
    return paths.Trainable(which, heads)
