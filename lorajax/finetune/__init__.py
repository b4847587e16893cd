"""Fine-tuning: of one adapter or of many at once, with the theory's quantities on the way.

| file | holds |
|---|---|
| `training` | pure steps that train a model on a task |
| `recipes` | how to train, and what the command trains with |
| `setup` | what comes before: a head that fits, gradients, ranks, adapters |
| `runs` | one whole run: looks on the way, checkpoints, a history |
| `footprints`, `traces` | what a step takes in bytes and operations, by its trace alone |
| `sharding` | batches and weights over several devices |
| `bridge` | ranks, starts and adapters as folders that PEFT trains on from |
| `experiments`, `budgets` | runs as lanes of a sweep; AdaLoRA |
| `allocations`, `contest` | ways to choose ranks for one budget, and how they compare |
| `probes`, `checkpoints` | the theory's quantities; full state through orbax |
| `insight`, `linear` | a finished run explained; what its linearized model would have reached |
| `claims` | what is claimed of a real network |
"""

from lorajax.finetune.experiments import Ends, Run, ends, interval, mask, picked, run_of
from lorajax.finetune.footprints import Footprint, abstract_lora, footprint
from lorajax.finetune.insight import Insight, caveats, insights, why_no_law
from lorajax.finetune.linear import check_linear, linear_optimum
from lorajax.finetune.probes import Probe, directions, measure, paths
from lorajax.finetune.recipes import Recipe
from lorajax.finetune.runs import (
    Looks,
    Observer,
    Outcome,
    Prepared,
    Stopped,
    Store,
    check_metrics,
    check_start,
    in_full,
    judge,
    prepare,
    run,
    stable_ranks,
    targets_of,
    widened,
)
from lorajax.finetune.setup import adapt, fit_head, gradients_of, moments_of, select_ranks
from lorajax.finetune.training import Metrics, Record, State, Trainer, fit, order_of
from lorajax.finetune.transfer import Transfer, transfer

__all__ = [
    "Ends",
    "Footprint",
    "Insight",
    "Looks",
    "Metrics",
    "Observer",
    "Outcome",
    "Prepared",
    "Probe",
    "Recipe",
    "Record",
    "Run",
    "State",
    "Stopped",
    "Store",
    "Trainer",
    "Transfer",
    "abstract_lora",
    "adapt",
    "caveats",
    "check_linear",
    "check_metrics",
    "check_start",
    "directions",
    "ends",
    "fit",
    "fit_head",
    "footprint",
    "gradients_of",
    "in_full",
    "insights",
    "interval",
    "judge",
    "linear_optimum",
    "mask",
    "measure",
    "moments_of",
    "order_of",
    "paths",
    "picked",
    "prepare",
    "run",
    "run_of",
    "select_ranks",
    "stable_ranks",
    "targets_of",
    "why_no_law",
    "widened",
    "transfer",
]
