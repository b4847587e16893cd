"""Writing an adapter as PEFT's files."""

import json
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from flax import nnx

from lorajax.adapters import paths
from lorajax.adapters.layers import AdaLoRA, Adapted, Adapter, LoRA, Tucker
from lorajax.adapters.layouts import Convolution, layout
from lorajax.adapters.peft.shared import (
    ADALORA_EPSILON,
    CONFIG,
    OFFSETS,
    PREFIX,
    WEIGHTS,
    Rename,
    conv_rows,
    dotted,
    patterns,
    saved_parts,
)
from lorajax.adapters.surgery import layers
from lorajax.environment import files


class _Entry(NamedTuple):
    """One layer as PEFT sees it: the tensors by suffix, and its scaling."""

    tensors: dict[str, np.ndarray]
    rank: int
    scaling: float


def save_peft(
    model: nnx.Module,
    folder: str | os.PathLike,
    *,
    name: str = "default",
    rename: Rename | None = None,
    heads: Sequence[str] = (),
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes one adapter of a model so that PEFT loads it onto the same base in PyTorch.

    Args:
      model: an adapted model whose base is that of the torch model.
      folder: is made if missing; the two files in it are replaced.
      name: which adapter. Its weight in a blend is not part of the format.
      rename: from a layer's path to the name of its torch module; "/" becomes "." if None.
      heads: paths of modules to be written along in full (PEFT's `modules_to_save`): Linear layers,
        norms, and modules of such and of bare parameters.
      base_model: name of the base for PEFT's `base_model_name_or_path`.
      task_type: PEFT's `task_type`, such as "SEQ_CLS".

    Raises:
      ValueError: for an adapter that PEFT cannot express, or an unknown name.
    """
    rename = rename or dotted
    chosen = {path: x for path, x in layers(model).items() if name in x.adapters}
    if not chosen:
        raise ValueError(f"the model has no adapter {name!r} to save.")
    kinds = {path: layer.adapters[name] for path, layer in chosen.items()}
    for path, layer in chosen.items():
        _check_expressible(path, layer, kinds[path])
    if len({adapter.kind for adapter in kinds.values()}) > 1:
        found = sorted({adapter.kind for adapter in kinds.values()})
        raise ValueError(
            f"the adapter {name!r} mixes {' and '.join(found)}; PEFT has one method an adapter, so "
            "give them names of their own."
        )
    first = next(iter(kinds.values()))
    rslora = all(adapter.rslora for adapter in kinds.values())
    entries, offsets = {}, []
    for path, layer in chosen.items():
        module = rename(path)
        if module in entries:
            raise ValueError(f"rename gives two layers the name {module!r}; names must differ.")
        base = layer.base if layer.unmerged is None else layer.unmerged
        entries[module] = _entry(base, kinds[path])
        if kinds[path].offset is not None:
            offsets.append(module)
    config: dict[str, Any] = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": first.dropout.rate if first.dropout is not None else 0.0,
        "modules_to_save": [rename(head) for head in heads] or None,
        "task_type": task_type,
    }
    if first.kind == "AdaLoRA":
        entries, fields = _one_rank(entries)
        config |= {"peft_type": "ADALORA", "rank_pattern": None} | fields
    else:
        power = 0.5 if rslora else 1.0
        pairs = {m: (e.rank, e.scaling * e.rank**power) for m, e in entries.items()}
        pairs = {m: (rank, _tidy(alpha)) for m, (rank, alpha) in pairs.items()}
        config |= {"peft_type": "LORA", "use_dora": first.kind == "DoRA"}
        config |= patterns(pairs, rslora=rslora)
    config["target_modules"] = _targets(list(entries), [rename(p) for p in paths.find(model)])
    tensors = {
        f"{PREFIX}{module}.{suffix}": np.ascontiguousarray(tensor)
        for module, entry in entries.items()
        for suffix, tensor in entry.tensors.items()
    }
    for head in heads:
        for suffix, tensor in _head_tensors(model, head).items():
            tensors[f"{PREFIX}{rename(head)}.{suffix}"] = np.ascontiguousarray(tensor)
    metadata = {"format": "pt"}
    if offsets:
        metadata[OFFSETS] = json.dumps(offsets)
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    files.write(target / WEIGHTS, safetensors.numpy.save(tensors, metadata))
    files.write(target / CONFIG, text)


def _tidy(alpha: float | int) -> float:
    """An alpha free of the rounding of `scaling · rank`, so that equal ones compare equal."""
    return float(f"{alpha:.12g}")


def _check_expressible(path: str, layer: Adapted, adapter: Adapter) -> None:
    base = layer.base if layer.unmerged is None else layer.unmerged
    view = layout(base, adapter.axes)
    why = None
    if isinstance(adapter, Tucker):
        why = "is a Tucker update, and PEFT has no core"
    elif view.stack:
        why = f"is stacked {view.stack[0]} times, and PEFT has one module for each kernel"
    elif view.lanes:
        why = f"has {math.prod(view.lanes)} lanes with factors of their own"
    elif isinstance(view, Convolution):
        conv = view.module
        dilations = [conv.kernel_dilation, conv.input_dilation]
        if view.groups > 1:
            why = f"has {view.groups} groups, and PEFT's adapters of such layers mix the groups"
        elif any(d is not None and np.any(np.asarray(d) != 1) for d in dilations):
            why = "is dilated, and PEFT's adapters are not"
        elif isinstance(conv.padding, str) and conv.padding not in ("SAME", "VALID"):
            why = f"pads as {conv.padding}, and PEFT's adapters pad with zeros"
        elif isinstance(adapter, AdaLoRA) and len(conv.kernel_size) != 2:
            why = "is no two-dimensional convolution, the only one that PEFT's AdaLoRA has"
    elif isinstance(base, nnx.Embed) and isinstance(adapter, AdaLoRA):
        why = "is an Embed, which PEFT's AdaLoRA does not adapt"
    if why:
        raise ValueError(
            f"PEFT cannot express the adapter of {path!r}: it {why}; merge it, or save the whole "
            "state with save_checkpoint."
        )


def _entry(base: nnx.Module, adapter: LoRA) -> _Entry:
    scaling = adapter.scaling
    if isinstance(adapter, AdaLoRA):
        a, b, e = (np.asarray(v[...], np.float32) for v in (adapter.a, adapter.b, adapter.e))
        if isinstance(base, nnx.Conv):
            a = conv_rows(a, base).reshape(a.shape[1], -1).T
        tensors = {"lora_A": a.T, "lora_B": b.T, "lora_E": e[:, None]}
        return _Entry(tensors, adapter.rank, scaling)
    a, b = (np.asarray(x, np.float32) for x in adapter.factors)
    if (offset := adapter.offset) is not None:
        a = np.concatenate([a, np.asarray(offset.a, np.float32)], axis=1)
        b = np.concatenate([b, -np.asarray(offset.b, np.float32)], axis=0)
    rank = a.shape[1]
    if isinstance(base, nnx.Embed):
        tensors = {"lora_embedding_A": a.T, "lora_embedding_B": b.T}
    elif isinstance(base, nnx.Conv):
        ones = (1,) * len(base.kernel_size)
        tensors = {
            "lora_A.weight": conv_rows(a, base),
            "lora_B.weight": b.T.reshape(b.shape[1], rank, *ones),
        }
    else:
        tensors = {"lora_A.weight": a.T, "lora_B.weight": b.T}
    if adapter.magnitude is not None:
        magnitude = np.asarray(adapter.magnitude[...], np.float32)
        if isinstance(base, nnx.Conv):
            magnitude = magnitude.reshape(1, -1, *(1,) * len(base.kernel_size))
        tensors["lora_magnitude_vector"] = magnitude
    return _Entry(tensors, rank, scaling)


def _one_rank(entries: dict[str, _Entry]) -> tuple[dict[str, _Entry], dict[str, Any]]:
    """AdaLoRA has one rank and one alpha: zero singular values fill up, E takes the scalings."""
    rank = max(entry.rank for entry in entries.values())
    divisor = rank + ADALORA_EPSILON
    alpha = _tidy(next(iter(entries.values())).scaling * divisor)
    changed = {}
    for module, entry in entries.items():
        a, b, e = (entry.tensors[f"lora_{part}"] for part in "ABE")
        missing = rank - entry.rank
        e = e * np.float32(entry.scaling * divisor / alpha)
        tensors = {
            "lora_A": np.pad(a, ((0, missing), (0, 0))),
            "lora_B": np.pad(b, ((0, 0), (0, missing))),
            "lora_E": np.pad(e, ((0, missing), (0, 0))),
        }
        changed[module] = _Entry(tensors, rank, entry.scaling)
    # total_step is for PEFT's own training, which refuses a config without it.
    fields = {"init_r": rank, "target_r": rank, "lora_alpha": alpha, "total_step": 1}
    return changed, fields


def _targets(chosen: list[str], every: list[str]) -> list[str] | str:
    """PEFT's `target_modules`: names, or a regular expression where a suffix would hit others."""
    for name in every:
        if name not in chosen and any(name.endswith("." + target) for target in chosen):
            return "|".join(re.escape(target) for target in sorted(chosen))
    return sorted(chosen)


def _head_tensors(model: nnx.Module, path: str) -> dict[str, np.ndarray]:
    known = paths.modules(model)
    module = known.get(path)
    if module is None or isinstance(module, Adapted):
        near = ", ".join(map(repr, paths.near_misses(path, known)))
        raise ValueError(f"heads name {path!r}, which is no plain module; near misses: {near}.")
    tensors = {}
    for name, (variable, transposed) in saved_parts(path, module).items():
        value = np.asarray(variable[...], np.float32)
        tensors[name] = value.T if transposed else value
    return tensors
