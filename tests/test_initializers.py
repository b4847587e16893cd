"""The starts: their unit of scale, what they keep exactly, and what they refuse."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorajax import TuckerFactorization, initializers
from lorajax.factors import Factors, unfold
from lorajax.initializers import Start, TuckerFactors

KEY = jax.random.key(0)
SHAPE = (24, 16)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


W, G = draw(*SHAPE), draw(*SHAPE, seed=1)
MOMENT = W @ W.T

BLIND = {
    "lora": functools.partial(initializers.lora, KEY, SHAPE, 4),
    "orthogonal": functools.partial(initializers.orthogonal, KEY, SHAPE, 4),
    "small": functools.partial(initializers.small, KEY, SHAPE, 4),
    "balanced": functools.partial(initializers.balanced, KEY, SHAPE, 4),
    "spectral": functools.partial(initializers.spectral, G, 4),
    "nystrom": functools.partial(initializers.nystrom, KEY, G, 4),
    "nora": functools.partial(initializers.nora, KEY, W, 4),
    "eva": functools.partial(initializers.eva, MOMENT, 4, outputs=16),
    "lora_ga": functools.partial(initializers.lora_ga, G, 4),
}
FROM_WEIGHT = [initializers.pissa, initializers.milora, initializers.olora]


def factors_of(result):
    return result.factors if isinstance(result, Start) else result


@pytest.mark.parametrize("name", list(BLIND))
def test_scale_is_linear_and_may_be_traced_or_named(name):
    one = factors_of(BLIND[name](scale=1.0))
    half = factors_of(jax.jit(lambda s: BLIND[name](scale=s))(jnp.asarray(0.5)))
    named = factors_of(BLIND[name](scale="flax"))
    assert one.shape == SHAPE and one.rank == 4
    for a, b, c in zip(one, half, named, strict=True):
        np.testing.assert_allclose(b, a / 2, atol=1e-10)
        np.testing.assert_allclose(c, math.sqrt(2) * a, atol=1e-10)


@pytest.mark.parametrize("name", ["lora", "small"])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_scale_is_the_norm_of_a_column(name, distribution):
    start = getattr(initializers, name)
    a, b = start(KEY, (4000, 3000), 8, 0.3, distribution=distribution)
    columns = jnp.sqrt(jnp.mean(jnp.sum(a**2, axis=0)))
    np.testing.assert_allclose(columns, 0.3, rtol=0.02)
    if name == "small":
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(jnp.sum(b**2, axis=1))), 0.3, rtol=0.02)
    else:
        assert not b.any()


@pytest.mark.parametrize(
    ("library", "variance"),
    [("peft", lambda n: 1 / (3 * n)), ("flax", lambda n: 2 / n), ("lecun", lambda n: 1 / n)],
)
def test_named_scales_are_the_entries_of_the_libraries(library, variance):
    a, _ = initializers.lora(KEY, (2000, 50), 40, library)
    np.testing.assert_allclose(jnp.var(a), variance(2000), rtol=0.02)


@pytest.mark.parametrize("name", ["orthogonal", "eva"])
def test_columns_are_orthonormal_times_the_scale(name):
    a, b = BLIND[name](scale=0.7)
    np.testing.assert_allclose(a.T @ a, 0.49 * np.eye(4), atol=1e-12)
    assert not b.any()


@pytest.mark.parametrize("name", ["balanced", "spectral"])
def test_balanced_starts_conserve_zero(name):
    a, b = BLIND[name](scale=0.2)
    np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-14)


def test_frames_do_not_depend_on_the_sign_convention_of_qr():
    """A Haar frame has mean zero in every entry; a raw QR has a fixed sign of one diagonal."""
    keys = jax.random.split(KEY, 400)
    frames = jax.vmap(lambda k: initializers.orthogonal(k, (3, 3), 3, 1.0).a)(keys)
    assert float(jnp.max(jnp.abs(frames.mean(axis=0)))) < 4 / math.sqrt(3 * 400)


def test_spectral_fills_the_directions_asked_for():
    a, b = initializers.spectral(G, 4, 0.1, directions=2)
    u, _, vt = np.linalg.svd(G)
    np.testing.assert_allclose(a @ b, 0.01 * u[:, :2] @ vt[:2], atol=1e-12)
    assert not a[:, 2:].any() and not b[2:].any()


@pytest.mark.parametrize("start", FROM_WEIGHT)
@pytest.mark.parametrize("scaling", [1.0, 4.0])
def test_starts_from_the_weight_carry_themselves_as_the_offset(start, scaling):
    made = start(W, 4, scaling=scaling)
    for a, b in zip(made.factors, made.offset, strict=True):
        np.testing.assert_array_equal(a, b)
    u, s, vt = np.linalg.svd(W, full_matrices=False)
    parts = {
        "pissa": (u[:, :4] * s[:4]) @ vt[:4] / scaling,
        "milora": (u[:, -4:] * s[-4:]) @ vt[-4:] / scaling,
    }
    if start.__name__ in parts:
        np.testing.assert_allclose(made.factors.product, parts[start.__name__], atol=1e-12)
    else:
        np.testing.assert_allclose(made.factors.product[:, :4], W[:, :4], atol=1e-12)
        np.testing.assert_allclose(made.factors.a.T @ made.factors.a, np.eye(4), atol=1e-12)


def test_lora_one_is_the_best_step_and_balanced():
    a, b = initializers.lora_one(G, 4, gamma=0.3, scaling=2.0)
    u, s, vt = np.linalg.svd(G, full_matrices=False)
    np.testing.assert_allclose(2 * a @ b, -0.3 * (u[:, :4] * s[:4]) @ vt[:4], atol=1e-12)
    np.testing.assert_allclose(a.T @ a, b @ b.T, atol=1e-12)


def test_lora_one_recovers_a_planted_update_from_one_step_of_data():
    """Whitened linear regression: the negative gradient estimates the update at γ = 1."""
    x = draw(20_000, 12, seed=2)
    u, v = np.linalg.qr(draw(12, 2, seed=3))[0], np.linalg.qr(draw(8, 2, seed=4))[0]
    target = jnp.asarray((u * [2.0, 1.0]) @ v.T)
    gradient = -x.T @ (x @ target) / 20_000
    error = jnp.linalg.norm(initializers.lora_one(gradient, 2).product - target)
    assert float(error / jnp.linalg.norm(target)) < 0.05
    zero = initializers.lora(KEY, (12, 8), 2)
    assert float(jnp.linalg.norm(zero.product - target) / jnp.linalg.norm(target)) == 1


def test_gora_takes_the_step_within_the_columns_of_a():
    a, b = initializers.gora(jax.random.key(0), G, 4, 0.3, gamma=0.2, scaling=2.0)
    project = np.asarray(a) @ np.linalg.inv(a.T @ a) @ np.asarray(a).T
    np.testing.assert_allclose(2.0 * a @ b, -0.2 * project @ np.asarray(G), atol=1e-12)
    assert float(jnp.sum((2.0 * a @ b) * G)) < 0  # the loss falls
    np.testing.assert_allclose(
        a, 0.3 / len(G) ** 0.5 * jax.random.normal(jax.random.key(0), a.shape)
    )


def test_lora_ga_takes_disjoint_directions():
    made = initializers.lora_ga(G, 4)
    u, _, vt = np.linalg.svd(G, full_matrices=False)
    size = 16**0.25 / 4
    np.testing.assert_allclose(np.abs(u[:, :4].T @ made.factors.a), size * np.eye(4), atol=1e-12)
    np.testing.assert_allclose(np.abs(made.factors.b @ vt[4:8].T), size * np.eye(4), atol=1e-12)
    np.testing.assert_array_equal(made.offset.a, made.factors.a)


def test_nora_and_nystrom_lie_in_the_column_space():
    low = W[:, :3] @ draw(3, 16, seed=7)
    for a, b in (
        initializers.nora(KEY, low, 4, 2.0),
        initializers.nystrom(KEY, low, 4, 2.0),
    ):
        assert np.linalg.matrix_rank(np.concatenate([low, a], axis=1)) == 3
        assert not b.any()


def test_a_column_of_a_sketch_has_the_mean_norm_of_the_matrix():
    """E‖W ω/√n‖² = ‖W‖_F²/n; over 150 columns of 200 directions chance is about 1 %."""
    wide = draw(200, 150, seed=9)
    for a, _ in (
        initializers.nora(KEY, wide, 150, 2.0),
        initializers.nystrom(KEY, wide, 150, 2.0),
    ):
        found = jnp.mean(jnp.sum(a**2, axis=0))
        np.testing.assert_allclose(found, 4 * jnp.sum(wide**2) / 150, rtol=0.05)


def test_tucker_starts_conserve_the_identity():
    made = initializers.tucker(KEY, (3, 8, 6), (2, 4, 3), 0.5)
    assert not made.core.any() and not made.product.any()
    assert made.parameters == 24 + 6 + 32 + 18
    for factor in made.factors:
        np.testing.assert_allclose(factor.T @ factor, 0.25 * np.eye(factor.shape[1]), atol=1e-12)


def test_hosvd_frames_hold_a_tensor_of_low_multilinear_rank():
    core = draw(2, 3, 2)
    frames = tuple(draw(n, r, seed=n) for n, r in ((4, 2), (6, 3), (5, 2)))
    tensor = TuckerFactors(core, frames).product
    want = jnp.einsum("abc,ia,jb,kc->ijk", core, *frames)
    np.testing.assert_allclose(tensor, want, atol=1e-12)
    made = initializers.hosvd(tensor, (2, 3, 2))
    projected = jnp.einsum("ijk,ai,bj,ck->abc", tensor, *(f @ f.T for f in made.factors))
    np.testing.assert_allclose(projected, tensor, atol=1e-10)


@pytest.mark.parametrize(
    "start", [initializers.lora, initializers.orthogonal, initializers.small, initializers.balanced]
)
def test_dtype_is_what_is_asked_for(start):
    for dtype in (jnp.float32, jnp.float64):
        assert {x.dtype for x in start(KEY, SHAPE, 2, dtype=dtype)} == {jnp.dtype(dtype)}


NAN = W.at[0, 0].set(jnp.nan)
BAD = [
    (lambda: initializers.lora(KEY, SHAPE, 17), "rank is 17; for a matrix of shape"),
    (lambda: initializers.lora(KEY, SHAPE, 0), "rank is 0"),
    (lambda: initializers.lora(KEY, SHAPE, 2, -1.0), "scale is -1.0; it must be positive"),
    (lambda: initializers.lora(KEY, SHAPE, 2, float("nan")), "scale is nan"),
    (lambda: initializers.lora(KEY, SHAPE, 2, "torch"), "scale is 'torch'; a named scale"),
    (lambda: initializers.spectral(G, 4, directions=5), "directions is 5"),
    (lambda: initializers.spectral(NAN, 4), "matrix has 1 entries"),
    (lambda: initializers.nystrom(KEY, NAN, 4), "target has 1 entries"),
    (lambda: initializers.pissa(NAN, 4), "weight has 1 entries"),
    (lambda: initializers.olora(W, 4, scaling=0.0), "scaling is 0.0"),
    (lambda: initializers.milora(W[:, :1] * jnp.ones((1, 16)), 4).offset.a, None),
    (lambda: initializers.milora(jnp.zeros(SHAPE), 4), "both factors would be zero"),
    (lambda: initializers.nora(KEY, jnp.zeros(SHAPE), 4), "weight is zero everywhere"),
    (lambda: initializers.lora_one(0 * G, 4), "gradient is zero everywhere"),
    (lambda: initializers.lora_one(G, 4, gamma=0.0), "gamma is 0.0"),
    (lambda: initializers.lora_ga(G, 9), "it must lie in 1 … 8"),
    (lambda: initializers.eva(W, 4, outputs=16), "a second moment must be square"),
    (lambda: initializers.eva(0 * MOMENT, 4, outputs=16), "inputs is zero everywhere"),
    (lambda: initializers.eva(MOMENT, 17, outputs=16), "rank is 17"),
    (lambda: initializers.tucker(KEY, (3, 4), (2,)), "a tensor of shape \\(3, 4\\) has 2 modes"),
    (lambda: initializers.tucker(KEY, (3, 4), (2, 5)), "ranks\\[1\\] is 5"),
    (lambda: initializers.tucker(KEY, (3, 4), (2, 1)), "at most 1, the product of the others"),
    (lambda: initializers.hosvd(NAN, (2, 2)), "tensor has 1 entries"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_says_what_would_be_right(call, message):
    if message is None:
        assert isinstance(call(), jax.Array)
        return
    with pytest.raises(ValueError, match=message):
        call()


def test_factors_are_what_the_rooms_share():
    assert isinstance(BLIND["lora"](), Factors)
    assert isinstance(BLIND["lora_ga"](), Start)


def test_superdiagonal_is_balanced_and_along_the_tensor(key):
    tensor = -TuckerFactorization.from_spectrum(key, (7, 6, 5), (3.0, 2.0, 1.0)).target
    start = initializers.superdiagonal(tensor, 2, 0.1)
    for mode, factor in enumerate(start.factors):
        core = unfold(start.core, mode)
        np.testing.assert_allclose(factor.T @ factor, core @ core.T, atol=1e-15)
    # Every direction points downhill: 0.1^4 of each mode's weight.
    assert float(jnp.sum(start.product * tensor)) == pytest.approx(1e-4 * (3 + 2), rel=1e-10)
    with pytest.raises(ValueError, match="tensor is zero"):
        initializers.superdiagonal(jnp.zeros((3, 3, 3)), 2)
    with pytest.raises(ValueError, match="mode is 3"):
        unfold(tensor, 3)


def test_starts_are_found_by_what_they_return_and_asked_what_they_need():
    offered = initializers.offered()
    assert {"lora", "orthogonal", "spectral", "pissa", "eva", "hosvd"} <= set(offered)
    assert not {"resolve_scale", "check_ranks", "random_matrix"} & set(offered)
    for name, start in offered.items():
        assert initializers.resolve(name) is start is getattr(initializers, name)
        assert initializers.name_of(start) == name
    assert initializers.asks_for("lora")["scale"] is False
    assert "scale" not in initializers.asks_for("pissa")
    bound = functools.partial(initializers.spectral, scale=1.0)
    assert list(initializers.asks_for(bound)) == ["matrix", "rank", "directions"]
    with pytest.raises(ValueError, match="must be one of balanced"):
        initializers.resolve("nope")
    with pytest.raises(ValueError, match="needs rank; give one"):
        initializers.call(
            "lora", {"key": 0, "shape": (2, 2), "rank": None}, remedies={"rank": "one"}
        )
    with pytest.raises(ValueError, match="parameter 'matrix' that nothing fills"):
        initializers.call("spectral", {"rank": 1})
    with pytest.raises(AttributeError, match="no attribute"):
        _ = initializers.nothing
