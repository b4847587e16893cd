"""Where the layers of a model are, by path: finding, matching and replacing them."""

import dataclasses
import difflib
import dis
import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax import nnx

from lorajax.adapters.layers import Adapted
from lorajax.adapters.layouts import ADAPTABLE, is_adaptable
from lorajax.environment.judging import judged

Predicate = Callable[[str, nnx.Module], bool]


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, nnx.Module):
        return [(k, v) for k, v in vars(node).items() if not k.startswith("_pytree__")]
    if isinstance(node, Mapping):
        return list(node.items())
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    return []


def replace(model: Any, visit: Callable[[str, nnx.Module], Any]) -> Any:
    """Replaces modules of a model in place, wherever they are referred to.

    Args:
      model: an NNX module; its containers may be modules, lists, tuples and dicts.
      visit: given a path and a module, returns its replacement, or None to look inside it. Each
        module is visited once, at the first of its paths.

    Returns:
      The model, or its replacement where the model itself was replaced.
    """
    done: dict[int, Any] = {}
    # Keeping what was visited alive keeps its id from being given to another object.
    kept: list[Any] = []

    def walk(node: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(node, (nnx.Module, list, tuple, dict)):
            return node
        if id(node) in done:
            return done[id(node)]
        kept.append(node)
        done[id(node)] = node
        if isinstance(node, nnx.Module):
            replacement = visit("/".join(path), node)
            if replacement is not None:
                done[id(node)] = replacement
                return replacement
        changed = {}
        for key, child in _children(node):
            new = walk(child, (*path, str(key)))
            if new is not child:
                changed[key] = new
        if not changed:
            return node
        if isinstance(node, tuple):
            items = [changed.get(i, child) for i, child in enumerate(node)]
            done[id(node)] = type(node)(*items) if hasattr(node, "_fields") else tuple(items)
            return done[id(node)]
        for key, new in changed.items():
            if isinstance(node, nnx.Module):
                setattr(node, key, nnx.data(new) if isinstance(new, tuple) else new)
            else:
                node[key] = new
        return node

    return walk(model, ())


def find(model: nnx.Module) -> dict[str, nnx.Module]:
    """Every layer of a model that has adapters or can have them, by path.

    Args:
      model: an NNX module.

    Returns:
      Layers by path, such as "blocks/0/attention/query"; a layer that is referred to from several
      places is listed at the first of them.
    """
    found: dict[str, nnx.Module] = {}

    def visit(path: str, module: nnx.Module) -> Any:
        if isinstance(module, Adapted) or is_adaptable(module):
            found[path] = module
            return module
        return None

    replace(model, visit)
    return found


def modules(model: nnx.Module) -> dict[str, nnx.Module]:
    """Every module of a model that is no adapted layer, by path."""
    found: dict[str, nnx.Module] = {}

    def visit(path: str, module: nnx.Module) -> Any:
        found[path] = module
        return module if isinstance(module, Adapted) else None

    replace(model, visit)
    return found


def matches(pattern: str, path: str) -> bool:
    """Whether a path pattern matches a path.

    Args:
      pattern: segments separated by "/"; in a segment `*`, `?` and `[…]` match as in a shell, and a
        segment `**` matches any number of segments, none included.
      path: the path of a layer.

    Returns:
      True if the whole path is matched.

    Example:
      >>> from lorajax.adapters.paths import matches
      >>> matches("**/query", "blocks/0/attention/query"), matches("*/query", "blocks/0/query")
      (True, False)
    """
    return _compiled(pattern).fullmatch(path) is not None


@functools.lru_cache(maxsize=1024)  # ranks of every layer are as many patterns, for as many paths
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = []
    segments = pattern.split("/")
    for i, segment in enumerate(segments):
        last = i == len(segments) - 1
        if segment == "**":
            parts.append(".*" if last else "(?:[^/]+/)*")
            continue
        text = ""
        j = 0
        while j < len(segment):
            c = segment[j]
            close = segment.find("]", j + 2)
            if c == "*":
                text += "[^/]*"
            elif c == "?":
                text += "[^/]"
            elif c == "[" and close > 0:
                inner = re.sub(r"([\\\[&~|])", r"\\\1", segment[j + 1 : close])
                text += "[" + ("^" + inner[1:] if inner[0] in "!^" else inner) + "]"
                j = close
            else:
                text += re.escape(c)
            j += 1
        parts.append(text if last else text + "/")
    return re.compile("".join(parts))


def near_misses(pattern: str, paths: Iterable[str], count: int = 3) -> list[str]:
    """The paths that a pattern without a match comes closest to, best first."""

    def score(path: str) -> float:
        last = difflib.SequenceMatcher(None, pattern.split("/")[-1], path.split("/")[-1]).ratio()
        whole = difflib.SequenceMatcher(None, pattern, path).ratio()
        return max(last, whole) + 0.1 * whole

    return sorted(paths, key=score, reverse=True)[:count]


def no_match(pattern: str, model: nnx.Module, layers: Iterable[str]) -> ValueError:
    """The error for a pattern that matches no layer: what it matches instead, and near misses."""
    layers = list(layers)
    if not layers:
        return ValueError(f"the model has no layer that can be adapted; these can: {ADAPTABLE}.")
    others = [
        (path, type(module).__name__)
        for path, module in modules(model).items()
        if path and path not in layers and matches(pattern, path)
    ]
    for path, kind in others:
        inside = [layer for layer in layers if layer.startswith(path + "/")]
        if inside:
            return ValueError(
                f"targets {pattern!r} matches {path!r}, a {kind} that cannot be adapted itself; "
                f"the layers inside it can: {', '.join(map(repr, inside[:3]))}."
            )
    if others:
        return ValueError(
            f"targets {pattern!r} matches {others[0][0]!r}, a {others[0][1]} that cannot be "
            f"adapted; these can: {ADAPTABLE}."
        )
    near = ", ".join(map(repr, near_misses(pattern, layers)))
    return ValueError(f"targets {pattern!r} matches no layer of the model; near misses: {near}.")


def select(
    model: nnx.Module, targets: Any, layers: Mapping[str, nnx.Module]
) -> list[tuple[str, Any, int]]:
    """Resolves targets to layers.

    Args:
      model: the model, for error messages.
      targets: a pattern, a predicate `(path, layer) -> bool`, a sequence of these, or a mapping
      from
        patterns to options. The first entry that matches a layer wins.
      layers: the layers to choose from, by path.

    Returns:
      Path, options (None where the targets give none) and index of the entry, in the model's order.

    Raises:
      ValueError: for an entry that matches nothing, or nothing that an earlier one has not taken.
    """
    if isinstance(targets, Mapping):
        entries = list(targets.items())
    elif isinstance(targets, str) or callable(targets):
        entries = [(targets, None)]
    else:
        entries = [(target, None) for target in targets]
    if not entries:
        raise ValueError("targets are empty; name at least one pattern, such as '**/query'.")
    chosen: dict[str, tuple[Any, int]] = {}
    for index, (target, options) in enumerate(entries):
        if isinstance(target, str):
            pattern = _compiled(target)
            hits = [path for path in layers if pattern.fullmatch(path)]
            if not hits:
                raise no_match(target, model, layers)
        elif callable(target):
            hits = [path for path, layer in layers.items() if target(path, layer)]
            if not hits:
                raise ValueError(
                    f"the predicate {getattr(target, '__name__', target)!r} is true for none of "
                    f"the {len(layers)} layers of the model that can be adapted."
                )
        else:
            raise ValueError(
                f"targets hold {target!r}; each must be a path pattern or a predicate "
                "(path, layer) -> bool."
            )
        fresh = [path for path in hits if path not in chosen]
        if not fresh:
            raise ValueError(
                f"targets {target!r} matches only layers that earlier targets have taken, such as "
                f"{hits[0]!r}; put the narrower pattern first."
            )
        chosen.update(dict.fromkeys(fresh, (options, index)))
    return [(path, *chosen[path]) for path in layers if path in chosen]


@judged
@dataclasses.dataclass(frozen=True)
class Trainable:
    """The NNX filter that `trainable` makes: true for adapter parameters and for named heads.

    Attributes:
      names: adapters whose parameters pass.
      heads: path patterns; everything that is a Param at or below a match passes.
    """

    names: tuple[str, ...]
    heads: tuple[str, ...] = ()

    def __call__(self, path: tuple[Any, ...], value: Any) -> bool:
        """Whether the Variable at `path` trains."""
        keys = [str(key) for key in path]
        kind = type(value) if isinstance(value, nnx.Variable) else getattr(value, "type", object)
        if issubclass(kind, nnx.LoRAParam):
            return any(
                keys[i] == "adapters" and keys[i + 1] in self.names for i in range(len(keys) - 1)
            )
        if not issubclass(kind, nnx.Param):
            return False
        prefixes = ["/".join(keys[: i + 1]) for i in range(len(keys))]
        return any(matches(head, prefix) for head in self.heads for prefix in prefixes)


def escape(path: str) -> str:
    """The pattern that matches this path and no other."""
    return re.sub(r"([*?[])", r"[\1]", path)


def segments(path: str) -> tuple[str, ...]:
    """The keys that a path joins; none for the model itself."""
    return tuple(path.split("/")) if path else ()


def attends(model: nnx.Module) -> bool:
    """Whether a model's code calls `attend`, so that an Embed's table may make logits as well.

    Args:
      model: an NNX module, adapted or not.

    Returns:
      True if a method of one of its modules' classes, other than Flax's own layers, reads an
      attribute of that name. A function outside of the model that calls it goes unseen.
    """
    kinds = {kind for module in modules(model).values() for kind in type(module).__mro__}
    return any(
        _reads(code, "attend")
        for kind in kinds
        if not kind.__module__.startswith(("flax.", "lorajax.adapters."))
        for value in vars(kind).values()
        if (code := getattr(inspect.unwrap(value), "__code__", None)) is not None
    )


def _reads(code: types.CodeType, name: str) -> bool:
    found = any(
        step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")) and step.argval == name
        for step in dis.get_instructions(code)
    )
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return found or any(_reads(each, name) for each in inner)
