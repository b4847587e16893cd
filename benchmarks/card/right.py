"""Is what a card computes right? Verdicts, adapters, PEFT's fixtures, a resumed sweep."""

import importlib.util
import json
import os
import pathlib
import sys
import tempfile
from importlib import resources
from typing import Any

from benchmarks.card.runs import ROOT, Report

BRIEF = ("lora_ga2024.first_step",)
"""What the tiny form runs: no flow is compiled for it."""
CLAIMS = (
    "gradient_flow.conservation",
    "gradient_flow.reduction",
    "gradient_flow.balanced_propagator",
    "spectral_dynamics.tanh_squared",
    "spectral_dynamics.benign_rank",
    "gradient_flow.lora_mode",
    "gradient_flow.critical_points",
    "kim2025.gradient_structure",
    "jang2024.certificate",
    "rushka2026.trace_squared_loss",
    "xu2025.loss_floor",
    "riemannian2024.invariance",
    "spectral_dynamics.tucker_conservation",
    "linear_attention2025.plateaus",
    "intruders2026.gaussian",
    "gradient_flow.loss_tail",
    "lora_rite2024.invariance",
    "whitened2026.excess_risk",
)
"""Two of the first papers and one of most others; one of them is refuted on record."""


def claims(report: Report, tiny: bool) -> None:
    """Verdicts of claims in float64 against those on record, as many as the budget allows."""
    from lorajax import claims
    from lorajax.cli.output import prepare_jax

    prepare_jax(brief=tiny)
    record = json.loads(resources.files(claims).joinpath("record.json").read_text("utf-8"))
    chosen = claims.select(BRIEF if tiny else CLAIMS)
    workers = 1 if tiny else max(1, min(6, (os.cpu_count() or 1) // 2))
    report.add(asked=[claim.id for claim in chosen])
    for outcome in claims.examine_all(chosen, claims.Run(), workers=workers):
        evidence = outcome.evidence
        report.row(
            claim=outcome.claim.id,
            verdict=outcome.verdict,
            recorded=record[outcome.claim.id]["verdict"],
            error=evidence.error if evidence else None,
            tolerance=evidence.tolerance if evidence else None,
            seconds=outcome.seconds,
            problem=outcome.problem,
        )
        if report.left < 1:
            break


def _models(tiny: bool) -> dict[str, Any]:
    """Small models by family, with a batch and the layers that are adapted."""
    import numpy as np

    from lorajax import models, tasks

    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, (4, 12)).astype(np.int32)
    whole = np.ones(tokens.shape, bool)
    sizes: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}
    llama = models.LlamaConfig(50, groups=1, mlp_width=24, **sizes)
    places = np.tile(np.arange(12, dtype=np.int32), (4, 1))
    segments = whole.astype(np.int32)
    row = {"tokens": tokens, "targets": whole, "segments": segments, "positions": places}
    found: dict[str, Any] = {"llama": (llama, tasks.NextToken(), row)}
    if tiny:
        return found
    bert = models.BertConfig(vocabulary=50, classes=3, **sizes)
    vit = models.ViTConfig((8, 8), 4, classes=3, **sizes)
    labels = np.array([0, 1, 2, 0], np.int32)
    images = rng.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    return found | {
        "bert": (bert, tasks.Texts(), {"tokens": tokens, "mask": whole, "labels": labels}),
        "vit": (vit, tasks.Images.of(vit), {"images": images, "labels": labels}),
    }


def adapters(report: Report, tiny: bool) -> None:
    """Losses of a few steps in float64, of each kind of adapter, on the card and on the processor.

    By gradient descent, which is linear in the gradient: Adam's first steps have the size of the
    rate whatever the size of a gradient, and would make rounding as large as that.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from lorajax import adapters, finetune, models
    from lorajax.cli.output import prepare_jax

    prepare_jax(brief=tiny)
    kinds: list[dict[str, Any]] = [
        {"start": "lora"},
        {"start": "pissa"},
        {"start": "orthogonal", "rslora": True},
        {"dora": True},
        {"kind": "adalora"},
    ]

    def losses(made: Any, options: dict[str, Any], where: Any) -> list[float]:
        config, task, batch = made
        with jax.default_device(where):
            model = models.build(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
            adapted = adapters.adapt(
                model,
                "**/attention/*",
                key=jax.random.key(1),
                **{"rank": 2, "dtype": jnp.float64} | options,
            )
            recipe = finetune.Recipe(steps=3, batch_size=4)
            wrt = adapters.trainable(adapted)
            rate = optax.sgd(0.1)
            trainer = finetune.Trainer(adapted, wrt, task, recipe, transformation=rate)
            state, found = trainer.init(), []
            for _ in range(3):
                state, metrics = trainer.step(state, batch)
                found.append(float(metrics.loss))
        return found

    for name, made in _models(tiny).items():
        for options in kinds[:1] if tiny else kinds:
            here = losses(made, options, jax.devices()[0])
            there = losses(made, options, jax.devices("cpu")[0])
            gap = float(np.max(np.abs(np.subtract(here, there)) / np.abs(there)))
            told = " ".join(f"{k}={v}" for k, v in options.items())
            # A hundred thousand roundings of float64; a wrong derivative shows in the second step.
            report.row(
                model=name,
                adapter=told,
                difference=gap,
                bound=1e-11,
                right=gap <= 1e-11,
                learns=here[2] != here[1] != here[0],
            )
            if report.left < 5:
                return


def fixtures(report: Report, tiny: bool) -> None:
    """PEFT's own files, against the logits that PEFT computed with them, in float32."""
    import jax
    import numpy as np

    from lorajax import adapters

    # The default on a card rounds factors of float32 products to ten bits.
    jax.config.update("jax_default_matmul_precision", "highest")
    formats = ROOT / "tests" / "formats"
    tiny_models = _module(formats / "tiny_models.py")
    cases = sorted((formats / "fixtures").glob("*/*/adapter_config.json"))
    bases = {f: tiny_models.load(formats / "fixtures" / f) for f in ("bert", "vit")}
    for path in cases[:2] if tiny else cases:
        family, case = path.parents[1].name, path.parent.name
        kept = np.load(path.parents[1] / "logits.npz")
        adapted = adapters.load_peft(bases[family], path.parent)
        inputs = kept[tiny_models.INPUTS[family]]
        merged = adapters.remove(adapters.merge(adapted))
        gap = max(
            float(np.abs(tiny_models.logits(m, inputs) - kept[case]).max())
            for m in (adapted, merged)
        )
        report.row(fixture=f"{family}/{case}", difference=gap, bound=1e-5, right=gap <= 1e-5)
        if report.left < 5:
            return


def _module(path: pathlib.Path) -> Any:
    """A file of the tests as a module."""
    spec = importlib.util.spec_from_file_location(f"lorajax_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class _Cut(Exception):
    """The sweep is stopped here."""


def resumed(report: Report, tiny: bool) -> None:
    """A sweep in float64 that is stopped, and goes on from its store, against one in one piece."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import lorajax
    from lorajax.cli.output import prepare_jax

    prepare_jax(brief=tiny)
    shape = (12, 8) if tiny else (64, 48)
    problem = lorajax.MatrixFactorization.from_spectrum(jax.random.key(0), shape, (3.0, 2.0, 1.0))
    times = jnp.linspace(0.0, 10.0, 50)
    seeds = range(4 if tiny else 100)
    axes = {"scale": [1e-1, 1e-2, 1e-4], "rank": [4], "seed": seeds}
    with tempfile.TemporaryDirectory() as folder:
        for start in ("orthogonal",) if tiny else ("orthogonal", "small"):
            swept: dict[str, Any] = {"key": jax.random.key(1), "chunk": len(seeds)}
            swept["store"] = os.path.join(folder, start)
            seen: list[Any] = []

            def cut(progress: Any) -> None:
                if progress.done:
                    raise _Cut

            try:
                lorajax.sweep_flows(problem, start, axes, times, **swept, progress=cut)
            except _Cut:
                pass
            again = lorajax.sweep_flows(
                problem, start, axes, times, **swept, progress=seen.append
            ).load()
            del swept["store"]
            whole = lorajax.sweep_flows(problem, start, axes, times, **swept)
            there, cpu = whole, jax.devices("cpu")
            if jax.default_backend() != "cpu":
                with jax.default_device(cpu[0]):
                    moved = jax.device_put(problem, cpu[0])
                    there = lorajax.sweep_flows(moved, start, axes, times, **swept, devices=cpu)
            scale = float(np.abs(whole["losses"]).max())

            def gap(other: Any, whole: Any = whole, scale: float = scale) -> float:
                return float(np.abs(other["losses"] - whole["losses"]).max()) / scale

            apart, across = gap(again), gap(there)
            report.row(
                start=start,
                engine=whole.attrs["engine"].partition(" (")[0],
                lanes=3 * len(seeds),
                resumed=seen[0].resumed,
                failed=int((again["status"] != 0).sum()),
                difference=apart,
                from_processor=across,
                # A resumed sweep is the same sweep; another device integrates within the tolerance.
                right=bool(apart == 0 and across <= 1e-8 and 0 < seen[0].resumed < 3 * len(seeds)),
            )
