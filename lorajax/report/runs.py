"""`report.html` of `lorajax finetune`: a run explained, with the source of every number."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lorajax.report import charts, page
from lorajax.report.charts import Series
from lorajax.report.page import Html, element

SCHEMA = 1


class Quantity(NamedTuple):
    """A number that a layer is described by.

    Attributes:
      field: of `finetune.Insight`.
      name: in words.
      unit: of the number; empty for none.
      source: what computes it, and where it comes from with its standing.
    """

    field: str
    name: str
    unit: str
    source: str


QUANTITIES = (
    Quantity(
        "rank", "chosen rank", "", "the option --rank, or the rule of --rule (`lorajax.ranks`)"
    ),
    Quantity(
        "used",
        "used rank",
        "",
        "effective rank exp(−Σ p ln p), p = σ/Σσ, of the update (spectra.effective_rank; Roy, "
        "Vetterli 2007, recalled; theory §9)",
    ),
    Quantity("stable", "stable rank", "", "Σσ²/σ₁² of the update (finetune.insights; definition)"),
    Quantity(
        "regime",
        "regime, 1 lazy → 0 rich",
        "",
        "K(0)/K(T), K = |Aᵀu|² + |Bv|² along the update's top singular vectors: the share of the "
        "tangent kernel that was there before training (finetune.insights; theory §2.2, derived: "
        "K is the factor √(λ² + 4σ²) of a mode's growth)",
    ),
    Quantity(
        "regime_law",
        "regime by the law",
        "",
        "K(0)/√(λ² + 4σ²) with the start's λ = |Aᵀu|² − |Bv|² and the learned σ (theory §2.2, "
        "derived): equal to the regime where descent conserves λ",
    ),
    Quantity(
        "drift",
        "imbalance drift",
        "",
        "‖Λ(T) − Λ(0)‖ over ‖A‖² + ‖B‖², Λ = AᵀA − BBᵀ (as spectra.imbalance_drift; theory §1, "
        "derived: 0 under gradient flow, of the order of the step under descent; momentum and "
        "Adam break it)",
    ),
    Quantity(
        "misalignment",
        "misalignment",
        "",
        "1 − |cos| of [A; Bᵀ] and the top direction of the first gradient at the last look "
        "(spectra.top_misalignment; Xu et al. 2025, arXiv:2503.06982, stated)",
    ),
    Quantity(
        "strength",
        "strength",
        "weight",
        "largest singular value of the update, scaling included (adapters.intruders)",
    ),
    Quantity(
        "threshold",
        "intruder threshold",
        "weight",
        "1/√D_W(b⁺) of the frozen weight's spectrum (ranks.intruder_threshold; arXiv:2607.23711, "
        "abstract read; Benaych-Georges, Nadakuditi 2012, recalled; theory §9)",
    ),
    Quantity(
        "intruding",
        "intruding directions",
        "",
        "singular values of the update above the threshold (adapters.intruders; as above)",
    ),
    Quantity("alpha", "alpha", "", "numerator of the scaling: the option --alpha, or the rank"),
    Quantity(
        "most",
        "alpha at which none intrudes",
        "",
        "alpha · threshold / strength (adapters.intruders; as above)",
    ),
    Quantity(
        "agrees",
        "early law holds to step",
        "",
        "the last look at which the largest singular value is within 10 % of laws.early_descent "
        "(theory §4, reconstructed; for networks the claim finetuning.early_factors, derived)",
    ),
)

LINEARIZED = (
    ("decay", "decay w", "the option --linearized"),
    ("samples", "training samples", "a random part of the training data (finetune.linear_optimum)"),
    ("loss", "training loss L̂ at the optimum", "of the model linearized in the adapted kernels "
     "(adapters.linearized; Jang, Lee, Ryu 2024, arXiv:2402.11867, stated)"),
    ("accuracy", "training accuracy there", "as above"),
    ("test_loss", "test loss there", "as above, on the data that the run was measured on"),
    ("test_accuracy", "test accuracy there", "as above"),
    ("objective", "objective L̂ + w‖X‖_*", "optima.minimize (accelerated proximal descent, "
     "recalled)"),
    ("lower_bound", "no update is below", "dual bound of optima.certify (theory §5, derived)"),
    ("gap", "gap", "objective less bound: the objective is within it of the global minimum"),
    ("nuclear", "‖X‖_* there", "sum of singular values over all layers"),
    ("rank", "largest rank there", "singular values above 1e-4 of the layer's largest"),
    ("run_loss", "training loss L̂ of this run's update", "its s(AB − A₀B₀) in the linearized "
     "model"),
    ("run_objective", "objective of this run's update", "as above, nuclear norm added"),
)  # fmt: skip


def _said(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else page.number(value)


def _percent(value: float | int) -> str:
    return f"{100 * value:.2f} %"


def to_html(run: Mapping[str, Any], history: Mapping[str, Any]) -> str:
    """The content of `report.html`.

    Args:
      run: what `run.json` holds.
      history: what `history.json` holds.

    Returns:
      One page that opens offline.
    """
    results, kind = run["results"], run["data"]["kind"]
    title = f"{run['model']['name']} on {run['data']['name']}"
    return page.shell(
        f"lorajax: {title}, {kind} loss {results['loss']:.4f}",
        element("h1", title),
        _tiles(run),
        element("p", "The same run again:"),
        element("pre", run["command"]),
        element("p", _facts(run), class_="meta"),
        *_curves(run, history, kind),
        *(_layers(run, history) if run["layers"] else ()),
        *_linearized(run.get("linearized")),
    )


def _tiles(run: Mapping[str, Any]) -> Html:
    results, model, kind = run["results"], run["model"], run["data"]["kind"]
    found = [(_percent(results["accuracy"]), f"{kind} accuracy", "")]
    found.append((f"{results['loss']:.4f}", f"{kind} loss [nats]", ""))
    for name, value in results.items():
        if name not in ("loss", "accuracy"):
            found.append((f"{value:.4f}", f"{kind} {name}", ""))
    share = 100 * model["trained"] / max(model["parameters"], 1)
    found.append((f"{model['trained']:,}", "parameters trained", f"{share:.1f} % of the model's"))
    speed = f"{run['per_second']:,.0f} {run['data']['unit']}/s"
    found.append((f"{run['seconds']:,.1f} s", "of training", speed))
    if layers := run["layers"]:
        count = sum(layer["intruding"] > 0 for layer in layers)
        found.append((f"{count} of {len(layers)}", "layers with intruders", ""))
    return element(
        "ul",
        (
            element("li", element("b", value), name, element("small", more) if more else None)
            for value, name, more in found
        ),
        class_="tiles",
    )


def _facts(run: Mapping[str, Any]) -> str:
    data, recipe, model = run["data"], run["recipe"], run["model"]
    versions = ", ".join(f"{k} {v}" for k, v in run["environment"].items() if k != "devices")
    return (
        f"{model['kind']} of {model['parameters']:,} parameters; {data['train']:,} training and "
        f"{data['test']:,} {data['kind']} {data['unit']}; {recipe['steps']:,} steps of "
        f"{recipe['batch_size']} with {recipe['optimizer']}, learning rate "
        f"{page.number(recipe['learning_rate'])} ({recipe['schedule']}, {recipe['warmup']} steps "
        f"of warm-up), seed {recipe['seed']}. {versions}."
    )


def _curves(run: Mapping[str, Any], history: Mapping[str, Any], kind: str) -> list[Html]:
    figures = []
    for name, label, log in (("loss", "loss [nats]", True), ("accuracy", "accuracy", False)):
        steps, values = charts.thinned(history["step"], history[name])
        lines = [
            Series(steps, values, "c0 faint", "training batches"),
            Series(history["test_step"], history[f"test_{name}"], "c1", kind),
        ]
        figures.append(charts.figure(lines, x="step", y=label, log=log, about=f"{name} over steps"))
    source = (
        f"Loss as the task reports it, averaged over {run['data']['unit']} (Trainer.step, "
        "Trainer.evaluate); batches in training mode, so augmented where the run augments."
    )
    if run["layers"]:
        looks = history["probes"]["singular_values"]
        lines = [
            Series(history["probe_step"], [look[i][0] for look in looks], "c2 faint")
            for i in range(len(run["layers"]))
        ]
        about = "largest singular value of each layer's update over steps"
        figures.append(charts.figure(lines, x="step", y="σ₁ of every update [weight]", about=about))
    return [
        element("h2", "Curves"),
        element("div", figures, class_="charts"),
        element("p", source, class_="meta"),
    ]


def _layers(run: Mapping[str, Any], history: Mapping[str, Any]) -> list[Html]:
    layers, law = run["layers"], run["law"]
    head = ("layer", "shape", "chosen rank", "used rank", "σ₁ [weight]", "regime", "drift",
            "intruding")  # fmt: skip
    rows = [
        (
            element("a", layer["path"] or "(model)", href=page.anchor(_id(layer))),
            f"{layer['shape'][0]}×{layer['shape'][1]}",
            str(layer["rank"]),
            *(_short(layer[name]) for name in ("used", "strength", "regime", "drift")),
            str(layer["intruding"]),
        )
        for layer in layers
    ]
    return [
        element("h2", "Layers at a glance"),
        _regimes(layers),
        page.table(head, rows, numbers=range(1, 8), dense=True),
        page.fold(
            "what these numbers are, and where they come from",
            page.table(("number", "source"), [(q.name, q.source) for q in QUANTITIES]),
        ),
        element("h2", "Learned spectra and the early law"),
        *_law(law),
        page.controls(["intruders", "no intruders"], "layers"),
        element("div", (_item(i, run, history) for i in range(len(layers)))),
    ]


def _short(value: float | int | None) -> str:
    return "–" if value is None else page.short(value)


def _id(layer: Mapping[str, Any]) -> str:
    return f"layer-{layer['path']}"


def _regimes(layers: Sequence[Mapping[str, Any]]) -> Html:
    """Regimes in a sentence."""
    known = sorted((x["regime"], x["path"]) for x in layers if x["regime"] is not None)
    if not known:
        return element("p", "No layer has learned anything.")
    (low, rich), (high, lazy) = known[0], known[-1]
    middle = known[len(known) // 2][0]
    return element(
        "p",
        f"The regime is the share of a layer's tangent kernel that was there before training: 1 "
        f"is lazy, towards 0 is rich. Here it goes from {page.short(low)} ({rich}) to "
        f"{page.short(high)} ({lazy}), with {page.short(middle)} in the middle.",
    )


def _law(law: Mapping[str, Any]) -> list[Html]:
    statement = (
        "Under plain descent from a small start the stacked factors Z = [A; Bᵀ] of every layer "
        "follow Z(k) = Π (1 + η H(M)) Z(0), M the negative gradient before training, until that "
        "gradient has moved (laws.early_descent; theory §4, reconstructed; claim "
        "finetuning.early_factors, derived)."
    )
    if law["why"]:
        return [element("p", statement, f" Measured only: {law['why']}, so the law says nothing "
                        "of this run.")]  # fmt: skip
    caveats = "; ".join(law["caveats"])
    return [
        element("p", statement, " Dashed in the figures below."),
        element("p", f"What it leaves out here: {caveats}.", class_="meta"),
    ]


def _item(i: int, run: Mapping[str, Any], history: Mapping[str, Any]) -> Html:
    layer = run["layers"][i]
    kind = "intruders" if layer["intruding"] else "no intruders"
    figures = _spectrum(i, layer, history), _compared(layer), _imbalance(i, history)
    rows = [
        (q.name, " ".join((_said(layer[q.field]), q.unit)).strip(), q.source)
        for q in QUANTITIES
        if not (q.field == "agrees" and layer["agrees"] is None)
    ]
    lists = [
        ("singular values learned", layer["learned"], "weight", "of s(AB − A₀B₀) after training"),
        ("… of the first gradient", layer["gradient"], "loss per weight", "adapters.gradients"),
    ]
    for name, values, unit, source in lists:
        shown = ", ".join(page.short(v) for v in values[:12]) + " …" * (len(values) > 12)
        rows.append((f"{name} [{unit}]", shown or "–", source))
    return page.item(
        element(
            "header",
            element(
                "h3",
                element("a", layer["path"] or "(model)", href=page.anchor(_id(layer))),
                class_="id",
            ),
            element("span", kind, class_="badge inconclusive" if layer["intruding"] else "badge"),
        ),
        element("p", _sentence(layer), class_="meta"),
        element("div", figures, class_="charts"),
        page.fold("numbers and sources", page.table(("quantity", "value", "source"), rows)),
        text=f"{layer['path']} {kind}",
        kind=kind,
        id=_id(layer),
    )


def _sentence(layer: Mapping[str, Any]) -> str:
    used, rank = page.short(layer["used"]), layer["rank"]
    words = f"{layer['shape'][0]}×{layer['shape'][1]}, uses {used} of rank {rank}"
    if layer["regime"] is not None:
        words += f", regime {page.short(layer['regime'])}"
        words += f" ({page.short(layer['regime_law'])} were λ conserved)"
    if layer["agrees"] is not None:
        words += f", early law within 10 % to step {layer['agrees']:,}"
    return words + "."


def _spectrum(i: int, layer: Mapping[str, Any], history: Mapping[str, Any]) -> Html:
    steps, rank = history["probe_step"], layer["rank"]
    values = [[look[i][k] for look in history["probes"]["singular_values"]] for k in range(rank)]
    lines, law = [], layer["predicted"]
    highest = max((v for row in values for v in row), default=0.0)
    for k in range(rank):
        label = "measured" if k == 0 and law else ""
        lines.append(Series(steps, values[k], charts.color(k), label))
    for k in range(rank if law else 0):
        # The law grows without end; beyond what was learned it would be all that is seen.
        row = [look[k] for look in law]
        held = [v if v is not None and v <= 1.3 * highest else None for v in row]
        kind = f"{charts.color(k)} law"
        lines.append(Series(steps, held, kind, "early law" if k == 0 else ""))
    return charts.figure(
        lines,
        x="step",
        y="singular values of the update [weight]",
        about=f"singular values of the update of {layer['path']} over steps",
        level=layer["threshold"],
        caption="Dotted: the intruder threshold." if layer["threshold"] <= highest else "",
    )


def _compared(layer: Mapping[str, Any]) -> Html | None:
    """The learned spectrum beside the first gradient's, each over its largest value."""
    learned, gradient = layer["learned"], layer["gradient"]
    if not gradient or not gradient[0] or not learned[0]:
        return None
    count = min(len(gradient), max(8, layer["rank"] + 2))
    lines = [
        Series(range(1, count + 1), [v / gradient[0] for v in gradient[:count]], "c1 law",
               "gradient before training", points=True),
        Series(range(1, len(learned) + 1), [v / learned[0] for v in learned], "c0", "learned",
               points=True),
    ]  # fmt: skip
    return charts.figure(
        lines,
        x="index of the singular value",
        y="σ over the largest",
        about=f"spectra of the update and of the gradient of {layer['path']}",
    )


def _imbalance(i: int, history: Mapping[str, Any]) -> Html:
    values = [look[i] for look in history["probes"]["imbalance"]]
    start = [values[0]] * len(values)
    lines = [
        Series(history["probe_step"], start, "k law", "at the start"),
        Series(history["probe_step"], values, "c0", "measured"),
    ]
    return charts.figure(
        lines, x="step", y="imbalance ‖AᵀA − BBᵀ‖ [weight]", about="imbalance over steps"
    )


def _linearized(found: Mapping[str, Any] | None) -> list[Html]:
    if found is None:
        return []
    rows = [(name, _said(found[field]), source) for field, name, source in LINEARIZED]
    reached = "reached" if found["converged"] else "not reached; the gap stands as it is"
    return [
        element("h2", "What the linearized model would have reached"),
        element(
            "p",
            "The model linearized in its adapted kernels, head and all else as they were before "
            "training, at the global minimum of its loss with decay w: in the NTK regime LoRA of "
            "enough rank ends there (Jang, Lee, Ryu 2024, arXiv:2402.11867, stated). "
            f"The tolerance of the solver was {reached}.",
        ),
        page.table(("quantity", "value", "source"), rows),
    ]
