"""Claims about the theory's reach: evaluated in the fine-tuning of a real, if small, network.

The network is the embedded ViT, pretrained on Fashion-MNIST, on images of the embedded MNIST
sample; each of its 24 attention and MLP kernels has an adapter. The module stands here and not in
`lorajax.claims` because that room lies below the models; importing it adds to the same registry.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from lorajax import adapters, data, finetune, initializers, laws, models, ranks, spectra, tasks
from lorajax.claims.base import Assumption, Control, Evidence, Run, claim, standard_errors
from lorajax.factors import Factors
from lorajax.finetune.contest import Contest, Contestant

SCALES = (1e-2, 1e-3, 1e-4)
REPETITIONS = 5
RANK = 2
STEPS = 33
RATE = 0.4
"""Step times the largest singular value of any layer's gradient: far from where descent is unstable
(2), and small enough for many steps in an e-fold."""
WINDOW = 12
"""Steps in which the fastest layer grows by (1 + RATE)^12 = 57: four e-folds."""


class Observed(NamedTuple):
    """What plain gradient descent on a fixed batch does to every layer's factors.

    Attributes:
      factors: by path, with leading axes (scale, repetition, step).
      matrices: M, the negative gradient at the pretrained weight, by path.
      step: of the descent.
      fastest: path of the layer whose M has the largest singular value.
    """

    factors: dict[str, Factors]
    matrices: dict[str, np.ndarray]
    step: float
    fastest: str


def _is_kernel(path: tuple[Any, ...], value: Any) -> bool:
    return tuple(map(str, path[-2:])) == ("base", "kernel")


def _descend(run: Run) -> Observed:
    """Scales × repetitions in one program, in float64: deviations of 1e-8 are looked at."""
    count = run.pick(8, 128)
    source = data.load("mnist-sample").train
    every = len(source) // count  # the set is sorted by class
    chosen = source[np.arange(0, len(source), every)[:count]]
    model = models.load("vit-fashion-mnist", dtype=jnp.float64, param_dtype=jnp.float64)
    task = tasks.Images.of(model.config)
    batch = task.prepare(chosen)
    # In float64 throughout, which scores of a task are not.
    x, classes = batch["pixels"].astype(jnp.float64), batch["labels"]

    def start(shape, rank, dtype):
        # Of the right shapes; the lanes' own follow.
        return Factors(jnp.ones((shape[0], rank), dtype), jnp.zeros((rank, shape[1]), dtype))

    options = {"key": run.key(3000), "rank": RANK, "start": start, "dtype": jnp.float64}
    adapted = finetune.adapt(model, "blocks/**", **options)
    graph, template, kernels, rest = nnx.split(adapted, nnx.LoRAParam, _is_kernel, ...)
    params = _starts(run, adapted, template)

    def loss_of(params, kernels, rest):
        logits = nnx.merge(graph, params, kernels, rest, copy=True)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()

    @jax.jit
    def advance(params, kernels, rest, step):
        def lane(params):
            return jax.grad(loss_of, argnums=(0, 1))(params, kernels, rest)

        gradient, at_kernels = jax.vmap(lane)(params)
        return jax.tree.map(lambda p, g: p - step * g, params, gradient), at_kernels

    # At factors of zero the network is the pretrained one; the same program then gives M.
    nowhere = jax.tree.map(jnp.zeros_like, params)
    _, at_kernels = advance(nowhere, kernels, rest, jnp.zeros((), jnp.float64))
    matrices = {
        "/".join(map(str, path[:-2])): -np.asarray(leaf[...][0])
        for path, leaf in nnx.to_flat_state(at_kernels)
    }
    tops = {path: float(np.linalg.norm(matrix, 2)) for path, matrix in matrices.items()}
    fastest = max(tops, key=lambda path: tops[path])
    step = RATE / tops[fastest]
    seen = [params]
    for _ in range(STEPS):
        params, _ = advance(params, kernels, rest, jnp.asarray(step, jnp.float64))
        seen.append(params)
    flat = [dict(nnx.to_flat_state(each)) for each in seen]

    def stacked(path: str, name: str) -> Array:
        place = (*path.split("/"), "adapters", "default", name)
        found = {tuple(map(str, key)): key for key in flat[0]}[place]
        values = np.stack([np.asarray(each[found][...]) for each in flat], axis=1)
        return jnp.asarray(values.reshape(len(SCALES), REPETITIONS, *values.shape[1:]))

    factors = {path: Factors(stacked(path, "a"), stacked(path, "b")) for path in matrices}
    return Observed(factors, matrices, step, fastest)


def _starts(run: Run, adapted: Any, template: Any) -> Any:
    """Small starts of all lanes, scales before repetitions, in place of the template's factors."""
    found = adapters.layers(adapted)
    shapes: dict[tuple[int, int], list[str]] = {}
    for path, layer in found.items():
        shapes.setdefault(layer.adapters["default"].factors.shape, []).append(path)
    scales = np.asarray(SCALES)[:, None, None, None]
    drawn = {}
    for number, (shape, members) in enumerate(shapes.items()):
        keys = jax.random.split(run.key(3001 + number), (len(members), REPETITIONS))
        small = functools.partial(initializers.small, shape=shape, rank=RANK, scale=1.0)
        units = jax.jit(jax.vmap(jax.vmap(lambda key, small=small: small(key))))(keys)
        for i, path in enumerate(members):
            for name, unit in zip("ab", units, strict=True):
                lanes = scales * np.asarray(unit[i], np.float64)[None]
                place = (*path.split("/"), "adapters", "default", name)
                drawn[place] = jnp.asarray(lanes.reshape(-1, *lanes.shape[2:]))

    def leaf(path, old):
        return old.replace(drawn[tuple(map(str, path))])

    return nnx.map_state(leaf, template)


def _observed(run: Run) -> Observed:
    return run.once("finetuning.descent", lambda: _descend(run))


def _predicted(seen: Observed, factor: float) -> dict[str, Factors]:
    """`Z(k) = (I + η H(M))^k Z(0)` in the window, for every lane."""
    steps = np.arange(WINDOW + 1)
    found = {}
    for path, matrix in seen.matrices.items():
        start = Factors(*(jnp.asarray(x)[:, :, 0] for x in seen.factors[path]))
        found[path] = laws.early_descent(jnp.asarray(matrix), start, factor * seen.step, steps)
    return found


@claim(
    "finetuning.early_factors",
    source="Xu et al. 2025 (arXiv:2503.06982), alignment phase, for two frozen layers; theory §4 "
    "(reconstructed). For the layers of any network: derived here",
    standing="derived",
    tolerance="the deviation is of second order in α, since the gradient moves with the product "
    "A B: at α it is (α/α')² times the one measured at α' = 10 α, twice that for what is of higher "
    "order at α', plus 1e-9 for rounding in float64",
    control=Control("the step η becomes 1.05 η in the law", {"factor": 1.05}),
    on_request=True,
)
def early_factors(run: Run, factor: float = 1.0) -> Evidence:
    """Early in the fine-tuning of a network from a small start every layer's stacked factors obey
    Z(k) = (I + η H(M))^k Z(0) under descent with step η, M the negative gradient of its kernel
    before training: norm and alignment of the first four e-folds are known in advance.
    """
    seen = _observed(run)
    law = _predicted(seen, factor)
    errors = np.zeros(len(SCALES))
    for path, predicted in law.items():
        z = np.asarray(spectra.stacked(predicted))
        found = np.asarray(spectra.stacked(seen.factors[path]))[:, :, : WINDOW + 1]
        gap = np.linalg.norm(found - z, axis=(-2, -1)) / np.linalg.norm(z, axis=(-2, -1))
        errors = np.maximum(errors, gap.max(axis=(1, 2)))
    small, large = errors[-1], errors[-2]
    tops = {path: float(np.linalg.norm(m, 2)) for path, m in seen.matrices.items()}
    shown = sorted(tops, key=lambda path: -tops[path])[:: max(1, len(tops) // 4)]

    def draw(ax):
        for color, path in enumerate(shown):
            direction = jnp.asarray(spectra.top_direction(jnp.asarray(seen.matrices[path])))
            for factors, style in ((seen.factors[path], "o"), (law[path], "-")):
                lane = jax.tree.map(lambda x: x[-1, 0, : WINDOW + 1], factors)
                angle = np.asarray(spectra.top_misalignment(lane, direction))
                label = f"{path}, σ₁ = {tops[path]:.2g}" if style == "o" else None
                ax.semilogy(angle, style, color=f"C{color}", markersize=3, label=label)
        ax.set(xlabel="step", ylabel="1 − |cos| to γ₁")
        ax.legend()

    return Evidence(
        measured={
            "scale": list(SCALES),
            "sup_deviation": errors.tolist(),
            "growth_of_the_fastest_layer": float((1 + RATE) ** WINDOW),
        },
        predicted={"sup_deviation": [0.0] * len(SCALES)},
        error=float(small),
        tolerance=float(2 * large * (SCALES[-1] / SCALES[-2]) ** 2 + 1e-9),
        draw=draw,
        caption="Misalignment of four layers of a ViT with their gradients' top directions: "
        "measured (dots) and known before training (lines), α = 1e-4.",
    )


@claim(
    "finetuning.smaller_start_aligns",
    source="Xu et al. 2025 (arXiv:2503.06982), for two frozen layers; theory §4, item 3",
    standing="reconstructed",
    tolerance="0: an order has no tolerance. The error is the upper end of the 95 % interval, over "
    "five starts, of the change of the mean over layers of ln(least 1 − cos) from one scale to the "
    "next smaller one, at the worst pair",
    control=Control("the order is reversed: larger α, better alignment", {"sign": -1.0}),
    on_request=True,
)
def smaller_start_aligns(run: Run, sign: float = 1.0) -> Evidence:
    """The smaller the start of a network's adapters, the closer they come to the top singular
    directions of the gradients before training: the record low of 1 − cos, averaged over the
    layers, falls with α.
    """
    seen = _observed(run)
    records = []
    for path, factors in seen.factors.items():
        direction = spectra.top_direction(jnp.asarray(seen.matrices[path]))
        angles = np.asarray(spectra.top_misalignment(factors, direction))
        records.append(np.log(angles.min(axis=-1)))
    record = np.stack(records)  # (layer, scale, repetition)
    means = record.mean(axis=0)
    worst, pairs = None, []
    for larger, smaller in zip(means[:-1], means[1:], strict=True):
        mean, half = finetune.interval(sign * (smaller - larger))
        pairs.append(mean)
        if worst is None or mean + half > sum(worst):
            worst = mean, half
    assert worst is not None
    falling = (np.diff(record.mean(axis=2), axis=1) < 0).mean(axis=0)

    def draw(ax):
        for layer in record.mean(axis=2):
            ax.semilogx(SCALES, layer / np.log(10), color="0.7", linewidth=0.8)
        ax.errorbar(
            SCALES,
            means.mean(axis=1) / np.log(10),
            means.std(axis=1, ddof=1) / np.log(10),
            fmt="o-",
            capsize=3,
            label="mean over layers ± 1 sd over starts",
        )
        ax.plot([], color="0.7", label="each of the 24 layers")
        ax.set(xlabel="scale α of the start", ylabel="log₁₀ of the least 1 − |cos|")
        ax.legend()

    return Evidence(
        measured={
            "mean_change_of_ln_record": pairs,
            "share_of_layers_that_follow": falling.tolist(),
        },
        predicted={},
        error=float(sum(worst)),
        tolerance=0.0,
        uncertainty=float(2 * worst[1]),
        draw=draw,
        caption=f"Record low of the misalignment in {STEPS} steps, five starts a scale.",
    )


def _contest(run: Run) -> dict[str, Contestant]:
    # Every third image: the set is sorted by class.
    every, aside, steps, batch = run.pick((3, 400, 60, 32), (1, 1000, 600, 50))
    found = data.load("mnist-sample")
    train, held_out = data.hold_out(found.train.take(slice(None, None, every)), aside)
    recipe = finetune.Recipe(
        steps=steps,
        batch_size=batch,
        optimizer="lora-plus",
        ratio=4.0,
        learning_rate=1e-2,
        warmup=steps // 20,
        seed=run.seed,
    )
    model = models.load("vit-fashion-mnist")
    task = tasks.Images.of(model.config)
    return Contest(
        finetune.fit_head(model, task, train, seed=run.seed),
        task,
        train,
        held_out,
        found.test,
        recipe,
        key=run.key(3100),
        uniform=2,
        seeds=run.pick(5, 10),
        rates=run.pick((1.0, 3.0), (0.1, 0.3, 1.0, 3.0)),
        methods=("rule", "AdaLoRA", "starved"),
    ).at_equal_parameters()


@claim(
    "finetuning.rank_rule",
    source="OpenReview gg2Wb2HPOI, for ViT-B/16 on CIFAR-100 and two language models",
    standing="stated",
    tolerance="the sampling error √(p (1 − p)/n) of an accuracy p on the n test images: below it "
    "two accuracies match. The error is the upper end of the 95 % interval of AdaLoRA's mean lead "
    "over paired seeds, so that what is confirmed is that the rule is not behind by more",
    control=Control("the rule has a tenth of AdaLoRA's parameters", {"contestant": "starved"}),
    on_request=True,
)
def rank_rule(run: Run, contestant: str = "rule") -> Evidence:
    """With ranks from the spectrum of the gradient before training LoRA matches or outperforms
    AdaLoRA at an equal budget of parameters.
    """
    found = run.once("finetuning.contest", lambda: _contest(run))
    rule, other = found[contestant], found["AdaLoRA"]
    lead, half = finetune.interval(other.scores - rule.scores)
    p, n = float(other.scores.mean()), len(data.load("mnist-sample").test)

    def draw(ax):
        for i, each in enumerate(found.values()):
            mean, width = finetune.interval(100 * each.scores)
            ax.plot(np.full(each.scores.size, i), 100 * each.scores, "o", color="0.7")
            ax.errorbar([i], [mean], [width], fmt="s", color=f"C{i}", capsize=4)
            ax.annotate(
                f"{each.parameters.mean():,.0f}", (i, mean), (8, 0), textcoords="offset points"
            )
        ax.set_xticks(range(len(found)), list(found))
        ax.set(xlabel="method, with the parameters that train")
        ax.set(ylabel="test accuracy [%], 95 % interval", xlim=(-0.5, len(found) - 0.2))

    return Evidence(
        measured={
            **{f"accuracy_{name}": each.scores.tolist() for name, each in found.items()},
            **{f"parameters_{name}": float(each.parameters.mean()) for name, each in found.items()},
            "mean_lead_of_AdaLoRA": lead,
            "half_width": half,
        },
        predicted={"mean_lead_of_AdaLoRA": 0.0},
        error=lead + half,
        tolerance=(p * (1 - p) / n) ** 0.5,
        uncertainty=2 * half,
        assumptions=(
            Assumption(
                "equal budgets, within 10 %",
                contestant != "rule" or rule.parameters.mean() <= 1.1 * other.parameters.mean(),
                f"{rule.parameters.mean():,.0f} and {other.parameters.mean():,.0f} parameters",
            ),
        ),
        draw=draw,
        caption="Test accuracy of each seed, its mean with the 95 % interval, and the parameters.",
    )


def _kernels() -> dict[str, np.ndarray]:
    """Every attention and MLP kernel of the embedded ViT as a matrix (inputs, outputs)."""
    model = models.load("vit-fashion-mnist")
    adapted = finetune.adapt(model, "blocks/**", key=jax.random.key(0), rank=1)
    found = adapters.layers(adapted).items()
    bases = {path: layer.base for path, layer in found}
    return {
        path: np.asarray(adapters.layout(base).matrix(adapters.kernel_of(base)), np.float64)
        for path, base in bases.items()
    }


@claim(
    "finetuning.intruders",
    source="arXiv:2607.23711 (abstract read); Benaych-Georges, Nadakuditi 2012; theory §9",
    standing="recalled",
    tolerance="standard errors of a mean over directions, as many as chance exceeds in any layer "
    "in 1 of 1000 cases, and the order 1/n of finite size, twice the variance over the value",
    control=Control("the exponent 2 of θ becomes 2.1", {"power": 2.1}),
    on_request=True,
)
def intruders(run: Run, power: float = 2.0) -> Evidence:
    """On pretrained kernels, too, the spectrum of the weight alone says where an update of random
    direction, twice as strong as the threshold, puts its singular value: D_W(z) = 1/θ²."""
    draws = run.pick(50, 1000)

    def simulate() -> dict[str, tuple[np.ndarray, float, np.ndarray, tuple[int, ...]]]:
        found = {}
        for i, (path, weight) in enumerate(_kernels().items()):
            values = np.linalg.svd(weight, compute_uv=False)
            theta = 2 * ranks.intruder_threshold(values, weight.shape)
            keys = jax.random.split(run.key(3100 + i))
            u, v = (
                np.asarray(jax.random.normal(key, (draws, n)), np.float64)
                for key, n in zip(keys, weight.shape, strict=True)
            )
            u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
            if weight.shape[0] > weight.shape[1]:
                weight, u, v = weight.T, v, u
            merged = weight + theta * u[:, :, None] * v[:, None, :]
            squares = np.linalg.eigvalsh(merged @ merged.transpose(0, 2, 1))
            tops = np.sqrt(squares[:, -1])
            found[path] = values, theta, tops, weight.shape
        return found

    found = run.once("intruders", simulate)
    law = np.array(
        [ranks.intruder_value(v, shape, t, power=power) for v, t, _, shape in found.values()]
    )
    tops = np.array([x[2] for x in found.values()])
    mean, variance = tops.mean(axis=1), tops.var(axis=1, ddof=1)
    quantile = standard_errors(len(law), draws - 1)
    allowed = quantile * np.sqrt(variance / draws) + 2 * variance / law
    share = np.abs(mean - law) / allowed
    worst = int(np.argmax(share))

    def draw(ax):
        places = np.arange(len(law))
        ax.errorbar(places, mean, np.sqrt(variance), fmt="o", label="one direction, ± 1 sd")
        ax.plot(places, law, "k_", markersize=12, label="law")
        ax.plot(places, [x[0][0] for x in found.values()], "x", label="top of the weight")
        ax.set(xlabel="layer", ylabel="top singular value")
        ax.legend()

    return Evidence(
        measured={"values": mean.tolist(), "worst_share_of_tolerance": float(share[worst])},
        predicted={"values": law.tolist()},
        error=float(np.abs(mean - law)[worst]),
        tolerance=float(allowed[worst]),
        draw=draw,
        caption=f"Each of {len(law)} kernels of the embedded ViT, {draws} random directions.",
    )
