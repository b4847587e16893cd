"""Where the time of a step goes: a trace of the profiler by kind of kernel, or XLA's own count."""

import pathlib
import re
import tempfile
import time
from collections.abc import Iterator

from benchmarks.card import steps
from benchmarks.card.runs import Report

KINDS = {
    "attention": r"fmha|flash|cudnn|softmax",
    "product": r"gemm|dot|matmul|cublas|cutlass|nvjet|xmma|s\d+_tensorop",
    "copy": r"memcpy|memset|copy|transpose|slice|concatenate|broadcast|pad",
    "sum": r"reduce",
    "elementwise": r"fusion|loop|add|multiply|convert|exp|wrapped|select|rsqrt|tanh|erf",
}
"""Kinds of kernels by their names, the first that fits."""


def kind_of(name: str) -> str:
    """The kind of a kernel, "other" where none fits."""
    found = (kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE))
    return next(found, "other")


def kernels(folder: str) -> Iterator[tuple[str, float, float]]:
    """Name, begin and end in seconds of what ran on the device, of a trace in a folder.

    On a card these are its kernels, by stream; on a CPU the operations of XLA's threads.
    """
    from jax.profiler import ProfileData

    for path in sorted(pathlib.Path(folder).rglob("*.xplane.pb")):
        planes = list(ProfileData.from_file(str(path)).planes)
        cards = [p for p in planes if p.name.startswith("/device:GPU")]
        for plane in cards or [p for p in planes if p.name == "/host:CPU"]:
            for line in plane.lines:
                # On a card lines of streams hold kernels, others repeat them under XLA's names.
                if not re.match(r"Stream" if cards else r".*XLA", line.name, re.IGNORECASE):
                    continue
                for event in line.events:
                    if cards or re.fullmatch(r"[a-z_\-.]+[\w.\-]*", event.name):
                        begin = event.start_ns / 1e9
                        yield event.name, begin, begin + event.duration_ns / 1e9


def busy(spans: list[tuple[float, float]]) -> float:
    """Seconds that at least one of several spans covers."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(spans):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total


def profile(report: Report, tiny: bool) -> None:
    """A trace of three steps of ViT-B/16 and XLA's count of operations and bytes."""
    import jax

    made = steps.case("vit", tiny)
    trainer = steps.trainer_of(made)
    columns = {k: jax.numpy.asarray(v) for k, v in steps.batch_of(made).items()}
    state = trainer.init()
    cost = trainer.lower(state, columns).compile().cost_analysis() or {}
    report.add(
        model="vit",
        xla={k: cost[k] for k in ("flops", "bytes accessed") if k in cost},
    )
    state, metrics = trainer.step(state, columns)
    state, metrics = trainer.step(state, columns)
    jax.block_until_ready(metrics)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            begin = time.perf_counter()
            for _ in range(3):
                state, metrics = trainer.step(state, columns)
            jax.block_until_ready(metrics)
            wall = time.perf_counter() - begin
        try:
            found = list(kernels(folder))
        except Exception as error:  # another profiler; the count above stands
            report.add(unread=f"{type(error).__name__}: {error}")
            return
    if not found:
        report.add(unread="the trace names no kernel")
        return
    by_kind: dict[str, float] = {}
    by_name: dict[str, float] = {}
    for name, begin, end in found:
        by_kind[kind_of(name)] = by_kind.get(kind_of(name), 0.0) + end - begin
        by_name[name] = by_name.get(name, 0.0) + end - begin
    total = sum(by_kind.values())
    report.add(
        seconds_per_step=wall / 3,
        busy=busy([(begin, end) for _, begin, end in found]) / wall,
        kernels=len(found) // 3,
        rows=[
            {"kind": kind, "share": seconds / total}
            for kind, seconds in sorted(by_kind.items(), key=lambda x: -x[1])
        ],
        longest=[
            {"kernel": name[:100], "share": seconds / total}
            for name, seconds in sorted(by_name.items(), key=lambda x: -x[1])[:8]
        ],
    )
