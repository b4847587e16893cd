"""Arguments of a valid call of every public function, by name; and what is not called, and why."""

from typing import Any

import numpy as np

import lorajax
from benchmarks.trust import domains
from benchmarks.trust.world import (
    World,
    array,
    forward,
    linear,
    llama,
    png,
    rngs,
    sgd,
    sheet,
    simplex,
    squared_outputs,
    squares,
    swept,
    times,
    unused,
)

RECORD = "a record: holds what it is given, which is judged where it is used"
EXEMPT = {
    "lorajax.claims": "its functions take claims of this package",
    "lorajax.studies": "its functions take studies of this package; the options are in the command",
    "lorajax.adapters.Adapted": "a layer that adapt makes",
    "lorajax.adapters.Adapter": "an adapter that adapt makes",
    "lorajax.adapters.AdaLoRA": "an adapter that adapt makes",
    "lorajax.adapters.LoRA": "an adapter that adapt makes",
    "lorajax.adapters.Tucker": "an adapter that adapt makes",
    "lorajax.adapters.IA3": "an adapter that adapt makes",
    "lorajax.adapters.Propulsion": "an adapter that adapt makes",
    "lorajax.adapters.whitened": "takes what gradients and input_moments made",
    "lorajax.report.to_html": "takes outcomes of this package's claims",
    "lorajax.report.to_json": "takes outcomes of this package's claims",
    "lorajax.report.verdict_table": "takes outcomes of this package's claims",
    "lorajax.report.write_json": "takes outcomes of this package's claims",
    "lorajax.adapters.Frozen": "a kind of variable",
    "lorajax.adapters.PeftLayer": RECORD,
    "lorajax.adapters.PeftMethod": "a base class without arguments",
    "lorajax.adapters.Spec": "a base class of LoRASpec, AdaLoRASpec and TuckerSpec",
    "lorajax.adapters.Site": RECORD,
    "lorajax.adapters.kinds.LowRankSpec": "a base class of LoRASpec, AdaLoRASpec and TuckerSpec",
    "lorajax.adapters.starts.fill": "called by adapt, with a view of a layer",
    "lorajax.adapters.starts.fill_tucker": "called by adapt, with a view of a layer",
    "lorajax.finetune.Observer": "a base class without arguments",
    "lorajax.finetune.run_of": "makes a Run; its arguments are those of prepare and run",
    "lorajax.finetune.Run": "made by run_of",
    "lorajax.finetune.Insight": RECORD,
    "lorajax.finetune.insights": "takes what a run left, its models and its history",
    "lorajax.finetune.linear_optimum": "linearized and minimize in turn, which are called",
    "lorajax.flows.Path": "made by the flows",
    "lorajax.flows.Plan": RECORD,
    "lorajax.flows.sweeping.FlowSweep": "made by plan_flows",
    "lorajax.models.Bert": "made by build, of a configuration",
    "lorajax.models.Llama": "made by build, of a configuration",
    "lorajax.models.Model": "a base class of the models",
    "lorajax.models.ResNet": "made by build, of a configuration",
    "lorajax.models.VGG": "made by build, of a configuration",
    "lorajax.models.ViT": "made by build, of a configuration",
    "lorajax.models.Family": RECORD,
    "lorajax.models.Format": RECORD,
    "lorajax.models.register": "takes a Family of this package or of an extension",
    "lorajax.models.torch_rules": "takes a configuration of a model",
    "lorajax.sweeps.Estimate": RECORD,
    "lorajax.laws.mode_law": "a decorator of laws of this package",
    "lorajax.problems.Features": "made by Linearized.from_features",
    "lorajax.problems.Tangents": "made by Linearized.from_function",
    "lorajax.problems.Linearized": "made by its class methods, which are called",
    "lorajax.finetune.prepare": "adapt and select_ranks in turn, which are called",
    "lorajax.initializers.call": "takes values by name, which its start judges",
    "lorajax.models.llama.places": "the positions that a model computes for itself",
    "lorajax.flows.plan.choose": "called by plan, after its checks",
    "lorajax.flows.lanes.two_layer": "called by solve and sweep_flows, after their checks",
    "lorajax.factors.check_rank": "itself a check",
    "lorajax.factors.check_factors": "itself a check",
    "lorajax.problems.check_spectrum": "itself a check",
    "lorajax.problems.check_flow": "itself a check",
    "lorajax.data.text.pack": "takes rows of tokens that `tables` makes",
    "lorajax.data.text.tables": "takes what read_texts and a tokenizer made",
    "lorajax.data.text.lengths": "takes tables that `tables` makes",
    "lorajax.data.text.Ragged": "takes rows of tokens that `tables` makes",
}


CLASS_METHODS = {
    "MatrixFactorization": ("from_spectrum", "from_target"),
    "TuckerFactorization": ("from_spectrum", "from_target"),
    "TraceSquared": ("from_weight",),
    "Linearized": ("from_features", "from_function"),
}

RELU = {
    "overlap": lambda w: array(2),
    "weights": lambda w: array(3, 4),
    "outputs": lambda w: array(3),
    "directions": lambda w: array(3),
}
AXES = {"scale": [0.1, 0.2], "rank": [1, 2]}
LANES = {"times": lambda w: times(w)}

# By the name of the argument, within a room if one is named before a colon.
NAMES: dict[str, Any] = {
    "key": lambda w: w.key,
    "shape": (6, 5),
    "rank": 2,
    "times": lambda w: w.times,
    "problem": lambda w: w.problem,
    "factors": lambda w: w.factors,
    "core": lambda w: w.factors,
    "path": lambda w: w.factors,
    "scale": 0.5,
    "matrix": lambda w: array(6, 5),
    "weight": lambda w: array(6, 5),
    "gradient": lambda w: array(6, 5),
    "signed": lambda w: array(6, 5),
    "target": lambda w: array(6, 5),
    "tensor": lambda w: array(4, 4, 4),
    "ranks": (2, 2, 2),
    "inputs": lambda w: array(6, 9),
    "outputs": 5,
    "first": lambda w: array(6, 5),
    "second": lambda w: array(6, 5),
    "singular_values": lambda w: abs(array(3)),
    "samples": 8,
    "constant": 1.0,
    "noise": 0.1,
    "budget": 20,
    "s": 1.0,
    "a": 0.5,
    "start": 0.1,
    "value": 0.3,
    "level": 0.5,
    "ratio": 4.0,
    "laws:c": 0.5,
    "strength": 2.0,
    "modes": 3,
    "mode": 0,
    "rate": 1.0,
    "weight_decay": 0.1,
    "learning_rate": 0.1,
    "steps": 3,
    "seed": 0,
    "name": "default",
    "model": lambda w: w.vit,
    "task": lambda w: w.task,
    "train": lambda w: w.table,
    "test": lambda w: w.table,
    "table": lambda w: w.table,
    "trainer": lambda w: w.trainer,
    "recipe": lambda w: w.recipe,
    "batch_size": 4,
    "adapters:model": lambda w: w.module,
    "adapters:module": lambda w: w.module.layer,
    "adapters:key": lambda w: w.key,
    "adapters:folder": lambda w: w.peft,
    "adapters:batches": lambda w: [array(4, 6)],
    "adapters:loss": lambda w: squared_outputs,
    "adapters:path": "layer",
    "config": lambda w: w.config,
    "decay": 0.1,
    "equations": 10,
    "update": lambda w: array(4, 4),
    "spectra": lambda w: {"x": abs(array(3))},
    "costs": lambda w: {"x": 4},
    "laws:samples": 8,
    "dtype": np.dtype("float64"),
}
# By the function and the argument.
CALLS: dict[str, dict[str, Any]] = {
    "lorajax." + name: given
    for name, given in {
        "adapters.RankBudget": {"model": lambda w: w.adalora, "final_rank": 1, "steps": 5},
        "adapters.Trainable": {"names": ("default",)},
        "adapters.by_part": {"factors": sgd, "beside": sgd},
        "adapters.guided": {
            "model": lambda w: w.adapted,
            "inputs": lambda w: array(4, 6),
            "gamma": 2.0,
        },
        "adapters.guided_weights": {"model": lambda w: w.adapted, "gamma": 2.0},
        "adapters.activate": {"model": lambda w: w.adapted, "which": "default"},
        "adapters.adapt": {"targets": "layer", "rank": 2},
        "adapters.cubic_budget": {"step": 2, "initial": 8, "final": 4},
        "adapters.effective_kernel": {"layer": lambda w: w.adapted.layer},
        "adapters.kinds.axes_of": {"entry": 2},
        "adapters.kinds.target_spec": {"entry": 2},
        "adapters.layouts.Convolution": {"module": lambda w: w.conv},
        "adapters.layouts.Lookup": {"module": lambda w: w.embed},
        "adapters.layouts.with_kernel": {"kernel": lambda w: array(6, 5)},
        "adapters.linearized": {"inputs": lambda w: array(4, 6), "targets": simplex},
        "adapters.load_checkpoint": {"template": lambda w: w.module, "folder": lambda w: w.saved},
        "adapters.merge": {"model": lambda w: w.adapted},
        "adapters.unmerge": {"model": lambda w: w.merged},
        "adapters.remove": {"model": lambda w: w.adapted},
        "adapters.orthogonality": {"model": lambda w: w.adalora},
        "adapters.updates_of": {"model": lambda w: w.adapted},
        "adapters.trainable": {"model": lambda w: w.adapted},
        "adapters.input_moments": {"forward": lambda w: forward},
        "adapters.peft.patterns": {"chosen": {"layer": (2, 4.0)}},
        "adapters.save_checkpoint": {"state": lambda w: w.module, "folder": unused},
        "adapters.save_peft": {"model": lambda w: w.adapted, "folder": unused},
        "adapters.save_peft_start": {"model": lambda w: w.adapted, "folder": unused},
        "adapters.scale_beside": {"factor": 2.0},
        "adapters.select_ranks": {
            "batches": lambda w: [array(4, 6), 2 * array(4, 6)],
        },
        "data.ImageFiles": {"sources": lambda w: [png()]},
        "data.Rows": {"column": lambda w: np.zeros((4, 2)), "index": np.arange(2)},
        "data.Table": {"columns": {"x": np.zeros((4, 2))}},
        "data.Buckets": {"lengths": np.arange(5), "batch_size": 2, "seed": 0, "window": 2},
        "data.hold_out": {"count": 3},
        "data.load": {"source": "mnist-sample"},
        "data.policy": {"name": "crop", "size": (8, 8)},
        "data.read_idx": {"path": lambda w: w.idx},
        "data.resize": {"images": np.zeros((2, 8, 8, 1), np.uint8), "size": (4, 4)},
        "data.shows_images": {"path": lambda w: w.folder},
        "data.stacked": {"batches": lambda w: [{"x": np.zeros(2)}]},
        "data.text.Template": {"source": "{{ messages }}"},
        "data.text.Tokenizer": {"folder": lambda w: w.tokenizer},
        "data.text.chat_template": {"folder": lambda w: w.tokenizer},
        "data.text.choose": {"sheet": sheet},
        "data.text.is_text": {"path": lambda w: w.tsv},
        "data.text.read_sheet": {"path": lambda w: w.tsv},
        "data.text.read_texts": {"train": lambda w: w.tsv},
        "data.text.sizes": {"longest": 12},
        "exact.check_balanced": {"factors": lambda w: w.balanced},
        "exact.balanced_core": {"core": lambda w: w.balanced_core},
        "factors.any_nonzero": {"tree": lambda w: w.factors},
        "factors.can_move": {"node": lambda w: w.factors},
        "factors.column_rates": {"eta": 1.0},
        "factors.is_adapter": {"node": lambda w: w.factors},
        "factors.is_factors": {"node": lambda w: w.factors},
        "flows.balanced_flow": {"factors": lambda w: w.balanced},
        "finetune.Trainer": {"model": lambda w: w.trained, "wrt": lambda w: w.wrt},
        "finetune.abstract_lora": {"rank": 2},
        "finetune.adapt": {"targets": "**/attention/*"},
        "finetune.check_metrics": {"names": ["accuracy"]},
        "finetune.check_start": {"start": "lora"},
        "finetune.directions": {"gradients": {}},
        "finetune.footprint": {
            "model": lambda w: w.trained,
            "wrt": lambda w: w.wrt,
            "batch": lambda w: w.expected,
        },
        "finetune.ends": {"losses": [2.0, 1.0]},
        "finetune.interval": {"values": [1.0, 2.0, 3.0]},
        "finetune.judge": {"state": lambda w: w.trainer.init(), "names": ["accuracy"]},
        "finetune.mask": {"model": lambda w: w.adapted, "ranks": {"layer": 1}},
        "finetune.measure": {"model": lambda w: w.trained},
        "finetune.paths": {"model": lambda w: w.trained},
        "finetune.picked": {"starts": lambda w: [lorajax.initializers.lora], "index": 0},
        "finetune.transfer": {"ranks": {"layer": 8}},
        "finetune.stable_ranks": {"history": {"probe_step": [], "probes": {}}},
        "finetune.widened": {"patterns": ["head"]},
        "flows.descend": {"optimizer": sgd},
        "flows.lora_plus": {"ratio": 4.0},
        "flows.start_of": {"start": "lora", "key": lambda w: w.key, "rank": 2},
        "flows.lanes.closed_form": {**LANES, "factors": lambda w: w.lanes, "one_sided": True},
        "flows.lanes.reduced_ode": {**LANES, "factors": lambda w: w.lanes, "one_sided": True},
        "flows.lanes.spectra": {**LANES, "factors": lambda w: w.lanes},
        "flows.lanes.full_ode": {**LANES, "factors": lambda w: w.lanes},
        "flows.plan.reduced_shape": {},
        "flows.sweeping.plan_flows": {"start": "lora", "axes": AXES, "key": lambda w: w.key},
        "flows.sweeping.sweep_flows": {"start": "lora", "axes": AXES, "key": lambda w: w.key},
        "initializers.asks_for": {"start": "lora"},
        "initializers.name_of": {"start": "lora"},
        "initializers.resolve": {"start": "lora"},
        "initializers.tucker": {"shape": (4, 4, 4)},
        "laws.adam_first_step": {"factor": 2.0},
        "laws.carried_rate": {"width": 64, "rank": 4},
        "laws.factor_balance": {"rate_a": 0.1, "width": 64},
        "laws.frame_gain": {"gram": lambda w: np.eye(2), "inputs": 9},
        "laws.gradient_step_gain": {"rank": 4, "gamma": 0.5},
        "laws.guidance_gap": {"second": 1.0, "gamma": 2.0},
        "laws.multiplied_equivalent": {"a": lambda w: array(6, 2), "multiplier": 0.5},
        "laws.projected_share": {"rank": 2, "inputs": 9},
        "laws.saddle_curvature": {"kept": lambda w: np.arange(3) < 2},
        "laws.sign_change": {"rate_a": 0.1, "rate_b": 0.1, "inputs": 9},
        "laws.spurious_away": {
            "alpha": 0.1,
            "beta": 0.3,
            "values": lambda w: np.array([3.0, 1.0]),
            "best_rank": 1,
        },
        "laws.allora_time": {"eta": 1.0},
        "laws.balanced_mode": {"b": 0.5},
        "laws.early_descent": {"start": lambda w: w.factors, "step": 0.1, "steps": np.arange(3)},
        "laws.one_step_error": {"dimension": 8},
        "laws.orthonormal_error": {"n": 8},
        "laws.outer_bound": {"decay": 0.1, "beta": 0.2, "last": 0.1},
        "laws.relu_overlap_rate": RELU,
        "laws.relu_overlap_velocity": RELU,
        "laws.scaled_gd_error": {"error": lambda w: array(2, 2), "gram": lambda w: np.eye(2)},
        "laws.spurious_distance": {"alpha": 0.1, "beta": 0.2, "last": 0.1, "nuclear": 1.0},
        "laws.spurious_share": {"alpha": 0.1, "beta": 0.2},
        "laws.trace_squared_flow": {"factors": lambda w: w.square},
        "laws.trace_squared_angle": {"factors": lambda w: w.square},
        "laws.trace_squared_error": {"a": lambda w: array(4, 2)},
        "laws.lora_plus_equivalent": {"a": lambda w: array(3)},
        "laws.loss_decay": {"end": lambda w: w.two_layer_factors},
        "models.abstract": {"source": "vit-fashion-mnist"},
        "models.build": {"rngs": rngs},
        "models.config": {"name": "resnet18"},
        "models.generate": {"model": llama, "tokens": np.ones((1, 3), np.int32), "limit": 2},
        "models.layout_of": {"source": lambda w: w.model_file},
        "models.llama.places": {"tokens": np.ones((1, 3), np.int32)},
        "models.load": {"source": lambda w: w.model_file},
        "models.normalize": {
            "images": np.zeros((2, 8, 8, 3), np.uint8),
            "mean": (0.5,) * 3,
            "std": (0.5,) * 3,
        },
        "models.notes": {"source": lambda w: w.model_file},
        "models.unread": {"source": lambda w: w.model_file},
        "models.save": {"path": lambda w: unused(w).with_suffix(".safetensors")},
        "ranks.intruder_overlaps": {"singular_values": lambda w: np.array([3.0, 2, 1, 1, 0.5])},
        "ranks.intruder_threshold": {"singular_values": lambda w: np.array([3.0, 2, 1, 1, 0.5])},
        "ranks.intruder_value": {"singular_values": lambda w: np.array([3.0, 2, 1, 1, 0.5])},
        "optima.structure": {"gradient": lambda w: array(6, 5)},
        "optima.lowest_curvature": {},
        "optima.manifold_rank": {},
        "optima.reduce_rank": {"factors": lambda w: w.square},
        "problems.LinearAttention": {
            "eigenvalues": lambda w: -np.sort(-abs(array(3))),
            "context": lambda w: 9 + abs(array(1))[0],
        },
        "problems.Decayed": {"decay": lambda w: abs(array(1))[0]},
        "problems.DiagonalFactorization": {
            "shape": (6, 5),
            "singular_values": lambda w: w.problem.singular_values,
        },
        "problems.MatrixFactorization": {
            "u": lambda w: w.problem.u,
            "v": lambda w: w.problem.v,
            "singular_values": lambda w: w.problem.singular_values,
        },
        "problems.ProductLoss": {"function": lambda w: squares, "shape": (6, 5)},
        "problems.SymmetricFactorization": {"target": lambda w: array(4, 4) @ array(4, 4).T},
        "problems.TraceSquared": {"trace": lambda w: array(1)[0], "size": 4},
        "problems.TuckerFactorization": {
            "core": lambda w: array(2, 2, 2),
            "frames": lambda w: (np.linalg.qr(array(4, 2))[0],) * 3,
        },
        "problems.TwoLayer": {
            "w1": lambda w: array(4, 3),
            "w2": lambda w: array(3, 4),
            "shift": lambda w: array(3, 3),
        },
        "problems.check_spectrum": {"singular_values": lambda w: w.problem.singular_values},
        "problems.check_start": {"start": lambda w: w.factors},
        "problems.MatrixFactorization.from_spectrum": {"singular_values": (2.0, 1.0)},
        "problems.TuckerFactorization.from_spectrum": {
            "shape": (4, 4, 4),
            "singular_values": (2.0, 1.0),
        },
        "problems.TuckerFactorization.from_target": {"target": lambda w: array(4, 4, 4)},
        "problems.TraceSquared.from_weight": {"weight": lambda w: array(4, 4)},
        "problems.Linearized.from_features": {
            "features": lambda w: array(3, 1, 4, 4),
            "targets": lambda w: array(3, 1),
        },
        "problems.Linearized.from_function": {
            "function": lambda w: linear,
            "weights": lambda w: array(4, 2),
            "inputs": lambda w: array(3, 4),
            "targets": lambda w: array(3, 2),
        },
        "ranks.above": {"floor": 0.1},
        "ranks.rule": {"which": "energy"},
        "ranks.edge_mean": {},
        "flows.drift_of": {"core": lambda w: w.flow.core, "start": lambda w: w.factors},
        "initializers.eva": {"inputs": lambda w: array(6, 6) @ array(6, 6).T},
        "laws.lora_modes": {"factors": lambda w: w.from_a},
        "laws.lazy_modes": {"factors": lambda w: w.from_a},
        "laws.deflated_amplitudes": {"factors": lambda w: w.from_a},
        "ranks.allocate": {"spectra": lambda w: {"x": np.array([3.0, 2.0, 1.0])}},
        "spectra.effective_rank": {"values": lambda w: abs(array(3))},
        "spectra.hitting_times": {"values": lambda w: array(4, 2), "levels": lambda w: array(2)},
        "spectra.misalignment": {
            "vectors": lambda w: array(2, 6),
            "direction": lambda w: array(6),
        },
        "spectra.rank_correlation": {"x": lambda w: array(5), "y": lambda w: array(5)},
        "spectra.top_misalignment": {"direction": lambda w: array(11)},
        "spectra.losses": {"factors": lambda w: w.flow.factors},
        "sweeps.estimate": {"function": lambda w: swept, "axes": {"x": [1.0, 2.0]}},
        "sweeps.sweep": {"function": lambda w: swept, "axes": {"x": [1.0, 2.0]}},
        "sweeps.open_sweep": {"path": lambda w: w.store},
        "sweeps.identity": {},
        "tasks.MaskedTokens": {"vocabulary": 9, "mask": 3, "special": (1, 2)},
        "tasks.Images": {"mean": (0.5,), "std": (0.25,), "channels": 1},
        "tasks.classified": {"logits": lambda w: array(4, 3), "classes": np.zeros(4, np.int32)},
        "tasks.totals": {"scores": lambda w: lorajax.tasks.Scores(*[array(3)] * 4)},
    }.items()
}


DEMANDS: dict[str, str] = {
    # An exponent, and how much of an adapter: of any sign.
    **{
        f"lorajax.{name}:gamma": "any"
        for name in (
            "adapters.guided",
            "adapters.guided_weights",
            "laws.carried_rate",
            "laws.gradient_step_gain",
            "laws.guidance_gap",
        )
    },
    # 0 keeps nothing in memory.
    **{
        f"lorajax.adapters.{name}:memory": domains.NOT_NEGATIVE
        for name in ("gradients", "select_ranks", "input_moments")
    },
    # 0 leaves a layer as it is where targets have ranks of their own.
    **{
        f"lorajax.adapters.{kind}Spec:rank": domains.NOT_NEGATIVE
        for kind in ("LoRA", "AdaLoRA", "Tucker")
    },
    # All of the risk.
    "lorajax.laws.whitened_risk:rank": domains.NOT_NEGATIVE,
    **{
        f"lorajax.problems.{kind}.from_target:tolerance": domains.NOT_NEGATIVE
        for kind in CLASS_METHODS
    },
}
"""What numbers must be where the name does not tell, or tells wrongly; "any" for no demand."""


def worse(name: str, argument: str, world: World) -> list[Any]:
    """Wrong values of the right type: of other shapes, with NaN, out of order."""
    import jax.numpy as jnp

    room = name.split(".")[1]
    nan = jnp.nan
    if argument == "times" and room in ("flows", "lorajax"):
        orders = ([1.0, 0.5], [0.0, 0.0], [-1.0, 1.0], [0.0, nan], [0.0, jnp.inf])
        return [np.array(order) for order in orders]
    if argument == "factors" and room == "flows" and "lanes" not in name:
        a, b = world.factors
        pairs = [(a[:5], b), (a, b[:, :4]), (a[:, :1], b), (0 * a, 0 * b), (a * nan, b)]
        pairs += [(a + 1j, b), (a.astype(jnp.float32), b), (a, b[None]), (a[:, :0], b[:0])]
        return [lorajax.Factors(*pair) for pair in pairs]
    if argument in ("matrix", "weight", "gradient", "target") and room == "initializers":
        return [array(6, 5) * nan, jnp.zeros((6, 5)).at[0, 0].set(jnp.inf), array(6, 5) + 1j]
    if argument == "singular_values" and room == "problems":
        return [jnp.array(v) for v in ([1.0, 2.0], [0.0], [-1.0], [nan], [3.0] * 9)]
    if argument == "rank" and (room == "initializers" or name.endswith("start_of")):
        return [6, 7, 10**6]
    return []
