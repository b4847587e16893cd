"""Arguments are judged by their annotations, in a sentence, whether or not anything is traced."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Array, Float, Int

import lorajax
from lorajax.environment import judging
from lorajax.environment.judging import POSITIVE, SHARE, at_least, judged
from lorajax.factors import PRNGKey


@judged(eta=POSITIVE, steps=at_least(1), share=SHARE)
def called(
    matrix: Float[Array, "m n"] | None = None,
    eta: float | Float[Array, ""] = 1.0,
    steps: int = 1,
    share: float = 0.0,
    kind: Literal["a", "b"] = "a",
    flag: bool = False,
    key: PRNGKey | None = None,
    path: str | pathlib.Path = "x",
    names: Sequence[str] = (),
    shape: tuple[int, int] = (1, 1),
    function: Callable[..., Any] | None = None,
    table: Mapping[str, Any] | None = None,
    lanes: Float[Array, "*lanes r"] | None = None,
    counts: Int[np.ndarray, " k"] | None = None,
) -> str:
    return "called"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("matrix", jnp.ones(3), r"matrix is an array of shape \(3,\) .* of shape \(m, n\)"),
        ("matrix", jnp.ones((2, 2), complex), "floating-point array"),
        ("matrix", "x", r"matrix is 'x'; it must be a floating-point array of shape \(m, n\)"),
        ("eta", float("nan"), "eta is nan; it must be positive and finite"),
        ("eta", 0.0, "eta is 0.0; it must be positive and finite"),
        ("eta", jnp.float64(-1.0), r"eta is -1.0 \(float64\); it must be positive"),
        ("eta", True, "eta is True; it must be a number"),
        ("steps", 2.0, "steps is 2.0; it must be a whole number"),
        ("steps", 0, "steps is 0; it must be at least 1"),
        ("share", 1.0, "share is 1.0; it must be at least 0 and less than 1"),
        ("kind", "c", "kind is 'c'; it must be one of 'a', 'b'"),
        ("flag", 1, "flag is 1; it must be True or False"),
        ("key", 3, "key is 3; it must be a PRNG key"),
        ("names", "ab", "names is 'ab'; it must be a sequence"),
        ("names", ["a", 1], "names is .*; it must be a sequence each of which is a text"),
        ("shape", (1, 2, 3), "of length 2"),
        ("function", "f", "function is 'f'; it must be a function"),
        ("table", [1], "table is .*; it must be a mapping"),
        ("lanes", jnp.ones(()), "of shape"),
        ("counts", np.ones(2), "an integer array"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(name, value, words):
    with pytest.raises(ValueError, match=words) as caught:
        called(**{name: value})
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_what_is_right_passes():
    given = {"matrix": np.ones((2, 3)), "eta": 3, "steps": np.int32(2), "key": jax.random.key(0)}
    given |= {"path": pathlib.Path("x"), "names": ["a"], "shape": [2, 3], "function": len}
    given |= {"table": {}, "lanes": jnp.ones((2, 3, 4)), "counts": np.ones(2, int)}
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert called(**given) == "called"
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert called(None, 1.0, 1) == "called"


def test_tracers_are_judged_by_shape_and_dtype():
    def run(eta, matrix):
        called(matrix, eta)
        return eta

    assert jax.jit(run)(-1.0, jnp.ones((2, 2))) == -1.0
    with pytest.raises(ValueError, match="matrix"):
        jax.jit(run)(1.0, jnp.ones(2))


def test_a_value_that_cannot_be_shown_is_told_by_its_class():
    class Rude:
        def __repr__(self):
            raise RuntimeError

    assert "Rude" in judging.shown(Rude())


def test_public_functions_are_judged():
    """Those of whole rooms; a law or a start of an extension judges itself."""
    bare = [
        f"{room}.{name}"
        for room in ("initializers", "laws", "flows", "ranks", "optima", "tasks", "sweeps")
        for name in getattr(lorajax, room).__all__
        if type(value := getattr(getattr(lorajax, room), name)).__name__ == "function"
        and not hasattr(value, "judged")
    ]
    assert bare == []
