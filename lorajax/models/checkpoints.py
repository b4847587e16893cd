"""Loading and saving of models: this package's own files and the public formats.

Only safetensors and npz without pickles are read: no file can run code.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lorajax import downloads
from lorajax.environment import memory
from lorajax.models import catalog, layers
from lorajax.models.catalog import Model
from lorajax.models.formats import FORMATS, Source, pair
from lorajax.models.layouts import Config, Rule
from lorajax.models.vit import ViTConfig

EMBEDDED = ("vit-fashion-mnist",)
"""Small models that come with the package: a ViT of 28×28 pixels (`sims/pretrain_vit.py`)."""

_HEADS = ("head", "distilled_head")
_IGNORED = re.compile(r"(.*\.)?num_batches_tracked|pooler\..*|vit\.pooler\..*")


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        # NumPy has no bfloat16 of its own; the flax framework hands such tensors over as JAX's.
        with safe_open(path, framework="flax") as file:
            tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}.") from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a readable npz file without pickles: {error}.") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; it must hold a JSON object.")
    return found


def _read(path: Path) -> Source:
    folder = path if path.is_dir() else path.parent
    metadata: dict[str, str] = {}
    if path.is_dir():
        index = _read_json(path / "model.safetensors.index.json")
        names = sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"]
        tensors: dict[str, np.ndarray] = {}
        for name in names:
            if Path(name).name != name or not (path / name).is_file():
                raise ValueError(f"{path} has no file {name!r}, which a checkpoint there needs.")
            part, metadata = _read_safetensors(path / name)
            tensors |= part
    elif path.suffix == ".npz":
        tensors = _read_npz(path)
    elif path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
    else:
        raise ValueError(f"{path} is no checkpoint; it must be a folder, .safetensors or .npz.")
    return Source(
        path,
        tensors,
        _read_json(folder / "config.json"),
        _read_json(folder / "preprocessor_config.json"),
        metadata,
    )


def _unprefixed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undoes what wrappers add to names: DataParallel's prefix, a bare `ViTModel`."""
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    if "embeddings.patch_embeddings.projection.weight" in tensors:
        tensors = {f"vit.{name}": value for name, value in tensors.items()}
    return {name: value for name, value in tensors.items() if not _IGNORED.fullmatch(name)}


def _some(names: Any, limit: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" * (len(names) > limit))


def _apply(rules: Iterator[Rule], source: Source) -> dict[str, np.ndarray]:
    """The model's arrays by path; a missing head is left out, anything else missing is an error."""
    arrays: dict[str, np.ndarray] = {}
    used: set[str] = set()
    missing: list[str] = []
    for rule in rules:
        absent = [name for name in rule.theirs if name not in source.tensors]
        if absent:
            if not rule.optional and not rule.ours[0].startswith(_HEADS):
                missing += absent
            continue
        try:
            parts = rule.read(*(source.tensors[name] for name in rule.theirs))
        except ValueError as error:
            shapes = [source.tensors[name].shape for name in rule.theirs]
            raise ValueError(
                f"{source.path}: {_some(rule.theirs)} has shape {shapes[0]}, which does not fit "
                f"the rest of the checkpoint ({error})."
            ) from error
        arrays |= dict(zip(rule.ours, parts, strict=True))
        used |= set(rule.theirs)
    if missing:
        raise ValueError(f"{source.path} lacks {_some(missing)}; the checkpoint is incomplete.")
    if unexpected := source.tensors.keys() - used:
        raise ValueError(
            f"{source.path} has {_some(unexpected)}, which this model has no place for; it is "
            "another architecture."
        )
    return arrays


def _restore_config(metadata: Mapping[str, str], path: Path) -> Config:
    family = metadata.get("family", "")
    if family not in catalog.FAMILIES:
        raise ValueError(f"{path} names the family {family!r}, which this version does not know.")
    kind = catalog.FAMILIES[family][1]
    fields = json.loads(metadata["config"])
    if unknown := fields.keys() - {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"{path} has settings that this version does not know: {_some(unknown)}.")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def load(
    source: str | os.PathLike,
    *,
    classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    seed: int = 0,
    **changes: Any,
) -> Model:
    """A pretrained model from a file, a folder or the hub, in any of the public formats.

    Read are: this package's own files; Hugging Face ViT folders; timm ViT and DeiT; Google's
    augreg npz files; torchvision ResNet and VGG; CIFAR ResNets by akamaster. Which one it is shows
    from the names of the tensors.

    Args:
      source: a name of `EMBEDDED`, a model that comes with the package; a .safetensors or .npz
        file; a folder with `model.safetensors` (and `config.json`, `preprocessor_config.json` if
        there); or "owner/name" on the Hugging Face hub.
      classes: outputs wanted. If the checkpoint's head has another number, or there is none, a
        fresh head is drawn from `seed`.
      image_size: pixels wanted, of a ViT; its position embeddings are interpolated.
      dtype: of the computation; that of the weights and the images if None.
      param_dtype: of the weights.
      seed: for a fresh head, and for dropout in training mode.
      **changes: other fields of the configuration to set, for example `heads` where the width is
        no multiple of 64 and nothing states them, or `gelu`, `mean`, `std`.

    Returns:
      The model in evaluation mode; `model.config` says what it is.

    Raises:
      ValueError: if the source is not there or not readable, is of no known format, or its tensors
        do not make up a model; one sentence that names the file and the tensor.
      downloads.DownloadError: for trouble on the way from the hub.
    """
    path = _find(source)
    read = _read(path)
    if read.metadata.get("format") == "lorajax":
        config = _restore_config(read.metadata, path)
        arrays = {name: np.asarray(value) for name, value in read.tensors.items()}
    else:
        read = read._replace(tensors=_unprefixed(read.tensors))
        for form in FORMATS:
            if all(name in read.tensors for name in form.signature):
                break
        else:
            raise ValueError(
                f"{path} is in no known format; its tensors are named {_some(read.tensors)}."
            )
        try:
            config = form.infer(read)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} looks like a {form.layout} checkpoint, but its shape could not be read "
                f"off: {error}."
            ) from error
        arrays = _apply(form.rules(config), read)
    if image_size is not None:
        changes["image_size"] = pair(image_size)
    target = catalog.replace(config, **changes, **({} if classes is None else {"classes": classes}))
    if "head.kernel" not in arrays and classes is None:
        raise ValueError(
            f"{path} has no classification head; say how many classes to make one for."
        )
    arrays = _fit(arrays, config, target)
    model = _assemble(target, arrays, path, dtype=dtype, param_dtype=param_dtype, seed=seed)
    del read, arrays
    memory.release()
    return model


def _find(source: str | os.PathLike) -> Path:
    name = os.fspath(source)
    if name in EMBEDDED:
        return Path(__file__).parent / "embedded" / f"{name}.safetensors"
    return Path(name) if Path(name).exists() else _from_hub(name)


def notes(source: str | os.PathLike) -> dict[str, str]:
    """What a safetensors file says about itself, such as the recipe and accuracy of a model.

    Args:
      source: as for `load`, but a .safetensors file or a model that comes with the package.

    Returns:
      Strings by name; empty if there are none.

    Raises:
      ValueError: if the source is not there or not readable.
    """
    return dict(_read(_find(source)).metadata)


def _from_hub(name: str) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or name.endswith(
        (".npz", ".safetensors")
    ):
        raise ValueError(
            f"source is {name!r}, which does not exist; it must be a file, a folder or a "
            "repository of the hub, owner/name."
        )
    weights = downloads.fetch_from_hub(name, "model.safetensors")
    for file in ("config.json", "preprocessor_config.json"):
        try:
            downloads.fetch_from_hub(name, file)
        except downloads.DownloadError:
            continue  # side files: what they would say is read off the tensors or defaulted
    return weights.parent


def _fit(arrays: dict[str, np.ndarray], config: Config, target: Config) -> dict[str, np.ndarray]:
    """Drops a head of the wrong size and resizes position embeddings."""
    arrays = dict(arrays)
    if config.classes != target.classes:
        arrays = {k: v for k, v in arrays.items() if k.split(".")[0] not in _HEADS}
    if isinstance(target, ViTConfig) and isinstance(config, ViTConfig):
        positions, prefix = arrays["embeddings.positions"], config.prefix
        rows, columns = config.grid
        if config.grid != target.grid and positions.shape[1] == prefix + rows * columns:
            grid = positions[0, prefix:].reshape(rows, columns, -1)
            grid = layers.resize_grid(grid, target.grid).reshape(1, -1, positions.shape[2])
            arrays["embeddings.positions"] = np.concatenate([positions[:, :prefix], grid], axis=1)
    return arrays


def _path(parts: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in parts)


def _assemble(
    config: Config, arrays: Mapping[str, np.ndarray], path: Path, *, dtype, param_dtype, seed: int
) -> Model:
    rngs = nnx.Rngs(seed)
    # Abstract first: drawing random weights only to overwrite them costs seconds for a ViT-L.
    model = nnx.eval_shape(
        lambda: catalog.build(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)
    )
    graph, state = nnx.split(model)
    leaves = dict(nnx.to_flat_state(state))
    known = {_path(parts) for parts in leaves}
    if unexpected := arrays.keys() - known:
        raise ValueError(f"{path} has {_some(unexpected)}, which this model has no place for.")
    for parts, leaf in leaves.items():
        name, wanted = _path(parts), leaf.get_value()
        if isinstance(leaf, nnx.RngKey):
            value = rngs.fork_key() if hasattr(rngs, "fork_key") else rngs()
        elif isinstance(leaf, nnx.RngCount):
            value = jnp.zeros(wanted.shape, wanted.dtype)
        elif name in arrays:
            if arrays[name].shape != wanted.shape:
                raise ValueError(
                    f"{path}: {name} has shape {arrays[name].shape}; the model's configuration "
                    f"makes it {wanted.shape}."
                )
            if not np.issubdtype(np.asarray(arrays[name]).dtype, np.floating) and (
                arrays[name].dtype != jnp.bfloat16
            ):
                raise ValueError(f"{path}: {name} has dtype {arrays[name].dtype}, not a float.")
            value = jnp.asarray(arrays[name], wanted.dtype)
        elif parts[0] in _HEADS:
            value = _fresh_head(rngs, parts, wanted)
        elif name.endswith(".bias") and ".attention." in name:
            value = jnp.zeros(wanted.shape, wanted.dtype)  # a checkpoint with qkv_bias off
        else:
            raise ValueError(f"{path} lacks {name}; the checkpoint is incomplete.")
        leaves[parts] = leaf.replace(value)
    model = nnx.merge(graph, nnx.from_flat_state(leaves))
    model.eval()
    return model


def _fresh_head(rngs: nnx.Rngs, parts: tuple[Any, ...], wanted: jax.ShapeDtypeStruct) -> jax.Array:
    if parts[-1] == "bias":
        return jnp.zeros(wanted.shape, wanted.dtype)
    # Not zeros: behind a head of zeros no gradient reaches the adapters, and starts and ranks that
    # are read off the gradient would see nothing.
    return nnx.initializers.lecun_normal()(rngs.params(), wanted.shape, wanted.dtype)


def tensors(model: Model, layout: str = "lorajax") -> dict[str, np.ndarray]:
    """A model's weights under the names of a layout.

    Args:
      model: without adapters; merge them first.
      layout: "lorajax", "huggingface", "timm" or "augreg" for a ViT; "lorajax" or "torchvision"
        for ResNet and VGG (CIFAR ResNets come out as akamaster's).

    Returns:
      NumPy arrays by name.

    Raises:
      ValueError: if the layout does not exist for this model or cannot express it.
    """
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    arrays = {
        _path(parts): np.asarray(leaf.get_value()) for parts, leaf in nnx.to_flat_state(state)
    }
    if layout == "lorajax":
        return arrays
    config = model.config
    for form in FORMATS:
        if form.layout == layout and isinstance(config, form.config):
            break
    else:
        known = ["lorajax"] + [f.layout for f in FORMATS if isinstance(config, f.config)]
        raise ValueError(
            f"layout is {layout!r}; for a {type(model).__name__} it must be one of "
            f"{', '.join(known)}."
        )
    if isinstance(config, ViTConfig):
        for field, odd in (("pool", config.pool == "mean"), ("distilled", config.distilled)):
            if odd and layout != "timm":
                raise ValueError(
                    f"layout is {layout!r}, which has no {field} = "
                    f"{getattr(config, field)!r}; use 'timm' or 'lorajax'."
                )
    rules = list(form.rules(config))
    if left := arrays.keys() - {name for rule in rules for name in rule.ours}:
        raise ValueError(
            f"model has {_some(left)}, which the layout {layout!r} has no place for; merge or "
            "remove adapters first."
        )
    return {
        name: np.ascontiguousarray(value)
        for rule in rules
        for name, value in zip(
            rule.theirs, rule.write(*(arrays[p] for p in rule.ours)), strict=True
        )
    }


def save(
    model: Model,
    path: str | os.PathLike,
    *,
    layout: str = "lorajax",
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Writes a model to one file, in this package's format or in a public one.

    Args:
      model: without adapters; merge them first.
      path: a .safetensors file, or .npz for the augreg layout.
      layout: as in `tensors`. For "huggingface" a `config.json` is written beside the file.
      notes: strings to keep in the file's metadata, for example a recipe.

    Returns:
      The path.

    Raises:
      ValueError: for a layout that does not fit the model or the file's suffix.
    """
    path = Path(path)
    suffix = ".npz" if layout == "augreg" else ".safetensors"
    if path.suffix != suffix:
        raise ValueError(
            f"path is {str(path)!r}; for the layout {layout!r} it must end in {suffix}."
        )
    found = tensors(model, layout)
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout == "augreg":
        np.savez(path, allow_pickle=False, **found)
        return path
    metadata = dict(notes or {})
    if layout == "lorajax":
        family = next(n for n, (kind, _) in catalog.FAMILIES.items() if isinstance(model, kind))
        config = json.dumps(dataclasses.asdict(model.config))
        metadata |= {"format": "lorajax", "family": family, "config": config}
    else:
        metadata["format"] = "pt"
    save_file({k: np.ascontiguousarray(v) for k, v in found.items()}, path, metadata)
    if layout == "huggingface":
        text = json.dumps(_huggingface_config(model.config), indent=2, sort_keys=True)
        (path.parent / "config.json").write_text(text + "\n", encoding="utf-8")
    return path


def _huggingface_config(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": "gelu" if config.gelu == "erf" else "gelu_pytorch_tanh",
        "layer_norm_eps": config.epsilon,
        "image_size": config.image_size[0]
        if config.image_size[0] == config.image_size[1]
        else list(config.image_size),
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        "qkv_bias": True,
        "id2label": {str(i): f"LABEL_{i}" for i in range(config.classes)},
        "label2id": {f"LABEL_{i}": i for i in range(config.classes)},
    }
