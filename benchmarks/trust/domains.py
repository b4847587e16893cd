"""Values that are certainly wrong for an argument, by its annotation and by what it stands for."""

import collections.abc
import datetime
import inspect
import math
import os
import pathlib
import types
import typing
from typing import Any, Literal

import numpy as np

NAN, INF = math.nan, math.inf
COUNT, POSITIVE, NOT_NEGATIVE, SHARE = "count", "positive", "not negative", "share"

DOMAINS: dict[str, str] = {
    **dict.fromkeys(
        "rank steps samples batch_size every max_steps count outputs limit equations statements "
        "dimension modes directions epochs classes channels accumulate chunk bucket memory "
        "workers length".split(),
        COUNT,
    ),
    **dict.fromkeys(
        "eta learning_rate rtol atol scaling gamma ratio b_rate tolerance scale alpha".split(),
        POSITIVE,
    ),
    **dict.fromkeys("weight_decay decay floor noise seed margin budget".split(), NOT_NEGATIVE),
    **dict.fromkeys("dropout smoothing".split(), SHARE),
}
"""What numbers of a name must be, wherever in the library it stands."""
_WRONG = {
    COUNT: (0, -1, -7, -(10**12)),
    POSITIVE: (0.0, -1e-300, -1.0, -1e30, NAN, INF, -INF),
    NOT_NEGATIVE: (-1, -(10**12), NAN, -INF),
    SHARE: (-0.1, 1.0, 1.5, -1e30, 1e30, NAN, INF),
    "finite": (NAN, INF, -INF),
}


class Stranger:
    """An object of no kind that anything asks for."""


class Rude:
    """An object that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


def pool() -> list[Any]:
    """Values of all kinds."""
    texts = ["", " ", "nonsense", "x" * 5000, "ünïcode", "3", "None", "a\nb", "{}"]
    numbers = [0, -1, 7, 10**30, 2.5, -2.5, NAN, INF, -INF, 1j, True, False]
    numbers += [np.float64(NAN), np.int8(-3), np.complex64(1j), np.bool_(True)]
    containers = [[], [1, 2], ["a"], (), (1, 2, 3, 4, 5, 6, 7), {}, {"a": 1}, {1, 2}, [None], [[]]]
    odd = [
        None,
        Ellipsis,
        Stranger(),
        Rude(),
        Stranger,
        b"bytes",
        range(3),
        slice(2),
        math,
        iter(()),
    ]
    odd += [pathlib.Path("nowhere"), datetime.date(2020, 1, 1), np.datetime64("2020-01-01")]
    odd += [lambda: None, NotImplemented, np.dtype("float32"), types.SimpleNamespace()]
    arrays: list[Any] = []
    for shape in ((), (3,), (2, 3), (2, 3, 4), (1, 1, 1, 1, 1), (0,), (0, 0)):
        for dtype in (np.float64, np.complex128, np.bool_, np.int32, object, "U3", "M8[s]"):
            arrays.append(np.zeros(shape, dtype))
    arrays += [np.full(shape, NAN) for shape in ((), (3,), (2, 3))]
    return [*texts, *numbers, *containers, *odd, *arrays]


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return False
    if _is_array(value):
        return value.shape == () and value.dtype.kind in ("iu" if whole else "iuf")
    return isinstance(value, (int,) if whole else (int, float))


def _may_be_array(annotation: Any, value: Any) -> bool:
    dims = annotation.dim_str.split()
    several = any(d.startswith("*") or d == "..." for d in dims)
    least = sum(not (d.startswith("*") or d == "...") for d in dims)
    if not _is_array(value):
        # Lists and numbers that NumPy would take for such an array are not certainly wrong.
        if isinstance(value, (bool, str, bytes, dict, set)) or value is None:
            return False
        if not isinstance(value, (int, float, list, tuple, range)):
            return False
        try:
            value = np.asarray(value)
        except ValueError:
            return False
        if value.dtype.kind not in "iuf":
            return False
    rank = len(value.shape)
    if rank < least or (rank > least and not several):
        return False
    return value.dtype.kind in "iuf"


def may_be(annotation: Any, value: Any) -> bool:
    """Whether a value could be right for an annotation, in doubt yes."""
    if annotation in (Any, inspect.Parameter.empty) or isinstance(annotation, typing.TypeVar):
        return True
    if annotation in (None, type(None)):
        return value is None
    if annotation is bool:
        return isinstance(value, (bool, np.bool_)) or (
            _is_array(value) and value.dtype.kind == "b" and value.shape == ()
        )
    if annotation in (int, float):
        return _is_number(value, annotation is int)
    if annotation is str:
        return isinstance(value, str)
    if hasattr(annotation, "dim_str"):
        return _may_be_array(annotation, value)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(may_be(part, value) for part in arguments)
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in arguments)
    if origin is collections.abc.Callable or annotation is collections.abc.Callable:
        return callable(value)
    if annotation is os.PathLike or origin is os.PathLike:
        return isinstance(value, (str, os.PathLike))
    if origin in (collections.abc.Mapping, dict):
        return isinstance(value, collections.abc.Mapping)
    if origin in (collections.abc.Sequence, collections.abc.Collection, list, tuple):
        if isinstance(value, (str, bytes)):
            return False
        if not isinstance(value, collections.abc.Sequence) and not isinstance(value, np.ndarray):
            return False
        if isinstance(value, np.ndarray):
            return len(value.shape) > 0 and value.dtype.kind in "iuf"
        inner = [a for a in arguments if a is not Ellipsis]
        if origin is tuple and Ellipsis not in arguments and len(value) != len(arguments):
            return False
        return all(may_be(a, each) for each in value for a in inner[:1])
    if origin is collections.abc.Iterable:
        return hasattr(value, "__iter__")
    if origin is type:
        return isinstance(value, type)
    if inspect.isclass(annotation):
        try:
            return isinstance(value, annotation)
        except TypeError:
            return True
    return True


def wrong_values(annotation: Any, name: str, domain: str | None) -> list[Any]:
    """Values that are certainly wrong for an argument.

    Args:
      annotation: of the argument, resolved.
      name: of the argument.
      domain: of its numbers; by its name if None, "any" for no demand.
    """
    found = [value for value in pool() if not may_be(annotation, value)]
    if not (may_be(annotation, 2.5) or may_be(annotation, 7)):
        return found
    if annotation in (Any, inspect.Parameter.empty):
        return []
    domain = domain or DOMAINS.get(name, "finite" if annotation is float else "any")
    numbers = [value for value in _WRONG.get(domain, ()) if may_be(annotation, value)]
    arrays = [np.asarray(value) for value in numbers if may_be(annotation, np.asarray(value))]
    return [*found, *numbers, *arrays]


def shown(value: Any) -> str:
    """A value in a few words, whatever it is."""
    if _is_array(value):
        return f"{value.dtype}{list(value.shape)}"
    try:
        return repr(value)[:40]
    except Exception:
        return type(value).__name__
