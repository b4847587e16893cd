"""Fine-tuning: of one adapter or of many at once, with the theory's quantities on the way."""

from lorajax.finetune.experiments import interval, masked, picked, run_of
from lorajax.finetune.probes import Probe, directions, measure, paths
from lorajax.finetune.setup import (
    adapt,
    fit_head,
    gradients_of,
    heads,
    moments_of,
    select_ranks,
)
from lorajax.finetune.training import Metrics, Recipe, Record, State, Trainer, fit

__all__ = [
    "Metrics",
    "Probe",
    "Recipe",
    "Record",
    "State",
    "Trainer",
    "adapt",
    "directions",
    "fit",
    "fit_head",
    "gradients_of",
    "heads",
    "interval",
    "masked",
    "measure",
    "moments_of",
    "paths",
    "picked",
    "run_of",
    "select_ranks",
]
