"""Streamed gradients and inputs, and the starts that are made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import adapters, initializers
from lorajax.adapters.gradients import estimate

KEY = jax.random.key(0, impl="rbg")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class Net(nnx.Module):
    """A layer of each kind that a gradient is estimated for."""

    def __init__(self):
        def make(kind, *args, **options):
            layer = nnx.eval_shape(lambda: kind(*args, use_bias=False, rngs=nnx.Rngs(0), **options))
            layer.kernel = nnx.Param(draw(*layer.kernel.shape) / 3)
            return layer

        self.conv = make(nnx.Conv, 2, 4, (3,), padding="SAME")
        self.heads = make(nnx.LinearGeneral, 4, (2, 3))
        self.wide = make(nnx.Linear, 60, 80)
        self.out = make(nnx.Linear, 80, 2)

    def __call__(self, x):
        x = self.heads(jnp.tanh(self.conv(x)))
        x = jnp.tanh(x.reshape(x.shape[0], -1))
        return self.out(jnp.tanh(self.wide(x)))


def per_sample(model, batch):
    x, y = batch
    return jnp.mean((model(x) - y) ** 2, axis=-1)


def mean_loss(model, batch):
    return jnp.mean(per_sample(model, batch))


@pytest.fixture(scope="module")
def net():
    return Net()


X, Y = draw(12, 10, 2), draw(12, 2, seed=1)
# Batches of unequal size: the estimate is of the mean over samples, not over batches.
BATCHES = [(X[:4], Y[:4]), (X[4:6], Y[4:6]), (X[6:], Y[6:])]


@pytest.fixture(scope="module")
def exact(net):
    grads = nnx.jit(nnx.grad(mean_loss))(net, (X, Y))
    return {
        path: adapters.layout(getattr(net, path)).matrix(grads[path]["kernel"][...])
        for path in ("conv", "heads", "wide", "out")
    }


@pytest.mark.parametrize("loss", [mean_loss, per_sample])
def test_streamed_gradients_are_those_of_one_large_batch(net, exact, loss):
    found = adapters.gradients(net, loss, iter(BATCHES))
    for path, want in exact.items():
        assert found[path].basis is None
        np.testing.assert_allclose(found[path].matrix, want, atol=1e-6)
        assert float(found[path].error) == 0


def test_large_layers_are_sketched_within_the_bound(net, exact):
    """The gradient has rank 12 at most, one a sample; a sketch of 20 columns holds it all."""
    found = adapters.gradients(net, per_sample, BATCHES, memory=10_000, width=20)
    assert found["wide"].basis is not None and found["out"].basis is None
    assert found["wide"].basis.shape == (60, 20)
    np.testing.assert_allclose(found["wide"].matrix, exact["wide"], atol=1e-6)
    narrow = adapters.gradients(net, per_sample, BATCHES, memory=10_000, width=4)["wide"]
    truth = np.linalg.svd(exact["wide"], compute_uv=False)
    missed = np.linalg.norm(narrow.matrix - exact["wide"], 2)
    assert 1e-4 * truth[0] < missed <= float(narrow.error)
    values = np.asarray(narrow.singular_values)
    np.testing.assert_allclose(narrow.norm, values[0], rtol=1e-5)
    np.testing.assert_allclose(found["out"].norm, np.linalg.norm(exact["out"], 2), rtol=1e-5)
    assert np.all(values <= truth[:4] + 1e-6)
    assert np.all(truth[:4] <= np.sqrt(values**2 + float(narrow.error) ** 2))


def test_memory_of_a_sketched_pass_holds_no_gradient(net):
    """No array of the wide kernel's shape is among what a sketching pass carries along."""
    found = estimate(net, per_sample, BATCHES, memory=10_000, width=4)
    assert found.passes == 2 and found.samples == 12
    sizes = [leaf.size for leaf in jax.tree.leaves(found.layers["wide"])]
    assert max(sizes) < 60 * 80 / 4
    assert estimate(net, per_sample, BATCHES).passes == 1


def test_noise_by_halves_and_by_signs(net):
    found = estimate(net, per_sample, BATCHES[:2], noise="halves")
    one, two = (estimate(net, per_sample, [b]).layers["out"].mean.matrix for b in BATCHES[:2])
    # Four samples and two: the mean is that of all six, and the noise has its variance.
    np.testing.assert_allclose(found.layers["out"].mean.matrix, (4 * one + 2 * two) / 6, atol=1e-6)
    noise = 8**0.5 / 6 * (one - two)
    np.testing.assert_allclose(found.layers["out"].noise.matrix, noise, atol=1e-6)
    equal = estimate(net, per_sample, [(X[:4], Y[:4]), (X[4:8], Y[4:8])], noise="halves")
    one, two = (
        estimate(net, per_sample, [(X[i : i + 4], Y[i : i + 4])]).layers["out"].mean.matrix
        for i in (0, 4)
    )
    np.testing.assert_array_equal(equal.layers["out"].mean.matrix, (one + two) / 2)
    np.testing.assert_array_equal(equal.layers["out"].noise.matrix, (one - two) / 2)
    signed = estimate(net, per_sample, [(X, Y)], noise="signs")
    graphdef, kernel, rest = nnx.split(net, lambda path, _: path[0] == "out", ...)
    singles = jax.jacrev(lambda k: per_sample(nnx.merge(graphdef, k, rest), (X, Y)))(kernel)
    stacked = np.asarray(singles["out"]["kernel"][...]).reshape(12, -1)
    target = np.asarray(signed.layers["out"].noise.matrix).reshape(-1)
    signs, *_ = np.linalg.lstsq(stacked.T, 12 * target, rcond=None)
    np.testing.assert_allclose(np.abs(signs), 1, atol=1e-3)


def summed(model, batch):
    """Sums over unequal numbers of answers, as of texts: a sample has 0 to 4 of them."""
    x, y, count = batch
    return per_sample(model, (x, y)) * count, count


@pytest.mark.parametrize("noise", ["none", "halves", "signs"])
def test_batches_of_unequal_counts_add_up_to_the_gradient_of_the_whole(net, noise):
    counts = jnp.asarray([3, 0, 1, 4, 4, 1, 2, 0, 1, 1, 3, 2], jnp.float32)

    def loss(net):
        sums, count = summed(net, (X, Y, counts))
        return sums.sum() / count.sum()

    whole = nnx.jit(nnx.grad(loss))(net)["wide"]["kernel"][...]
    for cuts in ((4, 6), (1, 2, 11)):
        batches = list(zip(*(np.split(column, cuts) for column in (X, Y, counts)), strict=True))
        found = estimate(net, summed, batches, noise=noise)
        assert found.samples == counts.sum()
        np.testing.assert_allclose(found.layers["wide"].mean.matrix, whole, atol=1e-6)
        # A mean over batches of their means is another gradient.
        gradient = nnx.jit(nnx.grad(lambda n, b: mean_of(summed(n, b))))
        means = [gradient(net, b) for b in batches]
        average = sum(each["wide"]["kernel"][...] for each in means) / len(batches)
        assert float(jnp.abs(average - whole).max()) > 1e-2 * float(jnp.abs(whole).max())


def mean_of(pair):
    sums, count = pair
    return sums.sum() / jnp.maximum(count.sum(), 1)


@pytest.mark.parametrize("forward", [None, lambda model, batch: model(batch)])
def test_input_moments(net, forward):
    found = adapters.input_moments(net, [X[:4], X[4:]], ["out", "conv"], forward=forward)
    hidden = jnp.tanh(net.heads(jnp.tanh(net.conv(X)))).reshape(12, -1)
    hidden = jnp.tanh(net.wide(hidden))
    np.testing.assert_allclose(found["out"], hidden.T @ hidden / 12, atol=1e-5)
    padded = jnp.pad(X, ((0, 0), (1, 1), (0, 0)))
    rows = jnp.concatenate([padded[:, i : i + 10] for i in range(3)], axis=-1).reshape(-1, 6)
    np.testing.assert_allclose(found["conv"], rows.T @ rows / rows.shape[0], atol=1e-5)
    assert not hasattr(net.out, "moment")


def test_lora_one_starts_at_the_best_step(net, exact):
    found = adapters.gradients(net, per_sample, BATCHES)
    start = functools.partial(initializers.lora_one, gamma=0.5)
    model = adapters.adapt(net, "wide", key=KEY, rank=3, alpha=6.0, start=start, gradients=found)
    u, s, vt = np.linalg.svd(-exact["wide"], full_matrices=False)
    want = net.wide.kernel[...] + 0.5 * (u[:, :3] * s[:3]) @ vt[:3]
    np.testing.assert_allclose(adapters.effective_kernel(model.wide), want, atol=1e-5)


def test_spectral_starts_along_the_descent(net, exact):
    model = adapters.adapt(
        net,
        {"wide": {"start": "spectral"}, "out": {"start": "lora_ga", "rank": 1}},
        key=KEY,
        rank=2,
        gradients={path: g for path, g in exact.items()},
    )
    a, b = model.wide.adapters["default"].factors
    descent = jnp.trace(b @ -exact["wide"].T @ a)
    assert float(descent) > 0
    np.testing.assert_allclose(a.T @ a, 1e-6 * np.eye(2), atol=1e-9)
    offset = model.out.adapters["default"].offset
    np.testing.assert_array_equal(offset.a, model.out.adapters["default"].factors.a)


def test_eva_starts_along_the_inputs(net):
    moments = adapters.input_moments(net, [X], "out")
    model = adapters.adapt(net, "out", key=KEY, rank=2, start="eva", inputs=moments)
    a, b = model.out.adapters["default"].factors
    values, vectors = np.linalg.eigh(moments["out"])
    projector = vectors[:, -2:] @ vectors[:, -2:].T
    np.testing.assert_allclose(a @ a.T, projector, atol=1e-4)
    assert not b.any()


def test_gradients_of_an_adapted_model_are_the_bases_own(net, exact):
    adapted = adapters.adapt(net, "out", key=KEY, rank=1)
    found = adapters.gradients(adapted, per_sample, BATCHES, ["out", "wide"], memory=0, width=20)
    for path in ("out", "wide"):
        np.testing.assert_allclose(found[path].matrix, exact[path], atol=1e-6)
    assert adapters.names(adapted) == ("default",)


def nan_loss(model, batch):
    return per_sample(model, batch) * jnp.nan


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n: adapters.gradients(n, per_sample, []), "batches hold 0; at least one"),
        (
            lambda n: adapters.gradients(n, per_sample, iter(BATCHES), memory=0, width=4),
            "is an iterator",
        ),
        (lambda n: adapters.gradients(n, per_sample, BATCHES, "nothing"), "matches no layer"),
        (lambda n: adapters.gradients(n, per_sample, BATCHES, width=0), "width is 0"),
        (lambda n: adapters.gradients(n, lambda m, b: m(b[0]), BATCHES), "shape \\(4, 2\\)"),
        (lambda n: adapters.gradients(n, nan_loss, BATCHES), "is not finite"),
        (lambda n: estimate(n, mean_loss, BATCHES, noise="signs"), "since the losses get"),
        (lambda n: estimate(n, mean_loss, BATCHES, noise="other"), "noise is 'other'"),
        (lambda n: estimate(n, mean_loss, BATCHES[:1], noise="halves"), "two halves need"),
        (lambda n: adapters.input_moments(n, [], "out"), "saw no input"),
        (
            lambda n: adapters.adapt(
                n, "out", key=KEY, rank=1, start="lora_one", gradients={"out": draw(3, 3)}
            ),
            "gradients hold a matrix of shape \\(3, 3\\) for 'out'",
        ),
        (
            lambda n: adapters.adapt(
                n, "out", key=KEY, rank=2, start="lora_ga", gradients={"out": draw(80, 2)}
            ),
            "it must lie in 1 … 1",
        ),
        (
            lambda n: adapters.adapt(
                n, "out", key=KEY, rank=1, start="lora_one", gradients={"out": 0 * draw(80, 2)}
            ),
            "is zero everywhere",
        ),
    ],
)
def test_bad_calls(net, call, message):
    with pytest.raises(ValueError, match=message):
        call(net)


def test_layers_without_a_second_moment():
    class Lookup(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(4, 3, rngs=nnx.Rngs(KEY), embedding_init=nnx.initializers.ones)

    with pytest.raises(ValueError, match="its inputs are indices"):
        adapters.input_moments(Lookup(), [jnp.zeros(2, jnp.int32)])
