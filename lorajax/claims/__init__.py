"""Claims: statements of theory, each with a check, a tolerance, a control and a verdict.

One module a paper:

* `gradient_flow`: facts and exact solutions of every LoRA flow,
* `spectral_dynamics`: spectral dynamics of LoRA and rank selection (OpenReview gg2Wb2HPOI),
* `xu2025`: LoRA in matrix factorization under gradient flow (arXiv:2503.06982),
* `jang2024`: LoRA in the NTK regime (arXiv:2402.11867),
* `kim2025`: a global minimum, or a loud failure (arXiv:2502.09376),
* `rushka2026`: the rank–accuracy trade-off (arXiv:2602.10212).

Claims on real networks, `finetuning`, are in `lorajax.finetune.claims`: models lie above this room.
"""

import importlib

from lorajax.claims.base import (
    PROFILES,
    REGISTRY,
    Assumption,
    Claim,
    Control,
    Evidence,
    Outcome,
    Run,
    claim,
    examine,
    examine_all,
    select,
)

# The order of the modules is the order of the tables.
PAPERS = ("gradient_flow", "spectral_dynamics", "xu2025", "jang2024", "kim2025", "rushka2026")
for _paper in PAPERS:
    importlib.import_module(f"lorajax.claims.{_paper}")

__all__ = [
    "PAPERS",
    "PROFILES",
    "REGISTRY",
    "Assumption",
    "Claim",
    "Control",
    "Evidence",
    "Outcome",
    "Run",
    "claim",
    "examine",
    "examine_all",
    "select",
]
