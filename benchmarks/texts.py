"""A LoRA step on language models: lorajax against PEFT with torch, on this machine and in this run.

`python -m benchmarks texts` needs the extras `benchmark` and `text`, and the folder LORAJAX_DATA:
MiniLM answers CoLA (32 texts of 64 tokens, two classes by its pooler), and SmolLM2, where the
folder has it, continues tinyshakespeare (4 rows of 256 tokens) and learns the answers to
instructions (one conversation of up to 96 tokens in its chat template). Both read one checkpoint
and one started adapter (rank 16 on query and value; MiniLM's head trains, too) and take the same
batches with AdamW, so that their losses can be compared step by step. Each runs in a process of
its own, in turn and several times over, so that a busy machine slows both alike, and what other
processes took in the meantime is told. Memory is the largest resident set of the process.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import machine

RANK, RATE = 16, 1e-3


class Case(NamedTuple):
    """A model and the batches that it is trained on."""

    folder: str
    batch: int
    length: int
    asked: str
    """For "classes", the next tokens of a "text", or those of "answers"."""


CASES = {
    "minilm": Case("minilm-l6", 32, 64, "classes"),
    "smollm2": Case("smollm2-135m", 4, 256, "text"),
    "instructions": Case("smollm2-135m", 1, 96, "answers"),
}


def write_case(case: Case, shelf: pathlib.Path, out: pathlib.Path, steps: int) -> None:
    """Checkpoint, started adapter and batches, for both engines; in a process of its own."""
    import jax

    from lorajax import adapters, models
    from lorajax.data import text
    from lorajax.finetune import bridge

    classes = case.asked == "classes"
    options: dict[str, Any] = {"classes": 2, "pool": "cls"} if classes else {}
    model = models.load(shelf / case.folder, **options)
    models.save(model, out / "base" / "model.safetensors", layout="huggingface")
    targets = ["**/attention/query", "**/attention/value"]
    adapted = adapters.adapt(model, targets, key=jax.random.key(0), rank=RANK, start="orthogonal")
    bridge.save_adapter(adapted, out / "adapter", out / "base", model.heads)
    tokenizer = text.Tokenizer(shelf / case.folder)
    rows, width = steps * case.batch, case.length
    if case.asked == "classes":
        asked = text.read_texts(shelf / "glue" / "cola_train.tsv", kind="classes")
        train, _ = text.tables(asked, tokenizer, text.Limits(max_length=width))
        taken = train[np.arange(rows) % len(train)]
        short = ((0, 0), (0, width - taken["tokens"].shape[1]))
        batch = {n: np.pad(taken[n], short) for n in ("tokens", "mask")}
        batch["labels"] = taken["labels"]
    elif case.asked == "answers":
        asked = text.read_texts(shelf / "text" / "instruct_1100.jsonl")
        template = text.chat_template(shelf / case.folder, tokenizer)
        train, _ = text.tables(asked, tokenizer, template=template)
        train = train.take(np.flatnonzero(text.lengths(train) <= width))
        taken = train[np.arange(rows) % len(train)]
        batch = {n: np.pad(x, ((0, 0), (0, width - x.shape[1]))) for n, x in taken.items()}
    else:
        with open(shelf / "tinyshakespeare.txt", encoding="utf-8") as file:
            (encoded,) = tokenizer.encode([file.read(6 * rows * width)])
        batch = {"tokens": encoded.tokens[: rows * width].reshape(rows, width)}
    np.savez(out / "batches.npz", allow_pickle=False, **batch)


def batches_of(case: Case, out: pathlib.Path) -> Callable[[int], dict[str, np.ndarray]]:
    """The columns of a step's batch; after the last one from the first again."""
    with np.load(out / "batches.npz") as file:
        columns = {name: file[name] for name in file.files}
    count = len(columns["tokens"]) // case.batch

    def batch(step: int) -> dict[str, np.ndarray]:
        first = step % count * case.batch
        return {name: column[first : first + case.batch] for name, column in columns.items()}

    return batch


def measured(step: Callable[[int], float], steps: int, imports: int) -> dict[str, Any]:
    """Losses of all steps, and what each but the first, which compiles, takes."""
    losses, seconds, cpu = [], [], []
    stages = {"imports": imports, "model read": machine.peak()}
    for i in range(steps):
        begin, spent = time.perf_counter(), time.process_time()
        losses.append(step(i))
        seconds.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - spent)
        stages.setdefault("first step", machine.peak())
    memory = machine.peak()
    return {
        "stages": stages,
        "losses": losses,
        "first": seconds[0],
        "seconds": seconds[1:],
        "cpu": cpu[1:],
        "memory": memory,
    }


def peft_engine(case: Case, out: pathlib.Path, steps: int) -> dict[str, Any]:
    from benchmarks import peers

    peers.load_torchvision()
    import peft
    import torch
    import transformers

    kind: Any = (
        transformers.AutoModelForSequenceClassification
        if case.asked == "classes"
        else transformers.AutoModelForCausalLM
    )
    imports = machine.peak()
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = kind.from_pretrained(
        out / "base", dtype=torch.float32, **(still if case.asked == "classes" else {})
    )
    model = peft.PeftModel.from_pretrained(base, out / "adapter", is_trainable=True)
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
    batch = batches_of(case, out)

    def step(i: int) -> float:
        columns = {name: torch.from_numpy(column) for name, column in batch(i).items()}
        tokens = columns["tokens"].long()
        if case.asked == "classes":
            given = {"attention_mask": columns["mask"].long(), "labels": columns["labels"].long()}
        elif case.asked == "answers":
            labels = tokens.where(columns["targets"], -100)  # what torch takes no loss of
            given = {"attention_mask": (columns["segments"] > 0).long(), "labels": labels}
        else:
            given = {"labels": tokens}
        loss = model(input_ids=tokens, **given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    found = measured(step, steps, imports)
    version = f"peft {peft.__version__}, torch {torch.__version__}"
    return {**found, "trainable": sum(p.numel() for p in trainable), "version": version}


def lorajax_engine(case: Case, out: pathlib.Path, steps: int) -> dict[str, Any]:
    import jax

    from lorajax import adapters, environment, finetune, models, tasks
    from lorajax.finetune import bridge

    environment.guard()  # as the command does for its users
    environment.wide()
    jax.devices()
    imports = machine.peak()
    model = models.load(out / "base")
    rules = bridge.bridge(model, out / "base").rules
    adapted = adapters.load_peft(model, out / "adapter", rules=rules)
    batch = batches_of(case, out)
    task = tasks.Texts() if case.asked == "classes" else tasks.NextToken()
    recipe = finetune.Recipe(
        steps=10**6, batch_size=case.batch, learning_rate=RATE, schedule="constant"
    )
    wrt = adapters.trainable(adapted, heads=model.heads)
    trainer = finetune.Trainer(adapted, wrt, task, recipe)
    del model
    state = trainer.init()
    shape = (case.batch, case.length)
    whole = {
        "targets": np.ones(shape, bool),
        "segments": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(case.length, dtype=np.int32), (case.batch, 1)),
    }

    def step(i: int) -> float:
        nonlocal state
        state, metrics = trainer.step(
            state, {**batch(i), **(whole if case.asked == "text" else {})}
        )
        return float(metrics.loss)

    found = measured(step, steps, imports)
    version = f"jax {jax.__version__} on {jax.devices()[0].platform}"
    return {**found, "trainable": trainer.parameters, "version": version}


ENGINES = {"lorajax": lorajax_engine, "peft": peft_engine}


def run_rounds(
    args: argparse.Namespace, name: str, out: pathlib.Path
) -> dict[str, list[dict[str, Any]]]:
    """What the engines measured, a dictionary a round; the first round is the longest."""
    command = [sys.executable, "-m", "benchmarks", "texts", "--case", name, "--folder", str(out)]
    command += ["--curve", str(args.curve)]
    subprocess.run(command, check=True)
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in ENGINES}
    for i in range(args.rounds):
        steps = args.steps + 1 if i else max(args.curve, args.steps + 1)
        for engine in ENGINES:
            watch = machine.Watch()
            done = subprocess.run(
                [*command, "--engine", engine, "--steps", str(steps)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                # On a busy machine threads that wait for each other would else spin, and torch's
                # processor time be several times what it computes.
                env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
            )
            last = {**json.loads(done.stdout.splitlines()[-1]), "others": watch.others()}
            found[engine].append(last)
            middle, cpu = statistics.median(last["seconds"]), statistics.median(last["cpu"])
            print(f"{name}, {engine}: {middle:.2f} s a step, {cpu:.2f} s of processor", flush=True)
    return found


def summary(name: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Prints and returns how the engines compare on a model."""
    case, table = CASES[name], {}
    what = {"classes": "classes", "text": "next tokens", "answers": "answers"}[case.asked]
    print(f"\n{case.folder}, {what}, {case.batch} × {case.length} tokens, rank {RANK} on q and v:")
    for engine, rounds in found.items():
        seconds = [s for each in rounds for s in each["seconds"]]
        cpu = [s for each in rounds for s in each["cpu"]]
        table[engine] = {
            "version": rounds[0]["version"],
            "trainable": rounds[0]["trainable"],
            "seconds_per_step": statistics.median(seconds),
            "spread": [min(seconds), max(seconds)],
            "medians_of_rounds": [statistics.median(each["seconds"]) for each in rounds],
            "processor_seconds": statistics.median(cpu),
            "processor_spread": [min(cpu), max(cpu)],
            "first_step": min(each["first"] for each in rounds),
            "peak_bytes": max(each["memory"] for each in rounds),
            "peak_bytes_after": {
                stage: max(each["stages"][stage] for each in rounds)
                for stage in rounds[0]["stages"]
            },
            "others": [each["others"] for each in rounds],
            "losses": rounds[0]["losses"],
        }
        row = table[engine]
        print(
            f"{engine:8} {row['seconds_per_step']:.2f} s a step ({min(seconds):.2f} … "
            f"{max(seconds):.2f}), {row['processor_seconds']:.2f} s of processor time (best "
            f"{min(cpu):.2f}), peak memory {row['peak_bytes'] / 1e9:.2f} GB, first step "
            f"{row['first_step']:.1f} s, {row['trainable']:,} trainable; {row['version']}"
        )
    ours, theirs = table["lorajax"], table["peft"]
    gap = float(np.abs(np.subtract(ours["losses"], theirs["losses"])).max())
    result = {
        "batch": case.batch,
        "length": case.length,
        "asked": case.asked,
        "time": ours["seconds_per_step"] / theirs["seconds_per_step"],
        "processor_time": ours["processor_seconds"] / theirs["processor_seconds"],
        "memory": ours["peak_bytes"] / theirs["peak_bytes"],
        "largest_difference_of_losses": gap,
        "steps_of_curve": len(ours["losses"]),
        "engines": table,
    }
    print(
        f"lorajax takes {result['time']:.2f} of PEFT's time, {result['processor_time']:.2f} of its "
        f"processor time and {result['memory']:.2f} of its memory; over {len(ours['losses'])} "
        f"steps losses differ by {gap:.1e} at most"
    )
    if busy := machine.said([x for each in table.values() for x in each["others"]]):
        result["busy"] = busy
        print(busy)
    return result


def _cores() -> int:
    return os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the engines in turn and prints the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--curve", type=int, default=50, help="steps of the first round")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of the others")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the table; of other models it stays")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    shelf = os.environ.get("LORAJAX_DATA")
    if not shelf:
        print("Nothing is measured: LORAJAX_DATA, the folder with the models, is not set.")
        return 0
    if args.engine:
        print(json.dumps(ENGINES[args.engine](CASES[args.case], args.folder, args.steps)))
        return 0
    if args.case:
        write_case(CASES[args.case], pathlib.Path(shelf), args.folder, args.curve)
        return 0
    results: dict[str, Any] = {}
    for name in args.models:
        if not (pathlib.Path(shelf) / CASES[name].folder).is_dir():
            print(f"{name} is left out: {CASES[name].folder} is not in LORAJAX_DATA.")
            continue
        with tempfile.TemporaryDirectory() as out:
            results[name] = summary(name, run_rounds(args, name, pathlib.Path(out)))
    if args.json:
        path = pathlib.Path(args.json)
        old = json.loads(path.read_text()).get("models", {}) if path.exists() else {}
        content = {"rank": RANK, "cores": _cores(), "models": {**old, **results}}
        path.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
