"""Writing an adapter as PEFT's files."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from flax import nnx

from lorajax.adapters import paths
from lorajax.adapters.layers import Adapter
from lorajax.adapters.layouts import layout
from lorajax.adapters.methods import PeftLayer, PeftMethod
from lorajax.adapters.peft.shared import (
    BASE,
    BLOCKS,
    CONFIG,
    OFFSETS,
    PREFIX,
    WEIGHTS,
    check_layer,
    check_output,
    check_whole,
)
from lorajax.adapters.surgery import layers
from lorajax.adapters.torch_layers import (
    WRAPPED,
    Names,
    Rename,
    TensorRule,
    TorchLayer,
    base_layers,
)
from lorajax.environment import files
from lorajax.environment.judging import judged


@judged
def save_peft(
    model: nnx.Module,
    folder: str | os.PathLike,
    *,
    name: str = "default",
    rename: Rename | None = None,
    rules: Iterable[TensorRule] | None = None,
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
      rules: in place of `rename`, those of the checkpoint that the base was read from, such as
        `models.torch_rules(…)`: names and order of its tensors.
      heads: paths of modules to be written along in full (PEFT's `modules_to_save`): Linear, Conv
        and Embed layers, norms, and modules of such and of bare parameters. Of an adapted layer the
        base is written along.
      base_model: name of the base for PEFT's `base_model_name_or_path`.
      task_type: PEFT's `task_type`, such as "SEQ_CLS".

    Raises:
      ValueError: for an adapter that PEFT cannot express, or an unknown name.
    """
    bases, names = base_layers(model), Names(model, rename, rules)
    adapters = _chosen(model, name)
    method = _method(model, name, adapters, bases)
    named = {"base_model_name_or_path": base_model, "task_type": task_type}
    config, tensors, metadata = _content(model, names, method, adapters, bases, heads)
    _write(pathlib.Path(folder), config | named, tensors, metadata)


@judged
def save_peft_start(
    model: nnx.Module,
    folder: str | os.PathLike,
    *,
    name: str = "default",
    rename: Rename | None = None,
    rules: Iterable[TensorRule] | None = None,
    heads: Sequence[str] = (),
    base_model: str | None = None,
    task_type: str | None = None,
    weights: bool = True,
) -> None:
    """Writes an adapter for PEFT to train on from: its configuration, and where it starts.

    Other than in `save_peft`, ranks are those of the layers here in every case: an offset is not
    written, but taken off the base by PEFT's own start of the same name, where it has one.

    Args:
      model: as for `save_peft`, and so are the others, but:
      folder: is made if missing. `get_peft_model(base, LoraConfig.from_pretrained(folder))` starts
        as PEFT does, `PeftModel.from_pretrained(base, folder, is_trainable=True)` where the
        adapter here is.
      name: which adapter.
      rename: from paths to torch's names.
      rules: in place of it, those of the checkpoint.
      heads: modules that train in full. They are written along only with the weights.
      base_model: name of the base.
      task_type: PEFT's.
      weights: whether the adapter's own numbers are written; False for the configuration alone.

    Raises:
      ValueError: as `save_peft`; and for a start with an offset that PEFT does not take off, which
        is any but PiSSA's on Linear layers that are torch modules of their own.
    """
    bases, names = base_layers(model), Names(model, rename, rules)
    adapters = _chosen(model, name)
    method = _method(model, name, adapters, bases)
    started, start = _without_offsets(names, adapters, bases)
    config, tensors, metadata = _content(model, names, method, started, bases, heads)
    config |= {"inference_mode": False, "init_lora_weights": start}
    config |= {"base_model_name_or_path": base_model, "task_type": task_type}
    _write(pathlib.Path(folder), config, tensors if weights else None, metadata)


def _without_offsets(
    names: Names, adapters: Mapping[str, Adapter], bases: Mapping[str, nnx.Module]
) -> tuple[dict[str, Adapter], str | bool]:
    """Adapters without their offsets, and the start of PEFT that takes the same off the base."""
    moved = [path for path, x in adapters.items() if getattr(x, "offset", None) is not None]
    for path in moved:
        start, base = adapters[path].start, bases[path]
        torch = names.layer(path, base)
        apart = torch.parts == 1 and not torch.attention
        apart = apart and not isinstance(base, (nnx.Embed, nnx.Conv))
        if start != "pissa" or not apart or len(moved) < len(adapters):
            raise ValueError(
                f"start is {start!r}, which takes an offset off the base of {path!r} that PEFT "
                "does not take off when it trains on; use pissa, for Linear layers that are torch "
                "modules of their own, or a start without an offset, such as lora or orthogonal."
            )
    bare = {}
    for path, adapter in adapters.items():
        bare[path] = nnx.clone(adapter) if moved else adapter
        if moved:
            bare[path].offset_a = bare[path].offset_b = nnx.data(None)
    return bare, "pissa" if moved else True


def _content(
    model: nnx.Module,
    names: Names,
    method: PeftMethod,
    adapters: Mapping[str, Adapter],
    bases: Mapping[str, nnx.Module],
    heads: Sequence[str],
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """The configuration, the tensors by name, and the metadata of their file."""
    written, metadata = _modules(names, method, adapters, bases)
    attentions = _attentions(names, written)
    modules, fields = method.config(written, list(adapters.values()))
    for module, tensors in attentions.items():
        modules[module] = modules[module]._replace(tensors=modules[module].tensors | tensors)
    first = next(iter(adapters.values()))
    tensors = {
        f"{PREFIX}{module}.{suffix}": tensor
        for module, entry in modules.items()
        for suffix, tensor in entry.tensors.items()
    }
    saved = []
    for head in heads:
        for key, tensor in _head(names, model, bases, head, saved).items():
            tensors[PREFIX + key] = tensor
    every = [names.module(path)[0] for path in bases if names.knows(path)]
    every = [module for module in every if not module.endswith(WRAPPED)]
    config: dict[str, Any] = {
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": first.dropout.rate if first.dropout is not None else 0.0,
        "modules_to_save": saved or None,
        "peft_type": method.type,
        **fields,
        "target_modules": _targets(list(modules), every),
    }
    for field in method.omitted:
        del config[field]
    return config, tensors, metadata


def _write(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray] | None,
    metadata: dict[str, str],
) -> None:
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        (folder / WEIGHTS).unlink(missing_ok=True)  # of an earlier start
    else:
        whole = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
        files.write(folder / WEIGHTS, safetensors.numpy.save(whole, metadata))
    files.write(folder / CONFIG, text)


def _chosen(model: nnx.Module, name: str) -> dict[str, Adapter]:
    found = {path: x.adapters[name] for path, x in layers(model).items() if name in x.adapters}
    if not found:
        raise ValueError(f"the model has no adapter {name!r} to save.")
    return found


def _method(
    model: nnx.Module,
    name: str,
    adapters: Mapping[str, Adapter],
    bases: Mapping[str, nnx.Module],
) -> PeftMethod:
    """The one method of all layers; raises ValueError for what PEFT would do differently."""
    tied = paths.attends(model)
    for path, adapter in adapters.items():
        if adapter.peft is None:
            raise ValueError(
                f"PEFT cannot express the adapter of {path!r}: it is a {adapter.kind} update, for "
                "which PEFT has no method; merge it, or save the whole state with save_checkpoint."
            )
        check_layer(path, bases[path], adapter.peft, adapter.axes)
        if tied and adapter.attends and isinstance(bases[path], nnx.Embed):
            raise ValueError(
                f"PEFT cannot express the adapter of {path!r}: it acts in Embed.attend, too, which "
                "the model calls, and PEFT's acts in the lookup alone; adapt with attends=False."
            )
    kinds = sorted({adapter.kind for adapter in adapters.values()})
    if len(kinds) > 1:
        raise ValueError(
            f"the adapter {name!r} mixes {' and '.join(kinds)}; PEFT has one method an adapter, so "
            "give them names of their own."
        )
    return next(iter(adapters.values())).peft


class _Block(NamedTuple):
    """One layer of ours as a block of a torch module."""

    torch: TorchLayer
    entry: PeftLayer
    path: str
    offset: bool


def _modules(
    names: Names,
    method: PeftMethod,
    adapters: Mapping[str, Adapter],
    bases: Mapping[str, nnx.Module],
) -> tuple[dict[str, PeftLayer], dict[str, str]]:
    """What is written, by name of the torch module, and the file's metadata."""
    found: dict[str, dict[int, _Block]] = {}
    for path, adapter in adapters.items():
        torch = names.layer(path, bases[path])
        check_output(path, torch)
        blocks = found.setdefault(torch.module, {})
        if torch.part in blocks:
            raise ValueError(
                f"rename gives two layers the name {torch.module!r}; names must differ."
            )
        entry = method.write(torch, bases[path], adapter)
        has_offset = getattr(adapter, "offset", None) is not None
        blocks[torch.part] = _Block(torch, entry, path, has_offset)
    modules, metadata, ranks = {}, {"format": "pt"}, {}
    for module, blocks in found.items():
        first = next(iter(blocks.values()))
        parts = first.torch.parts
        if parts == 1:
            modules[module] = first.entry
            continue
        entries = [blocks[i].entry if i in blocks else None for i in range(parts)]
        if len({block.offset for block in blocks.values()}) > 1:
            raise ValueError(
                f"PEFT cannot express the adapter of {first.path!r}: some layers of {module!r} "
                "start with an offset and others do not; give them one start."
            )
        try:
            modules[module] = method.fuse(entries, layout(bases[first.path]).shape[1])
        except ValueError as error:
            raise ValueError(
                f"PEFT cannot express the adapter of {first.path!r}, which is a part of "
                f"{module!r}: {error}."
            ) from None
        ranks[module] = [0 if entry is None else entry.rank for entry in entries]
    offsets = [module for module, blocks in found.items() if next(iter(blocks.values())).offset]
    if offsets:
        metadata[OFFSETS] = json.dumps(offsets)
    if ranks:
        metadata[BLOCKS] = json.dumps(ranks)
    return modules, metadata


def _attentions(names: Names, written: Mapping[str, PeftLayer]) -> dict[str, dict[str, Any]]:
    """What PEFT wants of a MultiheadAttention's output, by name of the adapted ones: zeros.

    PEFT adapts the inputs and the output of such a module together, with one rank.
    """
    found = {}
    for attention in names.attentions & written.keys():
        entry = written[attention]
        if entry.tensors.keys() != {"lora_A.weight", "lora_B.weight"}:
            raise ValueError(
                f"PEFT cannot express the adapter of {attention!r}, a MultiheadAttention, which it "
                "adapts by plain LoRA alone; leave its layers out, or merge the adapter."
            )
        width = entry.tensors["lora_A.weight"].shape[1]
        shapes = {"lora_A": (entry.rank, width), "lora_B": (width, entry.rank)}
        found[attention] = {
            f"{WRAPPED[1:]}.{name}.weight": np.zeros(shape, np.float32)
            for name, shape in shapes.items()
        }
    return found


def _targets(chosen: list[str], every: list[str]) -> list[str] | str:
    """PEFT's `target_modules`: names, or a regular expression where a suffix would hit others."""
    for name in every:
        if name not in chosen and any(name.endswith("." + target) for target in chosen):
            return "|".join(re.escape(target) for target in sorted(chosen))
    return sorted(chosen)


def _head(
    names: Names, model: nnx.Module, bases: Mapping[str, nnx.Module], path: str, saved: list[str]
) -> dict[str, np.ndarray]:
    """Tensors of a module in full, or of the base of an adapted layer; adds to `saved`."""
    whole = names.base(path, bases[path]) if path in layers(model) else names.whole(path)
    inside = BASE if path in layers(model) else ""
    if not inside:
        check_whole(path, model)
        saved.append(whole.module)
    tensors = {}
    for part in whole.parts:
        arrays = (np.asarray(variable[...], np.float32) for variable in part.variables)
        for key, tensor in zip(part.names, part.write(*arrays), strict=True):
            tensors[f"{whole.module}.{inside}{key}"] = tensor
    return tensors
