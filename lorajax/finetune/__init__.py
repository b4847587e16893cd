"""Fine-tuning: of one adapter or of many at once, with the theory's quantities on the way."""

from lorajax.finetune.experiments import masked, run_of
from lorajax.finetune.probes import Probe, directions, measure
from lorajax.finetune.training import Metrics, Recipe, Record, State, Trainer, fit

__all__ = [
    "Metrics",
    "Probe",
    "Recipe",
    "Record",
    "State",
    "Trainer",
    "directions",
    "fit",
    "masked",
    "measure",
    "run_of",
]
