"""Claims: statements of theory, each with a check, a tolerance, a control and a verdict.

One module (or folder) a paper, found from here; its row in `record.json` says where it stands:

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
* `dayi_chen2024`: rank-one fine-tuning beyond kernels (arXiv:2411.15385),
* `riemannian2024`, `reflora2025`, `lora_rite2024`: descents that forget how an update was split
  (arXiv:2402.02347, 2505.18877, 2410.20625),
* `intruders2026`: when an update stands on top of a weight (arXiv:2607.23711),
* `tight_frames2026`: no A beats orthonormal columns where the gradient is unknown,
* `learning_rates`: `rslora2023`, `lora_plus2024` and `mua2026`, rates and multipliers across width
  and rank (arXiv:2312.03732, 2402.12354, 2602.06204),
* `whitened2026`: ranks from gradients that the inputs whiten,
* `gora2025`: a start along the gradient for any rank (GoRA),
* `guidance`: base + γ(adapted − base), of outputs and of weights.

Claims on real networks, `finetuning`, are in `lorajax.finetune.claims`: models lie above this room.
"""

import importlib
import json
import pkgutil
from importlib import resources

from lorajax.claims.base import (
    ALTERATIONS,
    PROFILES,
    REGISTRY,
    SAMPLING_RISK,
    Assumption,
    Claim,
    Control,
    Evidence,
    Outcome,
    Run,
    claim,
    examine,
    examine_all,
    most_by_chance,
    resolving_power,
    select,
    standard_errors,
)

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

# The order of the record is the order of the tables; a claim without a row comes last.
_ROWS = list(json.loads(resources.files(__name__).joinpath("record.json").read_text("utf-8")))
for _id in sorted(REGISTRY, key=lambda id: _ROWS.index(id) if id in _ROWS else len(_ROWS)):
    REGISTRY[_id] = REGISTRY.pop(_id)

__all__ = [
    "ALTERATIONS",
    "PROFILES",
    "REGISTRY",
    "SAMPLING_RISK",
    "Assumption",
    "Claim",
    "Control",
    "Evidence",
    "Outcome",
    "Run",
    "claim",
    "examine",
    "examine_all",
    "most_by_chance",
    "resolving_power",
    "select",
    "standard_errors",
]
