"""Loading of models: this package's own files and the public formats of each family."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorajax import downloads
from lorajax.environment import memory
from lorajax.environment.judging import SEED, at_least, judged
from lorajax.environment.numbers import not_finite, sentence
from lorajax.models import catalog
from lorajax.models.family import Family, Format, Model, Rule, Untold
from lorajax.models.files import Source, Tensor, opened, said

EMBEDDED = ("vit-fashion-mnist", "vit-tiny-imagenet")
"""Small models that come with the package (`sims/pretrain_vit.py`): a ViT for gray images of 28×28
pixels, another for colored ones of 48×48."""

_BUFFERS = r"(^|\.)(num_batches_tracked|position_ids|mask_token)$"
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_UNREADABLE = (KeyError, IndexError, ValueError, TypeError, AttributeError, ArithmeticError)


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first of some names, in words."""
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" * (len(names) > limit))


def _format(source: Source) -> tuple[Family, Format, dict[str, Tensor]]:
    """The family, the format, and the tensors under the format's own names."""
    found = [
        (family, form, names)
        for family in catalog.families().values()
        for form in family.formats
        if (names := form.names(source.tensors)) is not None
    ]
    if not found:
        raise ValueError(
            f"{source.path} is in no known format; its tensors are named {some(source.tensors)}."
        )
    family, form, names = max(found, key=lambda match: len(match[1].signature))
    return family, form, {name: source.tensors[theirs] for name, theirs in names.items()}


def _infer(family: Family, form: Format, source: Source, changes: dict[str, Any]) -> Any:
    """The configuration that a checkpoint has; what it does not tell is taken from the changes."""
    where = f"{source.path} looks like a {form.layout} checkpoint, but it"
    try:
        fields = form.infer(source._replace(told=changes))
    except _UNREADABLE as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else said(error)
        raise ValueError(f"{where} cannot be read as one: {what}.") from error
    untold = {name: value.why for name, value in fields.items() if isinstance(value, Untold)}
    if missing := [name for name in untold if name not in changes]:
        options = ", ".join(f"{name}=…" for name in missing)
        raise ValueError(
            f"{source.path} does not tell {', '.join(missing)} ({untold[missing[0]]}); give "
            f"models.load(…, {options})."
        )
    return _configure(family, fields | {name: changes[name] for name in untold}, where)


def _configure(family: Family, fields: Mapping[str, Any], where: str) -> Any:
    try:
        catalog.check_fields(family.config, fields)
        return family.config(**fields)
    except _UNREADABLE as error:
        raise ValueError(
            f"{where} describes no {family.name}: {str(error).rstrip('.')}."
        ) from error


def _restored(source: Source) -> tuple[Family, Any]:
    """Family and configuration of one of this package's own files."""
    name = source.metadata.get("family", "")
    if (family := catalog.families().get(name)) is None:
        raise ValueError(f"{source.path} names the family {name!r}, which is not known here.")
    try:
        fields = json.loads(source.metadata.get("config", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source.path} has a configuration that is no JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{source.path} has a configuration that is no JSON object.")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    for field in family.repeats:
        value = fields.get(field, 0)
        counts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(count, int) and count > len(source.tensors) for count in counts):
            raise ValueError(
                f"{source.path} states {field} = {value} and has {len(source.tensors)} tensors."
            )
    return family, _configure(family, fields, f"{source.path} has a configuration that")


@judged(classes=at_least(1), seed=SEED)
def load(
    source: str | os.PathLike,
    *,
    classes: int | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    seed: int = 0,
    check_finite: bool = True,
    **changes: Any,
) -> Any:
    """A pretrained model from a file, a folder or the hub, in any of the public formats.

    Read are this package's own files and the formats of each family (`models.families()`):
    transformers' folders of ViT, DINOv2, CLIP and SigLIP (whose texts' half is left out), BERT,
    RoBERTa and Llama; timm's ViT, DeiT, DeiT III, DINOv2, CLIP, SigLIP and ResNet; Google's augreg
    npz files; torchvision's ViT, ResNet and VGG; CIFAR ResNets by akamaster. Which one it is
    shows from the names of the tensors; what they do not show is read from the JSON files beside
    them. A bare file of timm, without a `config.json`, counts as one with timm's own defaults.

    Args:
      source: a name of `EMBEDDED`, a model that comes with the package; a .safetensors or .npz
        file; a folder with `model.safetensors` or its shards; or "owner/name" on the Hugging Face
        hub.
      classes: outputs wanted. If the checkpoint's head has another number, or there is none, a
        fresh head is drawn from `seed`.
      dtype: of the computation; that of the weights and the inputs if None.
      param_dtype: of the weights.
      seed: for a fresh head, and for dropout in training mode.
      check_finite: whether weights that are NaN or infinite, or will be in `param_dtype`, are
        refused; False reads them, such as rows of a table of embeddings that no token has.
      **changes: other fields of the configuration to set: what the checkpoint does not tell, for
        example `heads`; or what is to be other than in the checkpoint, for example `image_size` of
        a ViT, whose position embeddings are interpolated, or `gelu`, `dropout`, `mean`, `std`; or
        `pool`, what the head of a CLIP ("mean" or "cls"), SigLIP ("mean" or "attention") or DINOv2
        ("cls+mean", "cls" or "mean") reads; the first of each is transformers' own.

    Returns:
      The model in evaluation mode, a subclass of `Model`; `model.config` says what it is. Rates of
      dropout are not taken over from public formats.

    Raises:
      ValueError: if the source is not there or not readable, is of no known format, its tensors do
        not make up a model, or it does not tell what decides the model's function; one sentence
        that names the file, and the tensor or the option. Nothing of the size of a model has been
        allocated then. Also for weights that are not finite, at the first such tensor.
      downloads.DownloadError: for trouble on the way from the hub.
    """
    if classes is not None:
        changes["classes"] = classes
    path = _find(source)
    with opened(path) as read:
        if read.metadata.get("format") == "lorajax":
            family, config = _restored(read)
            changes = family.options(changes)
            rules = [_as_named(name) for name in read.tensors]
        else:
            family, form, tensors = _format(read)
            read = read._replace(tensors=tensors)
            changes = family.options(changes)
            catalog.check_fields(family.config, changes)
            config = _infer(family, form, read, changes)
            rules = list(form.rules(config))
        target = catalog.replace(config, **changes)
        abstract = catalog.abstract(config, dtype, param_dtype)
        shapes = _shapes(abstract)
        arrays = _read(rules, read, shapes, abstract.heads, param_dtype if check_finite else None)
    lost = [name for name in shapes if name not in arrays and _within(name, abstract.heads)]
    if lost and "classes" not in changes:
        raise ValueError(
            f"{path} has no classification head ({some(lost)}); say how many classes to make one "
            "for."
        )
    if getattr(config, "classes", None) != getattr(target, "classes", None):
        arrays = {k: v for k, v in arrays.items() if not _within(k, abstract.heads)}
    arrays = dict(family.fit(arrays, config, target))
    abstract = catalog.abstract(target, dtype, param_dtype)
    model = _assemble(abstract, arrays, path, seed, re.compile(family.zeros))
    del arrays
    memory.release()
    return model


@judged(classes=at_least(1))
def abstract(
    source: str | os.PathLike,
    *,
    classes: int | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    **changes: Any,
) -> Any:
    """The model that `load` would give, without its numbers: shapes and types alone.

    Args:
      source: a published network by name, as for `models.config`; a checkpoint as for `load`; or a
        folder with the config.json of a BERT, RoBERTa or Llama, and no weights.
      classes: as for `load`, and so are the others.
      dtype: of the computation.
      param_dtype: of the weights.
      **changes: other fields of the configuration to set.

    Returns:
      The model, with a `jax.ShapeDtypeStruct` in place of every array: for `finetune.footprint`,
      `jax.eval_shape`, `jax.jit(…).lower`.

    Raises:
      ValueError: as `load` and `models.config`.

    Example:
      >>> from flax import nnx
      >>> from lorajax import models
      >>> model = models.abstract("llama-3-8b")
      >>> sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
      8030261248
    """
    if classes is not None:
        changes["classes"] = classes
    name = os.fspath(source)
    known = next((f for f in catalog.families().values() if f.find(name) is not None), None)
    if known is not None and not Path(name).exists():
        return catalog.abstract(catalog.config(name, **changes), dtype, param_dtype)
    path = _find(source)
    with contextlib.nullcontext(_outlined(path)) if _weightless(path) else opened(path) as read:
        if read.metadata.get("format") == "lorajax":
            family, config = _restored(read)
        else:
            family, form, tensors = _format(read)
            given = family.options(changes)
            config = _infer(family, form, read._replace(tensors=tensors), given)
    return catalog.abstract(catalog.replace(config, **family.options(changes)), dtype, param_dtype)


def _weightless(path: Path) -> bool:
    """Whether a folder has a configuration and no weights."""
    weights = ("model.safetensors", "model.safetensors.index.json")
    return (path / "config.json").is_file() and not any((path / each).exists() for each in weights)


def _outlined(path: Path) -> Source:
    """A checkpoint as its config.json describes it, whose tensors cannot be read."""

    def read() -> np.ndarray:
        raise ValueError(f"{path} has no weights")

    stated = Source(path, {}, {}).json("config.json")
    stated = {name: value for name, value in stated.items() if value is not None}
    for family in catalog.families().values():
        for form in family.formats:
            try:
                shapes = form.outline(stated)
            except _UNREADABLE as error:
                raise ValueError(f"{path} describes no {family.name}: {said(error)}.") from error
            if shapes is not None:
                tensors = {name: Tensor(shape, "float32", read) for name, shape in shapes.items()}
                return Source(path, tensors, {})
    raise ValueError(
        f"{path} has no weights, and its config.json states model_type = "
        f"{stated.get('model_type')!r}; without weights a BERT, RoBERTa or Llama can be planned."
    )


def _find(source: str | os.PathLike) -> Path:
    name = os.fspath(source)
    if name in EMBEDDED:
        return Path(__file__).parent / "embedded" / f"{name}.safetensors"
    return Path(name) if Path(name).exists() else _from_hub(name)


@judged
def unread(source: str | os.PathLike, config: Any) -> tuple[str, ...]:
    """What a checkpoint holds and a model made from it does not, such as the texts' half of a CLIP.

    Args:
      source: as for `load`.
      config: of the model that was loaded from it.

    Returns:
      Names of modules, or of tensors that are in none; counters and other buffers are not told.

    Raises:
      ValueError: if the source is not there, not readable, or of no known format.
    """
    with opened(_find(source)) as read:
        if read.metadata.get("format") == "lorajax":
            return ()
        _, form, tensors = _format(read)
        own = form.names(read.tensors) or {}
        rules = form.rules(config)
        used = {own.get(name) for rule in rules if rule.ours for name in rule.theirs}
        left = [n for n in read.tensors if n not in used and not re.search(_BUFFERS, n)]
    kept = [name for name in used if name is not None]
    return tuple(sorted({_outermost(name, kept) for name in left}))


def _outermost(name: str, kept: Iterable[str]) -> str:
    """The largest module around a tensor in which nothing is kept."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        module = ".".join(parts[:end])
        if not any(each.startswith(f"{module}.") for each in kept):
            return module
    return name


@judged
def layout_of(source: str | os.PathLike) -> str:
    """Which layout a checkpoint has, by the names of its tensors.

    Args:
      source: as for `load`.

    Returns:
      "lorajax", or that of a family's format: "huggingface", "huggingface-dinov2",
      "huggingface-clip", "huggingface-siglip", "timm", "augreg" or "torchvision".

    Raises:
      ValueError: if the source is not there, not readable, or of no known format.
    """
    with opened(_find(source)) as found:
        if found.metadata.get("format") == "lorajax":
            return "lorajax"
        return _format(found)[1].layout


@judged
def notes(source: str | os.PathLike) -> dict[str, str]:
    """What a safetensors file says about itself, such as the recipe and accuracy of a model.

    Args:
      source: as for `load`, but a .safetensors file or a model that comes with the package.

    Returns:
      Strings by name; empty if there are none.

    Raises:
      ValueError: if the source is not there or not readable.
    """
    with opened(_find(source)) as read:
        return dict(read.metadata)


def _from_hub(name: str) -> Path:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or name.endswith(
        (".npz", ".safetensors")
    ):
        raise ValueError(
            f"source is {name!r}, which does not exist; it must be a file, a folder or a "
            "repository of the hub, owner/name."
        )
    forms = [form for family in catalog.families().values() for form in family.formats]
    return downloads.fetch_checkpoint(name, sorted({file for form in forms for file in form.side}))


def _within(path: str, parents: Iterable[str]) -> bool:
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)


def path_of(parts: tuple[Any, ...]) -> str:
    """The dotted path of an array."""
    return ".".join(str(part) for part in parts)


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    leaves = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {path_of(parts): leaf.get_value().shape for parts, leaf in leaves}


def _as_named(name: str) -> Rule:
    return Rule((name,), (name,), lambda x: (x,), lambda x: (x,))


def _read(
    rules: list[Rule],
    source: Source,
    shapes: Mapping[str, tuple[int, ...]],
    heads: tuple[str, ...],
    finite_in: Any,
) -> dict[str, np.ndarray]:
    """The model's arrays by path; a missing head is left out, anything else missing is an error.

    All tensors are judged by their names, types and sizes before the first one is read, and by
    their entries as they are read, where these have to be finite in a type.
    """
    tensors = source.tensors
    missing: list[str] = []
    present: list[Rule] = []
    for rule in rules:
        if absent := [name for name in rule.theirs if name not in tensors]:
            if not rule.optional and not all(_within(path, heads) for path in rule.ours):
                missing += absent
        else:
            present.append(rule)
    if missing:
        raise ValueError(f"{source.path} lacks {some(missing)}; the checkpoint is incomplete.")
    used = {name for rule in present for name in rule.theirs}
    strange = (tensors.keys() - used) | {p for rule in present for p in rule.ours} - shapes.keys()
    if strange:
        raise ValueError(
            f"{source.path} has {some(strange)}, which this model has no place for; it is "
            "another architecture."
        )
    present = [rule for rule in present if rule.ours]
    for rule in present:
        for name in rule.theirs:
            if tensors[name].dtype not in _FLOATS:
                raise ValueError(
                    f"{source.path}: {name} has dtype {tensors[name].dtype}, not a float."
                )
        held = sum(tensors[name].size for name in rule.theirs)
        if held != sum(int(np.prod(shapes[path])) for path in rule.ours):
            raise _misfit(source, rule, [shapes[path] for path in rule.ours])
    arrays: dict[str, np.ndarray] = {}
    for rule in present:
        wanted = [shapes[path] for path in rule.ours]
        given = [_entries(name, tensors[name], finite_in) for name in rule.theirs]
        try:
            parts = rule.read(*given)
        except (ValueError, IndexError) as error:
            raise _misfit(source, rule, wanted) from error
        if [part.shape for part in parts] != wanted:
            raise _misfit(source, rule, wanted)
        arrays |= dict(zip(rule.ours, parts, strict=True))
    return arrays


def _entries(name: str, tensor: Tensor, finite_in: Any) -> np.ndarray:
    array = tensor.read()
    if finite_in is not None and (count := not_finite(array, finite_in)):
        raise ValueError(
            f"{tensor.file}: {name} has {sentence(count, array.size, finite_in)}; fetch or save "
            "the file anew, or read it as it is by models.load(…, check_finite=False)."
        )
    return array


def _misfit(source: Source, rule: Rule, wanted: list[tuple[int, ...]]) -> ValueError:
    shape = source.tensors[rule.theirs[0]].shape
    return ValueError(
        f"{source.path}: {some(rule.theirs)} has shape {shape}, which does not fit the rest of "
        f"the checkpoint, by which {some(rule.ours)} has shape {wanted[0]}."
    )


def _assemble(
    model: Model, arrays: dict[str, np.ndarray], path: Path, seed: int, zeros: re.Pattern
) -> Model:
    """An abstract model with arrays, fresh heads where they have none, and evaluation mode.

    The arrays are used up, one after the other, so that a model is not in memory twice.
    """
    rngs = nnx.Rngs(seed)
    heads = model.heads
    graph, state = nnx.split(model)
    leaves, freed = dict(nnx.to_flat_state(state)), memory.Returning()
    for parts, leaf in leaves.items():
        name, wanted = path_of(parts), leaf.get_value()
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
            given = arrays.pop(name)
            value, size = jnp.asarray(given, wanted.dtype), given.nbytes
            del given
            freed(size)
        elif _within(name, heads):
            value = _fresh_head(rngs, parts, wanted)
        elif zeros.fullmatch(name):
            value = jnp.zeros(wanted.shape, wanted.dtype)
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
