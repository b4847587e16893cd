"""Reading PEFT's files: checked first, then put into a model."""

import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from jaxtyping import Array

from lorajax import initializers
from lorajax.adapters import paths
from lorajax.adapters.layers import AdaLoRA, Adapted, LoRA
from lorajax.adapters.layouts import kernel_variable, layout
from lorajax.adapters.peft.shared import (
    ADALORA_EPSILON,
    CONFIG,
    LARGEST_CONFIG,
    OFFSETS,
    PREFIX,
    WEIGHTS,
    Rename,
    dotted,
    first_line,
    from_conv_rows,
    saved_parts,
)
from lorajax.factors import Factors
from lorajax.initializers import Start

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
    if config_file.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{str(config_file)!r} is larger than {LARGEST_CONFIG} bytes.")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(config_file)!r} is not valid JSON: {first_line(error)}") from None
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
            f"{str(weights_file)!r} is not a whole safetensors file: {first_line(error)}"
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
        offsets = set(json.loads(metadata.get(OFFSETS, "[]")))
    except (ValueError, TypeError):
        raise ValueError(f"the metadata {OFFSETS!r} is not a list of module names.") from None

    model = nnx.clone(model)
    found = paths.find(model)
    by_module = {rename(path): path for path in found}
    modules = paths.modules(model)
    whole = {rename(path): path for path in modules}
    grouped, saved = _grouped(tensors, by_module, whole, _modules_to_save(config))
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
    for module, parts in saved.items():
        _fill_head(whole[module], modules[whole[module]], parts)

    def visit(path: str, layer: nnx.Module) -> Any:
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
    tensors: Mapping[str, np.ndarray],
    by_module: Mapping[str, str],
    whole: Mapping[str, str],
    saved_names: list[str],
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
            pieces = body.split(".")
            parents = [".".join(pieces[:i]) for i in range(1, len(pieces))]
            listed = [p for p in parents if any(f".{p}".endswith(f".{s}") for s in saved_names)]
            if not listed:
                raise ValueError(f"the file holds {key!r}, which belongs to no LoRA adapter.")
            # PEFT keeps the outermost module of a name that is listed.
            module = listed[0]
            target, suffix = saved, body.removeprefix(f"{module}.")
        known = by_module if target is grouped else whole
        if module not in known:
            near = ", ".join(map(repr, paths.near_misses(module, known)))
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
                f"{field} has the key {key!r}, not a regular expression: {first_line(error)}"
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
        a = from_conv_rows(rows)
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
        divisor = _number(config, "init_r", config.get("init_r", 12)) + ADALORA_EPSILON
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


def _fill_head(path: str, module: nnx.Module, parts: Mapping[str, np.ndarray]) -> None:
    """Writes a module saved in full into that of the new model, whose Variables are its own."""
    variables = saved_parts(path, module)
    if set(parts) != set(variables):
        raise ValueError(f"the saved module {path!r} has {sorted(parts)}, not {sorted(variables)}.")
    for name, (variable, transposed) in variables.items():
        value = parts[name].T if transposed else parts[name]
        _check_shape(path, name, value, tuple(variable[...].shape))
        array: Array = jnp.asarray(value.astype(np.float32)).astype(variable[...].dtype)
        variable.set_value(array)
