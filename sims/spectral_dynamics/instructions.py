"""A real Llama on instructions: loss of held-out answers, and MT-Bench answered before and after.

SmolLM2 (135M parameters; the 260k one in the quick form, and where the folder has no SmolLM2)
learns instructions by adapters of one rank, the loss being that of the answers alone. Some
instructions are set aside, the same ones for every seed, and the loss of their answers is measured
before training and after it. Then the model answers MT-Bench's two-turn questions, greedily, before
and after, and both are written as MT-Bench's own answer files (a JSON line a question). The judge
that scores them is not included: it is a large model that nobody can call from here, so that no
score of MT-Bench comes out, only the answers that it would read. A seed that has finished is kept
in a file and not run again. Needs LORAJAX_DATA.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import time
import uuid
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from lorajax import adapters, data, finetune, models, plots, tasks  # noqa: E402
from lorajax.cli.texts import RATES  # noqa: E402
from lorajax.data import text  # noqa: E402
from lorajax.finetune import recipes  # noqa: E402
from lorajax.studies import simulation  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Profile:
    """How much is run.

    Attributes:
      model: folders, the first that is there is taken.
      steps: of training.
      batch: instructions a step.
      length: tokens of an instruction with its answer; longer ones are left out.
      held_out: instructions.
      seeds: of the start and the order.
      rank: of the adapters.
      questions: of MT-Bench, evenly spread over its categories; 0 for all.
      tokens: of an answer, at most.
      rows: questions that are answered at a time.
    """

    model: tuple[str, ...]
    steps: int
    batch: int
    length: int
    held_out: int
    seeds: int
    rank: int
    questions: int
    tokens: int
    rows: int


PROFILES = {
    "quick": Profile(("stories260k",), 20, 4, 128, 16, 2, 4, 2, 8, 2),
    "part": Profile(("smollm2-135m", "stories260k"), 60, 4, 96, 64, 3, 8, 8, 48, 4),
    "full": Profile(("smollm2-135m", "stories260k"), 500, 8, 256, 200, 3, 8, 0, 512, 8),
}
TARGETS = "blocks/**"
WINDOW = 16


@dataclasses.dataclass(frozen=True)
class Run:
    """What determines a run's result; a record in the file is found by all of these."""

    model: str
    seed: int
    steps: int
    batch: int
    length: int
    held_out: int
    rank: int
    rate: float
    inputs: str
    """Fingerprint of the files of model, instructions and questions."""
    questions: int
    tokens: int
    rows: int
    """The last three are 0 for seeds that answer no questions."""


class Bench:
    """The model, its tokenizer and template, and the instructions."""

    def __init__(self, shelf: pathlib.Path, profile: Profile):
        folder = simulation.first_model(shelf, profile.model)
        self.profile = profile
        self.name = folder.name
        self.model = models.load(folder)
        self.tokenizer = text.Tokenizer(folder)
        self.template = text.chat_template(folder, self.tokenizer)
        instructions = shelf / "text" / "instruct_1100.jsonl"
        asked = text.read_texts(instructions)
        limits = text.Limits(self.model.config.vocabulary, self.model.config.context)
        table, _ = text.tables(asked, self.tokenizer, limits, template=self.template)
        table = table.take(np.flatnonzero(text.lengths(table) <= profile.length))
        self.train, test = data.hold_out(table, profile.held_out)
        # Similar lengths side by side, so that little of a batch is filling.
        self.test = test.take(np.argsort(text.lengths(test), kind="stable"))
        file = shelf / "text" / "mt_bench_questions.jsonl"
        asked_for = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        self.questions = some(asked_for, profile.questions)
        self.inputs = simulation.fingerprint(folder, instructions, file)

    def runs(self, first: int) -> list[Run]:
        """Of all seeds; the first one answers the questions."""
        names = ("steps", "batch", "length", "held_out", "rank")
        sizes = {name: getattr(self.profile, name) for name in names}
        answers = {name: getattr(self.profile, name) for name in ("questions", "tokens", "rows")}
        return [
            Run(
                model=self.name,
                seed=seed,
                rate=RATES["tokens"]["lora"],
                inputs=self.inputs,
                **sizes,
                **(answers if seed == first else dict.fromkeys(answers, 0)),
            )
            for seed in range(first, first + self.profile.seeds)
        ]

    def _adapted(self, rank: int, seed: int) -> Any:
        key = jax.random.key(seed)
        return finetune.adapt(self.model, TARGETS, key=key, rank=rank, start="orthogonal")

    @functools.cached_property
    def _trainer(self) -> tuple[finetune.Trainer, Any]:
        """With the filter of what trains; all seeds share its programs."""
        profile = self.profile
        recipe = recipes.lora(
            profile.steps,
            batch_size=profile.batch,
            learning_rate=RATES["tokens"]["lora"],
            window=WINDOW,
        )
        model = self._adapted(profile.rank, 0)
        wrt = adapters.trainable(model)
        return finetune.Trainer(model, wrt, tasks.NextToken(), recipe), wrt

    @functools.cached_property
    def before(self) -> float:
        """The loss of what is held out; B is zero at first, whatever the seed."""
        trainer, _ = self._trainer
        return float(trainer.evaluate(trainer.init(), self.test, 2 * self.profile.batch).loss)

    def __call__(self, run: Run) -> dict[str, Any]:
        """Trains, measures, and answers the questions before and after where the run has some."""
        spent = time.process_time()
        trainer, wrt = self._trainer
        params = nnx.split(self._adapted(run.rank, run.seed), wrt, ...)[1]
        # A step gives its state up.
        state = trainer.init()._replace(params=jax.tree.map(jnp.copy, params))
        order = finetune.order_of(self.train, dataclasses.replace(trainer.recipe, seed=run.seed))
        losses = []
        for step in range(run.steps):
            state, metrics = trainer.step(state, self.train[order(step)])
            losses.append(metrics.loss)
        after = trainer.evaluate(state, self.test, 2 * run.batch)
        found = {
            "held-out loss before": self.before,
            "held-out loss after": float(after.loss),
            "losses": [float(f"{float(x):.6g}") for x in losses],
            "parameters": trainer.parameters,
        }
        print(
            f"{run.model}, seed {run.seed}: held-out loss {found['held-out loss before']:.4f}, "
            f"after {run.steps} steps {found['held-out loss after']:.4f}",
            flush=True,
        )
        if run.tokens:
            # Adapters are added to the kernels, so that both write by the same programs.
            tuned = adapters.remove(adapters.merge(trainer.model(state)))
            found["answers"] = {}
            for when, model in (("before", self.model), ("after", tuned)):
                model.eval()
                found["answers"][when] = self.answer(model, self.questions)
        return found | {"processor": time.process_time() - spent}

    def prompt(self, messages: Sequence[dict[str, str]]) -> np.ndarray:
        """Tokens of a conversation that the model is to go on with."""
        if self.template is not None:
            whole = self.template.render(messages, prompt=True)
            return self.tokenizer.encode([whole], special=False)[0].tokens
        whole = "".join(each["content"] + "\n\n" for each in messages)
        return self.tokenizer.encode([whole])[0].tokens

    def answer(self, model: Any, questions: Sequence[dict[str, Any]]) -> list[list[str]]:
        """Answers to both turns of questions, greedily; an answer is what the next turn follows."""
        talks: list[list[dict[str, str]]] = [[] for _ in questions]
        for turn in range(2):
            for talk, question in zip(talks, questions, strict=True):
                talk.append({"role": "user", "content": question["turns"][turn]})
            prompts = [self.prompt(talk) for talk in talks]
            # Prompts of similar length share a program, and little of a batch is filling.
            order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
            for first in range(0, len(order), self.profile.rows):
                part = order[first : first + self.profile.rows]
                for i, words in zip(part, self._write(model, part, prompts), strict=True):
                    talks[i].append({"role": "assistant", "content": words})
        return [[m["content"] for m in talk if m["role"] == "assistant"] for talk in talks]

    def _write(self, model: Any, part: Sequence[int], prompts: Sequence[np.ndarray]) -> list[str]:
        profile = self.profile
        longest = max(len(prompts[i]) for i in part)
        room = model.config.context - profile.tokens
        width = min(next(n for n in text.sizes(max(longest, 16)) if n >= longest), room)
        tokens = np.zeros((profile.rows, width), np.int32)
        mask = np.zeros((profile.rows, width), bool)
        for row, i in enumerate(part):
            kept = prompts[i][-width:]  # a conversation too long for the model loses its beginning
            tokens[row, width - len(kept) :], mask[row, width - len(kept) :] = kept, True
        # Rows without a question repeat the first, so that all batches share one program.
        tokens[len(part) :], mask[len(part) :] = tokens[0], mask[0]
        found = models.generate(model, jnp.asarray(tokens), jnp.asarray(mask), limit=profile.tokens)
        rows = zip(np.asarray(found.tokens), np.asarray(found.mask), strict=True)
        ends = set(model.config.ends)
        written = [[t for t in row[kept].tolist() if t not in ends] for row, kept in rows]
        return [self.tokenizer.decode(each).strip() for each in written[: len(part)]]


def some(questions: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """As many questions, evenly spread; MT-Bench has them by category."""
    places = np.linspace(0, len(questions), count or len(questions), endpoint=False)
    return [questions[int(i)] for i in places]


def write_answers(
    path: pathlib.Path,
    name: str,
    questions: Sequence[dict[str, Any]],
    answers: Sequence[Sequence[str]],
) -> None:
    """Writes MT-Bench's own format of a model's answers, a JSON line a question."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for question, turns in zip(questions, answers, strict=True):
            record = {
                "question_id": question["question_id"],
                "answer_id": uuid.uuid4().hex,
                "model_id": name,
                "choices": [{"index": 0, "turns": list(turns)}],
                "tstamp": time.time(),
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def statements(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the runs show, in numbers."""
    before, after = (
        np.array([run[f"held-out loss {when}"] for run in runs]) for when in ("before", "after")
    )
    fall = before - after
    half = finetune.interval(fall)[1] if len(fall) > 1 else float("nan")
    return {
        "held-out loss of the answers before, nats a token": float(before.mean()),
        "held-out loss of the answers after, mean over seeds": float(after.mean()),
        "fall of the held-out loss, mean over seeds": float(fall.mean()),
        "half of the 95 % interval of the fall": half,
        "least fall of a seed": float(fall.min()),
        "seeds": len(runs),
    }


def draw(runs: Sequence[dict[str, Any]], name: str):
    """The loss of batches over training, and of what is held out before and after."""
    figure, panel = plots.figure()
    with plots.style():
        for i, run in enumerate(runs):
            label = "of a step's batch, a color a seed" if i == 0 else None
            panel.plot(run["losses"], color=f"C{i}", linewidth=0.8, alpha=0.6, label=label)
        for i, run in enumerate(runs):
            ends = [run["held-out loss before"], run["held-out loss after"]]
            label = "held out, a mark a seed" if i == 0 else None
            panel.plot([0, len(run["losses"])], ends, "_", color="black", ms=9, label=label)
        panel.set(xlabel="step", ylabel="loss of the answers [nats a token]", title=name)
        panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.1))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    shelf = simulation.real_texts("tokenizers", "jinja2")
    if shelf is None:
        return
    profile = PROFILES[args.profile]
    bench = Bench(shelf, profile)
    if bench.name != profile.model[0]:
        print(f"{profile.model[0]} is not in LORAJAX_DATA; {bench.name} takes its place.")
    out = args.out / "spectral_dynamics"
    journal = simulation.Journal(out / "instructions.jsonl", Run)
    runs = [journal(run, bench) for run in bench.runs(args.seed)]
    written = []
    for when, answers in runs[0]["answers"].items():
        name = f"{bench.name}-{when}"
        path = out / "mt_bench" / "model_answer" / f"{name}.jsonl"
        write_answers(path, name, bench.questions, answers)
        written.append(path)
    numbers = statements(runs)
    content = {
        "profile": args.profile,
        "parameters": dataclasses.asdict(profile),
        "model": bench.name,
        "instructions": {"train": len(bench.train), "held out": len(bench.test)},
        "numbers": numbers,
        "runs": runs,
        "questions": len(bench.questions),
        "processor seconds": sum(run["processor"] for run in runs),
        "caption": __doc__,
    }
    (out / "instructions.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plots.save(draw(runs, bench.name), out / "instructions.png")
    for name, value in numbers.items():
        print(f"{name}: {value:.4g}")
    print(
        f"{len(bench.questions)} of MT-Bench's questions answered before and after; no judge is "
        "included, so that there is no score"
    )
    print(f"written: {out}/instructions.json, .png; {', '.join(map(str, written))}")


if __name__ == "__main__":
    main()
