"""What a store takes for the same function: by content, in any process."""

import dataclasses
import functools
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorajax.sweeps import identity, sweep

WIDE = np.zeros(2000)
FACTOR = 2.0


def scaled(scale, matrix=1.0):
    return {"x": scale * jnp.sum(jnp.asarray(matrix))}


def closure(matrix):
    def inner(scale):
        return {"x": scale * jnp.sum(jnp.asarray(matrix))}

    return inner


def default(matrix):
    def inner(scale, *, matrix=matrix):
        return {"x": scale * jnp.sum(matrix)}

    return inner


def by_module(scale):
    return {"x": scale * helper()}


def helper():
    return FACTOR


@dataclasses.dataclass(frozen=True)
class Holder:
    matrix: object

    def run(self, scale):
        return {"x": scale * jnp.sum(jnp.asarray(self.matrix))}

    def __call__(self, scale):
        return self.run(scale)


class Module(eqx.Module):
    matrix: jax.Array
    name: str = eqx.field(static=True)


def changed(position=1000, by=5.0):
    other = WIDE.copy()
    other[position] = by
    return other


WRAPS = {
    "partial": lambda m: functools.partial(scaled, matrix=m),
    "partial of a partial": lambda m: functools.partial(
        functools.partial(scaled, matrix={"m": [m]}), 3
    ),
    "closure": closure,
    "default": default,
    "method": lambda m: Holder(m).run,
    "callable": Holder,
    "jitted": lambda m: jax.jit(closure(m)),
    "vmapped": lambda m: jax.vmap(closure(m)),
    "module": lambda m: functools.partial(scaled, matrix=Module(jnp.asarray(m), "a")),
    "named tuple": lambda m: functools.partial(scaled, matrix=np.linalg.svd(np.diag(m[998:1003]))),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_what_is_bound_is_told_by_its_bytes(wrap):
    assert identity(wrap(WIDE)) == identity(wrap(WIDE.copy()))
    assert identity(wrap(WIDE)) != identity(wrap(changed()))
    assert identity(wrap(WIDE)) != identity(wrap(changed(by=1e-300)))


KINDS = {
    "integer": 1,
    "float": 1.0,
    "boolean": True,
    "text": "1",
    "numpy float": np.float64(1),
    "numpy float32": np.float32(1),
    "numpy integer": np.int64(1),
    "array": np.array(1.0),
    "vector": np.array([1.0]),
    "row": np.array([[1.0]]),
    "jax array": jnp.asarray(np.float64(1)),
    "weak jax array": jnp.array(1.0),
    "zero": 0.0,
    "minus zero": -0.0,
    "array of minus zero": np.array([-0.0]),
    "array of zero": np.array([0.0]),
    "list": [1.0],
    "tuple": (1.0,),
    "none": None,
    "key": jax.random.key(1),
    "raw key": jax.random.PRNGKey(1),
    "other generator": jax.random.key(1, impl="rbg"),
    "yet another": jax.random.key(1, impl="unsafe_rbg"),
    "module a": Module(jnp.ones(1), "a"),
    "module b": Module(jnp.ones(1), "b"),
    "function": helper,
    "complex": 1 + 0j,
    "dtype": np.dtype("float32"),
    "bfloat16": jnp.ones(1, jnp.bfloat16),
    "float16": jnp.ones(1, jnp.float16),
}


def test_kinds_that_print_alike_differ_and_nan_is_nan():
    told = {name: identity(value) for name, value in KINDS.items()}
    assert len(set(told.values())) == len(told)
    assert identity(float("nan")) == identity(float("nan"))
    assert identity(np.array([np.nan])) == identity(np.array([np.nan]))
    assert identity({"a": 1}) != identity({"a": 2})
    assert identity({1, 2, 3}) == identity({3, 2, 1})


def test_a_constant_of_the_module_counts(monkeypatch):
    before = identity(by_module)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert identity(by_module) != before


@pytest.mark.apart
def test_it_is_the_same_in_another_process():
    code = (
        "import functools, numpy as np; from lorajax.sweeps import identity; "
        "print(identity(functools.partial(np.add, np.arange(3.0), {'b', 'a', 'c'})))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1 and "0x" not in told.pop()


@pytest.mark.parametrize(
    "bound",
    [lambda x: x, iter([1]), object(), np.ma.masked_array([1.0], [True]), np.array([object()])],
    ids=["lambda", "iterator", "object", "masked", "objects"],
)
def test_what_has_no_stable_form_is_refused_with_a_remedy(bound, tmp_path):
    function = functools.partial(scaled, matrix=bound)
    with pytest.raises(ValueError, match="settings"):
        sweep(function, {"scale": [1.0]}, store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_settings_tell_what_the_function_does_not(tmp_path):
    axes, store = {"scale": [1.0, 2.0]}, tmp_path / "s"
    sweep(lambda scale: scale, axes, store=store, settings={"law": "one"})
    with pytest.raises(ValueError, match=r"settings\.law: one in the store, now two"):
        sweep(lambda scale: 2 * scale, axes, store=store, settings={"law": "two"})


def test_a_function_that_calls_itself_has_an_end():
    def down(n):
        return 0 if n == 0 else down(n - 1)

    assert identity(down) == identity(down)


def test_functions_are_told_as_users_have_them():
    """In a process that checks no types: what judges values around a function is no part of it."""
    code = (
        "from lorajax import initializers; from lorajax.sweeps.identity import identity;"
        "print(identity(initializers.orthogonal))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("lorajax.initializers") and "orthogonal" in found.stdout
