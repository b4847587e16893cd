"""What a batch means to a model: how it is prepared, and what is asked of the answers.

A task is all that training, ranks and starts know of the data's kind. One for another kind is a
frozen dataclass with a `unit` and two methods, written as `images` is.
"""

from lorajax.tasks.base import Batch, Scores, Task, Totals, classified, per_sample, totals
from lorajax.tasks.images import SMOOTHING, Images

__all__ = [
    "SMOOTHING",
    "Batch",
    "Images",
    "Scores",
    "Task",
    "Totals",
    "classified",
    "per_sample",
    "totals",
]
