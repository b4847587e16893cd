"""A command that is interrupted says how to go on; a run that is stopped keeps its state."""

import os
import signal

import pytest

from lorajax import cli
from lorajax.cli.interrupts import Interrupted, Stop, interruptible, saying


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """A shell starts what it runs in the background deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_a_sentence_and_a_status(number, status, monkeypatch, capsys):
    class Parsed:
        command = "x"

        @staticmethod
        def run(args):
            with saying(lambda: "half is kept, and the same command goes on."):
                os.kill(os.getpid(), number)
            raise AssertionError

    class Parser:
        @staticmethod
        def parse_args(argv):
            return Parsed

    monkeypatch.setattr(cli, "build_parser", Parser)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["x"]) == status
    said = "lorajax: interrupted; half is kept, and the same command goes on.\n"
    assert capsys.readouterr().err == said
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_signal_asks_and_the_second_interrupts():
    with Stop() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and stop.signal == signal.SIGTERM
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_option_without_words_is_refused(capsys):
    assert cli.main(["validate", "--seed=--"]) == 2
    assert "--seed is '--'; it must have a value." in capsys.readouterr().err
