"""An actor by which a driver and its trainings talk: whether to stop, what a training says, and how it ended."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ...utils.progress import Progress
from ...utils.signals import Stop

_LOOK_SECONDS = 1.0


class Board:
    """What is known of the trainings. An actor without resources, on the driver's machine."""

    def __init__(self) -> None:
        self._stopped = False
        self._notes: list[str] = []
        self._results: list[Any] = []
        self._errors: list[BaseException] = []

    def look(self, stop: bool) -> list[str]:
        """For the driver: ask all trainings to stop, or not; returns what they said since the last call."""
        self._stopped |= stop
        notes, self._notes = self._notes, []
        return notes

    def stopped(self) -> bool:
        return self._stopped

    def note(self, text: str) -> None:
        self._notes.append(text)

    def result(self, value: Any) -> None:
        self._results.append(value)

    def error(self, error: BaseException) -> None:
        self._errors.append(error)

    def ends(self) -> tuple[list[Any], list[BaseException]]:
        """The results and the errors."""
        return self._results, self._errors


def make_board(ray: Any) -> Any:
    return ray.remote(num_cpus=0, max_concurrency=8)(Board).remote()


@contextmanager
def listening(ray: Any, board: Any, stop: Stop, say: Progress) -> Iterator[None]:
    """For the driver: pass a stop on to the trainings, and say what they say, on a thread."""
    ended = threading.Event()

    def listen() -> None:
        while not ended.wait(_LOOK_SECONDS):
            with suppress(ray.exceptions.RayError):
                for text in ray.get(board.look.remote(stop.asked)):
                    say.event("note", text=text)

    thread = threading.Thread(target=listen, name="fastkd-ray", daemon=True)
    thread.start()
    try:
        with stop.gently():
            yield
    finally:
        ended.set()
        thread.join()
        with suppress(ray.exceptions.RayError):
            for text in ray.get(board.look.remote(stop.asked)):
                say.event("note", text=text)


@contextmanager
def stoppable(ray: Any, board: Any) -> Iterator[Stop]:
    """For a training: a `Stop` that the driver's stop triggers."""
    stop, ended = Stop(), threading.Event()
    if ray.get(board.stopped.remote()):
        stop()

    def listen() -> None:
        while not ended.wait(_LOOK_SECONDS):
            with suppress(ray.exceptions.RayError):
                if ray.get(board.stopped.remote()):
                    stop()
                    return

    thread = threading.Thread(target=listen, name="fastkd-ray", daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        ended.set()
        thread.join()
