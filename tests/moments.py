"""Ending a job at its n-th moment: a call of one of some functions, counted over all of them."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


class Killed(BaseException):
    """Ends the process, as far as a test can."""


class Moments:
    """Counts the calls of functions, and ends the job before the `last` one (from 1 on), by `end`; by default `Killed`
    is raised."""

    def __init__(self, last: int, end: Callable[[], Any] | None = None) -> None:
        self._left, self._end = last, end

    @property
    def reached(self) -> bool:
        """Whether there were so many calls."""
        return self._left <= 0

    def watch(self, places: Iterable[tuple[Any, str]], patch: pytest.MonkeyPatch) -> None:
        """Count the calls of functions, each named by its owner and its name."""
        for owner, name in places:
            patch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            self._left -= 1
            if not self._left:
                if self._end is None:
                    raise Killed
                self._end()
            return function(*arguments, **named)

        return run
