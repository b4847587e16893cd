"""`lorajax finetune --distributed`: two processes on the loopback against one process."""

import argparse
import json
import re
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from lorajax.cli import finetune as command
from lorajax.cli import main, processes, training


@pytest.fixture(autouse=True)
def double_precision():
    """The command trains without it, in this process as well."""
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="module")
def folder(little, tmp_path_factory):
    return little(tmp_path_factory.mktemp("inputs"), 48)


def port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def options(folder, out, data="rows.npz"):
    given = ["finetune", "--model", str(folder / "vit.safetensors"), "--data", str(folder / data)]
    given += ["--rank", "2", "--targets", "**/mlp/*", "--epochs", "2", "--batch-size", "16"]
    given += ["--probes", "2", "--checkpoints", "2", "--head-epochs", "1", "--samples", "32"]
    return [*given, "--metric", "accuracy", "--learning-rate", "0.02", "--out", str(out)]


def both(virtual, *commands):
    """Two processes side by side, each with two devices; their results."""
    address = f"127.0.0.1:{port()}"
    run = "import sys; from lorajax.cli import main; sys.exit(main(sys.argv[1:]))"
    started = []
    for i, given in enumerate(commands):
        joined = ["--distributed", "--coordinator", address, "--processes", "2"]
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", run, *given, *joined, "--process", str(i)],
                env=virtual(2),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        said = [each.communicate(timeout=900) for each in started]
    finally:
        for each in started:
            each.kill()
    return [(each.returncode, *words) for each, words in zip(started, said, strict=True)]


def own(printed):
    """What is not by Gloo, whose threads cut into each other's lines."""
    pieces = (
        r"\[Gloo\] Rank",
        "is connected to",
        r"peer ranks\.",
        "Expected number of connected peer ranks is :",
    )
    return re.sub("|".join((*pieces, r"\d", r"\s")), "", printed)


def curves(folder):
    found = json.loads((folder / "history.json").read_text())
    names = ("step", "loss", "accuracy", "test_step", "test_loss", "test_accuracy")
    return {name: np.asarray(found[name]) for name in names} | {
        "values": np.asarray(found["probes"]["singular_values"]),
        "metric": np.asarray(found["metrics"]["accuracy"]),
    }


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The curves of one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    assert main(options(folder, out)) == 0
    found = curves(out)
    assert len(found["loss"]) == 6 and found["loss"][0] - found["loss"][-1] > 0.05
    return found


@pytest.mark.slow
@pytest.mark.apart
def test_two_processes_end_where_one_does(folder, tmp_path, virtual, alone, capsys):
    """With split weights; finetune/test_sharding has both layouts."""
    two, other = tmp_path / "two", tmp_path / "other"
    shared = ["--layout", "full"]
    first, second = both(
        virtual, [*options(folder, two), *shared], [*options(folder, other), *shared]
    )
    assert first[0] == second[0] == 0, first[2] + second[2]
    found = curves(two)
    for name, values in alone.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5, err_msg=name)
    # The second one neither writes nor prints.
    assert not other.exists()
    assert "Written to" in first[1] and "vit.safetensors on rows" in first[1]
    assert own(first[1]) and not own(second[1])
    # Whole states: a single process goes on from them.
    assert main([*options(folder, two), "--resume"]) == 0
    assert "resumed at step 6 of 6" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.apart
def test_what_one_process_lacks_ends_both_in_a_sentence(folder, tmp_path, virtual):
    given = options(folder, tmp_path), options(folder, tmp_path, data="none.npz")
    first, second = both(virtual, *given)
    assert first[0] == second[0] == 2
    assert re.search(r"error: process 0 of 2: process 1 has ended, and says why", first[2])
    assert re.search(r"error: process 1 of 2: source is '\S+none.npz', which is", second[2])


@pytest.mark.slow
@pytest.mark.apart
def test_a_sweep_in_two_processes_is_one_sweep_or_none(tmp_path, virtual):
    given = ["sweep", "flow", "--seeds", "0:4", "--shape", "8", "6"]
    given += ["--store", str(tmp_path / "s.zarr")]
    first, second = both(virtual, [*given, "--ranks", "1"], [*given, "--ranks", "2"])
    assert first[0] == second[0] == 2, first[2] + second[2]
    assert "error: process 1 of 2: store" in second[2] and "axes.rank" in second[2]
    assert "error: process 0 of 2: process 1 has ended, and says why" in first[2]


def parsed(*given):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return parser.parse_args([*given])


def test_settings_of_a_run_do_not_tell_where_it_is_computed():
    joined = ["--distributed", "--coordinator", "a:1", "--processes", "2", "--process", "1"]
    assert training.settings(parsed()) == training.settings(parsed(*joined))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--process 1", "--process is 1; it goes with --distributed"),
        ("--distributed --dry-run", "plan by --devices N instead"),
        ("--distributed --devices 2", "--devices is 2; --distributed takes all"),
        ("--distributed --process 0", "--coordinator, --processes is missing"),
        (
            "--distributed --coordinator a:1 --processes 2 --process 2",
            "--process is 2; it must be below 2",
        ),
        (
            "--distributed --coordinator a:1 --processes 0 --process 0",
            "--processes is 0; it must be at least 1",
        ),
        ("--coordinator a:1 --processes 2", "--process is missing; give --coordinator"),
        (
            "--coordinator a --processes 2 --process 0",
            "--coordinator is 'a'; it must be HOST:PORT",
        ),
        (
            "--distributed --coordinator a:99999 --processes 2 --process 0",
            "--coordinator is 'a:99999'; it must be HOST:PORT",
        ),
    ],
)
def test_options_that_mean_nothing_together(given, message, tmp_path, capsys):
    assert main(["finetune", *given.split(), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class TestMeeting:
    """Before JAX joins them, the processes find each other at the coordinator's port."""

    def meet(self, *numbers, processes_there=None):
        """What each process ends with: None, or the sentence."""
        address, found = f"127.0.0.1:{port()}", {}

        def one(place, number, count):
            args = argparse.Namespace(coordinator=address, process=number, processes=count)
            try:
                processes._meet(args)
                found[place] = None
            except ValueError as error:
                found[place] = str(error)

        counts = processes_there or [len(numbers)] * len(numbers)
        threads = [
            threading.Thread(target=one, args=(i, number, count))
            for i, (number, count) in enumerate(zip(numbers, counts, strict=True))
        ]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return [found[i] for i in range(len(numbers))]

    def test_all_of_them_come(self):
        assert self.meet(2, 0, 1) == [None] * 3
        assert self.meet(0) == [None]

    def test_who_is_missing_is_named(self, monkeypatch):
        monkeypatch.setattr(processes, "WAIT", 1)
        first, second = self.meet(0, 1, processes_there=[3, 3])
        assert "--processes is 3, and after 1 s process 2 is missing" in first
        assert "process 1 is not joined with process 0" in second
        assert "within 1 s" in self.meet(1)[0]

    def test_two_of_one_number_and_other_counts(self, monkeypatch):
        monkeypatch.setattr(processes, "WAIT", 1)
        first, *others = self.meet(0, 1, 1, processes_there=[3, 3, 3])
        assert "process 2 is missing" in first
        assert sum("there is a process 1 already" in each for each in others) == 1
        assert "--processes is 2 there" in self.meet(0, 1, processes_there=[2, 3])[1]

    def test_a_port_that_is_taken(self):
        with socket.create_server(("", 0)) as server:
            taken = f"127.0.0.1:{server.getsockname()[1]}"
            args = argparse.Namespace(coordinator=taken, process=0, processes=2)
            with pytest.raises(ValueError, match=r"cannot have the port \(Address already in use"):
                processes._meet(args)
