"""Where families are found: those of this package by their files, others by registration."""

import dataclasses
import functools
import importlib
import numbers
import pkgutil
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import lorajax.models
from lorajax.environment.judging import judged
from lorajax.models.family import Family, Model

_REGISTERED: dict[str, Family] = {}


@functools.cache
def _own() -> tuple[Family, ...]:
    # A family is one file: each module of this package that has a FAMILY, and no list of them here.
    names = [info.name for info in pkgutil.iter_modules(lorajax.models.__path__)]
    modules = [importlib.import_module(f"lorajax.models.{name}") for name in sorted(names)]
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


@judged
def families() -> dict[str, Family]:
    """Every known family by its name."""
    return {family.name: family for family in _own()} | _REGISTERED


@judged
def register(family: Family) -> Family:
    """Makes a family from outside the package known to `config`, `build`, `load` and `save`.

    Args:
      family: with a name of its own; the same name again takes the place of what was registered.

    Returns:
      The family.

    Raises:
      ValueError: if its name is that of a family of this package, or its configuration no
        dataclass.
    """
    if any(family.name == own.name for own in _own()):
        raise ValueError(f"name is {family.name!r}, which is a family of this package.")
    if not dataclasses.is_dataclass(family.config):
        raise ValueError(f"config is {family.config!r}; it must be a frozen dataclass.")
    _REGISTERED[family.name] = family
    return family


def family_of(config: Any) -> Family:
    """The family of a configuration.

    Raises:
      ValueError: if it is of none.
    """
    for family in families().values():
        if type(config) is family.config:
            return family
    known = ", ".join(family.config.__name__ for family in families().values())
    raise ValueError(f"config is a {type(config).__name__}; it must be one of {known}.")


@judged
def config(name: str, **changes: Any) -> Any:
    """The configuration of a published network.

    Args:
      name: for example "vit-b/16", "resnet50", "cifar-resnet20", "vgg16-bn": see `Family.named` of
        `families()`.
      **changes: fields of the configuration to set, for example `classes=10`.

    Returns:
      The configuration, for example a ViTConfig.

    Raises:
      ValueError: for an unknown name or field.

    Example:
      >>> from lorajax import models
      >>> models.config("vit-ti/4", image_size=(32, 32), classes=10).width
      192
    """
    for family in families().values():
        if isinstance(name, str) and (found := family.find(name)) is not None:
            return replace(found, **family.options(changes))
    known = [pattern for family in families().values() for pattern in family.named]
    raise ValueError(f"name is {name!r}; it must be one of {', '.join(known)}.")


def replace(config: Any, **changes: Any) -> Any:
    """A configuration with some fields changed; ValueError names a field that does not exist."""
    check_fields(type(config), changes)
    return dataclasses.replace(config, **changes)


def check_fields(kind: type, fields: Mapping[str, Any]) -> None:
    """Raises ValueError for what is no field of a class of configurations, or of another type."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for name, value in fields.items():
        if name not in names:
            raise ValueError(
                f"{name} is not a field of {kind.__name__}; it has {', '.join(names)}."
            )
        if not _fits(value, hints[name]):
            raise ValueError(f"{name} is {value!r}; it must be of the type {hints[name]}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the simple types that JSON holds; other types are not judged."""
    if typing.get_origin(hint) is tuple:
        parts = [part for part in typing.get_args(hint) if part is not ...]
        long = len(parts) == 1 and ... in typing.get_args(hint)
        parts = parts * len(value) if long and isinstance(value, tuple) else parts
        return (
            isinstance(value, tuple) and len(parts) == len(value) and all(map(_fits, value, parts))
        )
    kinds = {int: numbers.Integral, float: numbers.Real, str: str, bool: bool}
    if hint not in kinds:
        return True
    return isinstance(value, kinds[hint]) and isinstance(value, bool) == (hint is bool)


@judged
def build(
    config: Any, *, rngs: nnx.Rngs, dtype: Any = None, param_dtype: Any = jnp.float32
) -> Model:
    """A randomly initialized model of any family.

    Args:
      config: of the model; its type decides the family.
      rngs: for the weights and for dropout.
      dtype: of the computation; that of the weights and the inputs if None.
      param_dtype: of the weights.

    Returns:
      A model in training mode, for example a ViT.

    Raises:
      ValueError: if the configuration is of no known family.
    """
    return family_of(config).model(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)


class _SameKey(nnx.RngStream):
    """A stream that gives one key again and again, for shapes alone.

    The traced counter of a plain stream is slow: each time it is set, flax asks where it is placed,
    and JAX searches the whole trace before it says that a traced value is nowhere (10 s for the 225
    layers of Llama-3-8B, of 12 in all).
    """

    def __call__(self) -> jax.Array:
        return self.key[...]

    def fork(self, **options: Any) -> nnx.RngStream:
        return nnx.RngStream(self(), tag=self.tag).fork(**options)


def abstract(config: Any, dtype: Any, param_dtype: Any) -> Model:
    """The model of `build` without arrays: weights that are overwritten need not be drawn.

    Args:
      config: of the model.
      dtype: as for `build`.
      param_dtype: as for `build`.

    Returns:
      The model with a `jax.ShapeDtypeStruct` in place of every array.
    """

    def make() -> Model:
        rngs = nnx.Rngs(0)
        rngs.default = _SameKey(0, tag="default")  # pyright: ignore[reportAttributeAccessIssue]
        return build(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

    return nnx.eval_shape(make)
