"""Reading PEFT's files: checked first, then put into a model."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from lorajax.adapters import paths
from lorajax.adapters.layers import Adapter
from lorajax.adapters.methods import PeftMethod, check_shape, first_line
from lorajax.adapters.peft.shared import (
    BASE,
    BLOCKS,
    CONFIG,
    LARGEST_CONFIG,
    OFFSETS,
    PREFIX,
    WEIGHTS,
    check_layer,
    check_output,
    check_whole,
)
from lorajax.adapters.surgery import base_of, check_name, insert
from lorajax.adapters.torch_layers import (
    WRAPPED,
    Names,
    Rename,
    TensorRule,
    Whole,
    base_layers,
)
from lorajax.environment.judging import judged
from lorajax.environment.numbers import not_finite, sentence

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


# What NumPy and safetensors raise for dtypes and sizes that they do not know.
_ODD = (KeyError, AttributeError, OverflowError, MemoryError)

# Torch's names of embeddings that PEFT saves along with an adapter, changed or not.
_EMBEDDINGS = ("embed_tokens", "lm_head")


@judged
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
        malformed, not of this format, or hold entries that are not finite in float32.
    """
    source = pathlib.Path(folder)
    config_file, weights_file = source / CONFIG, source / WEIGHTS
    for file in (config_file, weights_file):
        _check_link(source, file)
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
    return config, *_tensors(weights_file)


def _check_link(folder: pathlib.Path, file: pathlib.Path) -> None:
    """Raises ValueError for a link out of the folder, but for those of the hub's own cache."""
    if not file.is_symlink():
        return
    inside = folder.resolve()
    # The hub keeps the files of snapshots/<revision>/ in the blobs/ beside snapshots.
    allowed = (inside, *(parent / "blobs" for parent in inside.parents[1:2]))
    if not any(file.resolve().is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{str(file)!r} is a link out of its folder; copy the file that it means there."
        )


def _tensors(weights_file: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a safetensors file, checked, and its metadata."""
    tensors = {}
    try:
        with safetensors.safe_open(weights_file, framework="np") as file:
            metadata = dict(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118, it is no mapping
                tensors[key] = np.asarray(file.get_tensor(key))
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, *_ODD) as error:
        raise ValueError(
            f"{str(weights_file)!r} is not a whole safetensors file: {first_line(error)}"
        ) from None
    for key, tensor in list(tensors.items()):
        if key.endswith(".num_batches_tracked"):
            del tensors[key]  # torch's batch norms count, and nothing here reads it
            continue
        if not (np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == "bfloat16"):
            raise ValueError(
                f"{str(weights_file)!r} holds {key!r} of dtype {tensor.dtype}; weights must be "
                "floating point."
            )
        if count := not_finite(tensor, np.float32):
            raise ValueError(
                f"{str(weights_file)!r} holds {key!r} with "
                f"{sentence(count, tensor.size, np.float32)}; fetch the file anew, or take a state "
                "from before the training that diverged."
            )
    return tensors, metadata


@judged
def load_peft(
    model: nnx.Module,
    folder: str | os.PathLike,
    *,
    name: str = "default",
    rename: Rename | None = None,
    rules: Iterable[TensorRule] | None = None,
    dtype: Any = jnp.float32,
) -> Any:
    """Puts an adapter that PEFT (or `save_peft`) wrote into a model.

    Args:
      model: an NNX module with the base that the adapter was trained on. It is not changed.
      folder: the adapter's folder.
      name: the adapter's name in the model.
      rename: from a layer's path to the name of its torch module; "/" becomes "." if None.
      rules: in place of `rename`, those of the checkpoint that the base was read from; as for
        `save_peft`.
      dtype: dtype of the adapter's parameters.

    Returns:
      A new model with the adapter active in it. Modules that PEFT saved in full
      (`modules_to_save`) and bases that it saved along are replaced in it, too. Like PEFT's, the
      adapter of an Embed leaves `attend` alone.

    Raises:
      ValueError: for files as `read_peft` refuses them, an adapter of another model, shapes or
        ranks that do not fit, a merged model, options of PEFT that no layer here has, and whatever
        `save_peft` refuses to write.
    """
    check_name(name)
    files = read_peft(folder)
    try:
        return _put(model, files, name, (rename, rules), dtype)
    except ValueError as error:
        raise ValueError(f"{str(folder)!r} does not fit: {error}") from error


def _put(
    model: nnx.Module,
    files: tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]],
    name: str,
    naming: tuple[Rename | None, Iterable[TensorRule] | None],
    dtype: Any,
) -> Any:
    """A model with what the files of an adapter hold."""
    config, tensors, metadata = files
    method = _method(config)
    offsets, ranks = _metadata(metadata)
    model = nnx.clone(model)
    names = Names(model, *naming)
    file = _sorted(tensors, names, model, method, _modules_to_save(config))
    _check_targets(config, file.adapters)
    found, bases = paths.find(model), base_layers(model)
    chosen: dict[str, Adapter] = {}
    for module, parts in file.adapters.items():
        for path in file.paths[module]:
            base = base_of(path, found[path], name)
            check_layer(path, base, method)
            torch, mine = names.layer(path, base), parts
            if module.endswith(WRAPPED) and not np.any(parts.get("lora_B", 1)):
                continue  # which adds nothing, however often
            check_output(path, torch)
            if torch.parts > 1:
                mine = method.split(torch, parts, ranks.get(module))
            if mine:
                options = {"offset": module in offsets, "dtype": dtype}
                chosen[path] = method.read(torch, base, mine, config, **options)
    for path, parts in file.bases.items():
        _fill(path, names.base(path, bases[path]), parts, partly=True)
    for path, parts in file.whole.items():
        check_whole(path, model)
        _fill(path, names.whole(path), parts)
    return insert(model, chosen, name)


def _method(config: Mapping[str, Any]) -> PeftMethod:
    """The method of a configuration; raises ValueError for one that no kind declares."""
    known: dict[str, PeftMethod] = {}

    def walk(kind: type[Adapter]) -> None:
        if kind.peft is not None:
            known[kind.peft.type] = kind.peft
        for child in kind.__subclasses__():
            walk(child)

    walk(Adapter)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in known:
        names = " and ".join(map(repr, sorted(known, reverse=True)))
        raise ValueError(f"peft_type is {kind!r}; {names} can be loaded.")
    for option in _FOREIGN:
        if config.get(option):
            raise ValueError(f"the adapter uses PEFT's {option}, which no layer here has.")
    if config.get("bias", "none") != "none":
        raise ValueError(f"the adapter trains biases (bias={config['bias']!r}); only 'none' loads.")
    return known[kind]


def _metadata(metadata: Mapping[str, str]) -> tuple[set[str], dict[str, list[int]]]:
    """Which modules have offsets, and the ranks of blocks, as `save_peft` noted them."""
    try:
        offsets = json.loads(metadata.get(OFFSETS, "[]"))
        blocks = json.loads(metadata.get(BLOCKS, "{}"))
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"the metadata {OFFSETS!r} and {BLOCKS!r} are not valid JSON.") from None
    if not isinstance(offsets, list) or not all(isinstance(x, str) for x in offsets):
        raise ValueError(f"the metadata {OFFSETS!r} is not a list of module names.")
    good = isinstance(blocks, dict) and all(
        isinstance(ranks, list) and all(type(r) is int and r >= 0 for r in ranks)
        for ranks in blocks.values()
    )
    if not good:
        raise ValueError(f"the metadata {BLOCKS!r} is not a mapping from modules to ranks.")
    return set(offsets), blocks


def _modules_to_save(config: Mapping[str, Any]) -> list[str]:
    listed = config.get("modules_to_save") or []
    if not isinstance(listed, list) or not all(isinstance(x, str) for x in listed):
        raise ValueError("modules_to_save in the configuration is not a list of names.")
    return listed


def _check_targets(config: Mapping[str, Any], modules: Mapping[str, Any]) -> None:
    """Raises ValueError for a layer in the file that PEFT would leave out."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or "all-linear" in targets:
        return
    for module in (name.removesuffix(WRAPPED) for name in modules):
        if not any(f".{module}".endswith(f".{target}") for target in targets):
            raise ValueError(
                f"the file holds the layer {module!r}, which target_modules in the configuration "
                "leaves out, so that PEFT does without it."
            )


class _File(NamedTuple):
    """The tensors of a file by what they belong to.

    Attributes:
      adapters: those of adapters, by torch module and suffix.
      paths: the layers of each of these modules.
      whole: those of modules saved in full, by path and name inside the module.
      bases: those of adapted layers and embeddings that PEFT saved along, likewise.
    """

    adapters: dict[str, dict[str, np.ndarray]]
    paths: dict[str, list[str]]
    whole: dict[str, dict[str, np.ndarray]]
    bases: dict[str, dict[str, np.ndarray]]


def _sorted(
    tensors: Mapping[str, np.ndarray],
    names: Names,
    model: nnx.Module,
    method: PeftMethod,
    saved: list[str],
) -> _File:
    """Sorts a file's tensors; raises ValueError for one that belongs to nothing in the model."""
    layers: dict[str, list[str]] = {}
    for path in paths.find(model):
        if names.knows(path):
            layers.setdefault(names.module(path)[0], []).append(path)
    embeddings = {
        module: where[0]
        for module, where in layers.items()
        if isinstance(base_layers(model)[where[0]], nnx.Embed)
        or module.rpartition(".")[2] in _EMBEDDINGS
    }
    file = _File({}, {}, {}, {})
    whole: dict[str, str] | None = None
    for key, tensor in tensors.items():
        body = key.removeprefix(PREFIX)
        if body == key:
            raise ValueError(f"the file holds {key!r}; names of PEFT begin with {PREFIX!r}.")
        module, suffix = _suffix(body, method)
        if suffix:
            _check_known(module, layers)
            file.paths[module] = layers[module]
            file.adapters.setdefault(module, {})[suffix] = tensor
            continue
        parent, _, last = body.rpartition(".")
        base = parent.removesuffix(f".{BASE[:-1]}")
        if base != parent and base in layers:
            file.bases.setdefault(layers[base][0], {})[last] = tensor
            continue
        parents = [".".join(body.split(".")[:i]) for i in range(1, body.count(".") + 1)]
        listed = [p for p in parents if any(f".{p}".endswith(f".{s}") for s in saved)]
        if listed:
            # PEFT keeps the outermost module of a name that is listed.
            whole = names.wholes() if whole is None else whole
            _check_known(listed[0], whole)
            inside = body.removeprefix(f"{listed[0]}.")
            file.whole.setdefault(whole[listed[0]], {})[inside] = tensor
        elif parent in embeddings:
            file.bases.setdefault(embeddings[parent], {})[last] = tensor
        else:
            raise ValueError(f"the file holds {key!r}, which belongs to no LoRA adapter.")
    if not file.adapters:
        raise ValueError("the file holds no LoRA factors.")
    return file


def _suffix(body: str, method: PeftMethod) -> tuple[str, str]:
    """The module and the suffix of an adapter's tensor; an empty suffix for others."""
    for suffix in sorted(method.suffixes, key=len, reverse=True):
        for ending in (f".{suffix}", f".{suffix}.weight"):
            if body.endswith(ending):
                return body.removesuffix(ending), suffix
    return body, ""


def _check_known(module: str, known: Mapping[str, Any]) -> None:
    if module not in known:
        near = ", ".join(map(repr, paths.near_misses(module, known)))
        raise ValueError(
            f"the adapter is of another model: it has a layer {module!r}, and this one has none of "
            f"that name; near misses: {near or 'none'}. Pass rename or rules if names differ."
        )


def _fill(
    path: str, whole: Whole, parts: Mapping[str, np.ndarray], *, partly: bool = False
) -> None:
    """Writes a module saved in full into that of the new model, whose Variables are its own."""
    expected = {name for part in whole.parts for name in part.names}
    needed = {name for part in whole.parts if part.variables for name in part.names}
    if not set(parts) <= expected or (not partly and not needed <= set(parts)):
        raise ValueError(f"the saved module {path!r} has {sorted(parts)}, not {sorted(expected)}.")
    for part in whole.parts:
        if not part.variables or not set(part.names) <= set(parts):
            continue
        shapes = [np.zeros(variable[...].shape, np.float32) for variable in part.variables]
        for name, like in zip(part.names, part.write(*shapes), strict=True):
            check_shape(path, name, parts[name], like.shape)
        values = part.read(*(parts[name].astype(np.float32) for name in part.names))
        for variable, value in zip(part.variables, values, strict=True):
            old = variable[...]
            new = jnp.asarray(value).astype(old.dtype)
            # A sharded array stays so; an uncommitted one stays free to follow what it meets.
            if getattr(old, "committed", False):
                new = jax.device_put(new, old.sharding)
            variable.set_value(new)
