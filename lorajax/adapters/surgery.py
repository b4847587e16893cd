"""Putting adapters into a model and taking them out: pure functions from model to model.

Each function returns a new model. Its Variables are new objects, its arrays are the very buffers of
the old one, so that a frozen base costs no memory twice and nothing done to the new model can be
seen in the old one.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from lorajax.adapters import paths
from lorajax.adapters.kinds import Kind, Spec, target_spec
from lorajax.adapters.layers import Adapted, Adapter, effective_bias, effective_kernel
from lorajax.adapters.layouts import kernel_variable
from lorajax.adapters.starts import Site
from lorajax.environment.judging import judged
from lorajax.initializers import PRNGKey

Targets = str | Callable[[str, nnx.Module], bool] | Sequence[Any] | Mapping[str, Any]


@judged
def adapt(
    model: nnx.Module,
    targets: Targets = "**",
    *,
    key: PRNGKey,
    kind: Kind = "lora",
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
        predicate `(path, layer) -> bool`, a sequence of these, or a mapping from patterns to a
        rank, options or a Spec: `{"**/query": 16, "**/mlp/*": {"rank": 4, "alpha": 8}}`. The first
        that matches a layer wins; one that matches nothing is an error.
      key: a PRNG key. Each layer draws from it by its path, whatever the other targets are.
      kind: what is put in: "lora", "adalora", "tucker", or a `Spec` of your own; a class of them,
        or an instance whose fields hold where neither `targets` nor options say otherwise.
      name: the adapter's name.
      gradients: for starts that need one, the gradient of each layer, from `gradients(…)`.
      inputs: for EVA, the second moment of each layer's inputs, from `input_moments(…)`.
      **options: fields of the kind's Spec for all layers; for LoRA `rank`, `alpha`, `start`,
        `rslora`, `dora`, `recenter`, `axes`, `dropout`, `attends`, `dtype`.

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
    check_name(name)
    model = nnx.clone(model)
    found = paths.find(model)
    entries: dict[int, tuple[Spec, list[Site]]] = {}
    chosen: dict[str, Adapter] = {}
    for path, entry, index in paths.select(model, targets, found):
        spec = target_spec(entry, path, kind, **options)
        if spec.skips:
            continue
        base = base_of(path, found[path], name)
        estimate = None if gradients is None else gradients.get(path)
        moment = None if inputs is None else inputs.get(path)
        site = Site(path, base, key_of(key, path), estimate, moment)
        entries.setdefault(index, (spec, []))[1].append(site)
    for spec, sites in entries.values():
        chosen |= spec.build_all(sites)
    if not chosen:
        raise ValueError("every rank is 0, so that no layer is adapted; give at least one a rank.")
    return insert(model, chosen, name)


def check_name(name: str) -> None:
    """Raises ValueError for a name that no path and no key of a file could hold."""
    if not name or any(c in name for c in "/. "):
        raise ValueError(f"name is {name!r}; it must be a word without '/', '.' and spaces.")


def key_of(key: PRNGKey, path: str) -> PRNGKey:
    """A key that depends on the layer's path alone, whatever the other targets are."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def base_of(path: str, layer: nnx.Module, name: str) -> nnx.Module:
    """The base of a layer that is to get an adapter of a name.

    Args:
      path: the layer's path, for errors.
      layer: adapted already or not.
      name: of the adapter.

    Returns:
      The base layer.

    Raises:
      ValueError: for a merged layer, or one that has an adapter of this name.
    """
    if not isinstance(layer, Adapted):
        return layer
    if layer.unmerged is not None:
        raise ValueError(f"the layer {path!r} is merged; unmerge the model first.")
    if name in layer.adapters:
        raise ValueError(
            f"the layer {path!r} has an adapter {name!r} already; choose another name, or remove "
            "that one first."
        )
    return layer.base


def insert(model: nnx.Module, chosen: Mapping[str, Adapter], name: str) -> Any:
    """Puts adapters into layers, in place; they become active beside what is active there.

    Args:
      model: an NNX module; it is changed, so give a copy.
      chosen: adapters by path, for layers that `base_of` lets pass.
      name: of the adapters.

    Returns:
      The model, or what takes its place where the model is itself such a layer.
    """

    def visit(path: str, layer: nnx.Module) -> Any:
        adapter = chosen.get(path)
        if adapter is None:
            return layer if isinstance(layer, Adapted) else None
        adapted = layer if isinstance(layer, Adapted) else Adapted(layer)
        adapted.adapters[name] = adapter
        adapted.active = (*adapted.active, (name, 1.0))
        return adapted

    return paths.replace(model, visit)


@judged
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


@judged
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


@judged
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


@judged
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
        if (bias := effective_bias(layer)) is not None:
            merged.bias.set_value(bias)
        layer.unmerged, layer.base = layer.base, merged
        return layer

    return _edited(model, edit)


@judged
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


@judged
def remove(model: nnx.Module, which: str | Sequence[str] | None = None) -> Any:
    """Takes adapters out.

    Args:
      model: an adapted model. It is not changed.
      which: names to remove; all if None, which leaves plain layers: with the base's kernels, or
        with the merged ones where the model is merged.

    Returns:
      A new model. Layers without any adapter left are plain layers again.

    Raises:
      ValueError: for a model without adapters, an unknown name, names of a merged model, or a
        merged Embed whose adapter acts in the lookup alone where the model attends, too.
    """
    _adapted_layers(model, "remove")
    if which is not None:
        which = (which,) if isinstance(which, str) else tuple(which)
        _check_names(model, which)
        _check_merged(model, False, "remove an adapter of")
    dropped = names(model) if which is None else which
    if paths.attends(model):
        for path, layer in layers(model).items():
            lookup = [n for n, _ in layer.active if not layer.adapters[n].attends]
            if layer.unmerged is not None and lookup and isinstance(layer.base, nnx.Embed):
                raise ValueError(
                    f"the adapter {lookup[0]!r} of {path!r} leaves attend alone, so that one "
                    "merged table cannot serve both; keep the merged model, or unmerge it first."
                )

    def edit(layer: Adapted) -> Any:
        for name in dropped:
            if name in layer.adapters:
                del layer.adapters[name]
        layer.active = tuple(pair for pair in layer.active if pair[0] not in dropped)
        return layer if len(layer.adapters) else layer.base

    return _edited(model, edit)


@judged
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
