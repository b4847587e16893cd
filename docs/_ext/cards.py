"""What `python -m benchmarks gpu` found on a card, as tables."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from tables import rows_of, size_of, time_of

NONE = (
    "Nothing of this project has run on a GPU so far: there is nothing to show. The command's tiny "
    "form (`--tiny`), which runs every stage on any device, is tested."
)
MODELS = {"vit": "ViT-B/16", "bert": "BERT-base", "llama": "SmolLM2-135M"}
Stages = dict[str, dict[str, Any]]


def page(path: pathlib.Path) -> str:
    """All tables of a result, or that there is none."""
    if not path.exists():
        return NONE
    found = json.loads(path.read_text(encoding="utf-8"))
    stages = found["stages"]
    parts = [head(found)]
    for title, part in PARTS:
        if made := part(stages):
            parts.append(f"**{title}**\n\n{made}")
    if gone := unfinished(found):
        parts.append("Not measured: " + "; ".join(gone) + ".")
    return "\n\n".join(parts)


def head(found: dict[str, Any]) -> str:
    """The card and the versions."""
    card = found["stages"]["card"]
    versions = card["versions"]
    names = ("jax", "torch", "transformers", "peft", "torchdiffeq")
    told = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    tiny = " In the tiny form, whose figures mean nothing." if found["tiny"] else ""
    return (
        f"On one {card['driver'] or card['name']}, {told}; {found['seconds']:.0f} s in all.{tiny}"
    )


def rows(stages: Stages, name: str) -> list[dict[str, Any]]:
    """The rows of a stage, none where it has not begun."""
    return stages.get(name, {}).get("rows", [])


def right(stages: Stages) -> str:
    """How much of what was checked is right."""
    shown = []
    if claims := rows(stages, "claims"):
        good = sum(row["verdict"] == row["recorded"] for row in claims)
        asked = len(stages["claims"]["asked"])
        shown.append((f"verdicts as on record, of {asked} claims", f"{good} of {len(claims)}", ""))
    for name, what in (
        ("adapters", "losses of steps in float64 as on the processor"),
        ("fixtures", "PEFT's logits of its files, in float32"),
        ("resumed", "sweeps that were stopped and went on"),
    ):
        if several := rows(stages, name):
            good = sum(row["right"] for row in several)
            largest = max(row["difference"] for row in several)
            shown.append((what, f"{good} of {len(several)}", f"{largest:.0e}"))
    return rows_of("what | right | largest difference", shown) if shown else ""


def rates(stages: Stages) -> str:
    """Products of large matrices against what the maker states."""
    card = stages["card"]
    shown = []
    for dtype, rate in card.get("products", {}).items():
        stated = card["peaks"].get(dtype)
        share = f"{rate / stated:.0%} of {stated / 1e12:.4g}" if stated else "unknown"
        shown.append((dtype, f"{rate / 1e12:.3g}", share))
    if not shown:
        return ""
    source = f"\n\nStated by: {card['peaks_from']}." if card["peaks_from"] else ""
    return rows_of("dtype | TFLOP/s of a product | of the stated", shown) + source


def lanes(stages: Stages) -> str:
    """Lanes a second, by engine."""
    shown = [
        (
            row["engine"],
            f"{row['lanes']:,}",
            row["dtype"],
            f"{row['lanes_per_second']:,.0f}",
            f"{row['max_error']:.0e}",
        )
        for name in ("lanes", "lanes_torch")
        for row in rows(stages, name)
    ]
    return (
        rows_of("engine | lanes | dtype | lanes a second | largest error", shown) if shown else ""
    )


def _step(what: str, row: dict[str, Any]) -> tuple[str, ...]:
    share = row["utilization"]
    return (
        what,
        time_of(row["seconds_per_step"]),
        " to ".join(time_of(x) for x in row["spread"]),
        f"{row['units_per_second']:,.0f} {row['unit']}",
        f"{row['flop_rate'] / 1e12:.3g}" + ("" if share is None else f" ({share:.0%})"),
        size_of(row["peak_bytes"])
        if row["peak_bytes"]
        else f"{size_of(row['planned_bytes'])} planned",
    )


STEP = "{} | a step | spread | a second | TFLOP/s (of the stated peak) | peak memory"


def steps(stages: Stages) -> str:
    """LoRA steps by model and engine."""
    shown = [
        _step(f"{model}, {row.get('version', row['engine'])}", row)
        for name, model in MODELS.items()
        for stage in (name, f"{name}_peft")
        for row in rows(stages, stage)
    ]
    if not shown:
        return ""
    tail = (
        "\n\nOperations are LoRA's own: 2 a weight and token forward and 2 backward, 4ND in all, "
        "with the adapters' and attention's products and without what our last block leaves out."
    )
    return rows_of(STEP.format("model and engine"), shown) + tail


def many(stages: Stages) -> str:
    """Many adapters at once."""
    shown = [_step(row["engine"], row) for row in rows(stages, "many")]
    if not shown:
        return ""
    stage = stages["many"]
    tail = (
        f"\n\n{stage['adapters']} adapters of BERT-base, {stage['batch']} × {stage['tokens']} each"
    )
    if "ratio" in stage:
        tail += f"; at once is {stage['ratio']:.2f} times as fast"
    return rows_of(STEP.format("way"), shown) + tail + "."


def attention(stages: Stages) -> str:
    """Attention alone, by shape and way."""
    shown = [
        (
            f"{row['shape']}, {row['way']}",
            time_of(row["seconds"]) if "seconds" in row else "refused",
            f"{row['difference']:.0e}" if "difference" in row else "—",
        )
        for row in rows(stages, "attention")
    ]
    return rows_of("shape and way | forward and backward | difference", shown) if shown else ""


def profile(stages: Stages) -> str:
    """Where the time of a step goes."""
    stage = stages.get("profile", {})
    shown = [(row["kind"], f"{row['share']:.0%}") for row in rows(stages, "profile")]
    if not shown:
        return ""
    tail = f"\n\nThe device is busy {stage['busy']:.0%} of the time"
    tail += f"; {stage['kernels']} kernels a step."
    return rows_of("kind of kernel | share of its time", shown) + tail


PARTS: tuple[tuple[str, Callable[[Stages], str]], ...] = (
    ("Is it right?", right),
    ("Products", rates),
    ("Flows, 64×64, singular values at 200 times", lanes),
    ("LoRA steps, base in bfloat16, adapters of rank 16 in float32", steps),
    ("Many adapters on one base", many),
    ("Attention alone, in bfloat16", attention),
    ("A step of ViT-B/16", profile),
)


def unfinished(found: dict[str, Any]) -> list[str]:
    """Stages that were not finished, each with the reason."""
    said = []
    for name, stage in found["stages"].items():
        if stage["state"] == "missing":
            said.append(f"{name} (not installed: {', '.join(stage['missing'])})")
        elif stage["state"] != "done":
            said.append(f"{name} ({stage.get('error', stage['state'])})")
    return said
