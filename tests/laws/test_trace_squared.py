import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorajax import Factors, TraceSquared, gradient_flow, initializers, laws

TIMES = np.linspace(0.0, 4.0, 21)


@pytest.mark.parametrize("trace", [2.0, -1.3, 0.0])
@pytest.mark.parametrize("start", ["lora", "small"])
def test_the_closed_form_is_the_flow_from_any_start(start, trace, key):
    problem = TraceSquared(jnp.asarray(trace), 6)
    factors = getattr(initializers, start)(key, problem.shape, 3, 0.8)
    path = gradient_flow(problem, factors, TIMES, rtol=1e-11)
    law = laws.trace_squared_flow(problem, factors, TIMES)
    np.testing.assert_allclose(law.a, path.core.a, atol=1e-8)
    np.testing.assert_allclose(law.b, path.core.b, atol=1e-8)


def test_the_limit_is_the_stated_product(key):
    problem = TraceSquared(jnp.asarray(2.0), 6)
    start = initializers.lora(key, problem.shape, 3, 0.8)
    end = laws.trace_squared_flow(problem, start, jnp.array([jnp.inf]))
    stated = -2.0 / jnp.sum(start.a**2) * start.a @ start.a.T
    np.testing.assert_allclose(end.product[0], stated, atol=1e-13)
    assert float(problem.loss(jax.tree.map(lambda x: x[0], end))) < 1e-28
    full = problem.full_update()
    expected = float(jnp.linalg.norm(stated - full) / jnp.linalg.norm(full))
    assert float(laws.trace_squared_error(start.a)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_relative_error_of_orthonormal_starts(rank, key):
    a = initializers.orthogonal(key, (6, 6), rank, 0.3).a
    found = float(laws.trace_squared_error(a))
    assert found == pytest.approx((6 / rank - 1) ** 0.5, abs=1e-7)


def test_the_angle_grows_at_the_trace(key):
    problem = TraceSquared(jnp.asarray(1.5), 6)
    start = initializers.lora(key, problem.shape, 3, 0.8)

    def angle(times):
        return laws.trace_squared_angle(problem, start, times)

    found, size = angle(TIMES), float(jnp.sum(start.a**2))
    slope = (angle(TIMES + 1e-6) - angle(TIMES - 1e-6)) / 2e-6
    np.testing.assert_allclose(slope, 1.5 - size / 2 * np.sinh(2 * found), atol=1e-8)


def test_a_balanced_start_of_trace_zero_falls_as_a_power_of_time(key):
    """Tr W = y with ẏ = −2y² for A = Bᵀ: the root of the Riccati equation is double."""
    problem = TraceSquared(jnp.asarray(0.0), 6)
    a = initializers.lora(key, problem.shape, 3, 0.8).a
    flow = laws.trace_squared_flow(problem, Factors(a, a.T), TIMES)
    trace = np.trace(np.asarray(flow.product), axis1=1, axis2=2)
    first = float(jnp.sum(a**2))
    np.testing.assert_allclose(trace, first / (1 + 2 * first * TIMES), rtol=1e-9)
    # Of entries ½ every sum is exact, and so is the double root.
    exact = Factors(jnp.full((6, 3), 0.5), jnp.full((3, 6), 0.5))
    angle = laws.trace_squared_angle(problem, exact, TIMES)
    np.testing.assert_allclose(np.exp(-2 * angle), 1 / (1 + 9 * TIMES), rtol=1e-12)
    none = Factors(0 * a, 0 * a.T)
    np.testing.assert_array_equal(laws.trace_squared_angle(problem, none, TIMES), 0)
