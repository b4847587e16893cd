"""Thresholds of weights, and what of an adapter stands above them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax import adapters


@pytest.fixture(scope="module")
def model():
    draw = np.random.default_rng(0).normal(size=(100, 200)) / 200**0.5
    layer = nnx.Linear(100, 200, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(jnp.asarray(draw, jnp.float32))
    return nnx.Sequential(layer)


def along(strengths):
    """A start whose update has these singular values along random directions."""
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.normal(size=(n, len(strengths))))[0] for n in (100, 200))
    a, b = u * np.array(strengths)[None], v.T
    return lambda shape, rank, dtype: adapters_factors(a, b, dtype)


def adapters_factors(a, b, dtype):
    from lorajax import Factors

    return Factors(jnp.asarray(a, dtype), jnp.asarray(b, dtype))


@pytest.mark.parametrize("alpha", [2.0, 4.0])
def test_strength_stands_against_the_threshold_of_the_weight(model, alpha):
    start = along((2.0, 0.3))
    adapted = adapters.adapt(model, rank=2, start=start, alpha=alpha, key=jax.random.key(0))
    (row,) = adapters.intruders(adapted).rows
    assert row.strength == pytest.approx(2.0 * alpha / 2, rel=1e-5)
    # A Gaussian weight of entries of variance 1/200, half as many rows: 0.5^¼, within its scatter.
    assert row.threshold == pytest.approx(0.5**0.25, rel=0.3)
    assert row.directions == 1 and row.alpha == alpha
    update = adapted.layers[0].adapters["default"].update(adapted.layers[0].base)
    found = np.abs(row.left[:, 0] @ np.asarray(update) @ row.right[:, 0])
    assert found == pytest.approx(row.strength, rel=1e-5)
    # At the alpha that it names nothing intrudes any more.
    capped = adapters.adapt(
        model, rank=2, start=start, alpha=row.most * (1 - 1e-6), key=jax.random.key(0)
    )
    assert adapters.intruders(capped).rows[0].directions == 0
    assert "1 of 1 updates" in str(adapters.intruders(adapted))


def test_no_adapters_no_rows(model):
    assert adapters.intruders(model).rows == ()
