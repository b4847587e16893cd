"""Any start of `lorajax.initializers`, or one of your own, for any problem."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lorajax import initializers
from lorajax.environment.judging import at_least, judged
from lorajax.factors import Factors
from lorajax.problems import TwoLayer, TwoLayerFactors

DIRECTED = ("gradient", "matrix", "target", "tensor")
"""Parameters of a start that hold where the loss falls at zero."""

FILLED = ("key", "shape", "dtype", "outputs", "weight", "inputs", "problem", *DIRECTED)
"""Parameters of a start that the problem fills, and those that no problem has."""

_REMEDIES = {
    "rank": "it, e.g. as the axis 'rank': [4, 8]",
    "ranks": "them, bound to the start with functools.partial",
    "key": "a PRNG key",
    "weight": "a start that looks at none, since a problem holds no pretrained weight",
    "inputs": "a start that looks at none, since a problem holds no inputs of a layer",
}


def _direction(problem: Any, shape: tuple[int, ...]) -> Array | None:
    """Minus the gradient with respect to the update, at zero."""
    if hasattr(problem, "target"):
        return problem.target
    if hasattr(problem, "full_gradient") and len(shape) == 2:
        zero = jnp.zeros((shape[0], 1), problem.dtype), jnp.zeros((1, shape[1]), problem.dtype)
        return -problem.full_gradient(Factors(*zero))
    return None


@judged(rank=at_least(1))
def start_of(
    problem: Any,
    start: str | Callable[..., Any],
    *,
    key: Any = None,
    rank: int | None = None,
    **parameters: Any,
) -> Any:
    """The factors at which a flow of a problem starts.

    Args:
      problem: any problem; of two layers both adapters are filled, each with a key of its own.
      start: the name of a start of `lorajax.initializers`, or a function of parameters among `key`,
        `shape`, `rank`, `dtype`, `matrix` or `target` (the direction in which the loss falls at
        zero; `gradient` is its negative) and any of its own. A function with a parameter `problem`
        gets it whole and returns whatever that problem's flow starts from.
      key: a PRNG key.
      rank: r.
      **parameters: of the start, such as `scale`.

    Returns:
      Factors; TwoLayerFactors for two layers.

    Raises:
      ValueError: for an unknown name, a parameter that the start does not have, one that it needs
        and does not get, or a start that takes an offset off the weight.

    Example:
      >>> import jax, lorajax
      >>> from lorajax.flows import start_of
      >>> problem = lorajax.MatrixFactorization.from_spectrum(
      ...     jax.random.key(0), shape=(64, 48), singular_values=(4.0, 2.0)
      ... )
      >>> start_of(problem, "spectral", rank=3, scale=1e-3).a.shape
      (64, 3)
    """
    asked, name = initializers.asks_for(start), initializers.name_of(start)
    check_parameters(start, parameters)
    given = {"key": key, "rank": rank, **parameters}
    if "problem" in asked:
        return initializers.call(
            start, {**given, "problem": problem}, where=f"start {name!r}", remedies=_REMEDIES
        )

    def fill(key: Any, shape: tuple[int, ...], direction: Array | None) -> Any:
        gradient = None if direction is None else -direction
        values: Mapping[str, Any] = {
            "weight": None,
            "inputs": None,
            **given,
            "key": key,
            "shape": shape,
            "dtype": problem.dtype,
            "outputs": shape[-1],
            **dict.fromkeys(("matrix", "target", "tensor"), direction),
            "gradient": gradient,
        }
        found = initializers.call(start, values, where=f"start {name!r}", remedies=_REMEDIES)
        if isinstance(found, initializers.Start):
            raise ValueError(
                f"start {name!r} takes an offset off the weight, which changes the problem; flow "
                "from its factors on problem.recentered(start.offset)."
            )
        return found

    directed = bool(set(DIRECTED) & set(asked))
    if isinstance(problem, TwoLayer):
        keys = (None, None) if key is None else jax.random.split(key)
        along = problem.alignment_matrices() if directed else (None, None)
        parts = [fill(k, s, d) for k, s, d in zip(keys, problem.shape, along, strict=True)]
        return TwoLayerFactors(*parts)
    return fill(key, problem.shape, _direction(problem, problem.shape) if directed else None)


def check_parameters(start: str | Callable[..., Any], parameters: Any) -> None:
    """Raises ValueError unless a start has all of some parameters, by name."""
    own = [name for name in initializers.asks_for(start) if name not in FILLED]
    for name in parameters:
        if name not in own:
            raise ValueError(
                f"start {initializers.name_of(start)!r} has no parameter {name!r}; it takes "
                f"{', '.join(own) or 'none'}."
            )
