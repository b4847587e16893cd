"""One layer as torch has it: the name of its module, the shape and order of its weight.

Where a model was read from a checkpoint, the rules that read it (`models.torch_rules`) say so;
else a layer is taken to be called in torch as it is here, with its kernel in torch's usual order.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorajax.adapters import paths
from lorajax.adapters.layers import Adapted
from lorajax.adapters.layouts import is_adaptable, kernel_variable, layout
from lorajax.environment.judging import judged

Rename = Callable[[str], str]

_IN, _OUT = ".in_proj_weight", ".out_proj"
WRAPPED = ".base_layer.out_proj"
"""Where PEFT has the adapter of a MultiheadAttention's output, behind the name of the module."""


@runtime_checkable
class TensorRule(Protocol):
    """Which tensors of a checkpoint hold which arrays of a model."""

    @property
    def theirs(self) -> tuple[str, ...]:
        """Names of the checkpoint's tensors."""
        ...

    @property
    def ours(self) -> tuple[str, ...]:
        """Dotted paths of the model's arrays."""
        ...

    @property
    def read(self) -> Callable[..., tuple[np.ndarray, ...]]:
        """The checkpoint's tensors → the model's arrays."""
        ...

    @property
    def write(self) -> Callable[..., tuple[np.ndarray, ...]]:
        """The model's arrays → the checkpoint's tensors."""
        ...


class TorchLayer(NamedTuple):
    """Where the kernel of one layer is in torch.

    Attributes:
      module: name of the torch module.
      shape: of its weight: outputs, inputs, window; for an Embed (embeddings, features).
      rows: the row of our matrix that each of the weight's inputs is, flattened.
      embedded: whether it is an Embed.
      part: which of `parts` equal blocks of the module's outputs the layer is.
      parts: 3 for query, key and value in one module, 2 for a gate and what it gates, else 1.
      attention: name of the MultiheadAttention that it is in; "" for none.
    """

    module: str
    shape: tuple[int, ...]
    rows: np.ndarray
    embedded: bool = False
    part: int = 0
    parts: int = 1
    attention: str = ""

    def inputs(self, a: np.ndarray) -> np.ndarray:
        """Rows of A (m, r) as torch has them: (r, inputs, *window)."""
        return a[self.rows].T.reshape(a.shape[1], *self.shape[1:])

    def from_inputs(self, weight: np.ndarray) -> np.ndarray:
        """The inverse of `inputs`: (m, r)."""
        flat = weight.reshape(weight.shape[0], -1)
        a = np.empty((flat.shape[1], flat.shape[0]), flat.dtype)
        a[self.rows] = flat.T
        return a


def _torch_order(base: nnx.Module, kernel: np.ndarray) -> np.ndarray:
    """A kernel in the order of torch's weight; raises ValueError for one that torch has not."""
    if isinstance(base, nnx.Embed):
        return kernel
    if isinstance(base, nnx.Conv):
        return np.moveaxis(kernel, (-1, -2), (0, 1))
    view = layout(base)
    if view.stack or view.slices:
        raise ValueError("torch has one matrix a module")
    return np.asarray(view.matrix(jnp.asarray(kernel))).T


def _from_torch_order(base: nnx.Module, weight: np.ndarray) -> np.ndarray:
    if isinstance(base, nnx.Embed):
        return weight
    if isinstance(base, nnx.Conv):
        return np.moveaxis(weight, (0, 1), (-1, -2))
    return np.asarray(layout(base).kernel(jnp.asarray(weight.T)))


class Names:
    """How a torch model names the layers of this one.

    Args:
      model: an NNX module, adapted or not.
      rename: from a layer's path to the name of its torch module; "/" becomes "." if None.
      rules: those that read the model's checkpoint; they take the place of `rename`.

    Raises:
      ValueError: if both are given.
    """

    def __init__(
        self,
        model: nnx.Module,
        rename: Rename | None = None,
        rules: Iterable[TensorRule] | None = None,
    ):
        if rename is not None and rules is not None:
            raise ValueError("rename and rules are both given; the rules name every layer.")
        self.modules = paths.modules(model)
        self.rename = rename or dotted
        self.rules = None if rules is None else list(rules)
        # PEFT has one adapter for all of a MultiheadAttention, whose layers are no modules there.
        self.attentions = {
            rule.theirs[0].removesuffix(_IN)
            for rule in self.rules or ()
            if rule.ours and rule.theirs[0].endswith(_IN)
        }
        self._by_kernel: dict[str, tuple[TensorRule, int]] = {}
        for rule in self.rules or ():
            for part, ours in enumerate(rule.ours):
                path, _, last = ours.rpartition(".")
                if last in ("kernel", "embedding"):
                    self._by_kernel[path.replace(".", "/")] = rule, part

    def module(self, path: str) -> tuple[str, int]:
        """Name of the torch module that a layer is in, and which of its parts it is."""
        if self.rules is None:
            return self.rename(path), 0
        if path not in self._by_kernel:
            raise ValueError(f"the layer {path!r} is in none of the rules for torch's names.")
        rule, part = self._by_kernel[path]
        name = rule.theirs[0].removesuffix(".weight").removesuffix(_IN)
        outer = name.removesuffix(_OUT)
        return f"{outer}{WRAPPED}" if outer != name and outer in self.attentions else name, part

    def knows(self, path: str) -> bool:
        """Whether the rules, if there are any, tell of the layer at a path."""
        return self.rules is None or path in self._by_kernel

    def layer(self, path: str, base: nnx.Module) -> TorchLayer:
        """Where the kernel of the layer at a path is in torch.

        Args:
          path: the layer's path.
          base: the layer, without adapters.

        Returns:
          The TorchLayer.

        Raises:
          ValueError: for a layer that torch has not, or that the rules do not tell of.
        """
        module, part = self.module(path)
        attention = module.removesuffix(WRAPPED)
        attention = attention if attention in self.attentions else ""
        shape = tuple(kernel_variable(base).shape)
        embedded = isinstance(base, nnx.Embed)
        if embedded:
            return TorchLayer(module, shape, np.arange(shape[0]), True)
        view = layout(base)
        count = view.shape[1]
        # A kernel that holds the number of each entry of its matrix shows where torch puts it.
        entries = np.arange(math.prod(view.shape), dtype=np.int32).reshape(view.shape)
        index = np.asarray(view.kernel(jnp.asarray(entries)))
        if self.rules is None:
            weight, parts = _torch_order(base, index), 1
        else:
            rule, _ = self._by_kernel[path]
            parts = len(rule.ours)
            (weight,) = rule.write(*[index] * parts)
            weight = weight[part * count : (part + 1) * count]
        flat = weight.reshape(count, -1)
        if not np.array_equal(flat[:, 0] % count, np.arange(count)):
            raise ValueError(f"torch orders the outputs of {path!r} in another way.")
        rows = flat[0] // count
        return TorchLayer(module, weight.shape, rows, False, part, parts, attention)

    def wholes(self) -> dict[str, str]:
        """Paths by torch's name of the modules that can be saved in full."""
        if self.rules is None:
            return {self.rename(path): path for path in self.modules}
        found: dict[str, str] = {}
        for path, module in self.modules.items():
            try:
                found.setdefault(self._ruled(path, module, self.rules).module, path)
            except ValueError:
                continue
        return found

    def whole(self, path: str) -> "Whole":
        """How a module is saved in full (PEFT's `modules_to_save`).

        Args:
          path: the module's path.

        Returns:
          Name of the torch module, and what is in it.

        Raises:
          ValueError: for a module that is not there, holds adapters, or whose layout in torch is
            not known or spread over several modules.
        """
        module = self.modules.get(path)
        if module is None or isinstance(module, Adapted):
            near = ", ".join(map(repr, paths.near_misses(path, self.modules)))
            raise ValueError(f"heads name {path!r}, which is no plain module; near misses: {near}.")
        if self.rules is None:
            return Whole(self.rename(path), _parts(path, module))
        return self._ruled(path, module, self.rules)

    def base(self, path: str, base: nnx.Module) -> "Whole":
        """The base of an adapted layer, as `whole`."""
        torch = self.layer(path, base)
        if torch.parts > 1:
            raise ValueError(
                f"heads name {path!r}, an adapted layer that is a part of {torch.module!r} in "
                "torch; leave its base frozen."
            )
        if self.rules is None:
            return Whole(torch.module, _parts(path, base))
        return self._ruled(path, base, self.rules)

    def _ruled(self, path: str, module: nnx.Module, rules: list[TensorRule]) -> "Whole":
        prefix = path.replace("/", ".") + "."
        inside = {
            f"{prefix}{'.'.join(map(str, parts))}": variable
            for parts, variable in nnx.to_flat_state(nnx.state(module, _SAVED))
        }
        mine = [rule for rule in rules if any(ours in inside for ours in rule.ours)]
        names = [name.split(".") for rule in mine for name in rule.theirs]
        common = 0
        while names and all(len(n) > common + 1 and n[common] == names[0][common] for n in names):
            common += 1
        told = {ours for rule in mine for ours in rule.ours}
        if not common or told != set(inside):
            raise ValueError(
                f"the module {path!r} to save in full is no module of its own in torch, where it "
                f"is {', '.join('.'.join(n) for n in names[:3]) or 'nowhere'}; leave it frozen, or "
                "save the whole model."
            )
        torch_name = ".".join(names[0][:common])
        # What torch's module has and the model here does without.
        mine += [
            rule
            for rule in rules
            if not rule.ours and rule.theirs[0].startswith(f"{torch_name}.") and rule.write()
        ]
        parts = [
            Part(
                tuple(name.removeprefix(f"{torch_name}.") for name in rule.theirs),
                tuple(inside[ours] for ours in rule.ours),
                rule.write,
                rule.read,
            )
            for rule in mine
        ]
        return Whole(torch_name, parts)


class Part(NamedTuple):
    """Tensors of a torch module and the Variables that hold the same numbers.

    Attributes:
      names: the tensors' names inside the module.
      variables: those of the module here.
      write: arrays of the Variables → tensors.
      read: the inverse.
    """

    names: tuple[str, ...]
    variables: tuple[nnx.Variable, ...]
    write: Callable[..., tuple[np.ndarray, ...]]
    read: Callable[..., tuple[np.ndarray, ...]]


class Whole(NamedTuple):
    """A module that is saved in full.

    Attributes:
      module: its name in torch.
      parts: what is in it.
    """

    module: str
    parts: list[Part]


_SAVED = (nnx.Param, nnx.BatchStat)
_NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.BatchNorm)
_KNOWN = {"scale": "weight", "mean": "running_mean", "var": "running_var"}
"""Torch's names of what Flax's norms name otherwise."""


def _parts(path: str, module: nnx.Module) -> list[Part]:
    """What is in a module, layer by layer in torch's usual order."""
    found: dict[int, tuple[str, Part]] = {}
    for keys, node in nnx.iter_graph(module):
        inside = ".".join(map(str, keys))
        dot = inside + "." if inside else ""
        if isinstance(node, Adapted) or (isinstance(node, nnx.Module) and _is_foreign(node)):
            raise ValueError(
                f"the module {path!r} to save in full holds {type(node).__name__} layers, whose "
                "form in torch is not known; it may hold Linear, Conv and Embed layers, norms and "
                "bare parameters."
            )
        if is_adaptable(node):
            kernel = kernel_variable(node)
            try:
                _torch_order(node, np.zeros(kernel.shape))
            except ValueError as error:
                raise ValueError(f"the module {path!r} to save in full: {error}.") from None
            found[id(kernel)] = f"{dot}weight", _part(f"{dot}weight", kernel, node)
            if (bias := getattr(node, "bias", None)) is not None:
                found[id(bias)] = f"{dot}bias", _part(f"{dot}bias", bias)
        elif isinstance(node, _NORMS):
            for name in ("scale", "bias", "mean", "var"):
                if isinstance(variable := getattr(node, name, None), nnx.Variable):
                    torch_name = dot + _KNOWN.get(name, name)
                    found[id(variable)] = torch_name, _part(torch_name, variable)
        elif isinstance(node, nnx.Param):
            found.setdefault(id(node), (inside, _part(inside, node)))
    return [part for _, part in found.values()]


def _is_foreign(node: nnx.Module) -> bool:
    known = is_adaptable(node) or isinstance(node, _NORMS)
    return not known and any(hasattr(node, name) for name in ("kernel", "embedding", "scale"))


def _part(name: str, variable: nnx.Variable, layer: nnx.Module | None = None) -> Part:
    shape = tuple(variable.shape)
    if layer is None:
        # Biases of several axes, such as heads and head size, are one axis in torch.
        flat = name.endswith("bias")
        return Part(
            (name,),
            (variable,),
            lambda x: (x.reshape(-1) if flat else x,),
            lambda x: (x.reshape(shape) if flat and x.size == math.prod(shape) else x,),
        )
    return Part(
        (name,),
        (variable,),
        lambda x: (_torch_order(layer, x),),
        lambda x: (_from_torch_order(layer, x),),
    )


@judged
def dotted(path: str) -> str:
    """The default renaming: the layer's path with dots for slashes."""
    return path.replace("/", ".")


def base_layers(model: nnx.Module) -> Mapping[str, nnx.Module]:
    """The layers of a model that can be adapted, without their adapters and merges, by path."""

    def base(layer: Any) -> nnx.Module:
        if not isinstance(layer, Adapted):
            return layer
        return layer.base if layer.unmerged is None else layer.unmerged

    return {path: base(layer) for path, layer in paths.find(model).items()}
