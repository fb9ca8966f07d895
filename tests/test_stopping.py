"""A stop that a signal asks for, wherever the signal comes in."""

import os
import signal

import pytest

from fastkd.stopping import Stopped, stopping


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
    assert capsys.readouterr().err == "SIGTERM: stopping after the present batch\n"


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
