"""Data to fine-tune on: tables of samples, the order of batches, sets of images."""

from lorajax.data import text
from lorajax.data.augment import POLICIES, policy, resize
from lorajax.data.folders import shows_images
from lorajax.data.order import Buckets, Order, batches, hold_out
from lorajax.data.packs import read_idx
from lorajax.data.pictures import ImageFiles
from lorajax.data.sets import EMBEDDED, NAMED, load
from lorajax.data.table import Column, Dataset, Rows, Table, stacked

__all__ = [
    "EMBEDDED",
    "NAMED",
    "POLICIES",
    "Buckets",
    "Column",
    "Dataset",
    "ImageFiles",
    "Order",
    "Rows",
    "Table",
    "batches",
    "hold_out",
    "load",
    "policy",
    "read_idx",
    "resize",
    "shows_images",
    "stacked",
    "text",
]
