"""How PEFT's files hold a kind of adapter: what each kind declares, and what all have in common."""

import abc
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorajax.adapters.layers import Adapter
from lorajax.adapters.layouts import Axes, Convolution, layout
from lorajax.adapters.torch_layers import WRAPPED, TorchLayer
from lorajax.environment.judging import judged
from lorajax.factors import Factors


class PeftLayer(NamedTuple):
    """One torch module's adapter, as PEFT has it.

    Attributes:
      tensors: by the name behind that of the module, such as "lora_A.weight".
      rank: r.
      scaling: the factor in front of the update.
    """

    tensors: dict[str, np.ndarray]
    rank: int = 1
    scaling: float = 1.0


class PeftMethod(abc.ABC):
    """How PEFT holds one kind of adapter; a kind declares it as `Adapter.peft`.

    Attributes:
      type: PEFT's `peft_type`.
      suffixes: names of its tensors behind that of the module, without ".weight".
      omitted: fields of every configuration here that PEFT's of this kind does not have.
    """

    type: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    omitted: ClassVar[tuple[str, ...]] = ()

    def refusal(self, base: nnx.Module, axes: Axes | None = None) -> str | None:
        """Why PEFT's adapter of a layer would be another one: for writing and for reading.

        Args:
          base: the layer.
          axes: those of the adapter.

        Returns:
          The end of a sentence that begins with "it", or None where PEFT does the same.
        """
        view = layout(base, axes)
        if view.stack:
            return f"is stacked {view.stack[0]} times, and PEFT has one module for each kernel"
        if view.slices:
            return f"has {np.prod(view.slices)} slices with factors of their own"
        if isinstance(view, Convolution):
            conv = view.module
            if view.groups > 1:
                return f"has {view.groups} groups, and PEFT's adapters of such layers mix them"
            if self.dilated(conv):
                return "is dilated, and PEFT's adapters are not"
            if isinstance(conv.padding, str) and conv.padding not in ("SAME", "VALID"):
                return f"pads as {conv.padding}, and PEFT's adapters pad with zeros"
        return None

    def dilated(self, conv: nnx.Conv) -> bool:
        """Whether a convolution is dilated in a way that PEFT's adapter of it does not follow."""
        return any(not is_one(d) for d in (conv.kernel_dilation, conv.input_dilation))

    @abc.abstractmethod
    def write(self, torch: TorchLayer, base: nnx.Module, adapter: Any) -> PeftLayer:
        """The adapter of one layer as PEFT has it.

        Args:
          torch: where the layer is in torch.
          base: the layer.
          adapter: its adapter.

        Returns:
          The PeftLayer, float32 tensors in torch's order.
        """

    @abc.abstractmethod
    def config(
        self, modules: dict[str, PeftLayer], adapters: Sequence[Any]
    ) -> tuple[dict[str, PeftLayer], dict[str, Any]]:
        """What holds for all layers: the layers with one rank or alpha if PEFT has but one.

        Args:
          modules: by name of the torch module.
          adapters: those that they were written from.

        Returns:
          The modules again, and fields of the configuration.
        """

    @abc.abstractmethod
    def read(
        self,
        torch: TorchLayer,
        base: nnx.Module,
        parts: Mapping[str, np.ndarray],
        config: Mapping[str, Any],
        *,
        offset: bool,
        dtype: Any,
    ) -> Adapter:
        """The inverse of `write`, from tensors that may be anything.

        Args:
          torch: where the layer is in torch.
          base: the layer.
          parts: tensors by suffix.
          config: the configuration.
          offset: whether the second half of the factors is a start's offset, as `save_peft` has it.
          dtype: of the adapter's parameters.

        Returns:
          The adapter, which leaves `Embed.attend` alone as PEFT's does.

        Raises:
          ValueError: for tensors and settings that do not fit, naming the module.
        """

    def fuse(self, layers: Sequence[PeftLayer | None], outputs: int) -> PeftLayer:
        """One module's adapter from those of its equal blocks of outputs, None for none.

        Args:
          layers: of each block.
          outputs: columns of one block.

        Returns:
          The PeftLayer of the whole module.

        Raises:
          ValueError: if PEFT cannot say it.
        """
        del layers, outputs
        raise ValueError(f"PEFT's {self.type} has no form for several layers in one module")

    def split(
        self, torch: TorchLayer, parts: Mapping[str, np.ndarray], ranks: Sequence[int] | None
    ) -> dict[str, np.ndarray]:
        """The inverse of `fuse`: the tensors of one block.

        Args:
          torch: which block of which module.
          parts: tensors of the whole module by suffix.
          ranks: of the blocks, as `save_peft` noted them; None for a file of PEFT's own.

        Returns:
          Tensors by suffix; none for a block without an adapter.

        Raises:
          ValueError: if the outputs are not so many equal blocks.
        """
        del parts, ranks
        raise ValueError(f"PEFT's {self.type} of {torch.module!r} cannot be told apart.")


def is_one(dilation: Any) -> bool:
    """Whether a dilation is none."""
    return dilation is None or bool(np.all(np.asarray(dilation) == 1))


def check_parts(module: str, parts: Mapping[str, np.ndarray], expected: set[str]) -> None:
    """Raises ValueError unless a module has exactly the tensors that are expected of it."""
    if set(parts) != expected:
        odd = sorted(set(parts) ^ expected)[0]
        state = "lacks" if odd in expected else "has an unexpected"
        raise ValueError(f"the layer {module!r} {state} {odd}.")


def check_shape(module: str, part: str, tensor: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a tensor has the shape that it must have here."""
    if tensor.shape != shape:
        raise ValueError(
            f"the layer {module!r} has {part} of shape {tensor.shape}; here it must be {shape}."
        )


def read_factors(
    torch: TorchLayer,
    base: nnx.Module,
    first: np.ndarray,
    second: np.ndarray,
    names: tuple[str, str],
    dtype: Any,
    *,
    flat: bool = False,
) -> Factors:
    """A and B from PEFT's pair of tensors.

    Args:
      torch: where the layer is in torch.
      base: the layer.
      first: PEFT's A, (r, inputs, *window), or (r, inputs · window) if `flat`.
      second: PEFT's B, (outputs, r, 1, …), or (outputs, r) if `flat`.
      names: of the two, for errors.
      dtype: of the factors.
      flat: whether the tensors of a convolution are matrices.

    Returns:
      Factors (m, r), (r, n).

    Raises:
      ValueError: for other shapes.
    """
    module, (m, n) = torch.module, layout(base).shape
    rank = first.shape[0] if first.ndim else 0
    inputs, ones = torch.shape[1:], (1,) * (len(torch.shape) - 2)
    if torch.embedded or flat:
        inputs, ones = (m,), ()
    check_shape(module, names[0], first, (rank, *inputs))
    check_shape(module, names[1], second, (n, rank, *ones))
    if not rank:
        raise ValueError(f"the layer {module!r} has rank 0.")
    a, b = first.astype(np.float32), second.astype(np.float32).reshape(n, rank).T
    a = a.T if torch.embedded else torch.from_inputs(a)
    return Factors(jnp.asarray(a, dtype), jnp.asarray(b, dtype))


def fused(
    layers: Sequence[PeftLayer | None], outputs: int, names: tuple[str, str], *also: str
) -> PeftLayer:
    """Pairs of factors as one: inputs one below the other, outputs block by block.

    Args:
      layers: of each block, None for a block without an adapter.
      outputs: columns of one block.
      names: of the two tensors.
      also: tensors with one row for each component.

    Returns:
      The PeftLayer, with the largest of the scalings; the others' outputs make up for it.
    """
    scaling = max(layer.scaling for layer in layers if layer is not None)
    firsts, seconds = [], []
    for index, layer in enumerate(layers):
        if layer is None:
            continue
        second = layer.tensors[names[1]] * np.float32(layer.scaling / scaling)
        wide = np.zeros((len(layers) * outputs, *second.shape[1:]), np.float32)
        wide[index * outputs : (index + 1) * outputs] = second
        firsts.append(layer.tensors[names[0]])
        seconds.append(wide)
    given = [layer for layer in layers if layer is not None]
    tensors = {names[0]: np.concatenate(firsts), names[1]: np.concatenate(seconds, axis=1)}
    tensors |= {name: np.concatenate([x.tensors[name] for x in given]) for name in also}
    return PeftLayer(tensors, tensors[names[0]].shape[0], scaling)


def block_of(
    torch: TorchLayer,
    parts: Mapping[str, np.ndarray],
    ranks: Sequence[int] | None,
    names: tuple[str, str],
    *also: str,
) -> dict[str, np.ndarray]:
    """The factors of one block of outputs.

    Args:
      torch: which block of which module.
      parts: tensors of the whole module by suffix.
      ranks: of the blocks; None for all components that are not zero in this one.
      names: of the two tensors.
      also: tensors with one row for each component.

    Returns:
      Tensors by suffix; none for a block of rank 0.

    Raises:
      ValueError: if tensors are missing, the outputs are not so many equal blocks, or the ranks are
        not theirs.
    """
    module, rows = torch.module, torch.shape[0]
    check_parts(module, parts, {*names, *also})
    first, second = parts[names[0]], parts[names[1]]
    fits = first.ndim > 1 and second.shape[:2] == (rows * torch.parts, len(first))
    if not fits or any(len(parts[name]) != len(first) for name in also):
        raise ValueError(
            f"the layer {module!r} has {names[0]} of shape {first.shape} and {names[1]} of shape "
            f"{second.shape}; here they must be {torch.parts} blocks of {rows} outputs."
        )
    block = second[torch.part * rows : (torch.part + 1) * rows]
    if ranks is None:
        used = np.any(block != 0, axis=tuple(i for i in range(block.ndim) if i != 1))
        used = used if used.any() else np.ones_like(used)
    else:
        if len(ranks) != torch.parts or sum(ranks) > len(first):
            raise ValueError(
                f"the layer {module!r} has rank {len(first)}; the file says that its blocks have "
                f"{list(ranks)}."
            )
        start = sum(ranks[: torch.part])
        used = slice(start, start + ranks[torch.part])
        if not ranks[torch.part]:
            return {}
    found = {names[0]: first[used], names[1]: block[:, used]}
    return found | {name: parts[name][used] for name in also}


def number(field: str, value: Any) -> float:
    """A positive, finite number of the configuration; raises ValueError for anything else."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not 0 < value < 1e30:
        raise ValueError(
            f"{field} in the configuration is {value!r}; it must be positive and finite."
        )
    return float(value)


def dropout(config: Mapping[str, Any]) -> float:
    """The configuration's `lora_dropout`; raises ValueError unless it lies in [0, 1)."""
    rate = config.get("lora_dropout", 0.0)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"lora_dropout in the configuration is {rate!r}; it must lie in [0, 1).")
    return float(rate)


def pattern_value(config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """The value that PEFT gives a module by its suffix patterns; the first that matches wins.

    Args:
      config: the configuration.
      field: "rank_pattern" or "alpha_pattern".
      module: name of the torch module.
      default: where none matches.

    Returns:
      The value.

    Raises:
      ValueError: for anything but a mapping, and for regular expressions that are none or that
        could take exponential time.
    """
    module = module.removesuffix(WRAPPED)  # which PEFT gives what the whole module has
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{field} in the configuration is not a mapping.")
    for key, value in pattern.items():
        # A repeated group takes exponential time, k repetitions in a row the k-th power.
        repeats = len(re.findall(r"[*+{]", key))
        if len(key) > 500 or re.search(r"\)[*+{]", key) or len(module) ** repeats > 10**7:
            raise ValueError(f"{field} has the key {key[:60]!r}, too complex to be matched safely.")
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{field} has the key {key!r}, not a regular expression: {first_line(error)}"
            ) from None
    return default


@judged
def patterns(
    chosen: Mapping[str, tuple[int, float | int]], *, rslora: bool = False
) -> dict[str, Any]:
    """Ranks and alphas of many modules as the fields of a PEFT LoraConfig.

    Args:
      chosen: rank and alpha by the name of the torch module; at least one.
      rslora: whether alpha is to be divided by √r.

    Returns:
      `r` and `lora_alpha`, each the commonest value, `rank_pattern` and `alpha_pattern` with the
      others, `target_modules`, and `use_rslora`. Pattern keys are anchored, so that PEFT's suffix
      match can never give one module's rank to another.
    """
    common_rank = Counter(rank for rank, _ in chosen.values()).most_common(1)[0][0]
    common_alpha = Counter(alpha for _, alpha in chosen.values()).most_common(1)[0][0]

    def tidy(alpha: float | int) -> float | int:
        return int(alpha) if alpha == int(alpha) else alpha

    def key(name: str) -> str:
        return "^" + re.escape(name)

    return {
        "r": common_rank,
        "lora_alpha": tidy(common_alpha),
        "rank_pattern": {key(n): r for n, (r, _) in chosen.items() if r != common_rank},
        "alpha_pattern": {key(n): tidy(a) for n, (_, a) in chosen.items() if a != common_alpha},
        "target_modules": sorted(chosen),
        "use_rslora": rslora,
    }


def rounded(alpha: float | int) -> float:
    """An alpha free of the rounding of `scaling · rank`, so that equal ones compare equal."""
    return float(f"{alpha:.12g}")


def first_line(error: BaseException) -> str:
    """The first line of another library's error, as the end of a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") + "."
