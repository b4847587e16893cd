"""What problems and flows check before any tracing: spectra, precision, times, starts."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from lorajax.environment.judging import judged
from lorajax.factors import Factors, can_move, check_factors, check_finite, is_adapter, is_traced

PRECISIONS = ("float32", "float64")
"""Names of the dtypes in which problems and flows compute."""


@judged
def check_precision(**trees: Any) -> None:
    """Raises ValueError naming the first argument with an array that is not float32 or float64."""
    for name, tree in trees.items():
        for leaf in jax.tree.leaves(tree):
            if hasattr(leaf, "dtype") and str(leaf.dtype) not in PRECISIONS:
                raise ValueError(
                    f"{name} has dtype {leaf.dtype}; problems and flows compute in "
                    f"{' or '.join(PRECISIONS)}: convert it."
                )


@judged
def check_spectrum(singular_values: Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless values are positive, decreasing and no more than `shape` holds."""
    if singular_values.ndim != 1 or singular_values.shape[0] < 1:
        raise ValueError(
            f"singular_values have shape {singular_values.shape}; give at least one, in a vector."
        )
    if singular_values.shape[0] > min(shape):
        raise ValueError(
            f"singular_values has {singular_values.shape[0]} entries; a matrix of "
            f"shape {shape} has "
            f"at most {min(shape)}."
        )
    check_precision(singular_values=singular_values)
    if is_traced(singular_values):
        return
    values = np.asarray(singular_values)
    if not (np.all(np.isfinite(values)) and np.all(values > 0)):
        raise ValueError(f"singular_values are {values}; each must be positive and finite.")
    if np.any(np.diff(values) > 0):
        raise ValueError(f"singular_values are {values}; give them in decreasing order.")


@judged
def check_times(times: Array | np.ndarray) -> None:
    """Raises ValueError unless `times` is a vector, increasing, finite and starts at 0 or later."""
    shape = np.shape(times)
    if len(shape) != 1 or shape[0] < 1:
        raise ValueError(f"times have shape {shape}; they must be a vector of at least one time.")
    if is_traced(times):
        return
    values = np.asarray(times)
    if not np.all(np.isfinite(values)) or values[0] < 0:
        raise ValueError(
            f"times start at {values[0]}; they must be finite and start at 0 or later."
        )
    if np.any(np.diff(values) <= 0):
        i = int(np.argmax(np.diff(values) <= 0))
        raise ValueError(
            f"times go from {values[i]} to {values[i + 1]} at position {i + 1}; they must increase."
        )


@judged
def check_flow(problem: Any, factors: Factors, times: Any) -> None:
    """Raises ValueError unless a problem of one matrix, its start and times fit one another."""
    check_factors(factors, problem.shape)
    if factors.a.dtype != problem.dtype:
        raise ValueError(
            f"factors have dtype {factors.a.dtype} and the problem {problem.dtype}; they must "
            "agree."
        )
    check_times(times)


@judged
def check_start(problem: Any, start: Any, times: Any) -> None:
    """Raises ValueError unless any problem, its start and times fit and the start can move."""
    check_times(times)
    check_precision(factors=start)
    check_finite(factors=start)
    if isinstance(start, Factors) and hasattr(problem, "shape"):
        check_flow(problem, start, times)
        return
    for node in jax.tree.leaves(start, is_leaf=is_adapter):
        if not is_traced(node) and not can_move(node):
            raise ValueError(
                "factors are both zero (of a Tucker update, two of them), a critical point that no "
                "flow leaves; start all but at most one of them away from zero."
            )
    try:
        jax.eval_shape(problem.gradient, start)
    except (TypeError, ValueError) as error:
        shapes = [tuple(x.shape) for x in jax.tree.leaves(start)]
        raise ValueError(
            f"factors have shapes {shapes}, which do not fit the problem of shape "
            f"{getattr(problem, 'shape', '?')}."
        ) from error
