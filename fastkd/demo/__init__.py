"""The demo. Each task is a module here, with `run(settings, stop)`; `run_demo` runs the one that is asked for."""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..settings import DemoSettings
    from ..utils.signals import Stop


class Done(NamedTuple):
    """What a task leaves: its report as JSON can hold it, and as text for a person."""

    report: dict[str, Any]
    text: str


def run_demo(settings: "DemoSettings", stop: "Stop | None" = None) -> Done:
    """Run the demo, or what is missing of it. `Stopped` where a stop was asked for."""
    if settings.task == "digits":
        from . import digits

        return digits.run(settings, stop)
    from . import language

    return language.run(settings, stop)
