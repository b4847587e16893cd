"""How well predictions agree with the answers, by the measures that GLUE reports.

Each is a function of predictions and answers, arrays of one shape (n,), and returns a float64.
Where a measure is not defined, since one side is constant, it is 0, as no agreement can be seen.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Measure = Callable[[Any, Any], float]


def _paired(predictions: Any, answers: Any) -> tuple[np.ndarray, np.ndarray]:
    predictions, answers = np.asarray(predictions), np.asarray(answers)
    if predictions.shape != answers.shape or predictions.ndim != 1 or not len(answers):
        raise ValueError(
            f"predictions have shape {predictions.shape} and answers {answers.shape}; both must be "
            "of one shape (n,), with n of at least 1."
        )
    return predictions, answers


def accuracy(predictions: Any, answers: Any) -> float:
    """Share of the predictions that are right.

    Args:
      predictions: classes, shape (n,).
      answers: the right ones.

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: for other shapes, and so do the others.
    """
    predictions, answers = _paired(predictions, answers)
    return float((predictions == answers).mean())


def f1(predictions: Any, answers: Any, positive: int = 1) -> float:
    """Harmonic mean of precision and recall of one class.

    Args:
      predictions: classes, shape (n,).
      answers: the right ones.
      positive: the class, 1 as GLUE has it.

    Returns:
      A number in [0, 1]; 0 where the class is neither predicted nor right anywhere.
    """
    predictions, answers = _paired(predictions, answers)
    found, wanted = predictions == positive, answers == positive
    both = int(found.sum()) + int(wanted.sum())
    return 2 * int((found & wanted).sum()) / both if both else 0.0


def matthews(predictions: Any, answers: Any) -> float:
    """Matthews' correlation, for any number of classes.

    Args:
      predictions: classes, shape (n,).
      answers: the right ones.

    Returns:
      A number in [−1, 1], 0 for chance: Gorodkin, "Comparing two K-category assignments by a
      K-category correlation coefficient" (2004), eq. 8; of two classes it is Pearson's.
    """
    predictions, answers = _paired(predictions, answers)
    classes = np.unique(np.concatenate([predictions, answers]))
    x, y = (each[:, None] == classes for each in (predictions, answers))
    x, y = x - x.mean(0), y - y.mean(0)
    return _correlation(x.ravel(), y.ravel())


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    # Norms one by one: the product of their squares would leave the range of numbers earlier.
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return float(np.clip(x @ y / norm, -1, 1)) if norm > 0 else 0.0


def pearson(predictions: Any, answers: Any) -> float:
    """Pearson's correlation.

    Args:
      predictions: numbers, shape (n,).
      answers: likewise.

    Returns:
      A number in [−1, 1].
    """
    columns = [np.asarray(each, np.float64) for each in _paired(predictions, answers)]
    # The mean of equal numbers may differ from them in the last digit.
    x, y = (each - each.mean() if np.ptp(each) > 0 else 0 * each for each in columns)
    return _correlation(x, y)


def mean_ranks(values: Any) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs.

    Args:
      values: shape (n,).

    Returns:
      float64 of shape (n,).

    Example:
      >>> from lorajax.tasks import metrics
      >>> metrics.mean_ranks([3, 1, 3, 2]).tolist()
      [3.5, 1.0, 3.5, 2.0]
    """
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def spearman(predictions: Any, answers: Any) -> float:
    """Spearman's correlation: Pearson's of the mean ranks.

    Args:
      predictions: numbers, shape (n,).
      answers: likewise.

    Returns:
      A number in [−1, 1].
    """
    predictions, answers = _paired(predictions, answers)
    return pearson(mean_ranks(predictions), mean_ranks(answers))


METRICS: dict[str, Measure] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
"""The measures by their names."""
