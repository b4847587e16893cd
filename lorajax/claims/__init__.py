"""Claims: statements of theory, each with a check, a tolerance, a control and a verdict.

One module a paper:

* `gradient_flow`: facts and exact solutions of every LoRA flow,
* `spectral_dynamics`: spectral dynamics of LoRA and rank selection (OpenReview gg2Wb2HPOI),
* `xu2025`: LoRA in matrix factorization under gradient flow (arXiv:2503.06982),
* `jang2024`: LoRA in the NTK regime (arXiv:2402.11867),
* `kim2025`: a global minimum, or a loud failure (arXiv:2502.09376),
* `rushka2026`: the rank–accuracy trade-off (arXiv:2602.10212),
* `loraone2025`: the one-step gradient as a start (arXiv:2502.01235),
* `lora_ga2024`: a start whose first step is the best (arXiv:2407.05000),
* `eva2024`: a start that explains the inputs (arXiv:2410.07170),
* `allora2024`: rates that fall with the update (arXiv:2410.09692),
* `linear_attention2025`: plateaus of in-context learning (arXiv:2501.16265),
* `dayi_chen2024`: rank-one fine-tuning beyond kernels (arXiv:2411.15385).

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
PAPERS = (
    "gradient_flow",
    "spectral_dynamics",
    "xu2025",
    "jang2024",
    "kim2025",
    "rushka2026",
    "loraone2025",
    "lora_ga2024",
    "eva2024",
    "allora2024",
    "linear_attention2025",
    "dayi_chen2024",
)
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
