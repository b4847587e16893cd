"""Arrays are told by their bytes, places, dtypes and shapes, the same in every process."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorajax.environment import content

LONG = np.zeros(5000, np.float32)  # too long to be printed in full


def changed(at):
    x = LONG.copy()
    x[at] = 1
    return x


def test_what_differs_is_told_apart():
    different = [
        LONG,
        changed(2500),
        changed(2501),
        LONG.astype(np.float64),
        LONG[:-1],
        LONG.reshape(50, 100),
        {"a": LONG},
        {"b": LONG},
        -LONG,  # −0
        1,
        1.0,
        True,
        "1",
        jax.random.key(0),
        jax.random.key(1),
        jax.random.key(0, impl="rbg"),
        np.zeros(0),
        jnp.zeros(3, jnp.bfloat16),
    ]
    assert len({content.digest(each) for each in different}) == len(different)


def test_what_is_the_same_is_so_wherever_it_lies():
    assert content.digest([LONG, {"x": 2}]) == content.digest([jnp.asarray(LONG), {"x": 2}])
    assert content.digest(LONG.reshape(50, 100).T) == content.digest(LONG.reshape(100, 50))
    # Made by another process.
    assert content.digest({"a": np.arange(3), "b": 0.1}) == "5f6661e22276035d0d09be48fd01ae94"


def test_what_only_its_printed_form_tells_is_refused():
    with pytest.raises(TypeError, match=r"\['a'\] is a object, and no array"):
        content.digest({"a": object()})
