"""A valid call of every public function and class: values by the names that arguments have.

`EXEMPT` says of what is not called why not; whoever adds a public name adds its call here, or the
campaign fails.
"""

import dataclasses
import functools
import importlib
import inspect
import pathlib
import pkgutil
import tempfile
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np

import lorajax
from benchmarks.trust import domains

ROOMS_WITHOUT_LISTS = ("lorajax.spectra", "lorajax.factors")
RECORD = "a record: holds what it is given, which is judged where it is used"
EXEMPT = {
    "lorajax.claims": "its functions take claims of this package",
    "lorajax.studies": "its functions take studies of this package; the options are in the command",
    "lorajax.adapters.Adapted": "a layer that adapt makes",
    "lorajax.adapters.Adapter": "an adapter that adapt makes",
    "lorajax.adapters.AdaLoRA": "an adapter that adapt makes",
    "lorajax.adapters.LoRA": "an adapter that adapt makes",
    "lorajax.adapters.Tucker": "an adapter that adapt makes",
    "lorajax.adapters.Frozen": "a kind of variable",
    "lorajax.adapters.PeftLayer": RECORD,
    "lorajax.adapters.PeftMethod": "a base class without arguments",
    "lorajax.adapters.Spec": "a base class of LoRASpec, AdaLoRASpec and TuckerSpec",
    "lorajax.adapters.Site": RECORD,
    "lorajax.adapters.kinds.LowRankSpec": "a base class of LoRASpec, AdaLoRASpec and TuckerSpec",
    "lorajax.adapters.starts.fill": "called by adapt, with a view of a layer",
    "lorajax.adapters.starts.fill_tucker": "called by adapt, with a view of a layer",
    "lorajax.finetune.Observer": "a base class without arguments",
    "lorajax.finetune.run_of": "makes a Run; its arguments are those of prepare and run",
    "lorajax.finetune.Run": "made by run_of",
    "lorajax.flows.Path": "made by the flows",
    "lorajax.flows.Plan": RECORD,
    "lorajax.flows.sweeping.FlowSweep": "made by plan_flows",
    "lorajax.models.Bert": "made by build, of a configuration",
    "lorajax.models.Llama": "made by build, of a configuration",
    "lorajax.models.Model": "a base class of the models",
    "lorajax.models.ResNet": "made by build, of a configuration",
    "lorajax.models.VGG": "made by build, of a configuration",
    "lorajax.models.ViT": "made by build, of a configuration",
    "lorajax.models.Family": RECORD,
    "lorajax.models.Format": RECORD,
    "lorajax.models.register": "takes a Family of this package or of an extension",
    "lorajax.models.torch_rules": "takes a configuration of a model",
    "lorajax.sweeps.Estimate": RECORD,
    "lorajax.laws.mode_law": "a decorator of laws of this package",
    "lorajax.problems.Features": "made by Linearized.from_features",
    "lorajax.problems.Tangents": "made by Linearized.from_function",
    "lorajax.problems.Linearized": "made by its class methods, which are called",
    "lorajax.finetune.prepare": "adapt and select_ranks in turn, which are called",
    "lorajax.initializers.call": "takes values by name, which its start judges",
    "lorajax.models.llama.places": "the positions that a model computes for itself",
    "lorajax.flows.plan.choose": "called by plan, after its checks",
    "lorajax.flows.lanes.two_layer": "called by solve and sweep_flows, after their checks",
    "lorajax.factors.check_rank": "itself a check",
    "lorajax.factors.check_factors": "itself a check",
    "lorajax.problems.check_spectrum": "itself a check",
    "lorajax.problems.check_flow": "itself a check",
    "lorajax.data.text.pack": "takes rows of tokens that `tables` makes",
    "lorajax.data.text.tables": "takes what read_texts and a tokenizer made",
    "lorajax.data.text.Ragged": "takes rows of tokens that `tables` makes",
}


def named() -> Iterator[tuple[str, Any]]:
    """Every public function and class, once, by its shortest name."""
    found: dict[int, tuple[str, Any]] = {}
    for info in pkgutil.walk_packages(lorajax.__path__, "lorajax."):
        if any(part.startswith("_") for part in info.name.split(".")):
            continue
        module = importlib.import_module(info.name)
        names = getattr(module, "__all__", None)
        if names is None and info.name in ROOMS_WITHOUT_LISTS:
            own = vars(module).items()
            names = [n for n, v in own if getattr(v, "__module__", "") == info.name and n[0] != "_"]
        for name in names or ():
            value = getattr(module, name)
            own = getattr(value, "__module__", "") or ""
            if callable(value) and own.startswith("lorajax."):
                if inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value)):
                    shorter = found.get(id(value))
                    if shorter is None or len(f"{info.name}.{name}") < len(shorter[0]):
                        found[id(value)] = f"{info.name}.{name}", value
    yield from sorted(found.values())
    for kind, methods in CLASS_METHODS.items():
        for method in methods:
            yield (
                f"lorajax.problems.{kind}.{method}",
                getattr(getattr(lorajax.problems, kind), method),
            )


CLASS_METHODS = {
    "MatrixFactorization": ("from_spectrum", "from_target"),
    "TuckerFactorization": ("from_spectrum", "from_target"),
    "TraceSquared": ("from_weight",),
    "Linearized": ("from_features", "from_function"),
}


def exempt(name: str, value: Any) -> str | None:
    """Why something is not called; None where it is."""
    for prefix, reason in EXEMPT.items():
        if name == prefix or (name.startswith(prefix + ".") and prefix.count(".") == 1):
            return reason
    if inspect.isclass(value):
        if issubclass(value, tuple):
            return RECORD
        if getattr(value, "_is_protocol", False) or issubclass(value, BaseException):
            return "a protocol or an exception"
    return None


class World:
    """Small things of all kinds, made when they are asked for.

    Args:
      folder: for what has to lie on the disk.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def __getattr__(self, name: str) -> Any:
        maker = _MAKERS.get(name)
        if maker is None:
            raise AttributeError(name)
        value = maker(self)
        setattr(self, name, value)
        return value


def _array(*shape: int) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(np.random.default_rng(0).normal(size=shape))


def _two_layer(world: World) -> Any:
    return lorajax.TwoLayer(_array(4, 3), _array(3, 4), _array(4, 4)[:3, :3])


def _factors(*shape: int) -> Any:
    return lorajax.Factors(_array(shape[0], shape[1]), _array(shape[1], shape[2]))


def _loss(model: Any, batch: Any) -> Any:
    return (model(batch) ** 2).sum()


def _module(world: World) -> Any:
    from flax import nnx

    class Small(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.layer, self.head = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.head(self.layer(x))

    return Small()


def _vit(world: World) -> Any:
    from flax import nnx

    from lorajax import models

    model = models.build(world.config, rngs=nnx.Rngs(0))
    model.eval()
    return model


def _config(world: World) -> Any:
    from lorajax import models

    return models.ViTConfig(
        (8, 8), 4, width=16, depth=1, heads=2, classes=3, channels=1, mean=(0.5,), std=(0.25,)
    )


def _table(world: World) -> Any:
    from lorajax import data

    images = np.zeros((12, 8, 8, 1), np.uint8)
    return data.Table({"images": images, "labels": np.arange(12, dtype=np.int32) % 3})


def _adapted(world: World) -> Any:
    from lorajax import adapters

    return adapters.adapt(world.module, "layer", key=world.key, rank=2)


def _trainer(world: World) -> Any:
    from lorajax import adapters, finetune

    adapted = adapters.adapt(world.vit, "**/attention/*", key=world.key, rank=2)
    return finetune.Trainer(adapted, adapters.trainable(adapted), world.task, world.recipe)


def _start(world: World) -> Any:
    import jax

    return jax.random.key(0)


def _saved(name: str, write: Any) -> Any:
    def make(world: World) -> pathlib.Path:
        path = world.folder / name
        if not path.exists():
            write(world, path)
        return path

    return make


def _save_peft(world: World, path: pathlib.Path) -> None:
    from lorajax import adapters

    adapters.save_peft(world.adapted, path)


def _save_idx(world: World, path: pathlib.Path) -> None:
    import gzip

    path.write_bytes(gzip.compress(b"\0\0\x08\1\0\0\0\2ab"))


def _save_model(world: World, path: pathlib.Path) -> None:
    from lorajax import models

    models.save(world.vit, path)


def _simplex(world: World) -> Any:
    import jax.numpy as jnp

    return jnp.eye(3)[jnp.arange(4) % 3]


def _forward(model: Any, batch: Any) -> Any:
    return model(batch)


def _unused(world: World) -> pathlib.Path:
    return pathlib.Path(tempfile.mkdtemp(dir=world.folder)) / "new"


def _png() -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    return file.getvalue()


def _sheet(world: World) -> Any:
    from lorajax.data import text

    return text.read_sheet(world.tsv)


def _sgd(world: World) -> Any:
    import optax

    return optax.sgd(0.1)


def _rngs(world: World) -> Any:
    from flax import nnx

    return nnx.Rngs(0)


def _llama(world: World) -> Any:
    from flax import nnx

    from lorajax import models

    config = models.LlamaConfig(vocabulary=11, width=8, depth=1, heads=2, mlp_width=8, context=16)
    return models.build(config, rngs=nnx.Rngs(0))


def _squares(update: Any) -> Any:
    return (update**2).sum()


def _linear(weights: Any, inputs: Any) -> Any:
    return inputs @ weights


def swept(x: Any) -> dict[str, Any]:
    """A line."""
    return {"y": 2 * x}


def _save_store(world: World, path: pathlib.Path) -> None:
    lorajax.sweeps.sweep(swept, {"x": [1.0, 2.0]}, store=path)


def _save_checkpoint(world: World, path: pathlib.Path) -> None:
    lorajax.adapters.save_checkpoint(world.module, path)


def _save_tokenizer(world: World, path: pathlib.Path) -> None:
    from benchmarks.trust import strangers

    path.mkdir()
    strangers.TOKENIZER(path)


def _layer(kind: str, *shape: Any) -> Any:
    from flax import nnx

    return getattr(nnx, kind)(*shape, rngs=nnx.Rngs(0))


def _lanes(world: World) -> Any:
    import jax

    return jax.tree.map(lambda x: x[None] * np.ones((2, 1, 1)), world.balanced)


def _trained(world: World) -> Any:
    return lorajax.adapters.adapt(world.vit, "**/attention/*", key=world.key, rank=2)


RELU = {
    "overlap": lambda w: _array(2),
    "weights": lambda w: _array(3, 4),
    "outputs": lambda w: _array(3),
    "directions": lambda w: _array(3),
}
AXES = {"scale": [0.1, 0.2], "rank": [1, 2]}
LANES = {"times": lambda w: _times(w)}


def _times(world: World) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(world.times)


_MAKERS: dict[str, Any] = {
    "key": _start,
    "times": lambda w: np.linspace(0.0, 1.0, 4),
    "problem": lambda w: lorajax.MatrixFactorization.from_spectrum(w.key, (6, 5), (2.0, 1.0)),
    "factors": lambda w: lorajax.Factors(0.1 * _array(6, 2), 0.1 * _array(2, 5)),
    "two_layer": _two_layer,
    "linearized": lambda w: lorajax.Linearized.from_features(_array(3, 1, 4, 4), _array(3, 1)),
    "square": lambda w: _factors(4, 2, 4),
    "two_layer_factors": lambda w: lorajax.TwoLayerFactors(_factors(4, 2, 3), _factors(3, 2, 4)),
    "tucker": lambda w: lorajax.TuckerFactors(_array(2, 2, 2), (_array(4, 2),) * 3),
    "attention": lambda w: lorajax.LinearAttention(_array(3)[1:] * 0 + 2.0, 9 + abs(_array(1))[0]),
    "trace": lambda w: lorajax.TraceSquared.from_weight(_array(4, 4)),
    "diagonal": lambda w: lorajax.DiagonalFactorization(abs(_array(2)), (4, 3)),
    "module": _module,
    "vit": _vit,
    "config": _config,
    "table": _table,
    "task": lambda w: lorajax.tasks.Images.of(w.config),
    "recipe": lambda w: lorajax.finetune.Recipe(steps=2, batch_size=4),
    "adapted": _adapted,
    "trainer": _trainer,
    "adalora": lambda w: lorajax.adapters.adapt(
        w.module, "layer", key=w.key, rank=2, kind="adalora"
    ),
    "merged": lambda w: lorajax.adapters.merge(w.adapted),
    "conv": lambda w: _layer("Conv", 2, 3, (3,)),
    "embed": lambda w: _layer("Embed", 5, 3),
    "saved": _saved("saved", _save_checkpoint),
    "store": _saved("store", _save_store),
    "tokenizer": _saved("tokenizer", _save_tokenizer),
    "trained": _trained,
    "wrt": lambda w: lorajax.adapters.trainable(w.trained),
    "expected": lambda w: lorajax.tasks.expected(w.vit, 4)[1],
    "balanced": lambda w: lorajax.initializers.balanced(w.key, (6, 5), 2, 0.1),
    "balanced_core": lambda w: lorajax.initializers.balanced(w.key, (4, 3), 2, 0.1),
    "from_a": lambda w: lorajax.initializers.orthogonal(w.key, (6, 5), 2, 0.1),
    "lanes": _lanes,
    "flow": lambda w: lorajax.gradient_flow(w.problem, w.factors, w.times),
    "peft": _saved("peft", _save_peft),
    "idx": _saved("idx.gz", _save_idx),
    "model_file": _saved("model.safetensors", _save_model),
    "tsv": _saved("a.tsv", lambda w, p: p.write_text("text\tlabel\na\t0\nb\t1\n")),
}

# By the name of the argument, within a room if one is named before a colon.
NAMES: dict[str, Any] = {
    "key": lambda w: w.key,
    "shape": (6, 5),
    "rank": 2,
    "times": lambda w: w.times,
    "problem": lambda w: w.problem,
    "factors": lambda w: w.factors,
    "core": lambda w: w.factors,
    "path": lambda w: w.factors,
    "scale": 0.5,
    "matrix": lambda w: _array(6, 5),
    "weight": lambda w: _array(6, 5),
    "gradient": lambda w: _array(6, 5),
    "signed": lambda w: _array(6, 5),
    "target": lambda w: _array(6, 5),
    "tensor": lambda w: _array(4, 4, 4),
    "ranks": (2, 2, 2),
    "inputs": lambda w: _array(6, 9),
    "outputs": 5,
    "first": lambda w: _array(6, 5),
    "second": lambda w: _array(6, 5),
    "singular_values": lambda w: abs(_array(3)),
    "samples": 8,
    "constant": 1.0,
    "noise": 0.1,
    "budget": 20,
    "s": 1.0,
    "a": 0.5,
    "start": 0.1,
    "value": 0.3,
    "level": 0.5,
    "ratio": 4.0,
    "modes": 3,
    "mode": 0,
    "rate": 1.0,
    "weight_decay": 0.1,
    "learning_rate": 0.1,
    "steps": 3,
    "seed": 0,
    "name": "default",
    "model": lambda w: w.vit,
    "task": lambda w: w.task,
    "train": lambda w: w.table,
    "test": lambda w: w.table,
    "table": lambda w: w.table,
    "trainer": lambda w: w.trainer,
    "recipe": lambda w: w.recipe,
    "batch_size": 4,
    "adapters:model": lambda w: w.module,
    "adapters:module": lambda w: w.module.layer,
    "adapters:key": lambda w: w.key,
    "adapters:folder": lambda w: w.peft,
    "adapters:batches": lambda w: [_array(4, 6)],
    "adapters:loss": lambda w: _loss,
    "adapters:path": "layer",
    "config": lambda w: w.config,
    "decay": 0.1,
    "equations": 10,
    "update": lambda w: _array(4, 4),
    "spectra": lambda w: {"x": abs(_array(3))},
    "costs": lambda w: {"x": 4},
    "laws:samples": 8,
    "dtype": np.dtype("float64"),
}
# By the function and the argument.
CALLS: dict[str, dict[str, Any]] = {
    "lorajax." + name: given
    for name, given in {
        "adapters.RankBudget": {"model": lambda w: w.adalora, "final_rank": 1, "steps": 5},
        "adapters.Trainable": {"names": ("default",)},
        "adapters.activate": {"model": lambda w: w.adapted, "which": "default"},
        "adapters.adapt": {"targets": "layer"},
        "adapters.cubic_budget": {"step": 2, "initial": 8, "final": 4},
        "adapters.effective_kernel": {"layer": lambda w: w.adapted.layer},
        "adapters.kinds.axes_of": {"entry": 2},
        "adapters.kinds.target_spec": {"entry": 2},
        "adapters.layouts.Convolution": {"module": lambda w: w.conv},
        "adapters.layouts.Lookup": {"module": lambda w: w.embed},
        "adapters.layouts.with_kernel": {"kernel": lambda w: _array(6, 5)},
        "adapters.linearized": {"inputs": lambda w: _array(4, 6), "targets": _simplex},
        "adapters.load_checkpoint": {"template": lambda w: w.module, "folder": lambda w: w.saved},
        "adapters.merge": {"model": lambda w: w.adapted},
        "adapters.unmerge": {"model": lambda w: w.merged},
        "adapters.remove": {"model": lambda w: w.adapted},
        "adapters.orthogonality": {"model": lambda w: w.adalora},
        "adapters.updates_of": {"model": lambda w: w.adapted},
        "adapters.trainable": {"model": lambda w: w.adapted},
        "adapters.input_moments": {"forward": lambda w: _forward},
        "adapters.peft.patterns": {"chosen": {"layer": (2, 4.0)}},
        "adapters.save_checkpoint": {"state": lambda w: w.module, "folder": _unused},
        "adapters.save_peft": {"model": lambda w: w.adapted, "folder": _unused},
        "adapters.save_peft_start": {"model": lambda w: w.adapted, "folder": _unused},
        "adapters.scale_beside": {"factor": 2.0},
        "adapters.select_ranks": {
            "samples": 8,
            "batches": lambda w: [_array(4, 6), 2 * _array(4, 6)],
        },
        "data.ImageFiles": {"sources": lambda w: [_png()]},
        "data.Rows": {"column": lambda w: np.zeros((4, 2)), "index": np.arange(2)},
        "data.Table": {"columns": {"x": np.zeros((4, 2))}},
        "data.hold_out": {"count": 3},
        "data.load": {"source": "mnist-sample"},
        "data.policy": {"name": "crop", "size": (8, 8)},
        "data.read_idx": {"path": lambda w: w.idx},
        "data.resize": {"images": np.zeros((2, 8, 8, 1), np.uint8), "size": (4, 4)},
        "data.stacked": {"batches": lambda w: [{"x": np.zeros(2)}]},
        "data.text.Template": {"source": "{{ messages }}"},
        "data.text.Tokenizer": {"folder": lambda w: w.tokenizer},
        "data.text.chat_template": {"folder": lambda w: w.tokenizer},
        "data.text.choose": {"sheet": _sheet},
        "data.text.is_text": {"path": lambda w: w.tsv},
        "data.text.read_sheet": {"path": lambda w: w.tsv},
        "data.text.read_texts": {"train": lambda w: w.tsv},
        "data.text.sizes": {"longest": 12},
        "exact.check_balanced": {"factors": lambda w: w.balanced},
        "exact.balanced_core": {"core": lambda w: w.balanced_core},
        "factors.any_nonzero": {"tree": lambda w: w.factors},
        "factors.can_move": {"node": lambda w: w.factors},
        "factors.column_rates": {"eta": 1.0},
        "factors.is_adapter": {"node": lambda w: w.factors},
        "factors.is_factors": {"node": lambda w: w.factors},
        "flows.balanced_flow": {"factors": lambda w: w.balanced},
        "finetune.Trainer": {"model": lambda w: w.trained, "wrt": lambda w: w.wrt},
        "finetune.abstract_lora": {"rank": 2},
        "finetune.adapt": {"targets": "**/attention/*"},
        "finetune.check_metrics": {"names": ["accuracy"]},
        "finetune.check_start": {"start": "lora"},
        "finetune.directions": {"gradients": {}},
        "finetune.footprint": {
            "model": lambda w: w.trained,
            "wrt": lambda w: w.wrt,
            "batch": lambda w: w.expected,
        },
        "finetune.interval": {"values": [1.0, 2.0, 3.0]},
        "finetune.judge": {"state": lambda w: w.trainer.init(), "names": ["accuracy"]},
        "finetune.mask": {"model": lambda w: w.adapted, "ranks": {"layer": 1}},
        "finetune.measure": {"model": lambda w: w.trained},
        "finetune.paths": {"model": lambda w: w.trained},
        "finetune.picked": {"starts": lambda w: [lorajax.initializers.lora], "index": 0},
        "finetune.stable_ranks": {"history": {"probe_step": [], "probes": {}}},
        "finetune.widened": {"patterns": ["head"]},
        "flows.descend": {"optimizer": _sgd},
        "flows.lora_plus": {"ratio": 4.0},
        "flows.start_of": {"start": "lora", "key": lambda w: w.key, "rank": 2},
        "flows.lanes.closed_form": {**LANES, "factors": lambda w: w.lanes, "one_sided": True},
        "flows.lanes.reduced_ode": {**LANES, "factors": lambda w: w.lanes, "one_sided": True},
        "flows.lanes.spectra": {**LANES, "factors": lambda w: w.lanes},
        "flows.lanes.full_ode": {**LANES, "factors": lambda w: w.lanes},
        "flows.plan.reduced_shape": {},
        "flows.sweeping.plan_flows": {"start": "lora", "axes": AXES, "key": lambda w: w.key},
        "flows.sweeping.sweep_flows": {"start": "lora", "axes": AXES, "key": lambda w: w.key},
        "initializers.asks_for": {"start": "lora"},
        "initializers.name_of": {"start": "lora"},
        "initializers.resolve": {"start": "lora"},
        "initializers.tucker": {"shape": (4, 4, 4)},
        "laws.allora_time": {"eta": 1.0},
        "laws.balanced_mode": {"b": 0.5},
        "laws.early_descent": {"start": lambda w: w.factors, "step": 0.1, "steps": np.arange(3)},
        "laws.one_step_error": {"dimension": 8},
        "laws.orthonormal_error": {"n": 8},
        "laws.outer_bound": {"decay": 0.1, "beta": 0.2, "last": 0.1},
        "laws.relu_overlap_rate": RELU,
        "laws.relu_overlap_velocity": RELU,
        "laws.scaled_gd_error": {"error": lambda w: _array(2, 2), "gram": lambda w: np.eye(2)},
        "laws.spurious_distance": {"alpha": 0.1, "beta": 0.2, "last": 0.1, "nuclear": 1.0},
        "laws.spurious_share": {"alpha": 0.1, "beta": 0.2},
        "laws.trace_squared_flow": {"factors": lambda w: w.square},
        "laws.trace_squared_angle": {"factors": lambda w: w.square},
        "laws.trace_squared_error": {"a": lambda w: _array(4, 2)},
        "laws.lora_plus_equivalent": {"a": lambda w: _array(3)},
        "laws.loss_decay": {"end": lambda w: w.two_layer_factors},
        "models.abstract": {"source": "vit-fashion-mnist"},
        "models.build": {"rngs": _rngs},
        "models.config": {"name": "resnet18"},
        "models.generate": {"model": _llama, "tokens": np.ones((1, 3), np.int32), "limit": 2},
        "models.layout_of": {"source": lambda w: w.model_file},
        "models.llama.places": {"tokens": np.ones((1, 3), np.int32)},
        "models.load": {"source": lambda w: w.model_file},
        "models.normalize": {
            "images": np.zeros((2, 8, 8, 3), np.uint8),
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
        },
        "models.notes": {"source": lambda w: w.model_file},
        "models.save": {"path": lambda w: _unused(w).with_suffix(".safetensors")},
        "optima.structure": {"gradient": lambda w: _array(6, 5)},
        "optima.lowest_curvature": {},
        "optima.manifold_rank": {},
        "optima.reduce_rank": {"factors": lambda w: w.square},
        "problems.LinearAttention": {
            "eigenvalues": lambda w: -np.sort(-abs(_array(3))),
            "context": lambda w: 9 + abs(_array(1))[0],
        },
        "problems.Decayed": {"decay": lambda w: abs(_array(1))[0]},
        "problems.DiagonalFactorization": {"shape": (6, 5)},
        "problems.MatrixFactorization": {
            "u": lambda w: w.problem.u,
            "v": lambda w: w.problem.v,
            "singular_values": lambda w: w.problem.singular_values,
        },
        "problems.ProductLoss": {"function": lambda w: _squares, "shape": (6, 5)},
        "problems.SymmetricFactorization": {"target": lambda w: _array(4, 4) @ _array(4, 4).T},
        "problems.TraceSquared": {"trace": lambda w: _array(1)[0], "size": 4},
        "problems.TuckerFactorization": {
            "core": lambda w: _array(2, 2, 2),
            "frames": lambda w: (np.linalg.qr(_array(4, 2))[0],) * 3,
        },
        "problems.TwoLayer": {
            "w1": lambda w: _array(4, 3),
            "w2": lambda w: _array(3, 4),
            "shift": lambda w: _array(3, 3),
        },
        "problems.check_spectrum": {"singular_values": lambda w: w.problem.singular_values},
        "problems.check_start": {"start": lambda w: w.factors},
        "problems.MatrixFactorization.from_spectrum": {"singular_values": (2.0, 1.0)},
        "problems.TuckerFactorization.from_spectrum": {
            "shape": (4, 4, 4),
            "singular_values": (2.0, 1.0),
        },
        "problems.TuckerFactorization.from_target": {"target": lambda w: _array(4, 4, 4)},
        "problems.TraceSquared.from_weight": {"weight": lambda w: _array(4, 4)},
        "problems.Linearized.from_features": {
            "features": lambda w: _array(3, 1, 4, 4),
            "targets": lambda w: _array(3, 1),
        },
        "problems.Linearized.from_function": {
            "function": lambda w: _linear,
            "weights": lambda w: _array(4, 2),
            "inputs": lambda w: _array(3, 4),
            "targets": lambda w: _array(3, 2),
        },
        "ranks.above": {"floor": 0.1},
        "ranks.rule": {"which": "energy"},
        "ranks.edge_mean": {},
        "flows.drift_of": {"core": lambda w: w.flow.core, "start": lambda w: w.factors},
        "initializers.eva": {"inputs": lambda w: _array(6, 6) @ _array(6, 6).T},
        "laws.lora_modes": {"factors": lambda w: w.from_a},
        "laws.lazy_modes": {"factors": lambda w: w.from_a},
        "laws.deflated_amplitudes": {"factors": lambda w: w.from_a},
        "ranks.allocate": {"spectra": lambda w: {"x": np.array([3.0, 2.0, 1.0])}},
        "spectra.effective_rank": {"values": lambda w: abs(_array(3))},
        "spectra.hitting_times": {"values": lambda w: _array(4, 2), "levels": lambda w: _array(2)},
        "spectra.misalignment": {
            "vectors": lambda w: _array(6, 2),
            "direction": lambda w: _array(6),
        },
        "spectra.rank_correlation": {"x": lambda w: _array(5), "y": lambda w: _array(5)},
        "spectra.top_misalignment": {"direction": lambda w: _array(11)},
        "spectra.losses": {"path": lambda w: w.flow},
        "sweeps.estimate": {"function": lambda w: swept, "axes": {"x": [1.0, 2.0]}},
        "sweeps.sweep": {"function": lambda w: swept, "axes": {"x": [1.0, 2.0]}},
        "sweeps.open_sweep": {"path": lambda w: w.store},
        "sweeps.identity": {},
        "tasks.Images": {"mean": (0.5,), "std": (0.25,), "channels": 1},
        "tasks.classified": {"logits": lambda w: _array(4, 3), "classes": np.zeros(4, np.int32)},
        "tasks.totals": {"scores": lambda w: lorajax.tasks.Scores(*[_array(3)] * 4)},
    }.items()
}


def arguments(name: str, function: Any, world: World) -> dict[str, Any]:
    """Arguments of a valid call.

    Raises:
      LookupError: for an argument that no table has.
    """
    room = name.split(".")[1]
    given = dict(CALLS.get(name, {}))
    hints = hints_of(function)
    found = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        key = parameter.name
        for where in (given, NAMES):
            picked = where.get(f"{room}:{key}", where.get(key, LookupError))
            if picked is not LookupError:
                break
        if key in given:
            found[key] = _value(given[key], world)
        elif parameter.default is not parameter.empty:
            continue
        elif (known := _by_kind(hints.get(key), world)) is not None:
            found[key] = known
        elif picked is not LookupError:
            found[key] = _value(picked, world)
        else:
            raise LookupError(
                f"{name} has an argument {key!r} that benchmarks/trust/valid.py lacks"
            )
    return found


def _value(value: Any, world: World) -> Any:
    return value(world) if callable(value) and not inspect.isclass(value) else value


def _by_kind(hint: Any, world: World) -> Any:
    kinds = {
        lorajax.TwoLayer: "two_layer",
        lorajax.Linearized: "linearized",
        lorajax.TwoLayerFactors: "two_layer_factors",
        lorajax.TuckerFactors: "tucker",
        lorajax.LinearAttention: "attention",
        lorajax.TraceSquared: "trace",
        lorajax.DiagonalFactorization: "diagonal",
    }
    return getattr(world, kinds[hint]) if hint in kinds else None


@functools.cache
def hints_of(function: Any) -> dict[str, Any]:
    """Annotations of the arguments of a function, or of what makes a class."""
    target = function
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function):
            return typing.get_type_hints(function)
        target = function.__init__
    return typing.get_type_hints(inspect.unwrap(getattr(target, "__func__", target)))


DEMANDS: dict[str, str] = {
    f"lorajax.problems.{kind}.from_target:tolerance": domains.NOT_NEGATIVE for kind in CLASS_METHODS
}
"""What numbers must be where the name does not tell, or tells wrongly; "any" for no demand."""


def worse(name: str, argument: str, world: World) -> list[Any]:
    """Wrong values of the right type: of other shapes, with NaN, out of order."""
    import jax.numpy as jnp

    room = name.split(".")[1]
    nan = jnp.nan
    if argument == "times" and room in ("flows", "lorajax"):
        orders = ([1.0, 0.5], [0.0, 0.0], [-1.0, 1.0], [0.0, nan], [0.0, jnp.inf])
        return [np.array(order) for order in orders]
    if argument == "factors" and room == "flows" and "lanes" not in name:
        a, b = world.factors
        pairs = [(a[:5], b), (a, b[:, :4]), (a[:, :1], b), (0 * a, 0 * b), (a * nan, b)]
        pairs += [(a + 1j, b), (a.astype(jnp.float32), b), (a, b[None]), (a[:, :0], b[:0])]
        return [lorajax.Factors(*pair) for pair in pairs]
    if argument in ("matrix", "weight", "gradient", "target") and room == "initializers":
        return [_array(6, 5) * nan, jnp.zeros((6, 5)).at[0, 0].set(jnp.inf), _array(6, 5) + 1j]
    if argument == "singular_values" and room == "problems":
        return [jnp.array(v) for v in ([1.0, 2.0], [0.0], [-1.0], [nan], [3.0] * 9)]
    if argument == "rank" and (room == "initializers" or name.endswith("start_of")):
        return [6, 7, 10**6]
    return []
