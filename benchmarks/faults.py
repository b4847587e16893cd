"""Does a run that something befalls come to the same end when it is started again?

    python -m benchmarks faults [--fresh] [--only COMMAND] [--seed N]

Each command runs once undisturbed. Then faults strike at moments drawn from the seed: `kill -9`,
SIGTERM, SIGINT, a disk that is full, folders that cannot be written to, two runs at once, files
that are deleted or cut short, clocks that jump. The same command is given again until it ends, and
what it leaves must be what the undisturbed run left, byte for byte but for the seconds it took. A
lane or step that was done before must not be done again. A campaign that was cut off goes on.
"""

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.trust import commands, pages

FIXTURE = pages.ROOT / "tests" / "models" / "fixtures" / "huggingface_vit"
SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}


class Kind(NamedTuple):
    """A command, where it writes, and what of that must be the same."""

    name: str
    argv: Callable[[pathlib.Path], list[str]]
    again: list[str]
    result: Callable[[pathlib.Path], dict[str, Any]]
    rounds: int
    files: str


def _bytes(folder: pathlib.Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes().hex() for path in files}


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_seconds(v) for k, v in value.items() if k != "seconds"}
    return [_without_seconds(v) for v in value] if isinstance(value, list) else value


def _sweep(folder: pathlib.Path) -> dict[str, Any]:
    return _bytes(folder / "s.zarr")


def _validate(folder: pathlib.Path) -> dict[str, Any]:
    shown = json.loads((folder / "verdicts.json").read_text())
    return {"verdicts": _without_seconds(shown), **_bytes(folder / "figures")}


def _rank(folder: pathlib.Path) -> dict[str, Any]:
    return {"ranks": (folder / "ranks.json").read_text()}


def _finetune(folder: pathlib.Path) -> dict[str, Any]:
    history = json.loads((folder / "history.json").read_text())
    return {"history": _without_seconds(history), **_bytes(folder / "adapter")}


def kinds(place: pathlib.Path) -> list[Kind]:
    """The commands, on problems as small as they come."""
    model = ["--model", str(FIXTURE), "--data", str(place / "pack.npz"), "--image-size", "16"]
    few = ["--samples", "32", "--head-epochs", "1", "--seed", "3"]
    flow = ["sweep", "flow", "--shape", "6", "5", "--ranks", "2", "--scales", "1e-1", "1e-2"]
    flow += ["--starts", "lora", "--seeds", "0:32", "--chunk", "4"]
    train = ["--rank", "2", "--epochs", "4", "--batch-size", "8", "--probes", "2"]
    claims = [f"gradient_flow.{x}" for x in ("spectral_flow", "scaled_gd_one_step", "logistic")]
    return [
        Kind("sweep", lambda f: [*flow, "--store", str(f / "s.zarr")], [], _sweep, 15, "s.zarr"),
        Kind(
            "validate",
            lambda f: ["validate", *claims, "--out", str(f)],
            ["--resume"],
            _validate,
            3,
            "",
        ),
        Kind("rank", lambda f: ["rank", *model, *few, "--out", str(f)], [], _rank, 3, ""),
        Kind(
            "finetune",
            lambda f: ["finetune", *model, *few, *train, "--out", str(f)],
            ["--resume"],
            _finetune,
            3,
            "checkpoints",
        ),
    ]


class Site:
    """One command with its undisturbed result, and faults that are made of it."""

    def __init__(self, kind: Kind, place: pathlib.Path):
        self.kind, self.place, self.number = kind, place, 0
        whole = place / f"{kind.name}-whole"
        whole.mkdir()
        for _ in range(2):  # the first one compiles
            shutil.rmtree(whole)
            whole.mkdir()
            ended = self.start(whole).finish(300)
            if ended.status:
                raise RuntimeError(f"{kind.name} fails undisturbed: {ended.said[-2000:]}")
        self.whole, self.seconds, self.folder = kind.result(whole), ended.seconds, whole

    def start(
        self,
        folder: pathlib.Path,
        before: Callable[[], None] | None = None,
        again: bool = False,
    ) -> commands.Running:
        """Starts it in a folder."""
        self.number += 1
        argv = [*self.kind.argv(folder), *(self.kind.again if again else [])]
        return commands.Running(argv, self.place / f"{self.number}.log", before)

    def fresh(self, copy: bool = False) -> pathlib.Path:
        """A new folder; with a copy of the undisturbed result in it."""
        folder = self.place / f"{self.kind.name}-{self.number}-{random.getrandbits(32)}"
        if copy:
            shutil.copytree(self.folder, folder)
        else:
            folder.mkdir()
        return folder

    def done(self, folder: pathlib.Path) -> int:
        """Lanes or steps that a folder has."""
        if self.kind.name == "sweep":
            return _lanes(folder / "s.zarr")
        if self.kind.name == "validate":
            return _verdicts(folder / "verdicts.json")
        saved = folder / "checkpoints"
        if self.kind.name == "finetune" and saved.is_dir():
            return max((int(p.name) for p in saved.iterdir() if p.name.isdecimal()), default=0)
        return 0

    def settle(self, folder: pathlib.Path) -> tuple[str, commands.Ended]:
        """Gives the command again until it ends, and judges what it leaves."""
        done = self.done(folder)
        ended = self.start(folder, again=True).finish()
        if ended.status:
            return f"not resumed: {ended.said[-400:]}", ended
        found = re.search(r"\((\d+) were there\)|resumed at step (\d+)", ended.said)
        resumed = int(found[1] or found[2]) if found else 0
        if resumed < done:
            return f"redone: {done} were done, {resumed} were resumed", ended
        try:
            same = self.kind.result(folder) == self.whole
        except (OSError, ValueError) as error:
            return f"lost: {error}", ended
        return "same" if same else "changed", ended


def _verdicts(file: pathlib.Path) -> int:
    return len(json.loads(file.read_text())["claims"]) if file.exists() else 0


def _lanes(store: pathlib.Path) -> int:
    from lorajax import sweeps

    try:
        return int((sweeps.open_sweep(store)["status"].values >= 0).sum())
    except ValueError:
        return 0


def _sentence(ended: commands.Ended) -> str:
    """Nothing, or what is wrong with how a run ended that could not go on."""
    if "Traceback" in ended.said:
        return "raw: " + ended.said[-400:]
    return "" if "lorajax: error: " in ended.said else f"silent: status {ended.status}"


def strike(site: Site, fault: str, rng: random.Random) -> str:
    """Makes a fault of a command and says what came of it; "same" is what is wanted."""
    if fault in SIGNALS:
        folder = site.fresh()
        for _ in range(rng.choice((1, 1, 2))):
            again = site.done(folder) > 0
            ended = site.start(folder, again=again).struck(
                SIGNALS[fault], rng.random() * site.seconds
            )
            if ended.status == 0:
                break
            wanted = {"kill -9": -9, "SIGTERM": 143, "SIGINT": 130}[fault]
            if ended.status != wanted:
                return f"status {ended.status}, not {wanted}: {ended.said[-400:]}"
            if fault != "kill -9" and not re.search("same command|lorajax validate", ended.said):
                return f"silent: {ended.said[-300:]}"
        return site.settle(folder)[0]
    if fault == "full disk":
        folder = site.fresh()
        limit = rng.choice((6000, 12000)) if rng.random() < 0.3 else None
        count = rng.randrange(40)
        before = commands.full_after(folder, count) if limit is None else commands.full_disk(limit)
        ended = site.start(folder, before).finish()
        if ended.status and (wrong := _sentence(ended)):
            return wrong
        return site.settle(folder)[0]
    if fault == "read-only folder":
        folder = site.fresh(copy=rng.random() < 0.5)
        commands.read_only(folder, False)
        ended = site.start(folder, commands.mortal, again=True).finish()
        commands.read_only(folder, True)
        if ended.status and (wrong := _sentence(ended)):
            return wrong
        return site.settle(folder)[0]
    if fault == "two writers":
        folder = site.fresh()
        first = site.start(folder)
        while rng.random() < 0.9 and first.poll() is None:
            pass
        runs = [first, site.start(folder)]
        for each in runs:
            ended = each.finish()
            if ended.status and (wrong := _sentence(ended)):
                return wrong
        return site.settle(folder)[0]
    if fault in ("deleted files", "cut files"):
        return damage(site, fault, rng)
    assert fault == "clock jumps"
    folder = site.fresh(copy=rng.random() < 0.7)
    shift = rng.choice((-1, 1)) * rng.choice((3600.0, 1e9))
    for path in folder.rglob("*"):
        moment = max(0, path.stat().st_mtime + shift)
        os.utime(path, (moment, moment))
    ended = site.start(folder, commands.shifted_clock(shift), again=True).finish()
    if ended.status:
        return f"status {ended.status}: {ended.said[-400:]}"
    return site.settle(folder)[0]


def damage(site: Site, fault: str, rng: random.Random) -> str:
    """Files of a run, finished or killed, that are gone or cut short."""
    folder = site.fresh(copy=True)
    inside = folder / site.kind.files
    files = sorted(p for p in inside.rglob("*") if p.is_file())
    if site.kind.name == "finetune":
        # One state of those that are kept: from the other one the run goes on.
        latest = max(int(p.name) for p in inside.iterdir() if p.name.isdecimal())
        files = [p for p in files if p.is_relative_to(inside / str(latest))]
        for name in ("history.json", "adapter"):
            if (folder / name).is_file():
                (folder / name).unlink()
    if site.kind.name == "sweep":
        files = [p for p in files if "c" in p.relative_to(inside).parts[1:2]]
    for path in rng.sample(files, rng.randrange(1, 1 + min(4, len(files)))):
        size = path.stat().st_size
        if fault == "deleted files":
            path.unlink()
        else:
            os.truncate(path, rng.randrange(size or 1))
    ended = site.start(folder, again=True).finish()
    if ended.status:
        # What cannot be mended is said in a sentence, and another folder begins anew.
        return _sentence(ended) or "same"
    try:
        return "same" if site.kind.result(folder) == site.whole else "changed"
    except (OSError, ValueError) as error:
        return f"lost: {error}"


FAULTS = (
    *SIGNALS, "full disk", "read-only folder", "two writers", "deleted files", "cut files",
    "clock jumps",
)  # fmt: skip


def section(rows: list[dict[str, Any]]) -> str:
    """The campaign in words and a table."""
    names = list(dict.fromkeys(row["command"] for row in rows))
    lines = []
    for fault in FAULTS:
        line: list[Any] = [fault]
        for name in names:
            own = [r for r in rows if r["fault"] == fault and r["command"] == name]
            line.append(f"{sum(r['verdict'] == 'same' for r in own)} of {len(own)}")
        lines.append(line)
    same = sum(row["verdict"] == "same" for row in rows)
    words = (
        f"## Faults\n\n{len(rows)} faults, after {same} of which the same command came to the same "
        "end, nothing lost and nothing done twice. Where files that nothing can mend were taken "
        "away, a sentence that says so counts as well; the cut and deleted files of a sweep are "
        "its results and coordinates, those of a fine-tuning run its last saved state."
    )
    bad = [row for row in rows if row["verdict"] != "same"]
    listed = "".join(f"\n- {r['name']}: {r['verdict'].splitlines()[0][:120]}" for r in bad)
    shown = pages.table(["fault", *names], lines)
    return f"{words}\n\n{shown}\n" + (f"\nOtherwise:\n{listed}\n" if bad else "")


def _prepare(place: pathlib.Path) -> None:
    """Data for the small network, the compile cache, and everything imported but no backend."""
    import numpy as np

    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(place / "cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    from lorajax.cli.output import prepare_jax

    prepare_jax()
    import lorajax.finetune.checkpoints
    import lorajax.finetune.claims
    import lorajax.plots.finetune
    import lorajax.report
    import lorajax.studies
    import lorajax.sweeps  # noqa: F401

    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 48), ("test", 16)):
        arrays[f"{split}_x"] = rng.integers(0, 255, (count, 16, 16, 3), np.uint8)
        arrays[f"{split}_y"] = rng.integers(0, 4, count)
    np.savez(place / "pack.npz", **arrays)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks faults", description=__doc__)
    parser.add_argument("--only", metavar="COMMAND", default="")
    parser.add_argument("--fresh", action="store_true", help="forget what was done before")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    place = pathlib.Path(tempfile.mkdtemp(prefix="lorajax-faults-"))
    journal = pages.Journal(pages.ROOT / "out" / "campaigns" / "faults.jsonl", options.fresh)
    _prepare(place)
    rows = []
    for kind in kinds(place):
        if options.only not in kind.name:
            continue
        names = [(f, i) for i in range(kind.rounds) for f in FAULTS]
        site = None
        for fault, i in names:
            name = f"{kind.name}: {fault} {i}"
            if name not in journal.done:
                site = site or Site(kind, place)
                random.seed(f"{options.seed} {name}")
                verdict = strike(site, fault, random.Random(f"{options.seed} {name}"))
                journal.add(
                    {"name": name, "command": kind.name, "fault": fault, "verdict": verdict}
                )
                for left in place.glob(f"{kind.name}-[0-9]*"):
                    shutil.rmtree(left, ignore_errors=True)
                if verdict != "same":
                    print(f"{name}: {verdict}", flush=True)
            rows.append(journal.done[name])
    shutil.rmtree(place, ignore_errors=True)
    print(section(rows))
    if not options.only:
        slim = [row | {"verdict": row["verdict"].splitlines()[0][:120]} for row in rows]
        pages.publish("faults", {"page": section(rows), "seed": options.seed, "rows": slim})
    return int(any(row["verdict"] != "same" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
