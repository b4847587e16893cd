"""What writing and reading PEFT's files have in common: names, patterns, the layout of windows."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from lorajax.adapters.layers import Adapted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
OFFSETS = "lorajax.offsets"
LARGEST_CONFIG = 10 * 2**20
ADALORA_EPSILON = 1e-5
"""What PEFT's AdaLoRA adds to the rank before it divides alpha by it."""

Rename = Callable[[str], str]


_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
"""Torch's names of what Flax names otherwise."""


def saved_parts(path: str, module: nnx.Module) -> dict[str, tuple[nnx.Variable, bool]]:
    """What PEFT writes of a module that is saved in full (`modules_to_save`).

    Args:
      path: of the module, for errors.
      module: a Linear, a norm, or a module of such and of bare parameters.

    Returns:
      By torch's name inside the module, the Variable and whether torch has its transpose.

    Raises:
      ValueError: for a module with other variables, whose layout in torch is not known.
    """
    found: dict[str, tuple[nnx.Variable, bool]] = {}
    for parts, node in nnx.iter_graph(module):
        known = isinstance(node, (nnx.Linear, nnx.LayerNorm, nnx.RMSNorm))
        other = isinstance(node, nnx.Module) and any(hasattr(node, name) for name in _NAMES)
        if isinstance(node, Adapted) or (other and not known):
            raise ValueError(
                f"the module {path!r} to save in full holds {type(node).__name__} layers; it may "
                "hold Linear layers, norms and bare parameters."
            )
        if isinstance(node, nnx.Param):
            *inner, last = map(str, parts)
            found[".".join([*inner, _NAMES.get(last, last)])] = (node, last == "kernel")
    return found


def dotted(path: str) -> str:
    """The default renaming: the layer's path with dots for slashes."""
    return path.replace("/", ".")


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

    def number(alpha: float | int) -> float | int:
        return int(alpha) if alpha == int(alpha) else alpha

    def key(name: str) -> str:
        return "^" + re.escape(name)

    return {
        "r": common_rank,
        "lora_alpha": number(common_alpha),
        "rank_pattern": {key(n): r for n, (r, _) in chosen.items() if r != common_rank},
        "alpha_pattern": {key(n): number(a) for n, (_, a) in chosen.items() if a != common_alpha},
        "target_modules": sorted(chosen),
        "use_rslora": rslora,
    }


def conv_rows(a: np.ndarray, base: nnx.Conv) -> np.ndarray:
    """A as torch has the kernel of its convolution: (r, in, *window)."""
    window = a.reshape(*base.kernel.shape[:-1], a.shape[1])
    return np.moveaxis(window, (-1, -2), (0, 1))


def from_conv_rows(rows: np.ndarray) -> np.ndarray:
    """The inverse of `conv_rows`: (window · in, r)."""
    return np.moveaxis(rows, (0, 1), (-1, -2)).reshape(-1, rows.shape[0])


def first_line(error: BaseException) -> str:
    """The first line of another library's error, as the end of a sentence."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") + "."
