"""What a user of the installed package writes; `make typecheck` reads it from outside."""

import jax

import lorajax
from lorajax import adapters, data, finetune, models

ROOMS = (lorajax.finetune, lorajax.data, lorajax.models, lorajax.plots, lorajax.environment)
SAME = (finetune, data, models, adapters)


def product(factors: lorajax.Factors) -> jax.Array:
    """The update."""
    return factors.product


def path(problem: lorajax.MatrixFactorization, times: jax.Array) -> lorajax.Path:
    """A flow from LoRA's own start."""
    start = lorajax.initializers.lora(jax.random.key(0), problem.shape, rank=2, scale=0.1)
    return lorajax.gradient_flow(problem, start, times)
