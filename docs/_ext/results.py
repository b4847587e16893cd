"""Tables of the benchmarks from `benchmarks/results/`, and the gallery of what was drawn."""

import functools
import json
import pathlib
import sys
from typing import Any

import cards
from tables import rows_of, size_of, time_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
COMMITTED = ROOT / "sims" / "spectra.png"


def sweeps(found: dict[str, Any]) -> str:
    """Time and error of a lane, by case, size and engine; the scan over lanes apart."""
    cases, shown = {"reducible": "matrix factorization", "two_layer": "two frozen layers"}, []
    seen: set[tuple] = set()
    for row in found["rows"]:
        mark = (row["case"], row["size"], row["engine"])
        if mark in seen:  # the scan over the number of lanes repeats cases
            continue
        seen.add(mark)
        shown.append(
            (
                f"{cases[row['case']]}, {row['size']}×{row['size']}",
                f"`{row['engine']}`",
                f"{row['lanes']}",
                time_of(row["seconds_per_lane"]),
                f"{row['max_error']:.0e}",
            )
        )
    machine = found["machine"]
    head = f"On {machine['cores']} cores ({machine['cpu']}), jax {machine['jax']}.\n\n"
    return head + rows_of("problem | engine | lanes | a lane | largest error", shown)


def anatomy(found: dict[str, Any]) -> str:
    """Time of a point of the closed form under XLA's flags, and what its loops come to."""
    settings = found["settings"]
    own = next(iter(settings.values()))
    shown = [
        (
            name,
            time_of(1e-9 * each["point"]),
            f"{each['point'] / own['point']:.2f}",
            f"{each['loops']}",
            time_of(1e-9 * each["bytes alone"]),
            time_of(1e-9 * each["transcendentals"] * each["passes"]["exp"]),
        )
        for name, each in settings.items()
    ]
    head = "flags | a point | of XLA's own | loops | their bytes alone | their exponentials alone"
    tail = (
        f"\n\nA point has {own['operations']:.0f} operations and {own['transcendentals']:.0f} "
        f"exponentials and roots, and reads and writes {own['bytes']:.0f} bytes (rotations counted "
        "once), by XLA's own analysis."
    )
    layers = [
        (
            f"{size}×{size}, {name}",
            time_of(1e-6 * part["step"]),
            time_of(1e-6 * part["slopes"]),
            time_of(1e-6 * part["sums"]),
            time_of(1e-6 * part["operations alone"]),
            f"{part['rate of the product']:.0%}",
        )
        for name, each in settings.items()
        for size, part in each.get("two layers", {}).items()
        if name in ("XLA's own", "512 bits")
    ]
    parts = (
        "two layers | a step of eight lanes | its slopes | its sums of slopes | its operations at "
        "a large product's rate | that a product with W1 has"
    )
    return rows_of(head, shown) + tail + ("\n\n" + rows_of(parts, layers) if layers else "")


def agreement(found: dict[str, Any]) -> str:
    """Differences by engine, devices and chunk."""
    shown = [
        (f"`{r['engine']}`", str(r["devices"]), str(r["chunk"]), f"{r['difference']:.0e}")
        for r in found["rows"]
    ]
    return rows_of("engine | devices | lanes in a chunk | largest difference", shown)


def adapters(found: dict[str, Any]) -> str:
    """Memory, steps, ranks and Tucker updates."""
    lora, full, step = found["memory"]["lora"], found["memory"]["full"], found["step"]
    split, signs = found["ranks"]["split_half"], found["ranks"]["random_signs"]
    tucker = found["tucker"]
    return rows_of(
        "what | lorajax | beside it",
        [
            (
                "bytes for each parameter that trains (rank 8)",
                f"{lora['bytes_per_parameter']:.1f}",
                f"{full['bytes_per_parameter']:.1f} (full fine-tuning)",
            ),
            (
                "a step",
                time_of(step["lorajax"]),
                f"{time_of(step['flax nnx.LoRA'])} (Flax's LoRA), {time_of(step['full'])} (full)",
            ),
            (
                "ranks from split halves",
                time_of(split["select_ranks_s"]),
                f"{time_of(split['passes_s'])} (its gradients alone)",
            ),
            (
                "ranks from random signs",
                time_of(signs["select_ranks_s"]),
                f"{time_of(signs['passes_s'])} (its gradients alone)",
            ),
            (
                "error of a Tucker update of a convolution",
                f"{tucker['error_tucker']:.0e} ({tucker['parameters_tucker']} parameters)",
                f"{tucker['error_lora']:.2g} (LoRA, {tucker['parameters_lora']} parameters)",
            ),
        ],
    )


def finetune(found: dict[str, Any]) -> str:
    """A step on ViT-B/16 by engine."""
    shown = [
        (
            engine["version"],
            time_of(engine["seconds_per_step"]),
            " to ".join(time_of(x) for x in engine["spread"]),
            size_of(engine["peak_bytes"]),
            f"{engine['share_of_gemm']:.0%}",
        )
        for engine in found["engines"].values()
    ]
    return rows_of("engine | a step | spread | peak memory | share of the GEMM peak", shown)


def texts(found: dict[str, Any]) -> str:
    """A step on language models by engine."""
    shown = []
    for name, model in found["models"].items():
        for engine in model["engines"].values():
            shown.append(
                (
                    f"{name}, {engine['version']}",
                    time_of(engine["processor_seconds"]),
                    time_of(engine["seconds_per_step"]),
                    " to ".join(time_of(x) for x in engine["spread"]),
                    " / ".join(map(size_of, engine["peak_bytes_after"].values())),
                    size_of(engine["peak_bytes"]),
                )
            )
    worst = max(m["largest_difference_of_losses"] for m in found["models"].values())
    tail = f"\n\nThe losses of the two differ by at most {worst:.0e} over the steps compared."
    names = "model and engine | processor | clock | its spread"
    names += " | peak after imports / model read / first step | peak memory"
    return rows_of(names, shown) + tail


def stores(found: dict[str, Any]) -> str:
    """Memory and time of many lanes against few."""
    shown = [
        (f"{r['lanes']:,}", time_of(r["seconds"]), size_of(r["peak_bytes"]), str(r["failed"]))
        for r in (found["few"], found["many"])
    ]
    table = rows_of("lanes | time | peak memory | failed", shown)
    if parts := found.get("parts"):
        each = ", ".join(f"{name} {value:.1f}" for name, value in parts.items())
        table += f"\n\nMicroseconds a lane, a part at a time and nothing written: {each}."
    return table


def gradients(found: dict[str, Any]) -> str:
    """Cost of a derivative in runs of the flow, for each way to take it."""
    shown = [
        (
            f"{row['case']}, {row['size']}",
            f"{row['engine']}, {row['task']}",
            f"{time_of(row['seconds'])} ({' to '.join(map(time_of, row['spread']))})",
            f"{row['flows']:.1f}",
            size_of(row["bytes"]),
            f"{row['off']:.0e}" if row.get("off") else "",
        )
        for row in found["rows"]
    ]
    return rows_of("flow | what | time | flows | memory | off by", shown)


def waiting(found: dict[str, Any]) -> str:
    """Seconds of the commands, and what they go to."""
    shown = [
        (
            f"`lorajax {name.replace(', ', '`, ')}",
            f"{each['seconds']:.0f} s ({each['spread'][0]:.0f} to {each['spread'][1]:.0f})",
            *(f"{each[x]:.0f} s" for x in ("processor", "tracing", "compiling", "reading")),
            f"{each['programs']:.0f}",
        )
        for name, each in found["commands"].items()
    ]
    head = f"On {found['cores']} cores whose large float64 product has "
    head += f"{found['gemm_flop_rate'] / 1e9:.0f} GFLOP/s.\n\n"
    names = "command | clock | processor | tracing | compiling | reading | programs"
    return head + rows_of(names, shown)


def _read(name: str, folder: str = "") -> dict[str, Any]:
    return json.loads((RESULTS / folder / f"{name}.json").read_text(encoding="utf-8"))


WIDE = "wide"
"""Folder of the results on a processor that computes with 512 bits at a time."""


def goals() -> str:
    """What was before, what was asked for and what the tables have, on two processors."""
    here, there = _reached(""), _reached(WIDE)
    asked = {
        "matrix factorization, 512×512, times the scipy loop": ("23,000", ""),
        "the same, share of a large product's rate": ("10.7%, of one half as fast", "25%"),
        "two layers, 64 and 100, times the scipy loop": ("", "25"),
        "two layers, share of a large product's rate": ("", "40%"),
        "10⁶ lanes": ("", "8 s, 1 GB"),
        "a gradient backward, in flows: closed form, adjoint": ("", "bounded"),
        "a step of ViT-B/16, time and memory of PEFT's": ("0.98, 0.93", "0.85, 0.85"),
        "a step of MiniLM, likewise": ("", "0.85, 0.85"),
        "a step of SmolLM2, likewise": ("", "0.85, 0.85"),
        "a step of SmolLM2 on instructions, likewise": ("", "0.85, 0.85"),
        "`lorajax validate`, first": ("130 s", "75 s"),
        "`lorajax validate`, second": ("56 s", "40 s"),
        "`lorajax finetune`, first": ("", "35 s"),
    }
    # A name that one of the two spells otherwise would leave a cell empty.
    assert asked.keys() <= here.keys() and there.keys() <= asked.keys()
    shown = [(what, *wanted, there.get(what, ""), here[what]) for what, wanted in asked.items()]
    rates = (_read("sweeps", folder)["machine"]["gemm_flop_rate"] / 1e9 for folder in (WIDE, ""))
    names = "what | before | asked for | " + " | ".join(f"{rate:.0f} GFLOP/s" for rate in rates)
    return rows_of(names, shown)


def _reached(folder: str) -> dict[str, str]:
    """What the files of a folder have, by the name of the goal."""
    flows, vit, stored, words = (
        _read(name, folder) for name in ("sweeps", "finetune", "stores", "texts")
    )

    def lane(case: str, size: int, engine: str) -> dict[str, Any]:
        named = (case, size, engine)
        rows = (r for r in flows["rows"] if (r["case"], r["size"], r["engine"]) == named)
        return next(rows)

    def times(case: str, size: int, engine: str) -> str:
        ours, peer = (lane(case, size, each) for each in (engine, "scipy_dop853_residual"))
        ratio = peer["seconds_per_lane"] / ours["seconds_per_lane"]
        return f"{ratio:,.0f}" if ratio > 100 else f"{ratio:.1f}"

    def share(case: str, size: int, engine: str) -> str:
        return f"{lane(case, size, engine)['fraction_of_gemm']:.0%}"

    two, many = ("two_layer", "full_ode"), stored["many"]
    assert many["lanes"] == 10**6
    found = {
        "matrix factorization, 512×512, times the scipy loop": times(
            "reducible", 512, "closed_form"
        ),
        "the same, share of a large product's rate": share("reducible", 512, "closed_form"),
        "two layers, 64 and 100, times the scipy loop": " and ".join(
            times(two[0], size, two[1]) for size in (64, 100)
        ),
        "two layers, share of a large product's rate": " and ".join(
            share(two[0], size, two[1]) for size in (64, 100)
        ),
        "10⁶ lanes": f"{time_of(many['seconds'])}, {size_of(many['peak_bytes'])}",
    }
    steps = {
        "a step of ViT-B/16, time and memory of PEFT's": vit,
        "a step of MiniLM, likewise": words["models"]["minilm"],
        "a step of SmolLM2, likewise": words["models"]["smollm2"],
        "a step of SmolLM2 on instructions, likewise": words["models"]["instructions"],
    }
    found |= {what: f"{each['time']:.2f}, {each['memory']:.2f}" for what, each in steps.items()}
    if not folder:
        backward = {
            row["engine"]: f"{row['flows']:.1f}"
            for row in _read("gradients")["rows"]
            if (row["case"], row["size"], row["task"]) == ("one update", 512, "backward")
        }
        found["a gradient backward, in flows: closed form, adjoint"] = (
            f"{backward['closed form']} and {backward['checkpointed adjoint']}"
        )
        for name, each in _read("waiting")["commands"].items():
            command, turn = name.split(", ")
            found[f"`lorajax {command}`, {turn}"] = f"{each['seconds']:.0f} s"
    return found


TABLES = {
    "sweeps": sweeps,
    "waiting": waiting,
    "gradients": gradients,
    "anatomy": anatomy,
    "agreement": agreement,
    "adapters": adapters,
    "finetune": finetune,
    "texts": texts,
    "stores": stores,
}


def table(name: str) -> str:
    """The table of one benchmark; the tables of that of a card, which may not have run."""
    if name == "gpu":
        return cards.page(RESULTS / "gpu.json")
    return goals() if name == "goals" else TABLES[name](_read(name))


def plot_sweeps(path: pathlib.Path) -> None:
    """Draws the cost of a lane from the result of `python -m benchmarks sweeps`."""
    sys.path.append(str(ROOT))
    from benchmarks import sweeps as benchmark

    rows = json.loads((RESULTS / "sweeps.json").read_text(encoding="utf-8"))["rows"]
    benchmark.plot(rows, str(path))


def flat(path: pathlib.Path) -> str:
    """A figure's name among all of them."""
    return path.name if path.parent.name == "figures" else f"{path.parent.name}-{path.name}"


@functools.cache
def figures() -> list[pathlib.Path]:
    """The committed figure, and those that `make figures` left in out/."""
    made = [p for p in sorted((ROOT / "out").glob("*/*.png")) if p.with_suffix(".json").exists()]
    # A command that was given such a folder leaves figures there, too.
    return [COMMITTED, *(p for p in made if (ROOT / "sims" / p.parent.name).is_dir())]


def picture(path: pathlib.Path, link: str, alt: str) -> str:
    """A figure that is shown with letters as large as the page's own."""
    from lorajax import plots

    width = plots.width_on_page(path.read_bytes()[:24])
    return f"```{{image}} {link}\n:alt: {' '.join(alt.split())}\n:width: {width}px\n```\n"


def shown(path: pathlib.Path, title: str) -> str:
    """A figure in the gallery, which scrolls within itself on a narrow page."""
    from lorajax import plots

    image = picture(path, f"/generated/gallery/{flat(path)}", title)
    wide = plots.width_on_page(path.read_bytes()[:24]) > 1.1 * 3 * plots.COLUMN[0] * plots.SHOWN
    return f"::::{{container}} scroll{' wide' * wide}\n{image}::::\n"


def program(figure: pathlib.Path) -> str:
    """What draws a figure of out/: the file of its name, or one that names several figures."""
    folder = ROOT / "sims" / figure.parent.name
    named = (p for p in sorted(folder.glob("*.py")) if f'"{figure.stem}"' in p.read_text("utf-8"))
    own = folder / f"{figure.stem}.py"
    return str((own if own.exists() else next(named, own)).relative_to(ROOT))


def gallery() -> str:
    """Every figure with the docstring of the program that drew it."""
    parts = []
    for path in figures():
        if path == COMMITTED:
            parts += [
                "## Spectra over the scale of the start\n",
                shown(path, "Singular values over time, simulated and predicted"),
                "Singular values of A B under gradient flow, 60×40, rank 5, for three scales of "
                "the start; dashed the exact law of a mode, dotted the published tanh² law.\n",
                "Made by `lorajax spectra`.\n",
            ]
            continue
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        title, _, rest = found.get("caption", path.stem).partition("\n")
        place = program(path)
        parts += [
            f"## {title.rstrip('.')}\n",
            shown(path, title),
            rest.strip() + "\n",
            f"Made by `python {place} --profile {found.get('profile', 'quick')}`.\n",
        ]
    if len(parts) == 4:
        parts.append("`make figures` before `make docs` adds the figures of `sims/` to this page.")
    return "\n".join(parts)
