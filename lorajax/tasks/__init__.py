"""What a batch means to a model: how it is prepared, and what is asked of the answers.

A task is all that training, ranks and starts know of the data's kind. One for another kind is a
frozen dataclass with a `unit` and two methods, written as `images` and `texts` are.
"""

from lorajax.tasks import metrics
from lorajax.tasks.base import (
    Asks,
    Batch,
    Padded,
    Predicts,
    Scores,
    Task,
    Totals,
    classified,
    per_sample,
    standing,
    totals,
)
from lorajax.tasks.images import SMOOTHING, Images
from lorajax.tasks.masked import MaskedTokens
from lorajax.tasks.metrics import METRICS
from lorajax.tasks.shapes import expected
from lorajax.tasks.texts import NextToken, Regression, Texts, takes

__all__ = [
    "METRICS",
    "SMOOTHING",
    "Asks",
    "Batch",
    "Images",
    "MaskedTokens",
    "NextToken",
    "Padded",
    "Predicts",
    "Regression",
    "Scores",
    "Task",
    "Texts",
    "Totals",
    "classified",
    "expected",
    "metrics",
    "per_sample",
    "standing",
    "takes",
    "totals",
]
