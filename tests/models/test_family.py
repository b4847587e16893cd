"""Families: found by their files, registered from outside, and asked for all that is theirs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lorajax import adapters, models
from lorajax.models import family as kit


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """A toy of two heads on words: no image anywhere."""

    words: int = 7
    width: int = 4
    depth: int = 2
    classes: int = 3
    scale: float = 1.0


class Pair(models.Model):
    def __init__(self, config, *, rngs, **dtypes):
        super().__init__(config, rngs=rngs, **dtypes)
        self.embed = nnx.Embed(config.words, config.width, rngs=rngs, **dtypes)
        self.layers = nnx.List(
            [
                nnx.Linear(config.width, config.width, rngs=rngs, **dtypes)
                for _ in range(config.depth)
            ]
        )
        self.first = nnx.Linear(config.width, config.classes, rngs=rngs, **dtypes)
        self.second = nnx.Linear(config.width, config.classes, rngs=rngs, **dtypes)

    @property
    def heads(self):
        return ("first", "second")

    @property
    def beside(self):
        return ("embed",)

    def __call__(self, tokens):
        x = self.embed(tokens).mean(axis=1)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        scale = jnp.asarray(self.config.scale, x.dtype)
        return scale * (self.first(x) + self.second(x))


def infer(source):
    config = source.json("config.json")
    words, width = source.tensors["words.weight"].shape
    return {
        "words": words,
        "width": width,
        "depth": kit.count(source.tensors, r"layer\.(\d+)\."),
        "classes": kit.classes(source.tensors, "a.weight"),
        "scale": config.get("scale", models.Untold("its config.json states none")),
    }


def rules(config):
    yield kit.one("words.weight", "embed.embedding")
    for i in range(config.depth):
        yield from kit.linear(f"layer.{i}", f"layers.{i}")
    yield from kit.linear("a", "first")
    yield from kit.linear("b", "second")


PUBLIC = models.Format(
    "public",
    ("words.weight",),
    infer,
    rules,
    prefix="net.",
    beside=lambda config: {"config.json": {"scale": config.scale}},
)
FAMILY = models.Family(
    "pair",
    Pair,
    PairConfig,
    formats=(PUBLIC,),
    named={"pair-{tiny,wide}{,-deep}": lambda size, deep: PairConfig(
        width=4 if size == "tiny" else 8, depth=3 if deep else 1
    )},
    repeats=("depth",),
)  # fmt: skip


@pytest.fixture
def pair(monkeypatch):
    """The toy's family, known for the length of a test."""
    monkeypatch.setattr(models.catalog, "_REGISTERED", {})
    return models.register(FAMILY)


TOKENS = jnp.asarray([[0, 1, 2], [3, 4, 6]], jnp.int32)


def make(**changes):
    return models.build(models.config("pair-tiny", **changes), rngs=nnx.Rngs(0))


def test_families_are_found_by_their_files():
    assert {"vit", "resnet", "vgg"} <= models.families().keys()
    for family in models.families().values():
        assert issubclass(family.model, models.Model)
        for pattern in family.named:
            assert "{" in pattern


def test_a_published_name_is_expanded(pair):
    assert models.config("pair-wide-deep") == PairConfig(width=8, depth=3)
    assert models.config("pair-tiny", classes=9) == PairConfig(depth=1, classes=9)
    with pytest.raises(ValueError, match=r"must be one of .*pair-\{tiny,wide\}\{,-deep\}"):
        models.config("pair-huge")


def test_a_registered_family_is_saved_and_loaded(pair, tmp_path):
    model = make()
    path = models.save(model, tmp_path / "own.safetensors", notes={"recipe": "none"})
    np.testing.assert_array_equal(models.load(path)(TOKENS), model(TOKENS))
    assert models.notes(path)["family"] == "pair"
    other = models.load(path, classes=5)
    assert other(TOKENS).shape == (2, 5)
    np.testing.assert_array_equal(other.embed.embedding[...], model.embed.embedding[...])
    assert float(jnp.abs(other.second.kernel[...]).min()) > 0  # both heads are fresh, and not zero


def test_a_file_without_one_of_its_heads_needs_a_number_of_classes(pair, tmp_path):
    path = models.save(make(), tmp_path / "own.safetensors")
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    tensors = {k: v for k, v in load_file(path).items() if not k.startswith("second")}
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"no classification head \(second\.bias, second\.kernel"):
        models.load(path)
    assert models.load(path, classes=3)(TOKENS).shape == (2, 3)


def test_a_format_of_its_own_is_written_and_read(pair, tmp_path):
    model = make(scale=2.0)
    path = models.save(model, tmp_path / "model.safetensors", layout="public")
    assert models.load(tmp_path).config == model.config
    np.testing.assert_array_equal(models.load(tmp_path)(TOKENS), model(TOKENS))
    save_file({f"module.{k}": v for k, v in load_file(path).items()}, path)
    np.testing.assert_array_equal(models.load(tmp_path)(TOKENS), model(TOKENS))
    with pytest.raises(ValueError, match="for a Pair it must be one of lorajax, public"):
        models.save(model, path, layout="timm")


def test_what_a_file_does_not_tell_is_asked_for_by_name(pair, tmp_path):
    model = make(scale=2.0)
    path = models.save(model, tmp_path / "model.safetensors", layout="public")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"does not tell scale .*models\.load\(…, scale=…\)"):
        models.load(path)
    np.testing.assert_array_equal(models.load(path, scale=2.0)(TOKENS), model(TOKENS))


def test_a_registered_family_is_adapted(pair):
    model = make()
    adapted = adapters.adapt(model, "layers/*", key=jax.random.key(0), rank=2)
    np.testing.assert_array_equal(adapted(TOKENS), model(TOKENS))


def test_a_family_is_unknown_without_registration(pair, tmp_path, monkeypatch):
    path = models.save(make(), tmp_path / "own.safetensors")
    monkeypatch.setattr(models.catalog, "_REGISTERED", {})
    with pytest.raises(ValueError, match="names the family 'pair', which is not known here"):
        models.load(path)
    with pytest.raises(ValueError, match="config is a PairConfig; it must be one of .*ViTConfig"):
        models.build(PairConfig(), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"name": "vit"}, "which is a family of this package"), ({"config": int}, "frozen dataclass")],
)
def test_what_cannot_be_registered(change, message):
    with pytest.raises(ValueError, match=message):
        models.register(dataclasses.replace(FAMILY, **change))


def test_counting_takes_no_number_on_trust():
    assert kit.count(["a.0.x", "a.1.x", "a.1.y", "b"], r"a\.(\d+)\.") == 2
    with pytest.raises(ValueError, match="leave out number 1"):
        kit.count(["a.0.x", "a.2.x"], r"a\.(\d+)\.")


@pytest.mark.parametrize(
    ("field", "value"),
    [("depth", 1.5), ("depth", True), ("depth", "2"), ("scale", "1"), ("depth", (1,))],
)
def test_fields_have_their_types(field, value, pair):
    with pytest.raises(ValueError, match=f"{field} is .*; it must be of the type"):
        models.config("pair-tiny", **{field: value})
