"""Adapters in PEFT's own format: a folder with adapter_config.json and adapter_model.safetensors.

PEFT keeps `lora_A = Aᵀ` and `lora_B = Bᵀ` under the name of a torch module. What the format cannot
say is refused, never approximated: Tucker cores, factors with lanes or stacks, and convolutions
whose groups, dilation or padding PEFT's adapters do not follow. What it can say in other words is
said so: a start with an offset is written as LoRA of twice the rank, `[A A₀] [B; −B₀]`, which is
right on the unmodified base; the file's metadata tells `load_peft` how to take the two apart again.
"""

import json
import math
import os
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jaxtyping import Array

from lorajax import initializers
from lorajax.adapters import paths
from lorajax.adapters.layers import AdaLoRA, Adapted, Adapter, LoRA, Tucker
from lorajax.adapters.layouts import Convolution, kernel_variable, layout
from lorajax.adapters.surgery import layers
from lorajax.factors import Factors
from lorajax.initializers import Start

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_OFFSETS = "lorajax.offsets"
_LARGEST_CONFIG = 10 * 2**20
_ADALORA_EPSILON = 1e-5
"""What PEFT's AdaLoRA adds to the rank before it divides alpha by it."""

Rename = Callable[[str], str]

# Options of PEFT that change what an adapter computes and that lorajax has no layer for.
_FOREIGN = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


def dotted(path: str) -> str:
    """The default renaming: the layer's path with dots for slashes."""
    return path.replace("/", ".")


class _Entry(NamedTuple):
    """One layer as PEFT sees it: the tensors by suffix, and its scaling."""

    tensors: dict[str, np.ndarray]
    rank: int
    scaling: float


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
      heads: paths of plain Linear layers to be written along in full (PEFT's `modules_to_save`).
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
        metadata[_OFFSETS] = json.dumps(offsets)
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    # Written aside and moved into place, so that a crash leaves no half-written adapter.
    for final, data in (
        (target / WEIGHTS, safetensors.numpy.save(tensors, metadata)),
        (target / CONFIG, text.encode()),
    ):
        aside = final.with_name(final.name + ".partial")
        aside.write_bytes(data)
        os.replace(aside, final)


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
            a = _conv_rows(a, base).reshape(a.shape[1], -1).T
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
            "lora_A.weight": _conv_rows(a, base),
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


def _conv_rows(a: np.ndarray, base: nnx.Conv) -> np.ndarray:
    """A as torch has the kernel of its convolution: (r, in, *window)."""
    window = a.reshape(*base.kernel.shape[:-1], a.shape[1])
    return np.moveaxis(window, (-1, -2), (0, 1))


def _from_conv_rows(rows: np.ndarray) -> np.ndarray:
    """The inverse of `_conv_rows`: (window · in, r)."""
    return np.moveaxis(rows, (0, 1), (-1, -2)).reshape(-1, rows.shape[0])


def _one_rank(entries: dict[str, _Entry]) -> tuple[dict[str, _Entry], dict[str, Any]]:
    """AdaLoRA has one rank and one alpha: zero singular values fill up, E takes the scalings."""
    rank = max(entry.rank for entry in entries.values())
    divisor = rank + _ADALORA_EPSILON
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


def _head(model: nnx.Module, path: str) -> nnx.Linear:
    found = paths.find(model).get(path)
    if not isinstance(found, nnx.Linear):
        known = [p for p, x in paths.find(model).items() if isinstance(x, nnx.Linear)]
        near = ", ".join(map(repr, paths.near_misses(path, known)))
        raise ValueError(f"heads name {path!r}, which is no plain Linear; near misses: {near}.")
    return found


def _head_tensors(model: nnx.Module, path: str) -> dict[str, np.ndarray]:
    head = _head(model, path)
    tensors = {"weight": np.asarray(head.kernel[...], np.float32).T}
    if head.bias is not None:
        tensors["bias"] = np.asarray(head.bias[...], np.float32)
    return tensors


def read_peft(
    folder: str | os.PathLike,
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """Reads and checks the two files of a PEFT adapter, without a model.

    Args:
      folder: the adapter's folder.

    Returns:
      The configuration, the tensors by name, and the metadata of the safetensors file.

    Raises:
      ValueError: for a folder without the files, pickled weights, and files that are truncated,
        malformed, not of this format, or hold NaNs.
    """
    source = pathlib.Path(folder)
    config_file, weights_file = source / CONFIG, source / WEIGHTS
    for file in (config_file, weights_file):
        if not file.is_file():
            pickled = (source / "adapter_model.bin").is_file() and file is weights_file
            raise ValueError(
                f"{str(source)!r} has no {file.name}"
                + (
                    ", only a pickle, which could run any code; save it as safetensors."
                    if pickled
                    else "; a PEFT adapter is a folder with both files."
                )
            )
    if config_file.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"{str(config_file)!r} is larger than {_LARGEST_CONFIG} bytes.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(config_file)!r} is not valid JSON: {_first_line(error)}") from None
    if not isinstance(config, dict):
        raise ValueError(
            f"{str(config_file)!r} holds a {type(config).__name__}; it must be a dict."
        )
    tensors = {}
    try:
        with safetensors.safe_open(weights_file, framework="np") as file:
            metadata = dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118, it is no mapping
                tensors[key] = np.asarray(file.get_tensor(key))
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{str(weights_file)!r} is not a whole safetensors file: {_first_line(error)}"
        ) from None
    for key, tensor in tensors.items():
        if not (np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == "bfloat16"):
            raise ValueError(
                f"{str(weights_file)!r} holds {key!r} of dtype {tensor.dtype}; weights must be "
                "floating point."
            )
        if not np.all(np.isfinite(tensor.astype(np.float32))):
            raise ValueError(f"{str(weights_file)!r} holds {key!r} with NaNs or infinities.")
    return config, tensors, metadata


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") + "."


def load_peft(
    model: nnx.Module,
    folder: str | os.PathLike,
    *,
    name: str = "default",
    rename: Rename | None = None,
    dtype: Any = jnp.float32,
) -> Any:
    """Puts an adapter that PEFT (or `save_peft`) wrote into a model.

    Args:
      model: an NNX module with the base that the adapter was trained on. It is not changed.
      folder: the adapter's folder.
      name: the adapter's name in the model.
      rename: from a layer's path to the name of its torch module; "/" becomes "." if None.
      dtype: dtype of the adapter's parameters.

    Returns:
      A new model with the adapter active in it. Modules that PEFT saved in full
      (`modules_to_save`) are replaced in it, too.

    Raises:
      ValueError: for files as `read_peft` refuses them, an adapter of another model, shapes or
        ranks that do not fit, and options of PEFT that no layer here has.
    """
    rename = rename or dotted
    config, tensors, metadata = read_peft(folder)
    kind = config.get("peft_type")
    if kind not in ("LORA", "ADALORA"):
        raise ValueError(f"peft_type is {kind!r}; 'LORA' and 'ADALORA' can be loaded.")
    for option in _FOREIGN:
        if config.get(option):
            raise ValueError(f"the adapter uses PEFT's {option}, which no layer here has.")
    if config.get("bias", "none") != "none":
        raise ValueError(f"the adapter trains biases (bias={config['bias']!r}); only 'none' loads.")
    try:
        offsets = set(json.loads(metadata.get(_OFFSETS, "[]")))
    except (ValueError, TypeError):
        raise ValueError(f"the metadata {_OFFSETS!r} is not a list of module names.") from None

    model = nnx.clone(model)
    found = paths.find(model)
    by_module = {rename(path): path for path in found}
    grouped, saved = _grouped(tensors, by_module, _modules_to_save(config))
    chosen: dict[str, LoRA] = {}
    for module, parts in grouped.items():
        layer = found[by_module[module]]
        if isinstance(layer, Adapted) and name in layer.adapters:
            raise ValueError(
                f"the layer {by_module[module]!r} has an adapter {name!r} already; choose another "
                "name, or remove that one first."
            )
        base = layer.base if isinstance(layer, Adapted) else layer
        adapter = _read_layer(module, base, parts, config, module in offsets, dtype)
        chosen[by_module[module]] = adapter
    heads = {by_module[module]: parts for module, parts in saved.items()}

    def visit(path: str, layer: nnx.Module) -> Any:
        if path in heads:
            _fill_head(path, layer, heads[path])
            return layer
        if path not in chosen:
            return layer if isinstance(layer, Adapted) else None
        adapted = layer if isinstance(layer, Adapted) else Adapted(layer)
        adapted.adapters[name] = chosen[path]
        adapted.active = (*adapted.active, (name, 1.0))
        return adapted

    return paths.replace(model, visit)


_SUFFIXES = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_A",
    "lora_B",
    "lora_E",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
)


def _modules_to_save(config: Mapping[str, Any]) -> list[str]:
    listed = config.get("modules_to_save") or []
    if not isinstance(listed, list) or not all(isinstance(x, str) for x in listed):
        raise ValueError("modules_to_save in the configuration is not a list of names.")
    return listed


def _grouped(
    tensors: Mapping[str, np.ndarray], by_module: Mapping[str, str], saved_names: list[str]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
    """Tensors by module and suffix: those of adapters, and those of modules saved in full."""
    grouped: dict[str, dict[str, np.ndarray]] = {}
    saved: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in tensors.items():
        body = key.removeprefix(PREFIX)
        if body == key:
            raise ValueError(f"the file holds {key!r}; names of PEFT begin with {PREFIX!r}.")
        for suffix in sorted(_SUFFIXES, key=len, reverse=True):
            if body.endswith("." + suffix):
                target, module = grouped, body.removesuffix("." + suffix)
                suffix = suffix.removesuffix(".weight")
                break
        else:
            module, _, suffix = body.rpartition(".")
            if not any(module == s or module.endswith("." + s) for s in saved_names):
                raise ValueError(f"the file holds {key!r}, which belongs to no LoRA adapter.")
            target = saved
        if module not in by_module:
            near = ", ".join(map(repr, paths.near_misses(module, by_module)))
            raise ValueError(
                f"the adapter is of another model: it has a layer {module!r}, and this one has "
                f"none of that name; near misses: {near or 'none'}. Pass rename if names differ."
            )
        target.setdefault(module, {})[suffix] = tensor
    if not grouped:
        raise ValueError("the file holds no LoRA factors.")
    return grouped, saved


def _pattern_value(config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """The value that PEFT gives a module by its suffix patterns; the first that matches wins."""
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{field} in the configuration is not a mapping.")
    for key, value in pattern.items():
        # Repeated groups can take a regular expression exponential time.
        if len(key) > 500 or re.search(r"\)[*+{]", key):
            raise ValueError(f"{field} has the key {key[:60]!r}, too complex to be matched safely.")
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise ValueError(
                f"{field} has the key {key!r}, not a regular expression: {_first_line(error)}"
            ) from None
    return default


def _number(config: Mapping[str, Any], field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{field} in the configuration is {value!r}; it must be positive.")
    return float(value)


def _read_layer(
    module: str,
    base: nnx.Module,
    parts: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    with_offset: bool,
    dtype: Any,
) -> LoRA:
    view = layout(base)
    if view.stack or view.lanes:
        raise ValueError(f"the layer {module!r} is stacked, and a PEFT adapter has one kernel.")
    embedded = isinstance(base, nnx.Embed)
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedded else ("lora_A", "lora_B")
    adaptive = config["peft_type"] == "ADALORA"
    expected = {first, second} | ({"lora_E"} if adaptive else set())
    if config.get("use_dora"):
        expected.add("lora_magnitude_vector")
    if set(parts) != expected:
        odd = sorted(set(parts) ^ expected)[0]
        state = "lacks" if odd in expected else "has an unexpected"
        raise ValueError(f"the layer {module!r} {state} {odd}.")
    rows, columns = parts[first].astype(np.float32), parts[second].astype(np.float32)
    m, n = view.shape
    rank = rows.shape[0] if rows.ndim else 0
    if isinstance(base, nnx.Conv):
        _check_conv(module, base, adaptive)
        *window, inputs, outputs = view.kernel_shape
        if adaptive:
            _check_shape(module, first, rows, (rank, m))
            rows = rows.reshape(rank, inputs, *window)
        else:
            ones = (1,) * len(window)
            _check_shape(module, second, columns, (outputs, rank, *ones))
            columns = columns.reshape(outputs, rank)
        _check_shape(module, first, rows, (rank, inputs, *window))
        a = _from_conv_rows(rows)
    else:
        _check_shape(module, first, rows, (rank, m))
        a = rows.T
    _check_shape(module, second, columns, (n, rank))
    factors = Factors(jnp.asarray(a, dtype), jnp.asarray(columns.T, dtype))
    if not rank:
        raise ValueError(f"the layer {module!r} has rank 0.")
    common: dict[str, Any] = dict(start="peft", dropout=_dropout(config))
    if adaptive:
        _check_shape(module, "lora_E", parts["lora_E"], (rank, 1))
        alpha = _number(config, "lora_alpha", config.get("lora_alpha", 8))
        # PEFT divides by the rank that training began with, whatever pruning has left of it.
        divisor = _number(config, "init_r", config.get("init_r", 12)) + _ADALORA_EPSILON
        e = jnp.asarray(parts["lora_E"][:, 0].astype(np.float32), dtype)
        return AdaLoRA(factors, e, alpha=alpha * rank / divisor, **common)
    told = _pattern_value(config, "rank_pattern", module, config.get("r", 8))
    if told != rank:
        raise ValueError(f"the layer {module!r} has rank {rank}; the configuration says {told!r}.")
    alpha = _pattern_value(config, "alpha_pattern", module, config.get("lora_alpha", 8))
    alpha = _number(config, "lora_alpha", alpha)
    rslora = bool(config.get("use_rslora"))
    offset = None
    if with_offset:
        if rank % 2:
            raise ValueError(f"the layer {module!r} has an offset, but the odd rank {rank}.")
        half = rank // 2
        offset = Factors(factors.a[:, half:], -factors.b[half:])
        factors = Factors(factors.a[:, :half], factors.b[:half])
        alpha *= 0.5**0.5 if rslora else 0.5
    else:
        offset = _converted_offset(module, base, rank, alpha, config)
    magnitude = None
    if config.get("use_dora"):
        flat = parts["lora_magnitude_vector"].reshape(-1)
        _check_shape(module, "lora_magnitude_vector", flat, (n,))
        magnitude = jnp.asarray(flat.astype(np.float32), dtype)
    return LoRA(factors, offset, magnitude, alpha=alpha, rslora=rslora, **common)


def _check_shape(module: str, part: str, tensor: np.ndarray, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"the layer {module!r} has {part} of shape {tensor.shape}; here it must be {shape}."
        )


def _check_conv(module: str, base: nnx.Conv, adaptive: bool) -> None:
    dilated = base.kernel_dilation is not None and np.any(np.asarray(base.kernel_dilation) != 1)
    if not adaptive and (base.feature_group_count > 1 or dilated):
        raise ValueError(
            f"the layer {module!r} has groups or dilation, which PEFT's adapters do not follow, so "
            "that they are no update of its kernel."
        )


def _dropout(config: Mapping[str, Any]) -> float:
    rate = config.get("lora_dropout", 0.0)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"lora_dropout in the configuration is {rate!r}; it must lie in [0, 1).")
    return float(rate)


def _converted_offset(
    module: str, base: nnx.Module, rank: int, alpha: float, config: Mapping[str, Any]
) -> Factors | None:
    """What PEFT takes off the base for an adapter that was not converted to plain LoRA."""
    start = config.get("init_lora_weights", True)
    if not isinstance(start, str) or start.lower() in ("gaussian", "eva", "orthogonal"):
        return None
    weight = layout(base).matrix(kernel_variable(base)[...]).astype(jnp.float32)
    scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    if start.lower() == "pissa":
        made = initializers.pissa(weight, rank, scaling=scaling)
    elif start.lower() == "olora":
        # PEFT decomposes the transpose of the weight, so that B holds the orthonormal rows.
        flipped: Start = initializers.olora(weight.T, rank, scaling=scaling)
        offset = flipped.offset
        return Factors(offset.b.T, offset.a.T)
    else:
        raise ValueError(
            f"the adapter was started with {start!r}, which changes the base in a way that its "
            "file does not tell; save it with path_initial_model_for_weight_conversion."
        )
    return made.offset


def _fill_head(path: str, layer: nnx.Module, parts: Mapping[str, np.ndarray]) -> None:
    """Writes a module saved in full into a layer of the new model, whose Variables are its own."""
    if not isinstance(layer, nnx.Linear):
        raise ValueError(f"modules_to_save names {path!r}, a {type(layer).__name__}, no Linear.")
    expected = {"weight"} | ({"bias"} if layer.bias is not None else set())
    if set(parts) != expected:
        raise ValueError(f"the saved module {path!r} has {sorted(parts)}, not {sorted(expected)}.")
    _check_shape(path, "weight", parts["weight"].T, tuple(layer.kernel.shape))

    def set_to(variable: Any, value: np.ndarray) -> None:
        array: Array = jnp.asarray(value.astype(np.float32)).astype(variable[...].dtype)
        variable.set_value(array)

    set_to(layer.kernel, parts["weight"].T)
    if layer.bias is not None:
        _check_shape(path, "bias", parts["bias"], tuple(layer.bias.shape))
        set_to(layer.bias, parts["bias"])
