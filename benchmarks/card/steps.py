"""LoRA steps of ViT-B/16, BERT-base and SmolLM2-135M in bfloat16, and the same by PEFT.

The base has random weights in bfloat16, the adapters (rank 16 on query and value) are in float32,
as PEFT has them by default; AdamW, one batch again and again. Each engine draws its own weights:
what a step costs does not depend on them, and that both compute the same is held by the fixtures
and by `python -m benchmarks texts`. Float32 products of either may use TensorFloat-32.
"""

import contextlib
import dataclasses
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.card import rates
from benchmarks.card.runs import Report

RANK = 16
NAMES = ("vit", "bert", "llama")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
      name: of the case.
      unit: what is counted: "images" or "tokens".
      config: of our model.
      batch: samples of a step.
      length: tokens of a sample, for texts.
      shared: samples of each adapter's step where many train.
    """

    name: str
    unit: str
    config: Any
    batch: int
    length: int
    shared: int

    @property
    def units(self) -> int:
        """Images or tokens of a step."""
        return self.batch if self.unit == "images" else self.batch * self.length

    def shape(self) -> rates.Shape:
        """What the operations of a step depend on."""
        c = self.config
        common: dict[str, Any] = {"width": c.width, "depth": c.depth, "batch": self.batch}
        common |= {"rank": RANK, "hidden": c.mlp_width}
        if self.name == "llama":
            inner, shared = c.heads * c.head_width, c.groups * c.head_width
            common |= {"inner": inner, "shared": shared, "layers": 3, "tokens": self.length}
            return rates.Shape(**common, head=c.vocabulary, answers=self.length, causal=True)
        common |= {"inner": c.width, "shared": c.width, "layers": 2}
        if self.name == "bert":
            common |= {"tokens": self.length, "dense": c.width**2}
            return rates.Shape(**common, head=c.classes, answers=1)
        patches = c.grid[0] * c.grid[1]
        common |= {"patches": patches, "patch": c.patch_size**2 * c.channels}
        return rates.Shape(**common, tokens=c.prefix + patches, head=c.classes, answers=1)

    @property
    def last(self) -> int | None:
        """Tokens that our last block takes through: the head of ViT and BERT reads the first."""
        return None if self.name == "llama" else 1


def case(name: str, tiny: bool) -> Case:
    """A case by name, "vit", "bert" or "llama"; with a model of a few hundred weights if tiny."""
    from lorajax import models

    if name == "vit":
        if tiny:
            config = models.ViTConfig((12, 12), 4, width=32, depth=2, heads=2, classes=3)
            return Case(name, "images", config, 2, 0, 1)
        return Case(name, "images", models.config("vit-b/16"), 64, 0, 8)
    if name == "bert":
        if tiny:
            config = models.BertConfig(vocabulary=64, width=32, depth=2, heads=2)
            return Case(name, "tokens", config, 2, 8, 1)
        return Case(name, "tokens", models.config("bert-base-uncased", classes=2), 64, 128, 8)
    if tiny:
        config = models.LlamaConfig(64, width=32, depth=2, heads=2, groups=1, mlp_width=48)
        return Case(name, "tokens", dataclasses.replace(config, tied=True), 2, 8, 1)
    return Case(name, "tokens", models.config("smollm2-135m"), 8, 512, 2)


def random_model(config: Any, dtype: Any) -> Any:
    """A model of a configuration whose weights NumPy draws: nothing is compiled for them."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lorajax.models import catalog

    graph, state = nnx.split(catalog.abstract(config, dtype, dtype))
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if "scale" in name or "bias" in name:
            return jnp.full(leaf.shape, float("scale" in name), leaf.dtype)
        drawn = rng.standard_normal(leaf.shape, dtype=np.float32) * np.float32(0.02)
        return jnp.asarray(drawn, leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


def batch_of(made: Case) -> dict[str, np.ndarray]:
    """A batch for our task."""
    rng, c = np.random.default_rng(0), made.config
    if made.name == "vit":
        shape = (made.batch, *c.image_size, c.channels)
        images = rng.integers(0, 256, shape, dtype=np.uint8)
        return {"images": images, "labels": rng.integers(0, c.classes, made.batch).astype(np.int32)}
    shape = (made.batch, made.length)
    tokens = rng.integers(1, c.vocabulary, shape).astype(np.int32)
    whole = np.ones(shape, bool)
    if made.name == "bert":
        labels = rng.integers(0, c.classes, made.batch).astype(np.int32)
        return {"tokens": tokens, "mask": whole, "labels": labels}
    places = np.tile(np.arange(made.length, dtype=np.int32), (made.batch, 1))
    segments = whole.astype(np.int32)
    return {"tokens": tokens, "targets": whole, "segments": segments, "positions": places}


def trainer_of(made: Case) -> Any:
    """A trainer of adapters on a random base."""
    import jax
    import jax.numpy as jnp

    from lorajax import adapters, finetune, tasks

    model = random_model(made.config, jnp.bfloat16)
    targets = ["**/attention/query", "**/attention/value"]
    adapted = adapters.adapt(model, targets, key=jax.random.key(0), rank=RANK)
    task = {"bert": tasks.Texts(), "llama": tasks.NextToken()}.get(made.name)
    recipe = finetune.Recipe(steps=10**6, batch_size=made.batch, schedule="constant")
    wrt = adapters.trainable(adapted)
    return finetune.Trainer(adapted, wrt, task or tasks.Images.of(made.config), recipe)


def fused_by() -> Any:
    """By whom `fused` computes attention: cuDNN on a card, XLA elsewhere."""
    return "cudnn" if rates.device().platform == "gpu" else "xla"


def fused(query: Any, key: Any, value: Any, mask: Any = None, causal: bool = False) -> Any:
    """Attention by cuDNN on a card, by XLA elsewhere, (b, t, heads, f) → (b, t, heads f).

    An odd number of tokens is filled up, and how many stand is said by their number: cuDNN refuses
    odd ones for a mask, and a mask costs more than numbers.
    """
    import jax
    import jax.numpy as jnp

    asked, seen = query.shape[1], key.shape[1]
    options: dict[str, Any] = {"mask": mask, "is_causal": causal}
    if mask is None and (asked % 2 or seen % 2):
        query = jnp.pad(query, ((0, 0), (0, asked % 2), (0, 0), (0, 0)))
        key, value = (jnp.pad(x, ((0, 0), (0, seen % 2), (0, 0), (0, 0))) for x in (key, value))
        options |= {
            "query_seq_lengths": jnp.full(query.shape[0], asked, jnp.int32),
            "key_value_seq_lengths": jnp.full(query.shape[0], seen, jnp.int32),
        }
    options["implementation"] = fused_by()
    mixed = jax.nn.dot_product_attention(query, key, value, **options)
    return mixed[:, :asked].reshape(query.shape[0], asked, -1)


@contextlib.contextmanager
def fused_attention(made: Case) -> Iterator[None]:
    """Our models with `fused` in place of their own attention, for batches without filling."""
    from lorajax.models import layers
    from lorajax.models.vit import attention as vit

    plain, plain_call = layers.attention, vit.Attention.__call__

    def of_texts(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
        del mask  # all tokens stand, so that causal is all there is to it
        return fused(query, key, value, causal=made.name == "llama")

    def of_images(self: Any, x: Any, first: int | None = None, **options: Any) -> Any:
        if any(each is not None for each in options.values()):
            return plain_call(self, x, first, **options)

        def split(y: Any) -> Any:
            return y.reshape(*y.shape[:2], self.heads, -1)

        query, key, value = self.query(x[:, :first]), self.key(x), self.value(x)
        return self.out(fused(split(query), split(key), split(value)))

    kind: Any = vit.Attention
    layers.attention, kind.__call__ = of_texts, of_images
    try:
        yield
    finally:
        layers.attention, kind.__call__ = plain, plain_call


def paces(
    step: Callable[[], Any], wait: Callable[[Any], Any], spend: float, rounds: int = 10
) -> tuple[float, list[float]]:
    """Seconds of the first step, and of a step in each of several rounds of five.

    A round is waited for at its end alone, as in training, where a step is on its way while the
    next is asked for.
    """
    begin = time.perf_counter()
    wait(step())
    first = time.perf_counter() - begin
    wait(step())
    seconds: list[float] = []
    while len(seconds) < rounds and (len(seconds) < 2 or 5 * sum(seconds) < spend):
        begin = time.perf_counter()
        for _ in range(4):
            step()
        wait(step())
        seconds.append((time.perf_counter() - begin) / 5)
    return first, seconds


def resident() -> int:
    """The largest resident set of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_bytes() -> int:
    """Most bytes in use on JAX's device so far; of the process where the device does not tell."""
    stats = rates.device().memory_stats() or {}
    return int(stats.get("peak_bytes_in_use") or resident())


def memory_of(report: Report, planned: Any) -> dict[str, int | None]:
    """Bytes that XLA plans for a step, and in a stage's first row those that it had in use.

    A later row has no peak of its own: what the device remembers is that of the process.
    """
    plan = planned and planned.argument_size_in_bytes + planned.temp_size_in_bytes
    return {"planned_bytes": plan, "peak_bytes": None if "rows" in report.found else peak_bytes()}


def row_of(
    report: Report, made: Case, engine: str, flops: float, seconds: list[float], **more: Any
) -> None:
    """A row of the table of steps."""
    median, name = statistics.median(seconds), more.pop("card")
    rate = flops / median
    peak = rates.peak(name, "bfloat16")
    report.row(
        engine=engine,
        seconds_per_step=median,
        spread=[min(seconds), max(seconds)],
        unit=made.unit,
        units_per_second=made.units / median,
        flops=flops,
        utilization=None if peak is None else rate / peak,
        flop_rate=rate,
        **more,
    )


def _ours(report: Report, tiny: bool, name: str) -> None:
    import jax

    made = case(name, tiny)
    report.add(batch=made.batch, tokens=made.shape().tokens, rank=RANK, fused_by=fused_by())
    columns = {k: jax.numpy.asarray(v) for k, v in batch_of(made).items()}
    flops = rates.step_flops(made.shape(), made.last)
    for engine, context in (
        ("lorajax", contextlib.nullcontext()),
        ("lorajax, fused attention", fused_attention(made)),
    ):
        with context:
            trainer = trainer_of(made)
            state: Any = None
            metrics: Any = None

            def step(trainer: Any = trainer) -> Any:
                nonlocal state, metrics
                state, metrics = trainer.step(state, columns)
                return metrics.loss

            state = trainer.init()
            first, seconds = paces(step, float, min(10.0, report.left / 4), 2 if tiny else 10)
            analysis = trainer.lower(state, columns).compile()
            cost, memory = analysis.cost_analysis() or {}, analysis.memory_analysis()
        row_of(
            report,
            made,
            engine,
            flops,
            seconds,
            card=rates.device().device_kind,
            first=first,
            **memory_of(report, memory),
            xla_flops=cost.get("flops"),
            loss=float(metrics.loss),
            trainable=trainer.parameters,
        )
        del trainer, state
        if report.left < 20:
            return


def vit(report: Report, tiny: bool) -> None:
    """ViT-B/16 on images of 224 pixels."""
    _ours(report, tiny, "vit")


def bert(report: Report, tiny: bool) -> None:
    """BERT-base, classes of texts of 128 tokens."""
    _ours(report, tiny, "bert")


def llama(report: Report, tiny: bool) -> None:
    """SmolLM2-135M, next tokens of rows of 512."""
    _ours(report, tiny, "llama")


def _torch_model(made: Case) -> Any:
    """The model of transformers of the same shape, with random weights."""
    import transformers

    c = made.config
    sizes = {"hidden_size": c.width, "num_hidden_layers": c.depth, "num_attention_heads": c.heads}
    sizes |= {"intermediate_size": c.mlp_width, "attn_implementation": "sdpa"}
    if made.name == "vit":
        config = transformers.ViTConfig(
            image_size=c.image_size[0], patch_size=c.patch_size, num_labels=c.classes, **sizes
        )
        return transformers.ViTForImageClassification(config)
    if made.name == "bert":
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(
            vocab_size=c.vocabulary, num_labels=c.classes, **sizes, **still
        )
        return transformers.BertForSequenceClassification(config)
    config = transformers.LlamaConfig(
        vocab_size=c.vocabulary,
        num_key_value_heads=c.groups,
        head_dim=c.head_width,
        max_position_embeddings=c.context,
        tie_word_embeddings=c.tied,
        use_cache=False,
        **sizes,
    )
    return transformers.LlamaForCausalLM(config)


def _torch_batch(made: Case, where: Any) -> dict[str, Any]:
    import torch

    batch = batch_of(made)
    if made.name == "vit":
        pixels = (torch.from_numpy(batch["images"]).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        given = {"pixel_values": pixels.to(torch.bfloat16)}
        labels = torch.from_numpy(batch["labels"]).long()
    elif made.name == "bert":
        # No mask: all tokens stand, and an empty one lets PyTorch take its fastest attention.
        given = {"input_ids": torch.from_numpy(batch["tokens"]).long()}
        labels = torch.from_numpy(batch["labels"]).long()
    else:
        given = {"input_ids": torch.from_numpy(batch["tokens"]).long()}
        labels = given["input_ids"]
    return {name: x.to(where) for name, x in (given | {"labels": labels}).items()}


def _peft(report: Report, tiny: bool, name: str) -> None:
    from benchmarks import peers

    peers.load_torchvision()
    import peft
    import torch

    made = case(name, tiny)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # As JAX does by default on a card.
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = _torch_model(made).to(where, torch.bfloat16)
    model, trainable, optimizer = peers.lora(model, RANK)
    batch = _torch_batch(made, where)

    def step() -> Any:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    report.add(batch=made.batch, tokens=made.shape().tokens, rank=RANK)
    first, seconds = paces(step, lambda x: x.item(), min(10.0, report.left / 3), 2 if tiny else 10)
    cuda = where.type == "cuda"
    row_of(
        report,
        made,
        "peft",
        rates.step_flops(made.shape()),
        seconds,
        card=torch.cuda.get_device_name() if cuda else "cpu",
        first=first,
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else resident(),
        trainable=sum(p.numel() for p in trainable),
        dtypes=sorted({str(p.dtype) for p in model.parameters()}),
        version=f"peft {peft.__version__}, torch {torch.__version__}",
    )


def vit_peft(report: Report, tiny: bool) -> None:
    """The same as `vit` by PEFT and torch."""
    _peft(report, tiny, "vit")


def bert_peft(report: Report, tiny: bool) -> None:
    """The same as `bert` by PEFT and torch."""
    _peft(report, tiny, "bert")


def llama_peft(report: Report, tiny: bool) -> None:
    """The same as `llama` by PEFT and torch."""
    _peft(report, tiny, "llama")


def many(report: Report, tiny: bool) -> None:
    """Sixteen adapters on one base: in one program, and one after another."""
    import jax
    import jax.numpy as jnp

    count = 3 if tiny else 16
    whole = case("bert", tiny)
    made = dataclasses.replace(whole, batch=whole.shared)
    report.add(adapters=count, batch=made.batch, tokens=made.length, rank=RANK)
    trainer = trainer_of(made)
    columns = {k: jnp.asarray(v) for k, v in batch_of(made).items()}
    flops = count * rates.step_flops(made.shape(), made.last)

    def add(way: str, step: Callable[[], Any], planned: Any) -> None:
        first, seconds = paces(step, jax.block_until_ready, report.left / 4, 2 if tiny else 10)
        row_of(
            report,
            dataclasses.replace(made, batch=count * made.batch),
            way,
            flops,
            seconds,
            card=rates.device().device_kind,
            first=first,
            **memory_of(report, planned),
        )

    states = [trainer.init() for _ in range(count)]
    plan = trainer.lower(states[0], columns).compile().memory_analysis()

    def in_turn() -> Any:
        for i, state in enumerate(states):
            states[i], metrics = trainer.step(state, columns)
        return metrics.loss

    add("one after another", in_turn, plan)
    lanes = jax.tree.map(lambda *x: jnp.stack(x), *states)
    several = {k: jnp.broadcast_to(v, (count, *v.shape)) for k, v in columns.items()}
    together = jax.jit(jax.vmap(trainer.advance, in_axes=(0, None, 0)), donate_argnums=0)
    plan = together.lower(lanes, trainer.frozen, several).compile().memory_analysis()

    def at_once() -> Any:
        nonlocal lanes
        lanes, metrics = together(lanes, trainer.frozen, several)
        return metrics.loss

    add("at once", at_once, plan)
    one, other = (r["seconds_per_step"] for r in report.found["rows"])
    report.add(ratio=one / other)
