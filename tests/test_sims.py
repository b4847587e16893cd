"""Simulations show what their captions say, on a small form."""

import importlib.util
import json
import pathlib
import types

import numpy as np
import pytest

from lorajax import adapters, data, models
from lorajax.studies import simulation

SIMS = pathlib.Path(__file__).resolve().parents[1] / "sims"


def load(path: str):
    """A simulation as a module."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, SIMS / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_run_is_stuck_above_the_threshold_and_some_are_below():
    sim = load("jang2024/stuck_map.py")
    profile = sim.Profile(samples=(3, 6, 20), ranks=(2, 3, 4, 6, 7), instances=3, starts=4)
    found = sim.simulate(profile)
    assert dict(found.sizes) == {"samples": 3, "rank": 5, "instance": 3, "start": 4}
    numbers = sim.statements(found)
    # 3 samples: ranks 3, 4, 6, 7; 6 samples: 4, 6, 7; 20 samples: 6, 7.
    assert numbers["runs above the threshold"] == 9 * 12
    assert numbers["of them not certified global"] == 0
    assert numbers["of them stuck above the best of their rank, share"] > 0
    assert numbers["runs that do not rest"] == 0
    # What is stuck is above the global minimum, and an instance's best run is never stuck.
    assert np.all(found["stuck"].values <= found["uncertified"].values)
    assert np.all(found["stuck"].values.min(axis=-1) == 0)
    assert len(sim.draw(found).axes) == 4  # two maps and their color bars


def _glue_record(sim, task, method, seed, score, losses):
    part = sim.PROFILES["hour"][task]
    rate = sim.RATE[method]
    run = sim.Run(task, method, seed, rate, **sim.sizes(part, method))
    return run, {
        "run": sim.dataclasses.asdict(run),
        "score": score,
        "metric": sim.TASKS[task].metric,
        "share": 1.0 if method == "full" else 0.04,
        "steps": len(losses),
        "ranks": {},
        "losses": losses,
        "seconds": 9.0,
        "processor": 2.0 * len(losses),
    }


def test_glue_pairs_by_seed_and_says_what_was_not_run(tmp_path):
    sim = load("spectral_dynamics/glue.py")
    journal = simulation.Journal(tmp_path / "glue.jsonl", sim.Run)
    made = [
        _glue_record(sim, "stsb", "rule", 0, 0.80, [1.0, 0.5]),
        _glue_record(sim, "stsb", "rule", 1, 0.82, [1.0, 0.6]),
        _glue_record(sim, "stsb", "peft", 1, 0.82, [1.0, 0.6001]),
        _glue_record(sim, "stsb", "full", 0, 0.83, [1.0, 0.4]),
        _glue_record(sim, "stsb", "full", 1, 0.84, [1.0, 0.3]),
    ]
    for run, record in made:
        assert journal(run, lambda _, record=record: record) == record
    with (tmp_path / "glue.jsonl").open("a") as file:
        file.write('{"run": {"task": "st')  # a killed program's last line
    found = simulation.Journal(tmp_path / "glue.jsonl", sim.Run).found
    assert len(found) == 5
    records = sim.finished(found, "hour")
    assert len(records) == 5
    less = sim.differences(sim.scores(records)["stsb"])
    assert np.isclose(less["rule"][0], -0.025) and np.isclose(less["peft"][0], -0.02)
    assert np.isnan(less["peft"][1]) and less["rule"][1] > 0.05  # two seeds say little
    gap = sim.curves(records)["stsb"]
    assert gap["seeds"] == 1 and np.isclose(gap["all steps"], 1e-4) and gap["scores"] == 0
    assert gap["pairs"] == 1 and gap["unlike"] == 0
    # A run at other ranks is another run.
    other = _glue_record(sim, "stsb", "peft", 0, 0.7, [2.0, 1.0])[1] | {"ranks": {"layer": 2}}
    (found_there,) = sim.curves([*records, sim.digest(other, found)]).values()
    assert found_there == gap | {"unlike": 1}
    (words,) = sim.statements(records)
    assert "is 81.00, more than 1 point below full fine-tuning (-2.50" in words
    assert "leave open" in words and "1.0e-04" in words
    left = sim.missing(sim.PROFILES["hour"], records)
    assert "stsb, LoRA at the rule's ranks: 3 of 5 seeds" in left
    assert "sst2, full: 1 of 1 seeds" in left
    page = sim.page(records, [], "hour")
    assert "| stsb (spearman) | LoRA at the rule's ranks | 4.0% | 2 | 81.00" in page
    assert "Not run: sst2, LoRA" in page and "| 2.00 |" in page
    assert "## Profile" not in page
    # What was run of another profile stands beside it, and is not mixed with it.
    (run,) = sim.plan(sim.PROFILES["long"], methods=["rule"])
    longer = _glue_record(sim, "sst2", "rule", 0, 0.9, [1.0])[1]
    longer |= {"run": sim.dataclasses.asdict(run), "losses": [0.4] * 50 + [0.69] * 50}
    page = sim.page(records, [], "hour", {"long": [sim.digest(longer, {})]})
    assert page.count("Not run: sst2, LoRA") == 1 and "Not run: sst2, full: 1 of 1 seeds" in page
    assert "ended at a higher loss than it began with in 1 of 1 runs" in page
    assert "the last twentieth of the steps: 0.40 and 0.69)" in page
    # What is published has no losses, and is all that another machine needs for the same page.
    (tmp_path / "glue.json").write_text(json.dumps({"runs": records}))
    known = sim.published(tmp_path / "glue.json")
    assert sim.finished(known, "hour") == records and "losses" not in records[0]
    assert page.index("## Profile `long`") < page.index("is 90.00") < page.index("## Learning")


def test_glue_ranks_are_filled_up_by_the_gradient_s_next_directions():
    sim = load("spectral_dynamics/glue.py")
    spectra = {"a": (3.0, 2.0, 1.0), "b": (4.0, 0.5, 0.1), "c": (1.5, 0.0, 0.0), "d": (0.1, 0, 0)}
    costs, found = {"a": 10, "b": 5, "c": 6, "d": 9}, {"a": 1, "b": 1, "c": 0, "d": 0}
    layers = tuple(
        adapters.Selected(path, (3, 3), found[path], np.array(values), 0.0, 0.0, costs[path])
        for path, values in spectra.items()
    )
    selection = adapters.Selection(layers, "split_half", 4, 1, {})
    bench = types.SimpleNamespace(selection=selection, budget=37)
    ranks = {m: sim.Bench.ranks(bench, m) for m in ("rule", "filled")}
    # Energies a parameter that are left: 0.4 and 0.1 in a, 0.05 in b, 0.375 in c, 0.001 in d.
    assert ranks["filled"] == {"a": 2, "b": 2, "c": 1}
    assert ranks["rule"] == {"a": 1, "b": 1}


def test_glue_learning_rates_are_chosen_by_the_mean_of_what_was_held_out():
    sim = load("spectral_dynamics/glue.py")
    scores = {
        ("sst2", 1e-3): 0.80,
        ("stsb", 1e-3): 0.70,
        ("sst2", 2e-3): 0.79,
        ("stsb", 2e-3): 0.75,
    }
    records = [
        {"run": sim.dataclasses.asdict(run), "score": scores[run.task, run.rate]}
        for run in sim.choices({"rule": (1e-3, 2e-3)})
    ]
    assert all(record["run"]["held_out"] for record in records)
    words, best = sim.choice_table(records)
    assert best == {"rule": 2e-3} and "| mean | 75.00 | 77.00 |" in words
    # A rate that one task has not seen yet is not chosen.
    _, best = sim.choice_table(
        [r for r in records if r["run"]["task"] == "sst2" or r["score"] < 0.7]
    )
    assert best == {}


def test_answers_are_written_as_mt_bench_has_them(tmp_path):
    sim = load("spectral_dynamics/instructions.py")
    questions = [{"question_id": 81 + i, "category": "c", "turns": ["a", "b"]} for i in range(80)]
    taken = sim.some(questions, 8)
    assert [each["question_id"] for each in taken] == [81 + 10 * i for i in range(8)]
    assert sim.some(questions, 0) == questions
    path = tmp_path / "model_answer" / "name.jsonl"
    sim.write_answers(path, "name", taken[:2], [["one", "zwö"], ["three", ""]])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [each["question_id"] for each in lines] == [81, 91]
    assert set(lines[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert lines[0]["choices"] == [{"index": 0, "turns": ["one", "zwö"]}]
    assert lines[0]["answer_id"] != lines[1]["answer_id"] and lines[0]["model_id"] == "name"


def test_figures_of_real_texts_say_that_they_need_the_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("LORAJAX_DATA", raising=False)
    monkeypatch.syspath_prepend(str(SIMS / "spectral_dynamics"))
    for name in ("glue", "instructions", "language_spectra"):
        sim = load(f"spectral_dynamics/{name}.py")
        monkeypatch.setattr("sys.argv", [name, "--out", str(tmp_path)])
        sim.main()
        said = capsys.readouterr().out
        assert said.startswith("Nothing is run: LORAJAX_DATA") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


class Sudden(Exception):
    """A run is killed."""


@pytest.mark.slow
@pytest.mark.apart
def test_pretraining_goes_on_where_it_was_and_its_first_stage_can_be_made_longer(
    tmp_path, monkeypatch
):
    sim = load("pretrain_vit.py")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60).astype(np.int32)
    images = rng.integers(0, 90, (60, 16, 16, 3), dtype=np.uint8)
    images[np.arange(60), labels * 4] += 150
    table = data.Table({"images": images, "labels": labels})
    found = data.Dataset("rows", table, table, ("a", "b", "c"))
    monkeypatch.setattr(sim.data, "load", lambda source, folder=None: found)
    config = models.ViTConfig((12, 12), 4, 16, 1, 2, classes=3)
    plan = sim.Plan("rows", "rows", config, ((8, 1),), 20, 1e-3, "zoom-flip", 0.1, "muon", 1)
    monkeypatch.setitem(sim.PLANS, "rows", plan)

    def train(name, stages, stop=None):
        def stepped(self, record):
            if record.step == stop:
                raise Sudden

        monkeypatch.setattr(sim.Teller, "stepped", stepped)
        out = tmp_path / f"{name}.safetensors"
        sim.run("rows", "full", None, out, tmp_path / name, stages)
        return models.notes(out), models.tensors(models.load(out))

    stages = ((8, 2), (16, 2))
    notes, whole = train("whole", stages)
    with pytest.raises(Sudden):
        train("cut", stages, stop=5)
    _, resumed = train("cut", stages)
    for name, each in whole.items():
        np.testing.assert_array_equal(resumed[name], each)
    assert whole["embeddings.positions"].shape == (1, 1 + 3 * 3, 16)  # of 12 pixels
    assert notes["data"].startswith("rows; 60") and '"side": 16' in notes["stages"]
    with pytest.raises(ValueError, match="has taken 6 steps of stage 0 already"):
        train("cut", ((8, 1), (16, 2)))
    # A first stage may go on, to another end.
    train("cut", ((8, 3), (16, 1)))
    assert {each.stem for each in (tmp_path / "cut").glob("*.safetensors")} == {
        *("8x2", "8x2-16x2"),
        *("8x3", "8x3-16x1"),
    }


def test_a_folder_without_the_models_is_named(tmp_path):
    (tmp_path / "b").mkdir()
    assert simulation.first_model(tmp_path, ("a", "b")) == tmp_path / "b"
    with pytest.raises(ValueError, match="which has no folder a or c"):
        simulation.first_model(tmp_path, ("a", "c"))


def _contestant(sim, scores, parameters, **changes):
    held_out = {1e-3: 0.7, 3e-3: 0.8, 1e-2: 0.6}
    made = sim.Contestant(
        np.array(scores), held_out, 3e-3, {"layer": 2.0}, np.array(parameters, float), 100, 25, 10,
        60.0, 200.0,
    )  # fmt: skip
    return made._replace(**changes)


def _tried(sim, shift):
    """Results of a task in which the rule is better than one rank by `shift`."""
    base = np.array([0.80, 0.70, 0.75])
    small = np.array([1e-3, -1e-3, 0.0])
    even = {
        "uniform": _contestant(sim, base, [100] * 3, filled=0),
        "rule": _contestant(sim, base + shift + small, [100] * 3, rate=1e-2),
        "AdaLoRA": _contestant(sim, base + 0.1 * small, [99, 97, 100]),
        "starved": _contestant(sim, base - 0.2 + small, [10] * 3),
    }
    timed = {name: each for name, each in even.items() if name != "starved"}
    found = {
        "task": sim.TASKS["mnist"].said,
        "part": sim.dataclasses.asdict(sim.PROFILES["images"]["mnist"]),
        "inputs": "0123",
        "budget": 100,
        "looked at": 20,
        "heads": ["head"],
        "equal parameters": sim.plain(even),
        "equal time": sim.plain(timed),
        "choosing, processor seconds": {"split_half": 3.0},
        "training, processor seconds": {
            "rates-uniform+rule+starved": {"runs": 9, "s": 18.0},
            "steps-AdaLoRA": {"runs": 3, "s": 12.0},
        },
    }
    return json.loads(json.dumps(found))  # as it is read from its file


def test_the_trial_says_what_differs_and_what_was_not_run(tmp_path, monkeypatch, capsys):
    sim = load("trial.py")
    verdicts = sim.judged(_tried(sim, 0.05), "equal parameters")
    assert verdicts["rule"]["uniform"]["said"] == "better" and "rule" not in verdicts["rule"]
    assert np.isclose(verdicts["rule"]["uniform"]["mean"], 0.05)
    assert verdicts["uniform"]["rule"]["said"] == "worse"
    assert verdicts["AdaLoRA"]["uniform"]["said"] == "not told apart"
    none = sim.judged(_tried(sim, 0.0), "equal parameters")
    assert none["rule"]["uniform"]["said"] == "not told apart"
    # The control must come out worse, whatever the rule is worth.
    assert none["starved"]["rule"]["said"] == "worse"
    # A run that is there is shown, and not made again.
    folder = tmp_path / "trial" / "images"
    folder.mkdir(parents=True)
    (folder / "mnist.json").write_text(json.dumps(_tried(sim, 0.05)))
    page, numbers = tmp_path / "trial.md", tmp_path / "trial.json"
    arguments = ["--profile", "images", "--show", "--page", page, "--json", numbers]
    monkeypatch.setattr("sys.argv", ["trial", *map(str, arguments), "--out", str(tmp_path)])
    sim.main()
    assert "rank rule, split half" in capsys.readouterr().out
    said = page.read_text()
    assert "better than one rank everywhere in 1 of 1 pairs" in said
    assert "The control against the rule it starves: mnist worse.\n" in said
    alike = _tried(sim, 0.05)
    alike["equal parameters"]["starved"] = alike["equal parameters"]["rule"]
    told = sim.control({"mnist": _tried(sim, 0.05), "cifar10": alike})
    assert "mnist worse; cifar10 not told apart. Where a tenth" in told and "(cifar10)" in told
    assert "| rank rule, split half | 100 | 10 | 0.01\\* | 80.00 ± " in said  # the edge of its grid
    assert "+5.00 ± 0.25, better |" in said and "| AdaLoRA | 97 … 100 |" in said
    assert "| 75% | 60 | 200 | 3.0 | 2.0 |" in said and "| 60 | 200 | 0.0 | 4.0 |" in said
    assert f"Not run: {sim.TASKS['cifar10'].said}." in said
    assert "Not in the profile: MiniLM → STS-B" in said
    written = json.loads(numbers.read_text())
    assert written["verdicts"]["mnist"]["equal time"]["rule"]["uniform"]["said"] == "better"
    # Another machine, which has nothing but the numbers, writes the same page.
    monkeypatch.setattr("sys.argv", ["trial", *map(str, arguments), "--out", str(tmp_path / "o")])
    sim.main()
    assert page.read_text() == said and json.loads(numbers.read_text()) == written
    # Results of another amount are other results.
    other = sim.dataclasses.replace(sim.PROFILES["images"]["mnist"], steps=1)
    assert sim.known("mnist", other, tmp_path / "o", numbers) is None
    # And so are those of other weights or data.
    same = sim.PROFILES["images"]["mnist"]
    assert sim.known("mnist", same, tmp_path / "o", numbers, "0123") is not None
    assert sim.known("mnist", same, tmp_path / "o", numbers, sim.inputs("mnist", None)) is None


def test_a_fingerprint_tells_what_files_hold(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.bin").write_bytes(b"1")
    (tmp_path / "b.tsv").write_bytes(b"2")
    paths = tmp_path / "model", tmp_path / "b.tsv"
    found = simulation.fingerprint(*paths)
    assert len(found) == 16 and found == simulation.fingerprint(*paths)
    (tmp_path / "model" / "a.bin").write_bytes(b"3")
    assert simulation.fingerprint(*paths) != found
    (tmp_path / "model" / "a.bin").write_bytes(b"1")
    (tmp_path / "model" / "c.bin").write_bytes(b"")
    assert simulation.fingerprint(*paths) != found


def test_all_profiles_of_the_trial_are_of_one_form():
    sim = load("trial.py")
    assert set(sim.PROFILES["full"]) == set(sim.TASKS)
    for name, part in sim.PROFILES["full"].items():
        assert part.seeds >= 5 and set(part.methods) == set(sim.METHODS), name
        assert set(part.rates) == {"lora", "adalora", "full"}
        # Choosing takes less than training has, by the dearest way.
        dearest = max(method.passes for method in sim.METHODS.values())
        assert dearest * part.behind < part.steps * part.batch * sim.TRAINING["lora"]
    for profile in sim.PROFILES.values():
        for part in profile.values():
            assert {"uniform", "rule", "starved"} <= set(part.methods)
