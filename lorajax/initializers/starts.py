"""Starts by name: what this room offers, and what a start asks for, read off its signature.

A start is any function that returns `Factors`, a `Start` or `TuckerFactors`. Whoever runs it fills
the parameters that it names (`key`, `shape`, `rank`, `scale`, `matrix`, …), so that a function of
your own is a start as much as those here.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from lorajax.environment.judging import judged
from lorajax.factors import Factors, TuckerFactors
from lorajax.initializers.units import Start

RETURNS = (Factors, Start, TuckerFactors)
"""What a start returns."""


@judged
@functools.cache
def offered() -> Mapping[str, Callable[..., Any]]:
    """The starts of this room by name: its public functions that return one of `RETURNS`."""
    package = __name__.rpartition(".")[0]
    folder = importlib.import_module(package).__path__
    found: dict[str, Callable[..., Any]] = {}
    for info in pkgutil.iter_modules(folder, f"{package}."):
        for name, value in vars(importlib.import_module(info.name)).items():
            own = inspect.isfunction(value) and value.__module__ == info.name
            if not own or name.startswith("_"):
                continue
            if inspect.signature(value, eval_str=True).return_annotation in RETURNS:
                found[name] = value
    return dict(sorted(found.items()))


@judged
def resolve(start: str | Callable[..., Any]) -> Callable[..., Any]:
    """The start of a name, or the callable itself.

    Args:
      start: the name of a start of `lorajax.initializers`, or any callable that returns factors.

    Returns:
      The start.

    Raises:
      ValueError: for an unknown name, or what is neither a name nor callable.
    """
    if callable(start):
        return start
    if start not in offered():
        raise ValueError(
            f"start is {start!r}; a named start must be one of {', '.join(offered())}."
        )
    return offered()[start]


@judged
def name_of(start: str | Callable[..., Any]) -> str:
    """A short name for a reader: the function's, with the arguments bound to it."""
    if isinstance(start, str):
        return start
    if isinstance(start, functools.partial):
        bound = ", ".join(f"{key}={value!r}" for key, value in start.keywords.items())
        return f"{name_of(start.func)}({bound})"
    return getattr(start, "__name__", type(start).__name__).strip("<>")


@judged
def asks_for(start: str | Callable[..., Any]) -> dict[str, bool]:
    """The parameters that a start leaves to whoever calls it, and whether it needs them.

    Args:
      start: as for `resolve`. What a `functools.partial` has bound is not asked for.

    Returns:
      By name, in the signature's order: True where there is no default.

    Raises:
      ValueError: for an unknown name.
    """
    function = resolve(start)
    bound = function.keywords if isinstance(function, functools.partial) else {}
    return {
        name: p.default is p.empty
        for name, p in inspect.signature(function).parameters.items()
        if name not in bound and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


@judged
def call(
    start: str | Callable[..., Any],
    values: Mapping[str, Any],
    *,
    where: str = "the start",
    remedies: Mapping[str, str] | None = None,
) -> Any:
    """Calls a start with those of `values` that it asks for.

    Args:
      start: as for `resolve`.
      values: by parameter; None stands for what could be given but was not.
      where: what starts, for error messages.
      remedies: by parameter: what to give so that its value is there.

    Returns:
      What the start returns.

    Raises:
      ValueError: if the start needs what is missing.
    """
    arguments = {}
    for name, needed in asks_for(start).items():
        if name in values:
            if values[name] is None and needed:
                remedy = (remedies or {}).get(name, "a start that does not")
                raise ValueError(f"{where} needs {name}; give {remedy}.")
            if values[name] is not None:
                arguments[name] = values[name]
        elif needed:
            raise ValueError(
                f"{where} has a parameter {name!r} that nothing fills; bind it with "
                f"functools.partial, or use one of {', '.join(sorted(values))}."
            )
    return resolve(start)(**arguments)
