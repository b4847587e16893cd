"""The commands finetune and rank, on a model and a data set of a moment."""

import argparse
import json
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from lorajax import adapters, data, finetune, models, tasks
from lorajax.cli import finetune as command
from lorajax.cli import finetuning, main, rank, resuming, training
from lorajax.finetune import checkpoints, recipes

pytestmark = pytest.mark.slow  # they train

CONFIG = models.ViTConfig(
    (8, 8), 4, width=16, depth=1, heads=2, classes=3, channels=1, mean=(0.5,), std=(0.25,)
)


@pytest.fixture(autouse=True)
def double_precision_afterwards():
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="module")
def folder(little, tmp_path_factory):
    return little(tmp_path_factory.mktemp("inputs"), 64)


def run_apart(*arguments):
    """The command in a process of its own; the last line says whether it imported jax."""
    code = (
        "import sys; from lorajax.cli import main\n"
        "try:\n    status = main(sys.argv[1:])\n"
        "except SystemExit as end:\n    status = end.code\n"
        "print('jax' in sys.modules); sys.exit(status)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


def pictures(root, sides=(8, 8)):
    """Colored pictures in folders of classes without a split, each of its class's brightness."""
    for i, name in enumerate("abc"):
        (root / name).mkdir(parents=True)
        for j in range(10):
            pixels = np.full((sides[j % 2], 8, 3), 60 * i + j, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{j}.png")
    return root


@pytest.mark.apart
def test_folders_without_a_split_and_a_sheet_of_what_is_seen(folder, tmp_path, capsys):
    # One side differs, and the model takes one channel: its size, and the pictures' brightness.
    data_folder = pictures(tmp_path / "pictures", sides=(8, 9))
    (data_folder / "notes.txt").write_text("")
    files = ["--model", str(folder / "vit.safetensors"), "--data", str(data_folder)]
    options = ["--rank", "1", "--epochs", "1", "--batch-size", "9", "--probes", "1"]
    options += ["--checkpoints", "1", "--out", str(tmp_path / "out"), "--head", "keep"]
    assert main(["finetune", *files, *options]) == 2
    assert "give --hold-out PERCENT to measure on" in capsys.readouterr().err
    assert main(["finetune", *files, *options, "--hold-out", "20"]) == 0
    out = capsys.readouterr().out
    assert "24 training and 6 held-out images" in out
    assert "held out: 20 % of each class, the same for every seed" in out
    assert "1 left out of --data: notes.txt" in out
    assert "samples.png" in out
    sheet = np.asarray(Image.open(tmp_path / "out" / "samples.png").convert("RGB"))
    assert sheet.std() > 10 and not np.any(sheet[..., 0] != sheet[..., 2])


@pytest.mark.parametrize("gray", [True, False])
def test_the_model_that_comes_along_is_one_for_such_pictures(tmp_path, gray):
    root = pictures(tmp_path / "pictures", sides=(8, 9))
    if gray:
        for path in root.rglob("*.png"):
            Image.open(path).convert("L").save(path)
    args = parsed(["--data", str(root), "--hold-out", "20"])
    begun = finetuning.begin(args)
    assert args.model == ("vit-fashion-mnist" if gray else "vit-tiny-imagenet")
    config = begun.model.config
    assert config.channels == (1 if gray else 3) and config.classes == 3
    # Their sizes differ, so that they are brought to the model's own, once.
    assert begun.data.train[:1]["images"].shape == (1, *config.image_size, config.channels)


def test_the_pictures_that_come_along_need_no_folder_and_no_network(monkeypatch):
    monkeypatch.delenv("LORAJAX_DATA", raising=False)
    monkeypatch.setattr(socket, "socket", None)
    for source, model in (("mnist-sample", "fashion-mnist"), ("cifar10-sample", "tiny-imagenet")):
        args = parsed(["--data", source])
        begun = finetuning.begin(args)
        assert args.model == f"vit-{model}" and len(begun.data.classes) == 10
        usual = recipes.lora(1).learning_rate
        found = training.recipe(args, len(begun.data.train), "images", begun.rates).learning_rate
        assert found == (usual if source == "mnist-sample" else finetuning.RATES["lora"])
    # A model that is named stays, as do its own channels.
    args = parsed(["--data", "cifar10-sample", "--model", "vit-fashion-mnist"])
    assert finetuning.begin(args).model.config.channels == 1


def parsed(arguments):
    """Options as the command gets them."""
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return parser.parse_args(arguments)


def test_a_list_of_paths(folder, tmp_path, capsys):
    pictures(tmp_path)
    rows = [f"{c}/{j}.png,{c},{'val' if j < 3 else 'train'}" for c in "abc" for j in range(10)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    files = ["--model", str(folder / "vit.safetensors"), "--data", str(tmp_path / "list.csv")]
    options = ["--samples", "9", "--budget", "50", "--out", str(tmp_path / "out")]
    assert main(["rank", *files, *options]) == 0
    said = capsys.readouterr().out
    assert "21 training and 9 test images" in said and "; --fill spends the rest on the" in said
    found = json.loads((tmp_path / "out" / "ranks.json").read_text())
    assert main(["rank", *files, *options, "--fill"]) == 0
    said = capsys.readouterr().out
    assert "by split_half (filled up) on" in said and "--fill" not in said
    filled = json.loads((tmp_path / "out" / "ranks.json").read_text())
    assert filled["rule"] == "split_half (filled up)"
    assert filled["parameters"] > found["parameters"]
    for path, layer in found["layers"].items():
        assert filled["layers"][path]["rank"] >= layer["rank"]


def inputs(folder):
    data = ["--data", str(folder / "rows.npz"), "--model", str(folder / "vit.safetensors")]
    return [*data, "--head-epochs", "1", "--budget", "100"]


def fast(folder, out):
    steps = ["--epochs", "3", "--batch-size", "16", "--probes", "4", "--checkpoints", "4"]
    start = ["--rank", "2", "--start", "orthogonal"]
    return ["finetune", *inputs(folder), *steps, *start, "--out", str(out)]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert main(fast(folder, out)) == 0
    return out


def test_results_are_written(finished, folder):
    history = json.loads((finished / "history.json").read_text())
    assert history["step"] == list(range(1, 13))
    assert len(history["loss"]) == 12
    assert history["test_step"] == [0, 6, 12]  # every other epoch
    assert history["probe_step"] == [0, 3, 6, 9, 12]
    assert history["layers"] == [
        "blocks/0/attention/key",
        "blocks/0/attention/out",
        "blocks/0/attention/query",
        "blocks/0/attention/value",
        "blocks/0/mlp/down",
        "blocks/0/mlp/up",
    ]
    assert np.shape(history["probes"]["singular_values"]) == (5, 6, 2)
    assert np.max(history["probes"]["singular_values"][0]) == 0
    assert np.min(history["probes"]["singular_values"][-1]) > 0
    for name in ("curves.png", "probes.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def strict(text):
    """JSON without the numbers that only JavaScript's cousins have."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_a_run_is_explained(finished):
    run = strict((finished / "run.json").read_text())
    history = json.loads((finished / "history.json").read_text())
    assert run["results"] == {
        "loss": history["test_loss"][-1],
        "accuracy": history["test_accuracy"][-1],
    }
    assert [layer["path"] for layer in run["layers"]] == history["layers"]
    last = history["probes"]["singular_values"][-1]
    for layer, values in zip(run["layers"], last, strict=True):
        assert layer["learned"] == pytest.approx(values, rel=1e-3, abs=1e-6)
        assert layer["rank"] == 2 and 1 <= layer["used"] <= 2 + 1e-6
    assert "Adam" in run["law"]["why"] and run["linearized"] is None
    assert run["command"].startswith("lorajax finetune --data ")
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "Measured only: Adam" in page and f"{100 * run['results']['accuracy']:.2f} %" in page
    for layer in run["layers"]:
        assert f'id="layer-{layer["path"]}"' in page


@pytest.mark.apart
def test_runs_are_compared(finished, folder, tmp_path, capsys):
    """Plain descent, with its law and its linearized model, beside the default optimizer."""
    out = tmp_path / "sgd"
    changed = ["--optimizer", "sgd", "--learning-rate", "0.1", "--linearized", "0.05"]
    assert main([*fast(folder, out), *changed, "--targets", "**/mlp/*"]) == 0
    assert "Linearized at its start, with decay 0.05" in capsys.readouterr().out
    run = strict((out / "run.json").read_text())
    assert run["law"]["why"] == "" and len(run["layers"][0]["predicted"]) == 5
    assert run["linearized"]["decay"] == 0.05 and run["linearized"]["gap"] >= 0
    assert "What the linearized model would have reached" in (out / "report.html").read_text()
    assert main(["compare", str(finished), str(out), "--out", str(tmp_path / "c")]) == 0
    printed = capsys.readouterr().out
    assert "ended higher" not in printed
    assert "B: " in printed and "optimizer sgd" in printed and "too few runs" in printed


@pytest.mark.parametrize("rate", ["300", "1e30"])  # the second one ends at what is no number
def test_a_rate_that_is_too_large_is_named(folder, tmp_path, capsys, rate):
    changed = ["--learning-rate", rate, "--epochs", "12", "--schedule", "constant"]
    assert main([*fast(folder, tmp_path), *changed]) == 0
    said = capsys.readouterr().out
    assert "The loss of training ended higher (" in said and "\ntake a smaller --lear" in said


def test_the_adapter_is_a_peft_adapter_that_loads_again(finished, folder):
    config = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 2
    assert config["modules_to_save"] == ["head", "embeddings"]
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.blocks.0.mlp.up.lora_A.weight" in tensors
    history = json.loads((finished / "history.json").read_text())
    model = models.load(folder / "vit.safetensors")
    adapted = adapters.load_peft(model, finished / "adapter")
    pack = np.load(folder / "rows.npz")
    x = models.normalize(pack["test_x"][..., None], CONFIG.mean, CONFIG.std, channels=1)
    hits = np.asarray(adapted(x)).argmax(-1) == pack["test_y"]
    assert hits.mean() == pytest.approx(history["test_accuracy"][-1], abs=1e-6)


@pytest.fixture(scope="module")
def interrupted_run(folder, tmp_path_factory):
    """A run that was interrupted after its second state was saved."""
    out = tmp_path_factory.mktemp("interrupted")
    save, saved = checkpoints.Checkpoints.save, []

    def interrupted(self, state, history):
        save(self, state, history)
        saved.append(int(state.step))
        if len(saved) == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", interrupted)
        assert main(fast(folder, out)) == 130
    assert saved == [3, 6]
    assert not (out / "history.json").exists()
    return out


def same_curves(first, second):
    once, again = (json.loads((each / "history.json").read_text()) for each in (first, second))
    for name in ("step", "loss", "accuracy", "test_step", "test_accuracy", "probes"):
        assert once[name] == again[name], name


def test_an_interrupted_run_resumes_to_the_same_curves(finished, folder, interrupted_run, tmp_path):
    shutil.copytree(interrupted_run, tmp_path, dirs_exist_ok=True)
    assert main([*fast(folder, tmp_path), "--resume"]) == 0
    same_curves(finished, tmp_path)


@pytest.mark.apart
def test_a_run_from_before_an_option_came_goes_on(
    finished, folder, interrupted_run, tmp_path, capsys
):
    shutil.copytree(interrupted_run, tmp_path, dirs_exist_ok=True)
    files = list(tmp_path.glob("checkpoints/*/settings/metadata"))
    whole = [json.loads(file.read_text()) for file in files]

    def without(*names):
        for file, settings in zip(files, whole, strict=True):
            file.write_text(json.dumps({k: v for k, v in settings.items() if k not in names}))

    again = [*fast(folder, tmp_path), "--resume"]
    # What shapes every run has no value that leaves it out.
    without("smoothing")
    assert len(files) == 2 and main(again) == 2
    assert "holds a run with smoothing = None, not 0.1" in capsys.readouterr().err
    without("mixup", "window", "smoothing")
    assert main(again) == 2
    capsys.readouterr()
    without("mixup", "window")
    assert main([*again, "--mixup", "0.2"]) == 2
    said = "holds a run, which was begun before mixup came, with mixup = 0.0, not 0.2"
    assert said in capsys.readouterr().err
    assert main(again) == 0
    said = "was begun before some options came, and goes on with mixup = 0.0, window = None"
    assert said in capsys.readouterr().out
    same_curves(finished, tmp_path)


FIRST_OPTIONS = """
    alpha also augment batch_size beside budget constant data epochs head head_epochs hold_out
    image_size learning_rate max_rank method model optimizer precision probes rank rule samples
    scale schedule seed smoothing start targets warmup weight_decay
"""


def test_every_option_that_came_later_says_with_what_value_older_runs_go_on():
    """A new option belongs to `resuming.SINCE`, or into this list if no value leaves it out."""
    settings = training.settings(parsed([]))
    later = resuming.neutral()
    assert {*settings} == {*FIRST_OPTIONS.split(), *later}
    assert not {*FIRST_OPTIONS.split()} & {*later}
    assert later == {name: settings[name] for name in later}


def test_a_run_is_not_overwritten_nor_mixed_with_another(finished, folder, capsys):
    assert main(fast(folder, finished)) == 2
    assert "holds a run already; give --resume" in capsys.readouterr().err
    assert main([*fast(folder, finished), "--resume", "--seed", "3"]) == 2
    assert "holds a run with seed = 0, not 3" in capsys.readouterr().err


def test_full_training_writes_a_model(folder, tmp_path, capsys):
    """And images that are held out take the place of the test set."""
    command = fast(folder, tmp_path)
    assert main([*command, "--method", "full", "--epochs", "1", "--hold-out", "25"]) == 0
    printed = capsys.readouterr().out
    assert "48 training and 16 held-out images" in printed and "held-out accuracy" in printed
    tuned = models.load(tmp_path / "model" / "model.safetensors")
    assert tuned.config == CONFIG
    before = models.load(folder / "vit.safetensors")
    assert not np.array_equal(
        tuned.blocks[0].mlp.up.kernel[...], before.blocks[0].mlp.up.kernel[...]
    )


@pytest.mark.parametrize("start", ["spectral", "pissa"])
def test_ranks_are_chosen_and_starts_take_the_gradient(folder, tmp_path, start):
    command = ["finetune", *inputs(folder), "--start", start, "--rule", "energy"]
    options = ["--epochs", "1", "--batch-size", "16", "--max-rank", "1", "--out", str(tmp_path)]
    assert main([*command, *options]) == 0
    history = json.loads((tmp_path / "history.json").read_text())
    misalignment = np.array(history["probes"]["misalignment"])
    if start == "spectral":
        assert misalignment[0].max() < 1e-5
    assert np.isfinite(misalignment).all()


class Asked(rank.Stop):
    """As if SIGTERM had come after the second batch."""

    batches = 0

    def __call__(self):
        self.batches += 1
        self.signal = signal.SIGTERM if self.batches >= 2 else None
        return super().__call__()


def test_an_interrupted_rank_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch, capsys):
    options = ["rank", *inputs(folder), "--targets", "**/mlp/*", "--out"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*options, str(whole)]) == 0
    assert "went on" not in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(rank, "Stop", Asked)
        assert main([*options, str(cut)]) == 143
    said = f"interrupted; batch 2 of 2 is summed in {cut}, and the same command goes on from there"
    assert said in capsys.readouterr().err
    assert not (cut / "ranks.json").exists() and len(list(cut.glob("sums-*.npz"))) == 1
    assert main([*options, str(cut)]) == 0
    assert f"went on after batch 2 of 2, whose sums were in {cut}" in capsys.readouterr().out
    assert (cut / "ranks.json").read_bytes() == (whole / "ranks.json").read_bytes()
    assert [each.name for each in cut.iterdir()] == ["ranks.json"]


def test_rank_prints_a_table_and_writes_it(folder, tmp_path, capsys):
    command = ["rank", *inputs(folder), "--rule", "energy", "--out", str(tmp_path)]
    assert main([*command, "--targets", "**/mlp/*"]) == 0
    printed = capsys.readouterr().out
    assert "blocks/0/mlp/up" in printed and "by energy on 64 samples" in printed
    assert "of a trial at rank 4 is right for all these ranks with alpha 4" in printed
    found = json.loads((tmp_path / "ranks.json").read_text())
    assert list(found["layers"]) == ["blocks/0/mlp/down", "blocks/0/mlp/up"]
    assert found["transfer"]["rates"]["alpha/r"] == 1
    for layer in found["layers"].values():
        values = np.array(layer["singular_values"])
        assert (np.diff(values) <= 0).all()
        kept = (values[: layer["rank"]] ** 2).sum() / (values**2).sum()
        assert kept >= 0.9
    assert found["peft"]["target_modules"] == ["blocks.0.mlp.down", "blocks.0.mlp.up"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "--rank", "none"], "--rank is 'none'"),
        (["finetune", "--rank", "0"], "--rank is '0'"),
        (["finetune", "--epochs", "0"], "--epochs is 0.0; it must be positive"),
        (["finetune", "--learning-rate", "-1"], "--learning-rate is -1.0; it must be positive"),
        (["finetune", "--epochs", "1e99"], "--epochs is 1e+99; it must be positive and at most"),
        (["rank", "--seed", "9" * 20], "it must be at least 0 and at most 2,147,483,647"),
        (["finetune", "--method", "full", "--beside", "2"], "--beside is 2.0 with --method full"),
        (["finetune", "--beside", "0"], "--beside is 0.0"),
        (["finetune", "--linearized", "0"], "--linearized is 0.0; it must be positive"),
        (["finetune", "--method", "full", "--linearized"], "--linearized is 0.001 with --method"),
        (["finetune", "--budget", "0"], "--budget is 0.0"),
        (["finetune", "--hold-out", "100"], "--hold-out is 100.0"),
        (["rank", "--rule", "c_over_n"], "needs --constant C"),
        (["rank", "--constant", "2"], "goes with --rule c_over_n"),
        (["finetune", "--fill", "--rank", "4"], "--fill with --rank 4; it goes with ranks that"),
        (["finetune", "--fill", "--method", "full"], "--fill with --method full; it goes with"),
        (["rank", "--samples", "0"], "--samples is 0"),
        (["rank", "--max-rank", "0"], "--max-rank is 0"),
        (["rank", "--seed", "-1"], "--seed is -1"),
    ],
)
def test_usage_errors_answer_without_jax(arguments, message):
    done = run_apart(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout.strip().endswith("False")


REAL = ("--learning-rate", "--scale", "--beside", "--alpha", "--epochs", "--weight-decay")
SHARED = ("--samples", "--head-epochs", "--max-rank", "--image-size", "--seed")
WHOLE = ("--batch-size", "--probes", "--checkpoints", "--warmup", *SHARED)
BAD = [
    *(("finetune", name, value) for name in REAL for value in ("nan", "inf", "-1", "1e99")),
    *(("finetune", name, "0") for name in REAL if name != "--weight-decay"),
    *(("finetune", name, value) for name in WHOLE for value in ("-1", "9" * 20)),
    *(("finetune", name, "0") for name in WHOLE if name not in ("--warmup", "--seed")),
    *(("rank", name, value) for name in SHARED for value in ("-1", "9" * 20)),
    *(("finetune", "--smoothing", value) for value in ("nan", "inf", "-0.1", "1", "1e99")),
    *(("rank", "--budget", value) for value in ("nan", "inf", "-1", "0", "100.1")),
    *(("rank", "--hold-out", value) for value in ("nan", "inf", "-1", "100")),
    *(("finetune", "--rank", value) for value in ("0", "-1", "nan", "1.5", "²", "9" * 20)),
    ("finetune", "--weight-decay", "0.1"),
]


@pytest.mark.parametrize("arguments", BAD, ids=" ".join)
def test_a_number_out_of_range_is_named_before_anything_happens(arguments, tmp_path, capsys):
    command, option, value = arguments
    assert main([command, option, value, "--out", str(tmp_path / "new")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"lorajax: error: {option} is ") and message.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0", "1e99"])
def test_a_constant_out_of_range_is_named(value, tmp_path, capsys):
    command = ["rank", "--rule", "c_over_n", "--constant", value]
    assert main([*command, "--out", str(tmp_path / "new")]) == 2
    assert "lorajax: error: --constant is " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--start", "warm"], "--start is 'warm'; a named start must be one of balanced"),
        (["--start", "pissa", "--scale", "1"], "--scale is 1.0, but the start 'pissa' has none"),
        (["--start", "tucker"], "'ranks'"),
        (["--rule", "elbow"], "rule is 'elbow'; it must be one of 'split_half'"),
        (["--warmup", "12", "--epochs", "3", "--batch-size", "16"], "--warmup is 12; it must be"),
        (["--batch-size", "65"], "--batch-size is 65; there are 64 images"),
        (["--rank", "17"], "--rank is 17; for blocks/0/attention/"),
        (["--also", "embedings"], "--also holds 'embedings', which matches no part of the model"),
        (["--targets", "**/atention/*"], "atention"),
        (["--image-size", "9"], "image_size is (9, 9)"),
        (["--data", "no-such-set"], "source is 'no-such-set'"),
        (["--model", "no-such-model"], "source is 'no-such-model', which does not exist"),
    ],
)
def test_what_takes_data_and_model_is_judged_before_training(
    folder, tmp_path, arguments, message, capsys, monkeypatch
):
    def fit_head(*_, **__):
        raise ZeroDivisionError("the head is fitted")

    monkeypatch.setattr(finetune, "fit_head", fit_head)
    command = ["finetune", *inputs(folder), *arguments, "--out", str(tmp_path)]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_command_offers_what_the_library_has():
    """Choices are spelled out, since asking the library would import jax."""
    parser = argparse.ArgumentParser()
    training.configure(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert choices["augment"] == data.POLICIES
    assert choices["optimizer"] == recipes.OPTIMIZERS
    assert choices["schedule"] == recipes.SCHEDULES
    assert parser.get_default("smoothing") == tasks.SMOOTHING


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no-such-set"], "source is 'no-such-set'"),
        (["--model", "no-such-model"], "source is 'no-such-model', which does not exist"),
        (["--targets", "**/atention/*"], "atention"),
    ],
)
def test_bad_inputs_are_refused_in_a_sentence(folder, tmp_path, arguments, message, capsys):
    assert main(["rank", *inputs(folder), *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.apart
def test_two_devices_and_a_base_in_half_precision(folder, tmp_path, virtual):
    given = [*fast(folder, tmp_path), "--devices", "2", "--layout", "full", "--dtype", "bfloat16"]
    found = subprocess.run(
        [sys.executable, "-m", "lorajax", *given],
        env=virtual(2),
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    history = json.loads((tmp_path / "history.json").read_text())
    assert history["test_loss"][-1] < history["test_loss"][0]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert main([*fast(folder, tmp_path / "new"), "--devices", "99"]) == 2
