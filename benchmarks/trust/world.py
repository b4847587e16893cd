"""Small things of every kind that arguments are made of."""

import pathlib
import tempfile
from typing import Any

import numpy as np

import lorajax


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


def array(*shape: int) -> Any:
    """Normal entries of a shape."""
    import jax.numpy as jnp

    return jnp.asarray(np.random.default_rng(0).normal(size=shape))


def _two_layer(world: World) -> Any:
    return lorajax.TwoLayer(array(4, 3), array(3, 4), array(4, 4)[:3, :3])


def _factors(*shape: int) -> Any:
    return lorajax.Factors(array(shape[0], shape[1]), array(shape[1], shape[2]))


def squared_outputs(model: Any, batch: Any) -> Any:
    """Squares of what a model says."""
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


def simplex(world: World) -> Any:
    """Rows of a distribution each."""
    import jax.numpy as jnp

    return jnp.eye(3)[jnp.arange(4) % 3]


def forward(model: Any, batch: Any) -> Any:
    """Calls a model."""
    return model(batch)


def unused(world: World) -> pathlib.Path:
    """A place where nothing is."""
    return pathlib.Path(tempfile.mkdtemp(dir=world.folder)) / "new"


def png() -> bytes:
    """A small picture."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    return file.getvalue()


def sheet(world: World) -> Any:
    """A sheet of two texts."""
    from lorajax.data import text

    return text.read_sheet(world.tsv)


def sgd(world: World) -> Any:
    """Plain descent."""
    import optax

    return optax.sgd(0.1)


def rngs(world: World) -> Any:
    """Random streams."""
    from flax import nnx

    return nnx.Rngs(0)


def llama(world: World) -> Any:
    """A Llama of a few numbers."""
    from flax import nnx

    from lorajax import models

    config = models.LlamaConfig(vocabulary=11, width=8, depth=1, heads=2, mlp_width=8, context=16)
    return models.build(config, rngs=nnx.Rngs(0))


def squares(update: Any) -> Any:
    """A loss of an update."""
    return (update**2).sum()


def linear(weights: Any, inputs: Any) -> Any:
    """A linear map of inputs."""
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


def times(world: World) -> Any:
    """The times as JAX has them."""
    import jax.numpy as jnp

    return jnp.asarray(world.times)


_MAKERS: dict[str, Any] = {
    "key": _start,
    "times": lambda w: np.linspace(0.0, 1.0, 4),
    "problem": lambda w: lorajax.MatrixFactorization.from_spectrum(w.key, (6, 5), (2.0, 1.0)),
    "factors": lambda w: lorajax.Factors(0.1 * array(6, 2), 0.1 * array(2, 5)),
    "two_layer": _two_layer,
    "linearized": lambda w: lorajax.Linearized.from_features(array(3, 1, 4, 4), array(3, 1)),
    "square": lambda w: _factors(4, 2, 4),
    "two_layer_factors": lambda w: lorajax.TwoLayerFactors(_factors(4, 2, 3), _factors(3, 2, 4)),
    "tucker": lambda w: lorajax.TuckerFactors(array(2, 2, 2), (array(4, 2),) * 3),
    "attention": lambda w: lorajax.LinearAttention(array(3)[1:] * 0 + 2.0, 9 + abs(array(1))[0]),
    "trace": lambda w: lorajax.TraceSquared.from_weight(array(4, 4)),
    "diagonal": lambda w: lorajax.DiagonalFactorization(w.problem.singular_values, (4, 3)),
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
