"""The commands that take a student to another runtime: export, and the report on several exports."""

from typing import Any

from ..errors import DataError
from ..settings import DeploySettings, ExportSettings
from ..utils.factories import is_factory, made_by
from .commands import DeployReport, Export
from .outcome import Outcome, settings_of, shows_progress, store_of


def export(command: Export) -> Outcome:
    """Export the student. Status 1: it costs more than at_most."""
    from ..deploy.api import export as run

    settings = settings_of(ExportSettings, command)
    found = run(command.student, command.to, command.out, settings, **_evaluated_on(command))
    return Outcome(found.to_json(), str(found), found.status)


def deploy_report(command: DeployReport) -> Outcome:
    """Measure and compare the exports. Status 1: one costs more than at_most."""
    from ..deploy.api import deploy_report as run
    from ..deploy.result import report_lines
    from ..report.runs import in_lines

    settings = settings_of(DeploySettings, command)
    given = {"cache": command.cache, "data": command.data, "at-most": command.at_most, "threads": command.threads}
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    typed = in_lines(["fastkd", "deploy-report", command.student, *map(str, command.folders), *words])
    found = run(command.student, command.folders, command.out, settings, command=typed, **_evaluated_on(command))
    return Outcome(found.to_json(), "\n".join(report_lines(found)), found.status)


def _evaluated_on(command: Export | DeployReport) -> dict[str, Any]:
    from ..cache import open_cache
    from ..utils.progress import mode_for

    if command.data is not None and not is_factory(command.data):
        raise DataError(f"--data: got {command.data!r}; expected the module:factory that returns the examples.")
    return {
        "cache": None if command.cache is None else open_cache(store_of(command.cache)),
        "data": None if command.data is None else made_by(command.data, DataError),
        "progress": mode_for() if shows_progress(json=command.json) else "none",
    }
