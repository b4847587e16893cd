"""What a family of models is: its classes, its published names, and the files it reads and writes.

A family is declared by one `Family` value at the end of the file that defines its model, and found
from there (`catalog`); `models.register` takes one from outside the package.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorajax.environment.judging import judged
from lorajax.models.files import Source


class Model(nnx.Module):
    """What every model here has, so that nobody else asks which family it is of.

    Args:
      config: a frozen dataclass that fixes the model's function, apart from its weights.
      rngs: for the initial weights, and for dropout.
      dtype: of the computation; that of the weights and the inputs if None.
      param_dtype: of the weights.

    A subclass adds its layers, keeps all arrays in NNX variables, and sets `heads` and `beside`
    where they are others.
    """

    @judged
    def __init__(
        self,
        config: Any,
        *,
        rngs: nnx.Rngs,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self.config = config
        self.dtype = dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, for example logits; each model says of what."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__.")

    @property
    def takes(self) -> str:
        """What it is called on, which decides the task; `tasks.takes` names the kinds."""
        return "images"

    @property
    def heads(self) -> tuple[str, ...]:
        """Paths of the heads: drawn afresh for other classes, and trained in full."""
        return ("head",)

    @property
    def beside(self) -> tuple[str, ...]:
        """Paths of what trains in full beside the heads by default: nothing."""
        return ()


class Untold(NamedTuple):
    """The value of a field that a checkpoint does not tell, with why; the caller must give it."""

    why: str


class Rule(NamedTuple):
    """Tensors of a checkpoint and what they become.

    Attributes:
      theirs: names in the checkpoint.
      ours: dotted paths in the model; none for tensors that the model has no use for.
      read: checkpoint tensors → one array a path.
      write: arrays in the order of `ours` → checkpoint tensors.
      optional: whether the checkpoint may lack the tensors, which then count as zeros.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Callable[..., tuple[np.ndarray, ...]]
    write: Callable[..., tuple[np.ndarray, ...]]
    optional: bool = False


def _nothing(config: Any) -> None:
    """Refuses nothing."""


def _plain(name: str) -> str:
    """The name as it is."""
    return name


def _spelled(config: Any, name: str) -> str:
    """The name as it is."""
    return name


def _no_files(config: Any) -> dict[str, dict[str, Any]]:
    """No files."""
    return {}


def _no_outline(said: dict[str, Any]) -> None:
    """Needs the weights."""


@judged
@dataclasses.dataclass(frozen=True)
class Format:
    """One public layout of a family's checkpoints.

    Attributes:
      layout: its name, as `models.save` takes it.
      signature: names of tensors that give it away; of several formats that fit, the one with the
        most is taken.
      infer: the configuration's fields as a checkpoint tells them, `Untold` where it tells none. A
        ValueError refuses the checkpoint; anything that its tensors would not show, and that the
        model has no place for, must be refused here.
      rules: which tensors are which arrays, for a configuration; they read and write.
      ignored: a regular expression of tensors that no model here needs.
      prefix: put before every name where the checkpoint was saved without it.
      bare: a tensor's name that shows that the prefix is missing.
      rename: a name in a file → the layout's, where files spell one name in several ways.
      spell: (configuration, a name of the layout) → how a file of that configuration spells it.
      suffix: of the file to write, ".safetensors" or ".npz".
      express: raises ValueError for a configuration that the layout cannot tell.
      beside: JSON files to write beside the weights, by name.
      side: names of the JSON files beside the weights that `infer` reads.
      modules: rules with the names of the torch model that the checkpoint is loaded into, where
        they are not those of the file; for adapters, which name its modules.
      outline: shapes of the tensors that `signature` and `infer` look at, by what a `config.json`
        states; None where it states another model. For plans without weights.
    """

    layout: str
    signature: tuple[str, ...]
    infer: Callable[[Source], dict[str, Any]]
    rules: Callable[[Any], Iterable[Rule]]
    ignored: str = r"(.*\.)?num_batches_tracked"
    prefix: str = ""
    bare: str = ""
    rename: Callable[[str], str] = _plain
    spell: Callable[[Any, str], str] = _spelled
    suffix: str = ".safetensors"
    express: Callable[[Any], None] = _nothing
    beside: Callable[[Any], dict[str, dict[str, Any]]] = _no_files
    side: tuple[str, ...] = ("config.json",)
    modules: Callable[[Any], Iterable[Rule]] | None = None
    outline: Callable[[dict[str, Any]], dict[str, tuple[int, ...]] | None] = _no_outline

    def names(self, tensors: Mapping[str, Any]) -> dict[str, str] | None:
        """The layout's names → a checkpoint's own, or None if it is in another format.

        Raises:
          ValueError: if the checkpoint has one tensor under two spellings.
        """
        # DataParallel and torch.compile put a word in front of every name.
        wrapper = next((w for w in ("module.", "_orig_mod.") if _all_start(tensors, w)), "")
        bare = self.bare and f"{wrapper}{self.bare}" in tensors
        own: dict[str, str] = {}
        twice: list[str] = []
        for theirs in tensors:
            name = self.rename((self.prefix if bare else "") + theirs[len(wrapper) :])
            if re.fullmatch(self.ignored, name):
                continue
            twice += [own[name], theirs] if name in own else []
            own[name] = theirs
        if not all(name in own for name in self.signature):
            return None
        if twice:
            raise ValueError(f"the tensors {twice[0]} and {twice[1]} are two spellings of one.")
        return own


def _all_start(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _as_it_is(
    arrays: Mapping[str, np.ndarray], config: Any, target: Any
) -> Mapping[str, np.ndarray]:
    """Changes nothing."""
    return arrays


@judged
@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models, declared once, in the file of its model.

    Attributes:
      name: of the family; it stands in this package's own files.
      model: class, made from (config, rngs=, dtype=, param_dtype=); a subclass of `Model`.
      config: class of the configuration, a frozen dataclass whose values JSON can hold and whose
        `__post_init__` raises ValueError for what makes no model. A model that classifies has a
        field `classes`.
      formats: public layouts that it reads and writes, beside this package's own.
      named: published networks: a name, in which `{a,b}` stands for either, → the configuration,
        made from what stood in the braces.
      options: what a caller may give for fields → the fields, for example one side of a square.
      fit: (arrays by path, configuration they have, the one wanted) → arrays that fit the second,
        for example resized tables of positions.
      zeros: a regular expression of paths that a file may lack, and that then are zeros.
      repeats: fields that count layers (numbers or tuples of them); a file with fewer tensors is
        refused before a model of a billion layers is laid out.

    Example:
      >>> import lorajax.models.vgg
      >>> lorajax.models.vgg.FAMILY.named["vgg{11,13,16,19}{,-bn}"]("16", "-bn").batch_norm
      True
    """

    name: str
    model: type[Model]
    config: type
    formats: tuple[Format, ...] = ()
    named: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    options: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    fit: Callable[..., Mapping[str, np.ndarray]] = _as_it_is
    zeros: str = r"(?!)"
    repeats: tuple[str, ...] = ()

    def find(self, name: str) -> Any | None:
        """The configuration of a published network; None for a name of another family."""
        for pattern, make in self.named.items():
            parts = re.split(r"\{([^}]*)\}", pattern)
            choices = [
                f"({'|'.join(map(re.escape, part.split(',')))})" if i % 2 else re.escape(part)
                for i, part in enumerate(parts)
            ]
            if match := re.fullmatch("".join(choices), name):
                return make(*match.groups())
        return None


Map = Callable[[np.ndarray], np.ndarray]


def _identity(x: np.ndarray) -> np.ndarray:
    return x


def one(
    theirs: str, ours: str, read: Map = _identity, write: Map = _identity, optional: bool = False
) -> Rule:
    """A rule of one tensor and one array, the same by default."""
    return Rule((theirs,), (ours,), lambda x: (read(x),), lambda x: (write(x),), optional)


def linear(theirs: str, ours: str, optional_bias: bool = False) -> Iterator[Rule]:
    """Rules of torch's Linear (out, in) as a Flax Linear (in, out)."""
    yield one(f"{theirs}.weight", f"{ours}.kernel", np.transpose, np.transpose)
    yield one(f"{theirs}.bias", f"{ours}.bias", optional=optional_bias)


def stacked(theirs: str, ours: Sequence[str], optional_bias: bool = False) -> Iterator[Rule]:
    """Rules of one torch Linear whose outputs are those of several Flax ones, one by one."""
    yield from _stacked(f"{theirs}.weight", f"{theirs}.bias", ours, optional_bias)


def attention_in(theirs: str, ours: str) -> Iterator[Rule]:
    """Rules of the `in_proj` of torch's MultiheadAttention as query, key and value."""
    names = [f"{ours}.{name}" for name in ("query", "key", "value")]
    yield from _stacked(f"{theirs}.in_proj_weight", f"{theirs}.in_proj_bias", names, True)


def _stacked(weight: str, bias: str, ours: Sequence[str], optional_bias: bool) -> Iterator[Rule]:
    count = len(ours)
    yield Rule(
        (weight,),
        tuple(f"{name}.kernel" for name in ours),
        lambda x: tuple(part.T for part in np.split(x, count)),
        lambda *x: (np.concatenate([kernel.T for kernel in x]),),
    )
    yield Rule(
        (bias,),
        tuple(f"{name}.bias" for name in ours),
        lambda x: tuple(np.split(x, count)),
        lambda *x: (np.concatenate(x),),
        optional_bias,
    )


def unused(theirs: str, *shape: int) -> Rule:
    """The rule of a tensor that a model has no use for, whether it is there or not.

    Args:
      theirs: its name.
      *shape: of the zeros that stand for it where a module of torch cannot be without; none for a
        tensor that is not written.
    """
    zeros = (np.zeros(shape, np.float32),) if shape else ()
    return Rule((theirs,), (), lambda *x: (), lambda *x: zeros, True)


def conv(theirs: str, ours: str) -> Rule:
    """The rule of torch's kernel (out, in, height, width) as Flax's (height, width, in, out)."""
    return one(theirs, ours, lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))


def layer_norm(theirs: str, ours: str) -> Iterator[Rule]:
    """Rules of torch's LayerNorm."""
    yield one(f"{theirs}.weight", f"{ours}.scale")
    yield one(f"{theirs}.bias", f"{ours}.bias")


def batch_norm(theirs: str, ours: str) -> Iterator[Rule]:
    """Rules of torch's BatchNorm, with its running statistics."""
    yield from layer_norm(theirs, ours)
    yield one(f"{theirs}.running_mean", f"{ours}.mean")
    yield one(f"{theirs}.running_var", f"{ours}.var")


def count(names: Iterable[str], pattern: str, first: int = 0) -> int:
    """How many numbers, from `first` on, the pattern's group matches at the start of names.

    Raises:
      ValueError: if numbers are left out, as a hostile file does to have a huge model made.
    """
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    if found and (min(found) < first or max(found) - first + 1 != len(found)):
        missing = next(i for i in itertools.count(first) if i not in found)
        raise ValueError(f"the tensors named {pattern!r} leave out number {missing}")
    return len(found)


def classes(shapes: Mapping[str, Any], name: str, axis: int = 0) -> int | Untold:
    """Outputs of a head by its tensor's shape; `Untold` where the checkpoint has no head."""
    if name in shapes:
        return shapes[name].shape[axis]
    return Untold("it has no classification head; say how many classes to make one for")


DEEPEST = 10_000
"""Blocks of a model that is planned by its configuration alone; a hostile one could state any."""


def stated(said: Mapping[str, Any], name: str, most: int = 2**40) -> int:
    """A whole number of a `config.json`, where there are no tensors that show it.

    Raises:
      ValueError: if it is not there, or lies outside 1 … most.
    """
    value = said.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"its config.json states {name} = {value!r}; it must lie in 1 … {most}")
    return value


def agree(stated: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
    """Raises ValueError where a configuration states something else than the tensors show.

    Args:
      stated: the checkpoint's own configuration, by its own keys.
      shown: what the tensors show, by the same keys; `Untold` and keys that are absent or null in
        `stated` say nothing.
    """
    for key, value in shown.items():
        said = stated.get(key)
        if said is None or isinstance(value, Untold):
            continue
        said = tuple(said) if isinstance(said, list) else said
        if said != value:
            raise ValueError(f"its configuration states {key} = {said!r}, its tensors show {value}")
