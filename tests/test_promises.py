"""Accuracies that docstrings promise, made anew; those of the README are in test_docs.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorajax
from lorajax import initializers, laws, spectra
from lorajax.models import layers


@pytest.mark.parametrize(
    ("spectrum", "std", "promised"),
    [
        ((4.0, 2.0, 1.0), 1e-2, 0.008),
        ((4.0, 2.0, 1.0), 0.1, 0.38),
        (tuple(4.0 * 2.0**-i for i in range(5)), 1e-2, 0.08),
        ((2.0, 1.999), 1e-2, 0.59),
    ],
)
def test_the_deflated_law_is_off_by_what_its_docstring_says(spectrum, std, promised):
    """The largest sup error over 24 draws of 60×40: another 24 than those of the docstring."""
    problem = lorajax.MatrixFactorization.from_spectrum(jax.random.key(3), (60, 40), spectrum)
    times = jnp.linspace(0.0, 14.0 / spectrum[-1], 100)

    @jax.jit
    @jax.vmap
    def sup_error(key):
        start = initializers.lora(key, (60, 40), 5, std * 60**0.5)
        path = lorajax.gradient_flow(problem, start, times)
        simulated = spectra.singular_values(path)[:, : len(spectrum)]
        law = laws.lora_modes(problem, start, times)
        return abs((simulated - law) / jnp.asarray(spectrum)[None, :]).max()

    worst = float(sup_error(jax.random.split(jax.random.key(20), 24)).max())
    # The largest of 24 draws is a draw itself: the same to a factor of two.
    assert promised / 2 < worst < 2 * promised


def test_approximations_of_gelu_differ_by_what_the_docstring_says():
    x = jnp.linspace(-6.0, 6.0, 4001)
    exact = layers.gelu(x)
    for form, promised in (("tanh", 5e-4), ("quick", 0.0204)):
        off = float(abs(layers.gelu(x, form) - exact).max())
        assert 0.9 * promised < off <= promised, (form, off)


def test_misalignments_are_told_down_to_1e_30():
    direction = jnp.asarray(np.eye(50)[0])
    for angle in (1e-3, 1e-9, 1e-15):
        vector = direction.at[1].set(angle)
        found = float(spectra.misalignment(3.0 * vector, direction))
        assert found == pytest.approx(angle**2 / 2, rel=1e-6)
