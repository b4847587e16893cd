"""The models themselves: sizes, pieces with derivatives of their own, and a published accuracy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from lorajax import data, models
from lorajax.models import layers

# Parameters of the published networks (torchvision's and timm's documentation; akamaster's table
# says 0.27M and 0.66M for the CIFAR ResNets).
PARAMETERS = {
    "vit-ti/16": 5_717_416,
    "vit-s/16": 22_050_664,
    "vit-b/16": 86_567_656,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "vgg16": 138_357_544,
    "vgg16-bn": 138_365_992,
    "cifar-resnet20": 269_722,
    "cifar-resnet44": 658_586,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name):
    config = models.config(name)
    model = nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("config", "heads", "beside"),
    [
        (models.ViTConfig((8, 8), 4, 8, 1, 2), ("head",), ("embeddings",)),
        (
            models.ViTConfig((8, 8), 4, 8, 1, 2, distilled=True),
            ("head", "distilled_head"),
            ("embeddings",),
        ),
        (models.config("cifar-resnet20"), ("head",), ()),
        (models.VGGConfig((1, 1), (2, 2), hidden=4), ("head",), ()),
    ],
)
def test_a_model_knows_its_heads_and_what_trains_beside_them(config, heads, beside):
    model = nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0)))
    assert (model.heads, model.beside) == (heads, beside)
    assert all(getattr(model, name) is not None for name in heads + beside)


@pytest.mark.parametrize("name", ["vit-x/16", "resnet51", "cifar-resnet21", "vgg12", "bert"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=r"it must be one of .*vit-\{ti,s,b,l\}"):
        models.config(name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.config("vit-b/16", image_size=(224, 230)), "multiples of"),
        (lambda: models.config("vit-b/16", heads=7), "must be a multiple of heads = 7"),
        (
            lambda: models.config("vit-b/16", pool="max"),
            "must be 'cls', 'mean', 'cls\\+mean' or 'att",
        ),
        (lambda: models.config("vit-b/16", mlp="glu"), "mlp is 'glu'; it must be 'gelu' or 'swi"),
        (lambda: models.config("vit-b/16", final_norm="all"), "final_norm is 'all'; it must be"),
        (lambda: models.config("vit-b/16", class_token=False), "pool = 'cls' reads one"),
        (lambda: models.config("vit-b/16", distilled=True, pool="mean"), "pool is 'mean'; a dis"),
        (lambda: models.config("vit-b/16", registers=-1), "registers is -1"),
        (lambda: models.config("vit-b/16", placed=2), "placed is 2; of 1 tokens in front"),
        (lambda: models.config("vit-b/16", table=(3,)), r"table is \(3,\); it must be"),
        (lambda: models.config("vit-b/16", depth=0), "depth is 0"),
        (lambda: models.config("vit-b/16", size=3), "size is not a field of ViTConfig"),
        (lambda: models.config("resnet50", stem="small"), "must be one of imagenet, cifar"),
        (lambda: models.config("resnet50", widths=(64,)), "one entry a stage"),
        (lambda: models.config("resnet50", shortcut="pad"), "only basic blocks"),
        (lambda: models.config("resnet50", classes=0), "classes is 0; it must be at least 1"),
        (lambda: models.config("resnet18", depths=(2, 2, 0, 2)), "depths is .*at least 1"),
        (lambda: models.config("vit-b/16", image_size="x"), "image_size is 'x'; it must be an int"),
        (lambda: models.config("vgg16", widths=(64,)), "one entry a stage"),
        (lambda: models.config("vgg16", channels=1), "must have 1 entry or 1, one a channel"),
        (lambda: models.config("vgg16", std=(0.0,)), "every entry must be positive"),
    ],
)
def test_configurations_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (models.ViTConfig((8, 8), 4, 8, 1, 2), (1, 8, 12, 3), r"takes \(batch, 8, 8, 3\)"),
        (models.config("cifar-resnet20"), (1, 32, 32, 1), r"takes \(batch, height, width, 3\)"),
        (models.VGGConfig((1, 1), (2, 2), hidden=4), (1, 3, 9, 3), "at least 4 pixels"),
    ],
)
def test_images_are_checked(config, shape, message):
    model = models.build(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        model(jnp.zeros(shape, jnp.float32))


@pytest.mark.parametrize("form", ["erf", "tanh", "quick"])
def test_gelu_and_its_derivatives(form, key):
    x = 3 * jax.random.normal(key, (50,), jnp.float64)

    def reference(x):
        if form == "quick":
            return x / (1 + jnp.exp(-1.702 * x))
        return jax.nn.gelu(x, approximate=form == "tanh")

    np.testing.assert_allclose(layers.gelu(x, form), reference(x), atol=1e-14)
    derivative = jax.vmap(jax.grad(lambda x: layers.gelu(x, form)))(x)
    np.testing.assert_allclose(derivative, jax.vmap(jax.grad(reference))(x), atol=1e-14)
    check_grads(lambda x: layers.gelu(jnp.asarray(x), form), (x,), order=2)


def test_layer_norm_and_its_derivatives(key):
    x = 2 + jax.random.normal(key, (3, 4, 16), jnp.float64)
    norm = layers.LayerNorm(16, rngs=nnx.Rngs(0), param_dtype=jnp.float64, epsilon=1e-3)
    norm.scale.set_value(jnp.linspace(0.5, 2, 16))
    norm.bias.set_value(jnp.linspace(-1, 1, 16))
    centered = np.asarray(x - x.mean(-1, keepdims=True))
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-3)
    expected = expected * np.linspace(0.5, 2, 16) + np.linspace(-1, 1, 16)
    np.testing.assert_allclose(norm(x), expected, atol=1e-12)
    check_grads(lambda x: layers.standardize(jnp.asarray(x), 1e-3), (x,), order=2)


def test_layer_norm_of_half_precision_computes_in_single(key):
    x = (100 + jax.random.normal(key, (4, 64))).astype(jnp.bfloat16)
    norm = layers.LayerNorm(64, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    exact = layers.standardize(x.astype(jnp.float32), 1e-6)
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(norm(x).astype(jnp.float32), exact, atol=0.02)


@pytest.mark.parametrize("size", [(7, 7), (1, 1), (3, 5), (8, 2)])
def test_adaptive_average_pool(size, key):
    x = jax.random.normal(key, (2, 5, 6, 3), jnp.float32)
    expected = np.zeros((2, *size, 3), np.float32)
    for i in range(size[0]):
        rows = slice(i * 5 // size[0], -(-(i + 1) * 5 // size[0]))
        for j in range(size[1]):
            columns = slice(j * 6 // size[1], -(-(j + 1) * 6 // size[1]))
            expected[:, i, j] = np.asarray(x)[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(layers.adaptive_average_pool(x, size), expected, atol=1e-6)


def test_normalize_is_what_it_says():
    images = np.array([[[[0, 128, 255]]]], np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    expected = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(models.normalize(images, mean, std), expected, atol=1e-5)
    gray = models.normalize(images[..., :1], (0.5,), (0.5,))
    assert gray.shape == (1, 1, 1, 3)
    with pytest.raises(ValueError, match="images have 2 channels"):
        models.normalize(images[..., :2], mean, std)
    with pytest.raises(ValueError, match="normalize takes bytes"):
        models.normalize(images.astype(np.float32), mean, std)


def test_training_and_evaluation_modes(key):
    x = jax.random.normal(key, (8, 16, 16, 3), jnp.float32)
    config = models.VGGConfig((1, 1), (4, 4), batch_norm=True, hidden=8, grid=1, classes=3)
    model = models.build(config, rngs=nnx.Rngs(0))
    before = np.asarray(model.norms[0].mean[...])
    run = nnx.jit(lambda model, x: model(x))
    assert not np.array_equal(run(model, x), run(model, x))  # dropout
    assert not np.array_equal(before, model.norms[0].mean[...])
    model.eval()
    after = np.asarray(model.norms[0].mean[...])
    np.testing.assert_array_equal(run(model, x), run(model, x))
    np.testing.assert_array_equal(after, model.norms[0].mean[...])
    vit = models.build(
        models.ViTConfig((8, 8), 4, 8, 1, 2, classes=3, dropout=0.5), rngs=nnx.Rngs(0)
    )
    x = x[:, :8, :8]
    assert not np.array_equal(run(vit, x), run(vit, x))
    vit.eval()
    np.testing.assert_array_equal(run(vit, x), run(vit, x))


def test_batch_statistics_are_those_of_the_batch(key):
    x = 3 + 2 * jax.random.normal(key, (4, 5, 5, 6), jnp.float32)
    norm = layers.BatchNorm(6, rngs=nnx.Rngs(0), dtype=None, param_dtype=jnp.float32)
    y = norm(x)
    np.testing.assert_allclose(y.mean((0, 1, 2)), np.zeros(6), atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)


def test_the_embedded_vit_has_the_accuracy_its_file_states(data_dir):
    model = models.load("vit-fashion-mnist")
    stated = float(models.notes("vit-fashion-mnist")["test_accuracy"])
    split = data.load("fashion-mnist", folder=data_dir).test
    assert accuracy(model, split, 1000) == pytest.approx(stated, abs=5e-4)
    assert stated > 0.85


def accuracy(model, split, batch_size):
    @nnx.jit
    def correct(model, images, labels):
        config = model.config
        x = models.normalize(images, config.mean, config.std, channels=config.channels)
        return (model(x).argmax(-1).astype(labels.dtype) == labels).sum()

    found = [
        int(correct(model, batch["images"], batch["labels"]))
        for batch, _ in data.batches(split, batch_size)
    ]
    return sum(found) / len(split)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "published"), [("cifar_resnet20", 0.810), ("cifar_resnet44", 0.827)]
)
def test_cifar_resnets_score_what_their_source_scores(data_dir, name, published):
    model = models.load(data_dir / f"{name}.safetensors")
    split = data.load("cifar10_jpg.npz", folder=data_dir).test.take(slice(None, None, 10))
    found = accuracy(model, split, 500)
    print(f"{name}: {100 * found:.2f} %")
    # Every tenth picture (they lie by class): within three standard errors of the share of all.
    assert found == pytest.approx(published, abs=3 * (published * (1 - published) / 1000) ** 0.5)
