"""The demo: capture a real teacher, train students from the cache, and report. A module per task, with `run`.

Belongs here: what a person would do by hand, in order, on real input. Does not: anything the engine itself needs.
"""

from typing import Any, NamedTuple

from ..settings import DemoSettings
from ..utils.signals import Stop


class DemoResult(NamedTuple):
    """The report of a task, for JSON and as text."""

    report: dict[str, Any]
    text: str


def run_demo(settings: DemoSettings, stop: Stop | None = None) -> DemoResult:
    """Run a task, reusing the results of an earlier run. Raises `Stopped` if `stop` was called."""
    if settings.task == "digits":
        from . import digits

        return digits.run(settings, stop)
    from . import language

    return language.run(settings, stop)
