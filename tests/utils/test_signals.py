"""A stop that a signal asks for, wherever the signal comes in."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastkd.utils.signals import Stopped, stopping


class Signals:
    """Sends a signal while a class is being made of it, as may happen in an import."""

    def __set_name__(self, owner: type, name: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_while_nothing_is_to_be_dropped_it_stops_at_once() -> None:
    with pytest.raises(Stopped), stopping() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked


def test_a_class_in_the_making_does_not_turn_it_into_an_error() -> None:
    with pytest.raises(Stopped), stopping():
        type("Made", (), {"field": Signals()})


def test_where_something_is_to_be_dropped_it_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with stopping() as stop:
        stop.gentle = True
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked
    assert capsys.readouterr().err == "SIGTERM: stopping after the current batch\n"


def test_an_error_of_its_own_stays_one() -> None:
    with pytest.raises(ValueError, match="mine"), stopping() as stop:  # noqa: PT012
        try:
            raise Stopped
        except Stopped:
            assert not stop.asked
            raise ValueError("mine")  # noqa: B904


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stopping():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_asking_again_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """A launcher hands on the SIGTERM that the scheduler has sent to everybody."""
    tidied = False
    with pytest.raises(Stopped), stopping():  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            tidied = True
    with pytest.raises(KeyboardInterrupt), stopping() as stop:  # noqa: PT012
        stop.gentle = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert tidied
    assert capsys.readouterr().err == "SIGINT: stopping after the current batch; Ctrl-C again to quit now\n"


def test_it_is_asked_with_nobody_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the terminal has gone, or the signal comes while a line is being written."""

    def write(text: str) -> int:
        raise errors.pop()

    for error in (OSError(5, "Input/output error"), RuntimeError("reentrant call"), ValueError("closed file")):
        errors: list[Exception] = [error]
        monkeypatch.setattr(sys.stderr, "write", write)
        with stopping() as stop:
            stop.gentle = True
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        assert not errors


STOPPED = """
import time
from fastkd.utils.signals import end
from fastkd.utils.signals import Stopped, WORK_REMAINS, final, stopping

class Slow:
    def __del__(self, sleep=time.sleep):  # while Python takes itself apart
        sleep(1)

slow = Slow()
final()
try:
    with stopping():
        print("ready", flush=True)
        time.sleep(30)
except Stopped:
    time.sleep(0.2)
    end(WORK_REMAINS)
"""


def test_the_status_outlives_further_signals() -> None:
    process = subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for _ in range(6):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.wait(20) == 75
    process.stdout.close()
