"""A valid call of every public function and class, from the values in `calls`."""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from typing import Any

import lorajax
from benchmarks.trust.calls import CALLS, CLASS_METHODS, EXEMPT, NAMES, RECORD
from benchmarks.trust.world import World

ROOMS_WITHOUT_LISTS = ("lorajax.spectra", "lorajax.factors")


def named() -> Iterator[tuple[str, Any]]:
    """Every public function and class, once, by its shortest name."""
    found: dict[int, tuple[str, Any]] = {}
    for info in pkgutil.walk_packages(lorajax.__path__, "lorajax."):
        if any(part.startswith("_") for part in info.name.split(".")):
            continue
        module = importlib.import_module(info.name)
        names = getattr(module, "__all__", None)
        if names is None and info.name in ROOMS_WITHOUT_LISTS:
            own = vars(module).items()
            names = [n for n, v in own if getattr(v, "__module__", "") == info.name and n[0] != "_"]
        for name in names or ():
            value = getattr(module, name)
            own = getattr(value, "__module__", "") or ""
            if callable(value) and own.startswith("lorajax."):
                if inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value)):
                    shorter = found.get(id(value))
                    if shorter is None or len(f"{info.name}.{name}") < len(shorter[0]):
                        found[id(value)] = f"{info.name}.{name}", value
    yield from sorted(found.values())
    for kind, methods in CLASS_METHODS.items():
        for method in methods:
            yield (
                f"lorajax.problems.{kind}.{method}",
                getattr(getattr(lorajax.problems, kind), method),
            )


def exempt(name: str, value: Any) -> str | None:
    """Why something is not called; None where it is."""
    for prefix, reason in EXEMPT.items():
        if name == prefix or (name.startswith(prefix + ".") and prefix.count(".") == 1):
            return reason
    if inspect.isclass(value):
        if issubclass(value, tuple):
            return RECORD
        if getattr(value, "_is_protocol", False) or issubclass(value, BaseException):
            return "a protocol or an exception"
    return None


def arguments(name: str, function: Any, world: World) -> dict[str, Any]:
    """Arguments of a valid call.

    Raises:
      LookupError: for an argument that no table has.
    """
    room = name.split(".")[1]
    given = dict(CALLS.get(name, {}))
    hints = hints_of(function)
    found = {}
    for parameter in parameters(function):
        key = parameter.name
        for where in (given, NAMES):
            picked = where.get(f"{room}:{key}", where.get(key, LookupError))
            if picked is not LookupError:
                break
        if key in given:
            found[key] = _value(given[key], world)
        elif parameter.default is not parameter.empty:
            continue
        elif (known := _by_kind(hints.get(key), world)) is not None:
            found[key] = known
        elif picked is not LookupError:
            found[key] = _value(picked, world)
        else:
            raise LookupError(
                f"{name} has an argument {key!r} that benchmarks/trust/valid.py lacks"
            )
    # What goes through as further options is given by name alone.
    return {**{name: _value(value, world) for name, value in given.items()}, **found}


def parameters(function: Any) -> list[inspect.Parameter]:
    """The arguments of a function, or of a class's making, that have names of their own."""
    target = function
    if inspect.isclass(function) and "__init__" in vars(function):
        target = functools.partial(function.__init__, None)  # Flax's classes show none
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in inspect.signature(target).parameters.values() if p.kind not in several]


def _value(value: Any, world: World) -> Any:
    return value(world) if callable(value) and not inspect.isclass(value) else value


def _by_kind(hint: Any, world: World) -> Any:
    kinds = {
        lorajax.TwoLayer: "two_layer",
        lorajax.Linearized: "linearized",
        lorajax.TwoLayerFactors: "two_layer_factors",
        lorajax.TuckerFactors: "tucker",
        lorajax.LinearAttention: "attention",
        lorajax.TraceSquared: "trace",
        lorajax.DiagonalFactorization: "diagonal",
    }
    return getattr(world, kinds[hint]) if hint in kinds else None


@functools.cache
def hints_of(function: Any) -> dict[str, Any]:
    """Annotations of the arguments of a function, or of what makes a class."""
    target = function
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function):
            return typing.get_type_hints(function)
        target = function.__init__
    return typing.get_type_hints(inspect.unwrap(getattr(target, "__func__", target)))
