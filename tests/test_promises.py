"""Accuracies that docstrings promise, made anew; those of the README are in test_docs.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import root_scalar

import lorajax
from lorajax import exact, initializers, laws, spectra
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


@pytest.mark.parametrize(("std", "promised"), [(1e-3, 3e-6), (0.1, 0.05)])
def test_a_gaussian_start_is_as_balanced_as_theory_says(std, promised):
    """The largest error of an entry over 8 draws (theory section 2.1): another 8 than those."""
    problem = lorajax.MatrixFactorization.from_spectrum(
        jax.random.key(3), (60, 40), (4.0, 2.0, 1.0)
    )
    times = jnp.linspace(0.0, 14.0, 100)

    @jax.jit
    @jax.vmap
    def largest(key):
        start = initializers.lora(key, (60, 40), 5, std * 60**0.5)
        diagonal, core, _ = exact.reduce(problem, start)
        path = lorajax.gradient_flow(diagonal, core, times, rtol=1e-10)
        balanced = exact.balanced_core(diagonal, core, times)
        return jnp.abs(balanced.core.product - path.core.product).max()

    worst = float(largest(jax.random.split(jax.random.key(20), 8)).max())
    assert promised / 2 < worst < 2 * promised


def test_the_escape_is_right_unless_atol_is_fixed():
    """What theory section 8 says of the time at which a mode of s = 2 is half learned."""
    s = 2.0
    problem = lorajax.DiagonalFactorization(jnp.array([s]), (1, 1))

    def escape(scale):
        def beyond(t):
            return float(laws.lora_mode(t, s, scale)) - s / 2

        return root_scalar(beyond, bracket=(0.0, 50.0), xtol=1e-13).root

    def flow(scale, times, **options):
        start = lorajax.Factors(jnp.full((1, 1), scale), jnp.zeros((1, 1)))
        path = lorajax.gradient_flow(problem, start, times, **options)
        assert path.converged
        return np.asarray(path.core.product[:, 0, 0])

    for scale in (1e-2, 1e-12, 1e-24):
        reached = flow(scale, np.array([0.0, escape(scale)]))[-1]
        # At half its size the mode grows by s²/2 in a unit of time.
        assert abs(reached - s / 2) / (s**2 / 2) < 3e-8
    for scale, least, most in ((1e-12, 0.5, 0.8), (1e-20, 2.0, 3.0)):
        times = np.linspace(0.0, escape(scale) + 5.0, 4001)
        late = np.interp(s / 2, flow(scale, times, atol=1e-6), times) - escape(scale)
        assert least < late < most, late


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
