"""Arguments are judged before anything is traced: by their annotation, and by what they may be.

`judged` is put on public functions. It reads the annotations that are there anyway (a shape in
jaxtyping, a Literal, a class) and takes further demands by name:

    @judged(eta=POSITIVE, steps=at_least(1))
    def rate(eta: float, steps: int): ...

What is wrong raises ValueError in one sentence, with the argument, its value and what would be
right. Values that are being traced are judged by shape and dtype alone, and what has no annotation
not at all; a call that passes costs some microseconds.
"""

import collections.abc
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, overload

import numpy as np

Judge = Callable[[Any], str | None]
"""Takes a value and returns what it must be, or None where it is that."""
_Function = TypeVar("_Function", bound=Callable[..., Any])
_LONGEST = 60


class Demand(NamedTuple):
    """What numbers must fulfil, wherever in an argument they stand.

    Attributes:
      holds: takes an array of numbers and says which are right.
      words: what they must be.
    """

    holds: Callable[[np.ndarray], Any]
    words: str


POSITIVE = Demand(lambda x: (x > 0) & (x < math.inf), "positive and finite")
NOT_NEGATIVE = Demand(lambda x: (x >= 0) & (x < math.inf), "at least 0 and finite")
FINITE = Demand(np.isfinite, "finite")
FRACTION = Demand(lambda x: (x > 0) & (x <= 1), "more than 0 and at most 1")
SHARE = Demand(lambda x: (x >= 0) & (x < 1), "at least 0 and less than 1")
INSIDE = Demand(lambda x: (x > 0) & (x < 1), "between 0 and 1")
SEED = Demand(lambda x: (x >= 0) & (x < 2**63), "at least 0 and less than 2⁶³")


def at_least(least: int) -> Demand:
    """A count that has a least value."""
    return Demand(lambda x: x >= least, f"at least {least}")


def shown(value: Any) -> str:
    """A value in a few words."""
    if _is_array(value):
        if value.shape == () and not is_traced(value):
            return f"{value} ({value.dtype})"
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    try:
        text = repr(value)
    except Exception:  # whatever a stranger's class does
        text = object.__repr__(value)
    if "\n" in text or len(text) > _LONGEST:
        text = f"a {type(value).__name__}"
    return text


def is_traced(value: Any) -> bool:
    """Whether a value is known to JAX alone; without importing it."""
    return any(each.__name__ == "Tracer" for each in type(value).__mro__)


def _is_array(value: Any) -> bool:
    # A problem of this package has a shape and a dtype as well.
    return all(hasattr(value, name) for name in ("shape", "dtype", "ndim"))


def _kind(value: Any) -> str:
    """Bool, integer, float, complex, key or another kind of dtype, as NumPy's letters have it."""
    if isinstance(value, (bool, np.bool_)):
        return "b"
    if isinstance(value, int):
        return "i"
    if isinstance(value, float):
        return "f"
    dtype = getattr(value, "dtype", None)
    name = str(dtype)
    if name.startswith(("key<", "prng")):
        return "k"
    if "float" in name:  # bfloat16 has a kind of its own in NumPy
        return "f"
    return getattr(dtype, "kind", "?")


_NUMBER_WORDS = {"f": "a number", "i": "a whole number", "b": "True or False"}
_ALLOWED = {"f": "fiu", "i": "iu", "b": "b"}


def _scalar(kind: str) -> Judge:
    def judge(value: Any) -> str | None:
        found = _kind(value)
        right = found in _ALLOWED[kind] and getattr(value, "shape", ()) == ()
        if right and found == "f" and not is_traced(value) and not math.isfinite(value):
            return "a finite number"
        return None if right else _NUMBER_WORDS[kind]

    return judge


def _jaxtyped(annotation: Any) -> Judge:
    """Rank and kind of dtype of an array; names of axes are bound by the function's own checks."""
    dims = annotation.dim_str.split()
    variadic = any(d.startswith("*") or d == "..." or d.startswith("?*") for d in dims)
    least = len([d for d in dims if not (d.startswith("*") or d == "...")])
    names = annotation.dtypes if isinstance(annotation.dtypes, (list, tuple)) else ()
    kinds = {k for k in map(_letter, names) if k}
    words = {"f": "floating-point ", "i": "integer ", "u": "integer ", "b": "boolean ", "k": ""}
    what = words.get(min(kinds), "") if kinds and len(kinds - {"u"}) == 1 else ""
    if not dims:
        wanted = "a PRNG key" if "k" in kinds else f"a {what or 'numeric '}scalar"
    else:
        article = "a" if what and what[0] not in "i" else "an"
        wanted = f"{article} {what}array of shape ({', '.join(dims)})"

    def judge(value: Any) -> str | None:
        if not _is_array(value):
            return wanted
        rank = len(value.shape)
        if rank < least or (rank > least and not variadic):
            return wanted
        return None if not kinds or _kind(value) in kinds else wanted

    return judge


def _letter(name: Any) -> str:
    name = getattr(name, "pattern", name)
    name = name if isinstance(name, str) else str(name)
    if "prng_key" in name:
        return "k"
    for start, letter in (("bool", "b"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        if name.startswith(start):
            return letter
    return "f" if "float" in name else ""


def _union(parts: list[Judge]) -> Judge:
    def judge(value: Any) -> str | None:
        wanted: list[str] = []
        for part in parts:
            if (said := part(value)) is None:
                return None
            wanted.append(said)
        whole = _NUMBER_WORDS["i"]
        if {"a finite number", _NUMBER_WORDS["f"]} & {*wanted}:
            wanted = [words for words in wanted if words != whole]
        return " or ".join(dict.fromkeys(wanted))

    return judge


def _items(inner: Judge, length: int | None, of: type | tuple[type, ...], words: str) -> Judge:
    texts = inner is _text or inner is _callable

    def judge(value: Any) -> str | None:
        if isinstance(value, (str, bytes)) or not (isinstance(value, of) or _is_vector(value)):
            return words
        if texts and not isinstance(value, of):
            return words
        if length is not None and len(value) != length:
            return f"{words} of length {length}"
        for each in value:
            if (said := inner(each)) is not None:
                return f"{words} each of which is {said}"
        return None

    return judge


def _is_vector(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iuf"


def _instance(kind: type) -> Judge:
    article = "an" if kind.__name__[0] in "AEIOU" else "a"

    def judge(value: Any) -> str | None:
        try:
            return None if isinstance(value, kind) else f"{article} {kind.__name__}"
        except TypeError:  # a protocol that cannot be asked
            return None

    return judge


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "a text"


def _path(value: Any) -> str | None:
    if isinstance(value, str):
        return None if value and "\0" not in value else "a path"
    return None if isinstance(value, os.PathLike) else "a path"


def _callable(value: Any) -> str | None:
    return None if callable(value) else "a function"


def _none(value: Any) -> str | None:
    return None if value is None else "None"


_PLAIN: dict[Any, Judge] = {
    int: _scalar("i"),
    float: _scalar("f"),
    bool: _scalar("b"),
    str: _text,
    None: _none,
    type(None): _none,
}
_SEQUENCES = (collections.abc.Sequence, collections.abc.Collection, list, tuple)


@functools.cache
def judge_of(annotation: Any) -> Judge | None:
    """What judges the values of an annotation; None where any will do."""
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if hasattr(annotation, "dim_str"):
        return _jaxtyped(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = [judge_of(part) for part in arguments]
        if os.PathLike in arguments or any(typing.get_origin(a) is os.PathLike for a in arguments):
            parts = [_path if a is str else p for a, p in zip(arguments, parts, strict=True)]
        known = [part for part in parts if part is not None]
        return _union(known) if len(known) == len(parts) else None
    if origin is Literal:
        words = "one of " + ", ".join(map(repr, arguments))
        return lambda value: (
            None if any(type(value) is type(a) and value == a for a in arguments) else words
        )
    if origin is collections.abc.Callable or annotation is Callable:
        return _callable
    if annotation is os.PathLike or origin is os.PathLike:
        return _path
    if origin is collections.abc.Mapping or origin is dict:
        return lambda value: None if isinstance(value, collections.abc.Mapping) else "a mapping"
    if origin is type or annotation is type:
        return lambda value: None if isinstance(value, type) else "a class"
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        inner = {judge_of(a) for a in arguments}
        each = inner.pop() if len(inner) == 1 else None
        return _items(each or (lambda _: None), len(arguments), (tuple, list), "a tuple")
    if origin in _SEQUENCES:
        each = judge_of(arguments[0]) if arguments else None
        return _items(each or (lambda _: None), None, (list, tuple, range), "a sequence")
    if origin is collections.abc.Iterable:
        return lambda value: None if hasattr(value, "__iter__") else "iterable"
    if inspect.isclass(annotation) and annotation is not object:
        return _instance(annotation)
    return None


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, collections.abc.Mapping):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    if isinstance(value, (list, tuple)):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value]


def _fulfilled(demand: Demand, value: Any) -> bool:
    for leaf in _leaves(value):
        if leaf is None or isinstance(leaf, (str, bool)) or is_traced(leaf):
            continue
        if _kind(leaf) not in "iuf":
            continue
        array = np.asarray(leaf)
        if not np.all(demand.holds(array.astype(float) if array.dtype == object else array)):
            return False
    return True


def refused(name: str, value: Any, wanted: str) -> ValueError:
    """The error of an argument that is not what it must be."""
    return ValueError(f"{name} is {shown(value)}; it must be {wanted}.")


@overload
def judged(function: _Function, /, **demands: Demand) -> _Function: ...
@overload
def judged(**demands: Demand) -> Callable[[_Function], _Function]: ...
def judged(function: Any = None, /, **demands: Demand) -> Any:
    """Judges the arguments of a function, or of a class's making, before it runs.

    Args:
      function: whose annotations are read, at its first call.
      **demands: on numbers, by the names of arguments.

    Returns:
      The function, which raises ValueError for what its arguments must not be.
    """
    if function is None:
        return lambda each: judged(each, **demands)
    if inspect.isclass(function):
        function.__init__ = judged(function.__init__, **demands)
        return function
    signature = inspect.signature(function)
    names = [
        name
        for name, p in signature.parameters.items()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    assert demands.keys() <= signature.parameters.keys(), demands
    judges: dict[str, Judge] = {}
    defaults = {n: p.default for n, p in signature.parameters.items()}

    def prepare() -> None:
        hints = typing.get_type_hints(inspect.unwrap(function))
        for name, parameter in signature.parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if (judge := judge_of(hints.get(name, Any))) is not None:
                judges[name] = judge
        judges.setdefault("", lambda _: None)  # prepared

    def check(name: str, value: Any) -> None:
        if value is defaults.get(name, judges):
            return
        # What numbers must be says more than that they must be finite.
        if name in demands and not _fulfilled(demands[name], value):
            raise refused(name, value, demands[name].words)
        if name in judges and (wanted := judges[name](value)) is not None:
            raise refused(name, value, wanted)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not judges:
            prepare()
        for name, value in zip(names, args, strict=False):
            check(name, value)
        for name, value in kwargs.items():
            check(name, value)
        return function(*args, **kwargs)

    wrapper.judged = True  # pyright: ignore[reportAttributeAccessIssue]
    return wrapper
