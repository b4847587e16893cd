"""Singular values of every layer's update in language models, against what theory predicts.

The spectral-dynamics paper fine-tunes BERT and Llama beside a ViT. Here a real BERT (MiniLM, 22.7M
parameters) learns SST-2 and a real Llama (SmolLM2, 135M parameters) the answers to instructions, by
plain descent with batches from a small start, as the ViT of `real_spectra.py` does. The quick form
has a Llama of 260k parameters alone, which takes SmolLM2's place where the folder has none. Solid
lines are the singular values of A B where they grow fastest, dashed ones those of the linear
law Z(k) = (I + η H(M))^k Z(0), which knows the gradient before training alone (theory section 4),
and dots the times at which each passes a level of its own, against the gradient's singular values.
Needs LORAJAX_DATA.
"""

import argparse
import dataclasses
import json
import os
import pathlib
from typing import Any

os.environ.setdefault("NPROC", "16")  # see docs/howto/install.md

import numpy as np  # noqa: E402
import real_spectra  # noqa: E402

from lorajax import data, finetune, models, plots, tasks  # noqa: E402
from lorajax.data import text  # noqa: E402
from lorajax.studies import simulation  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Network:
    """A model, what it learns, and how much of it.

    Attributes:
      title: of its figure.
      folders: the first that is there is taken.
      length: tokens of a text; BERT's are cut at it, a Llama's longer ones left out.
      head: samples that the head is fitted to; 0 for a model that has its own.
      at_once: samples that gradients are taken of at a time.
      profile: as of the ViT.
    """

    title: str
    folders: tuple[str, ...]
    length: int
    head: int
    at_once: int
    profile: real_spectra.Profile


def _profile(steps: int, every: int, batch: int, samples: int) -> real_spectra.Profile:
    return real_spectra.Profile(steps, every, batch, samples)


LLAMAS = ("smollm2-135m", "stories260k")
PROFILES = {
    "quick": {
        "llama": Network("stories260k", LLAMAS[1:], 64, 0, 32, _profile(60, 3, 8, 256)),
    },
    "full": {
        "bert": Network("MiniLM", ("minilm-l6",), 32, 4096, 64, _profile(400, 8, 64, 4096)),
        "llama": Network("SmolLM2", LLAMAS, 96, 0, 8, _profile(120, 4, 16, 512)),
    },
}


def prepared(shelf: pathlib.Path, network: Network) -> tuple[Any, Any, data.Table]:
    """The model with its head fitted, the task, and what it learns."""
    folder = simulation.first_model(shelf, network.folders)
    tokenizer = text.Tokenizer(folder)
    if not network.head:
        model = models.load(folder)
        asked = text.read_texts(shelf / "text" / "instruct_1100.jsonl")
        limits = text.Limits(model.config.vocabulary, model.config.context)
        template = text.chat_template(folder, tokenizer)
        train, _ = text.tables(asked, tokenizer, limits, template=template)
        train = train.take(np.flatnonzero(text.lengths(train) <= network.length))
        return model, tasks.NextToken(), train
    model = models.load(folder, classes=2, pool="mean")
    asked = text.read_texts(shelf / "sst2_train.tsv", kind="classes")
    limits = text.Limits(model.config.vocabulary, model.config.longest, network.length)
    train, _ = text.tables(asked, tokenizer, limits)
    # No more than the steps take: all of it goes to the device.
    taken = max(network.profile.steps * network.profile.batch, network.profile.samples)
    train = train.take(data.Order(len(train), min(taken, len(train)), 0)(0))
    fitted = train.take(np.arange(min(network.head, len(train))))
    return finetune.fit_head(model, tasks.Texts(), fitted, epochs=2), tasks.Texts(), train


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", choices=PROFILES, default="quick")
    parser.add_argument(
        "--networks", nargs="+", choices=("bert", "llama"), help="default: the profile's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"))
    args = parser.parse_args()
    shelf = simulation.real_texts("tokenizers", "jinja2")
    if shelf is None:
        return
    out = args.out / "spectral_dynamics"
    out.mkdir(parents=True, exist_ok=True)
    networks = PROFILES[args.profile]
    for name in args.networks or networks:
        if name not in networks:
            print(f"{name} is left out: profile {args.profile} has {', '.join(networks)}.")
            continue
        network = networks[name]
        model, task, train = prepared(shelf, network)
        results = real_spectra.follow(
            model, task, train, network.profile, args.seed, network.at_once
        )
        path = out / f"language_spectra_{name}.png"
        plots.save(real_spectra.draw(network.profile, results, network.title, task.unit), path)
        numbers = real_spectra.statements(network.profile, results)
        content = {
            "profile": args.profile,
            "parameters": dataclasses.asdict(network),
            "seed": args.seed,
            "numbers": numbers,
            "caption": __doc__,
        }
        path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        for what, value in numbers.items():
            print(f"{network.title}, {what}: {value:.3g}", flush=True)
        print(f"written: {path} and {path.with_suffix('.json').name}")


if __name__ == "__main__":
    main()
