"""Passes over batches that were cut short go on to the very same sums, and from nothing else's."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorajax.adapters.gradients import estimate
from lorajax.adapters.keeping import Kept, Stopped

RNG = np.random.default_rng(0)
BATCHES = [jnp.asarray(RNG.normal(size=(6, 40)), jnp.float32) for _ in range(7)]
TRACED = []


class Net(nnx.Module):
    def __init__(self, seed=0):
        self.wide = nnx.Linear(40, 60, rngs=nnx.Rngs(seed))
        self.out = nnx.Linear(
            60, 3, rngs=nnx.Rngs(seed + 1), param_dtype=jnp.bfloat16, dtype=jnp.bfloat16
        )


def loss(model, x):
    jax.debug.callback(lambda: TRACED.append(1))
    hidden = jnp.tanh(model.wide(x)).astype(jnp.bfloat16)
    return jnp.sum(model.out(hidden).astype(jnp.float32) ** 2, axis=-1)


def stopping_after(count):
    """A context as the command's: it says to stop after so many batches."""
    asked = []

    @contextlib.contextmanager
    def context():
        def stop():
            asked.append(1)
            return len(asked) >= count

        yield stop

    return context


def numbers(found):
    return [np.asarray(x) for x in jax.tree.leaves(found)]


def run(keep=None, model=None, batches=BATCHES, **options):
    TRACED.clear()
    options = {"noise": "halves", "memory": 0, "width": 2} | options
    found = numbers(estimate(model or Net(), loss, batches, keep=keep, **options))
    jax.effects_barrier()
    return found, len(TRACED)


# In the first pass, at its end, and in the second one, which only sketches take.
@pytest.mark.parametrize("cut", [3, 7, 10])
@pytest.mark.parametrize("noise", ["halves", "signs", "none"])
def test_what_was_cut_short_goes_on_to_the_same_numbers(tmp_path, noise, cut):
    whole, calls = run(noise=noise)
    assert calls == 14
    with pytest.raises(Stopped) as caught:
        run(Kept(tmp_path, stopping=stopping_after(cut)), noise=noise)
    assert (caught.value.done, caught.value.count) == ((cut - 1) % 7 + 1, 7)
    keep = Kept(tmp_path)
    found, calls = run(keep, noise=noise)
    for a, b in zip(found, whole, strict=True):
        np.testing.assert_array_equal(a, b)
    if cut == 10:  # a first pass that took less than `every` is not worth writing, and done again
        assert keep.resumed == [(3, 7)] and calls == 7 + 4
    else:
        assert keep.resumed == [(cut, 7)] and calls == 14 - cut
    keep.clear()
    assert not list(tmp_path.iterdir())


def test_it_is_written_as_often_as_it_is_asked_for(tmp_path):
    with pytest.raises(Stopped):
        run(Kept(tmp_path, every=0, stopping=stopping_after(9)))
    assert len(list(tmp_path.iterdir())) == 2  # one of each pass
    keep = Kept(tmp_path)
    run(keep)
    assert keep.resumed[0][0] > 0 and keep.resumed[1] == (2, 7)


def test_sums_of_anything_else_are_not_taken(tmp_path):
    with pytest.raises(Stopped):
        run(Kept(tmp_path, stopping=stopping_after(3)))
    others = [
        (Kept(tmp_path), {"model": Net(seed=2)}),
        (Kept(tmp_path), {"batches": [*BATCHES[:-1], BATCHES[0]]}),
        (Kept(tmp_path), {"noise": "none"}),
        (Kept(tmp_path), {"width": 3}),
        (Kept(tmp_path, settings={"smoothing": 0.1}), {}),
    ]
    for keep, options in others:
        run(keep, **options)
        assert keep.resumed == [], options
    keep = Kept(tmp_path)
    run(keep)
    assert keep.resumed == [(3, 7)]


def test_what_others_have_kept_stays(tmp_path):
    with pytest.raises(Stopped):
        run(Kept(tmp_path, settings={"seed": 1}, stopping=stopping_after(3)))
    (theirs,) = tmp_path.iterdir()
    keep = Kept(tmp_path, settings={"seed": 2}, every=0)
    run(keep)
    assert len(list(tmp_path.iterdir())) > 1
    keep.clear()
    assert list(tmp_path.iterdir()) == [theirs]


def test_settings_that_only_their_printed_form_tells_are_refused(tmp_path):
    with pytest.raises(ValueError, match="settings must be JSON"):
        Kept(tmp_path, settings={"weights": np.zeros(5000)})


@pytest.mark.parametrize("content", [b"", b"PK\3\4 half a file", None])
def test_half_a_file_is_begun_anew(tmp_path, content):
    with pytest.raises(Stopped):
        run(Kept(tmp_path, stopping=stopping_after(3)))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-200] if content is None else content)
    keep = Kept(tmp_path)
    found, calls = run(keep)
    assert keep.resumed == [] and calls == 14
    for a, b in zip(found, run()[0], strict=True):
        np.testing.assert_array_equal(a, b)
