"""What a kind of adapter is: a frozen set of options that builds the adapter of a layer."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from lorajax.adapters.layers import Adapter
from lorajax.adapters.layouts import Axes
from lorajax.adapters.starts import Site
from lorajax.environment.judging import POSITIVE, SHARE, judged


@judged(alpha=POSITIVE, dropout=SHARE)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(abc.ABC):
    """A kind of adapter with its options; `adapt(model, targets, kind=…)` takes the class or one.

    A new kind is a subclass, a frozen dataclass whose fields are its options, with a `build` that
    makes an `Adapter`, and with a `name` if it is to be found by one. Two options that exclude each
    other are fields of two classes, so that no call can give both.

    Attributes:
      alpha: numerator of the scaling; None for a scaling of 1 at any rank.
      dropout: rate at which entries of the adapter's input are dropped in training.
      attends: for an Embed, whether the adapter acts in `Embed.attend` as well; PEFT's do not.
      dtype: dtype of the adapter's parameters, in which it computes too.

    Raises:
      ValueError: for a dtype that is not floating point; a subclass for options of its own.
    """

    name: ClassVar[str | None] = None

    alpha: float | int | None = None
    dropout: float | int = 0.0
    attends: bool = True
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype is {self.dtype}; it must be floating point.")

    @property
    def skips(self) -> bool:
        """Whether a layer with these options is left alone, as one of rank 0 is."""
        return False

    @abc.abstractmethod
    def build(self, site: Site) -> Adapter:
        """The adapter of one layer.

        Args:
          site: the layer, a key of its own, and what is known of its gradient and inputs.

        Returns:
          The adapter.

        Raises:
          ValueError: where the options do not fit the layer, naming `site.path`.
        """

    def build_all(self, sites: Sequence[Site]) -> dict[str, Adapter]:
        """The adapters of all layers of one target, by path; each on its own unless overridden."""
        return {site.path: self.build(site) for site in sites}

    def common(self, site: Site) -> dict[str, Any]:
        """What `Adapter.__init__` is told of these options: alpha, dropout, rngs, attends."""
        rngs = nnx.Rngs(dropout=jax.random.fold_in(site.key, 1)) if self.dropout else None
        return dict(alpha=self.alpha, dropout=self.dropout, rngs=rngs, attends=self.attends)


Kind = str | type[Spec] | Spec


@judged
def kinds() -> dict[str, type[Spec]]:
    """Every kind that has a name: those of this folder, and any subclass defined elsewhere.

    Raises:
      ValueError: for two classes of one name, unless one is the other, defined again.
    """
    found: dict[str, type[Spec]] = {}

    def walk(kind: type[Spec]) -> None:
        if kind.name is not None and "name" in vars(kind):
            both = (found.get(kind.name, kind), kind)
            places = sorted({f"{each.__module__}.{each.__qualname__}" for each in both})
            if len(places) > 1:
                raise ValueError(
                    f"name is {kind.name!r} of two kinds, {' and '.join(places)}; give yours a "
                    "name of its own."
                )
            found[kind.name] = kind
        for child in kind.__subclasses__():
            walk(child)

    walk(Spec)
    return found


def spec_of(kind: Kind, options: Mapping[str, Any], path: str) -> Spec:
    """The options of one layer.

    Args:
      kind: the name of a kind, a subclass of Spec, or an instance whose fields are defaults.
      options: fields by name, which win over those of an instance.
      path: the layer's path, for errors.

    Returns:
      The Spec.

    Raises:
      ValueError: for an unknown kind or option, or values that the kind refuses.
    """
    if isinstance(kind, str):
        known = kinds()
        if kind not in known:
            names = ", ".join(map(repr, sorted(known)))
            raise ValueError(
                f"kind of {path!r} is {kind!r}; it must be {names} or a subclass of adapters.Spec."
            )
        kind = known[kind]
    if not isinstance(kind, Spec) and not (isinstance(kind, type) and issubclass(kind, Spec)):
        raise ValueError(f"kind of {path!r} is {kind!r}; it must be a name or an adapters.Spec.")
    fields = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(options) - fields):
        name = (kind if isinstance(kind, type) else type(kind)).__name__
        raise ValueError(
            f"adapt has no option {unknown[0]!r} for {path!r}; those of {name} are "
            f"{', '.join(sorted(fields))}."
        )
    try:
        return kind(**options) if isinstance(kind, type) else dataclasses.replace(kind, **options)
    except ValueError as error:
        raise ValueError(f"layer {path!r}: {error}") from None


def target_options(entry: Any) -> dict[str, Any]:
    """The options that the entry of a target stands for: a rank, a Spec, options by name, None."""
    if entry is None:
        return {}
    if isinstance(entry, Spec):
        return {"kind": entry}
    return dict(entry) if isinstance(entry, Mapping) else {"rank": entry}


@judged
def target_spec(entry: Any, path: str, kind: Kind = "lora", **options: Any) -> Spec:
    """The Spec of a layer from what its target says and what holds for all targets.

    Args:
      entry: a rank, a Spec, options by name, or None.
      path: the layer's path, for errors.
      kind: the kind of those that name none.
      **options: fields for all layers; the entry's win, and a Spec stands for itself.

    Returns:
      The Spec.

    Raises:
      ValueError: as for `spec_of`.
    """
    if isinstance(entry, Spec):
        return entry
    given = {"kind": kind} | options | target_options(entry)
    return spec_of(given.pop("kind"), given, path)


@judged
def axes_of(entry: Any, path: str) -> Axes | None:
    """The axes that the entry of a target names, as for `target_spec`; None for the layer's own."""
    return getattr(target_spec(entry, path), "axes", None)
