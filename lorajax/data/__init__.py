"""Images to fine-tune on: sets, the order of batches, and augmentations on the device."""

from lorajax.data.augment import policy, resize
from lorajax.data.order import Order, batches, hold_out
from lorajax.data.pictures import ImageFiles
from lorajax.data.sets import NAMED, Dataset, Split, load, read_idx

__all__ = [
    "NAMED",
    "Dataset",
    "ImageFiles",
    "Order",
    "Split",
    "batches",
    "hold_out",
    "load",
    "policy",
    "read_idx",
    "resize",
]
