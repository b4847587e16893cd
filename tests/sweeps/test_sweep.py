"""`sweep` in memory: axes, keys, statuses, shapes, and independence of how it is run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax
from lorajax.sweeps import STATUS, sweep
from lorajax.sweeps.axes import make_grid


def draw(scale, key):
    return {"x": jnp.asarray(scale, float) * jax.random.normal(key, (3,)), "n": jnp.asarray(3)}


# Batches of other sizes are other programs, which may round the last bit differently.
same = functools.partial(np.testing.assert_allclose, rtol=1e-14)
AXES = {"scale": [1e-3, 1.0, 2.0, 5.0], "seed": range(45)}


def test_the_product_of_axes_with_coordinates():
    found = sweep(lambda a, b: a * b, {"a": [1.0, 2.0, 3.0], "b": [10, 20]}, static=("b",))
    assert dict(found.sizes) == {"a": 3, "b": 2}
    np.testing.assert_array_equal(found["value"], [[10.0, 20.0], [20.0, 40.0], [30.0, 60.0]])
    np.testing.assert_array_equal(found["a"], [1.0, 2.0, 3.0])
    assert found["status"].dtype == np.int8 and not found["status"].any()


def test_a_zipped_axis_moves_its_parameters_together():
    run = {"scale": [1.0, 2.0, 3.0], "vector": np.arange(6.0).reshape(3, 2)}
    found = sweep(lambda scale, vector, b: scale * vector + b, {"run": run, "b": [0.0, 1.0]})
    assert found["value"].dims == ("run", "b", "value_0")
    assert found["scale"].dims == ("run",)
    want = run["vector"] * np.array([[1.0], [2.0], [3.0]])
    np.testing.assert_array_equal(found["value"].sel(b=1.0), want + 1)


def test_static_parameters_set_shapes_and_may_be_strings():
    def build(rank, start, scale):
        a = jnp.ones((rank, 2)) if start == "ones" else jnp.zeros((rank, 2))
        return scale * jnp.sum(a)

    axes = {"rank": [1, 4], "start": ["ones", "zeros"], "scale": [1.0, 3.0]}
    found = sweep(build, axes, static=("rank", "start"))
    np.testing.assert_array_equal(found["value"].sel(start="ones"), [[2.0, 6.0], [8.0, 24.0]])
    assert not found["value"].sel(start="zeros").any()


@pytest.mark.parametrize("chunk", [1, 7, 180])
def test_chunks_and_order_change_nothing(chunk):
    key = jax.random.key(3)
    want = sweep(draw, AXES, key=key)
    found = sweep(draw, AXES, key=key, chunk=chunk)
    same(found["x"], want["x"])
    by_cost = sweep(draw, AXES, key=key, chunk=chunk, bucket=5, cost=lambda scale: -(scale**2))
    same(by_cost["x"], want["x"])
    turned = dict(reversed([(name, list(values)[::-1]) for name, values in AXES.items()]))
    other = sweep(draw, turned, key=key, chunk=chunk).transpose(*want["x"].dims)
    same(other.sel(want.coords)["x"], want["x"])


def test_keys_come_from_the_coordinates_that_are_folded():
    key = jax.random.key(0)
    all_folded = sweep(draw, AXES, key=key)["x"] / sweep(draw, AXES, key=key)["scale"]
    assert len(np.unique(np.round(all_folded[..., 0], 12))) == 180
    by_seed = sweep(draw, AXES, key=key, fold=("seed",))["x"]
    np.testing.assert_allclose(by_seed[0] / 1e-3, by_seed[2] / 2.0, rtol=1e-12)
    # A lane is the same in a larger sweep, whatever the axis's dtype, and differs from its mirror.
    part = sweep(draw, {"scale": [1, 2], "seed": [7]}, key=key)
    want = sweep(draw, AXES, key=key)["x"].sel(scale=[1.0, 2.0], seed=[7])
    same(part["x"], want)
    mirrored = sweep(lambda a, b, key: jax.random.normal(key), {"a": [1, 2], "b": [1, 2]}, key=key)
    assert float(mirrored["value"][0, 1]) != float(mirrored["value"][1, 0])


def test_a_lane_that_fails_is_marked_and_the_others_are_untouched():
    axes = {"step": np.where(np.arange(180) == 17, 3.0, 0.1)}

    def descend(step):
        return jax.lax.fori_loop(0, 400, lambda _, x: x - step * x**3, jnp.asarray(1.5))

    found = sweep(descend, axes)
    assert STATUS[int(found["status"][17])] == "non-finite"
    assert np.isnan(found["value"][17])
    rest = np.delete(found["value"].values, 17)
    alone = sweep(descend, {"step": np.full(179, 0.1)})
    same(rest, alone["value"])


def test_a_reported_status_is_kept_and_nan_is_then_a_value():
    def report(x):
        return {"hit": jnp.where(x > 1, x, jnp.nan), "status": jnp.where(x > 2, 1, 0)}

    found = sweep(report, {"x": [0.5, 1.5, 2.5]})
    np.testing.assert_array_equal(found["status"], [0, 0, 1])
    np.testing.assert_array_equal(found["hit"], [np.nan, 1.5, np.nan])


def test_statuses_are_those_of_flows():
    assert STATUS == lorajax.flows.STATUS


def test_a_batched_function_gets_all_lanes_of_a_call():
    sizes = []

    def whole(scale, key):
        sizes.append(scale.shape)
        return {"x": scale[:, None] * jax.vmap(lambda k: jax.random.normal(k, (3,)))(key)}

    found = sweep(whole, AXES, key=jax.random.key(3), batched=True, chunk=45)
    want = sweep(draw, AXES, key=jax.random.key(3))
    same(found["x"], want["x"])
    assert set(sizes) == {(45,)}


def test_one_function_compiles_once(traces):
    def once(scale, key):
        return scale * jax.random.normal(key)

    sweep(once, AXES, key=jax.random.key(0), chunk=7)
    with traces() as names:
        sweep(once, {**AXES, "seed": range(45, 90)}, key=jax.random.key(1), chunk=7)
    assert "once" not in names and "run_lanes" not in names


@pytest.mark.parametrize("sizes", [{}, {"bucket": 1}, {"chunk": 2}])
def test_a_function_is_traced_once_for_each_static_value(sizes):
    """Outputs' shapes are known from the trace that runs; tracing a network takes seconds."""
    seen = []

    def grow(x, kind, key):
        seen.append(kind)
        return x * jax.random.normal(key) + len(kind)

    def run(count):
        axes = {"kind": ["a", "b"], "x": np.arange(1.0, count)}
        return sweep(grow, axes, static=("kind",), key=jax.random.key(0), **sizes)

    run(5)
    assert sorted(seen) == ["a", "b"]
    run(5)
    assert len(seen) == 2


def test_chunks_fit_the_memory():
    def wide(x):
        return x * jnp.ones(1000)

    seen = []
    sweep(wide, {"x": np.arange(100.0)}, memory=80_000, progress=seen.append)
    assert len(seen) > 20 and seen[-1].done == seen[-1].total == 100


def test_progress_counts_what_failed():
    seen = []
    sweep(lambda x: jnp.log(x), {"x": [1.0, -1.0, 2.0]}, chunk=1, progress=seen.append)
    assert [p.done for p in seen] == [0, 1, 2, 3]
    assert seen[-1].failed == 1 and seen[-1].remaining == 0


def identity(x):
    return x


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(axes={}), "axes is empty"),
        (dict(axes={"x": []}), "axis 'x' is empty"),
        (dict(axes={"x": 3.0}), "axis 'x' is 3.0"),
        (dict(axes={"x": [1.0, np.nan]}), "NaN or infinite"),
        (dict(axes={"x": ["a"]}), "cannot be traced"),
        (dict(axes={"y": [1.0]}), "function takes"),
        (dict(axes={"x": [1.0], "y": [1.0]}), "not y"),
        (dict(axes={"a": {"x": [1.0], "y": [1.0, 2.0]}}), "zips values of lengths"),
        (dict(axes={"a": {"x": [1.0]}, "x": [1.0]}), "'x' twice"),
        (dict(axes={"x": [1.0]}, static=("z",)), "static names"),
        (dict(axes={"x": [1.0]}, fold=("x",)), "without a key"),
        (dict(axes={"x": [1.0]}, chunk=0), "chunk is 0"),
        (dict(axes={"x": [1.0]}, dims={"value": ("t",)}), "dims gives"),
        (dict(axes={"x": [1.0]}, dims={"other": ("t",)}), "dims names"),
        (dict(axes={"x": [1.0]}, coords={"t": [1.0]}), "coords names"),
        (dict(axes={"x": [1.0]}, devices=[]), "devices is empty"),
        (dict(axes={"x": [[1.0], [2.0]]}, static=("x",)), "static and has shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        sweep(identity, **arguments)


def test_a_status_is_one_of_the_codes():
    def whole(code):
        return {"x": jnp.ones(()), "status": code}

    found = sweep(whole, {"code": [0, 1, 200, -7]})
    assert found["status"].values.tolist() == [0, 1, STATUS.index("failed"), STATUS.index("failed")]
    with pytest.raises(ValueError, match="status of dtype float64"):
        sweep(whole, {"code": [0.0, 1.0]})
    with pytest.raises(ValueError, match="key"):
        sweep(lambda x, key: {"k": key}, {"x": [1.0]}, key=jax.random.key(0))


def test_outputs_must_not_depend_on_static_values():
    with pytest.raises(ValueError, match="other shapes"):
        sweep(lambda n: jnp.ones(n), {"n": [2, 3]}, static=("n",))


def test_blocks_cover_the_grid_once_and_keep_costs_together():
    grid = make_grid({"a": range(7), "b": range(11), "c": [1.0]})
    for limit in (1, 5, 12, 77, 1000):
        sizes = grid.block_shape(limit)
        assert np.prod(sizes) <= limit
        count = np.zeros(grid.shape, int)
        for block in grid.blocks(sizes):
            count[block.slices] += 1
        assert np.all(count == 1)
    assert grid.block_shape(7, [0.0, 1.0, 0.0]) == (7, 1, 1)
    assert grid.block_shape(11, [1.0, 0.0, 0.0]) == (1, 11, 1)
