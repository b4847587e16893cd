"""What a value is, in a line that is the same in any process: by content, never by printed form.

A store asks whether the function that wrote it is the one that goes on. Numbers, strings and
containers are told by what they hold, arrays by kind, dtype, shape and a digest of their bytes,
functions by the name under which they are defined and by what they have bound: arguments of a
`functools.partial`, defaults, variables of an enclosing function and of their module, the object of
a method. The code of a function is not looked at.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import pathlib
import types
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lorajax.environment.judging import judged

CHECKS = ("jaxtyping.", "lorajax.environment.judging")
"""Modules whose wrappers look at what a function is called with and leave it as it is."""
LONGEST = 200
"""Characters of a container beyond which it is told by a digest."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, slice)
_SEQUENCES = {tuple: "()", list: "[]", set: "{}", frozenset: "{}"}


class Unstable(ValueError):
    """A value that nothing tells from another one of its kind in another process."""


@judged
def identity(value: Any) -> str:
    """A line that is the same for the same value in any process, and another for any other.

    Args:
      value: a function, with whatever it has bound, or any value that may be bound: numbers,
        strings, arrays, PRNG keys, containers, data classes and other pytrees of these.

    Returns:
      The line. Numbers of other kinds differ (1, 1.0, True, `np.float64(1)`), and so do 0.0 and
      −0.0; NaN is NaN.

    Raises:
      Unstable: a ValueError that names the value, for lambdas, open files, iterators, tracers and
        other objects that have no stable form.
    """
    return _identity(value, ())


def digest(data: bytes) -> str:
    """64 bits of data, as hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _refuse(value: Any, why: str) -> Unstable:
    return Unstable(f"{_type_name(type(value))} {why}")


def _type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else _name(kind)


def _name(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", "?")
    return f"{getattr(value, '__module__', None) or 'builtins'}.{name}"


def _short(text: str, kind: str, count: int) -> str:
    return text if len(text) <= LONGEST else f"{kind}[{count}]#{digest(text.encode())}"


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _identity(value: Any, above: tuple[int, ...]) -> str:
    if id(value) in above:  # a function that calls itself, a list that holds itself
        return f"↑{len(above) - above.index(id(value))}"
    above = (*above, id(value))

    def of(inner: Any) -> str:
        return _identity(inner, above)

    def named(items: Iterable[tuple[str, Any]]) -> str:
        return _joined(f"{name}={of(inner)}" for name, inner in items)

    kind = type(value)
    if isinstance(value, enum.Enum):
        return f"{_name(kind)}.{value.name}"
    if kind in _PLAIN:
        return _short(repr(value), kind.__name__, 1)
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _array(value, of)
    if isinstance(value, np.dtype):
        return f"dtype({value.str if value.isbuiltin == 1 else value.name})"
    if isinstance(value, functools.partial):
        parts = [*map(of, value.args), *(f"{n}={of(v)}" for n, v in sorted(value.keywords.items()))]
        return f"{of(value.func)}({_joined(parts)})"
    if isinstance(value, (type, types.ModuleType)):
        return _name(value) if isinstance(value, type) else value.__name__
    if isinstance(value, types.MethodType):
        return f"{of(value.__func__)}@{of(value.__self__)}"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, np.ufunc)):
        return _function(value, of)
    if kind in _SEQUENCES:
        parts = map(of, value)
        inner = _joined(sorted(parts) if kind in (set, frozenset) else parts)
        return _short(f"{kind.__name__}({inner})", kind.__name__, len(value))
    if kind in (dict, OrderedDict):
        pairs = (f"{of(k)}: {of(v)}" for k, v in value.items())
        return _short(f"{kind.__name__}({_joined(pairs)})", kind.__name__, len(value))
    if isinstance(value, pathlib.PurePath):
        return f"{kind.__name__}({str(value)!r})"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{_name(kind)}({named(zip(kind._fields, value, strict=True))})"
    if dataclasses.is_dataclass(value):
        fields = ((f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value))
        return f"{_name(kind)}({named(fields)})"
    return _other(value, of)


def _array(value: Any, of: Any) -> str:
    """Kind, dtype, shape and a digest of the bytes; a scalar shows its value as well."""
    if isinstance(value, jax.core.Tracer):
        raise _refuse(value, "has no value yet, since it is being traced")
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"key<{jax.random.key_impl(value)}>({of(np.asarray(jax.random.key_data(value)))})"
    if isinstance(value, np.ndarray) and type(value) not in (np.ndarray, np.memmap):
        raise _refuse(value, "may hold more than its entries tell; pass a plain array")
    kind = "jax" if isinstance(value, jax.Array) else "numpy"
    weak = "weak " if getattr(value, "weak_type", False) else ""
    array = np.asarray(value)
    if array.dtype.hasobject:
        if array.dtype != object:
            raise _refuse(value, f"of dtype {array.dtype} has no stable form")
        return f"numpy object{list(array.shape)}({of(array.ravel().tolist())})"
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    shape = " scalar" if isinstance(value, np.generic) else list(array.shape)
    shown = f" {array[()]}" if array.ndim == 0 else ""
    names = f":{array.dtype.descr}" if array.dtype.names else ""
    return f"{kind} {weak}{array.dtype}{shape}{names}{shown}#{digest(array.tobytes())}"


def _function(value: Any, of: Any) -> str:
    """Where a function is defined, its defaults, and the variables it has from around it."""
    if not isinstance(value, types.FunctionType):
        owner = getattr(value, "__self__", None)
        if owner is not None and not isinstance(owner, (types.ModuleType, type)):
            return f"{type(owner).__name__}.{value.__name__}@{of(owner)}"
        return f"numpy.{value.__name__}" if isinstance(value, np.ufunc) else _name(value)
    # A check of types or of values around a function does not change what it computes.
    checked = value.__globals__.get("__name__", "").startswith(CHECKS)
    if checked and inspect.isroutine(getattr(value, "__wrapped__", None)):
        return of(value.__wrapped__)
    if value.__name__ == "<lambda>":
        raise Unstable(
            f"the lambda of {value.__module__}, line {value.__code__.co_firstlineno}, has no name "
            "to be told by"
        )
    bound = [of(inner) for inner in value.__defaults__ or ()]
    bound += [f"{n}={of(v)}" for n, v in sorted((value.__kwdefaults__ or {}).items())]
    # What `jax.vmap` and the like return holds marks of JAX's own beside the function.
    by_jax = value.__globals__.get("__name__", "").startswith("jax.")
    for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
        try:
            inner = cell.cell_contents
        except ValueError:  # a cell that has not been filled
            continue
        bound.append(
            f"{name}={_leniently(inner, of) if by_jax and not callable(inner) else of(inner)}"
        )
    if by_jax:
        return f"{_name(value)}[{_short(_joined(bound), 'bound', len(bound))}]"
    bound += [f"{n}={_leniently(v, of)}" for n, v in _globals(value)]
    return _name(value) + (f"[{_short(_joined(bound), 'bound', len(bound))}]" if bound else "")


def _globals(function: types.FunctionType) -> list[tuple[str, Any]]:
    """Data, and functions of the same module, that a function finds in its module."""
    codes, names = [function.__code__], set()
    for code in codes:  # grows while it is walked
        names |= set(code.co_names)
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    found = [(n, function.__globals__[n]) for n in sorted(names & set(function.__globals__))]
    apart = (types.ModuleType, type, types.BuiltinFunctionType, np.ufunc)
    return [
        (name, value)
        for name, value in found
        if not isinstance(value, apart)
        and (not callable(value) or getattr(value, "__module__", None) == function.__module__)
    ]


def _leniently(value: Any, of: Any) -> str:
    """Its identity, or its type where it has none."""
    try:
        return of(value)
    except Unstable:  # a logger, a cache: nothing that was handed over
        return _type_name(type(value))


def _other(value: Any, of: Any) -> str:
    """What wraps a function (`jax.jit`), a pytree that is registered, or nothing stable."""
    if callable(value) and inspect.isroutine(getattr(value, "__wrapped__", None)):
        return f"{type(value).__name__}({of(value.__wrapped__)})"
    inner = jax.tree_util.default_registry.flatten_one_level(value)
    if inner is None:
        raise _refuse(value, "has no stable form")
    children, extra = inner
    return f"{_name(type(value))}({_joined(map(of, children))}; {of(extra)})"
