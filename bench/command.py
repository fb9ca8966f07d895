"""`fastkd bench`: measure suites or read recordings from files; then compare them, and write JSON, tables, a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastkd.bench.suites import SUITES, RunConfig, Suite, listing, named
from fastkd.errors import BenchError, ReportError
from fastkd.utils.output_guard import check_file
from fastkd.utils.packages import PAGES, check_packages

if TYPE_CHECKING:
    from fastkd.bench.settings import BenchSettings
    from fastkd.bench.table import Recording


def bench(command: "BenchSettings") -> tuple[str, int]:
    """What to print at the end, and the exit status. Raises BenchError and ReportError."""
    suites = named(command.suites or (list(SUITES) if command.use else ()))
    if command.list:
        return listing(), 0
    if command.runs < 1 or (command.rounds is not None and command.rounds < 1):
        raise BenchError("--runs, --rounds: got a number below 1; expected at least 1.")
    if command.against is not None and not command.check:
        raise BenchError("--against: it names the recording that --check compares with; add --check.")
    _check_outputs(command)
    from fastkd.bench.check import bundled
    from fastkd.bench.run import device_for, run_suites, to_stderr
    from fastkd.bench.table import load, save

    before: list[Recording] = []
    if command.check:  # read first, since it may be the file that --json writes
        before = bundled() if command.against is None else load(command.against)
    failed: list[str] = []
    ask = RunConfig(device_for(command.device), command.full, command.peers, command.rounds)
    if command.use:
        found = _taken(command.use, suites)
    else:
        path = command.json

        def keep(found: "Sequence[Recording]") -> None:
            if path is not None:
                save(found, path)

        found, failed = run_suites(suites, ask, runs=command.runs, say=to_stderr, keep=keep)
    if not found:
        raise BenchError(f"{', '.join(failed)}: nothing was measured; the reason is printed above.")
    lines, worse = [], False
    if command.check:
        found, text, worse = _checked(command, ask, found, before)
        lines.append(text)
    if command.json is not None:
        save(found, command.json)
        lines.append(str(command.json))
    lines += _written(command, found)
    if noisy := [recording.suite for recording in found if recording.load.get("quiet") is False]:
        lines.append(f"not quiet: other processes worked during {', '.join(noisy)}; measure again on a quiet machine")
    lines += [f"failed: {', '.join(failed)}"] if failed else []
    return "\n".join(lines), 1 if failed or worse else 0


def _check_outputs(command: "BenchSettings") -> None:
    """Raise BenchError or ReportError, before anything is measured, for files that could not be written at the end."""
    for name in ("json", "markdown", "page"):
        if (path := getattr(command, name)) is not None:
            check_file(path, f"--{name}", BenchError)
    if command.page is not None:
        check_packages(PAGES, "report", "--page", ReportError)


def _written(command: "BenchSettings", found: "list[Recording]") -> list[str]:
    """Write the tables and the page that the command asks for. Returns their paths as text."""
    files: dict[Path, str] = {}
    if command.markdown is not None:
        from fastkd.bench.results import markdown

        files[command.markdown] = markdown(found)
    if command.page is not None:
        from fastkd.bench.page import page_of
        from fastkd.report.render import to_html

        files[command.page] = to_html(page_of(found))
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [str(path) for path in files]


def _taken(paths: Sequence[Path], suites: Sequence[Suite]) -> "list[Recording]":
    """The recordings of some suites in files. Raises BenchError if there are none."""
    from fastkd.bench.table import load

    names = {suite.name for suite in suites}
    found = [recording for path in paths for recording in load(path) if recording.suite in names]
    if not found:
        raise BenchError(f"{', '.join(map(str, paths))}: no recordings of {', '.join(sorted(names))}.")
    return found


def _checked(
    command: "BenchSettings", ask: RunConfig, found: "list[Recording]", before: "list[Recording]"
) -> "tuple[list[Recording], str, bool]":
    """The recordings, with a second run of suites that seem worse; the comparison as text; whether any row is worse.
    before: the recordings of --against, or the bundled ones of any hardware."""
    from fastkd.bench.check import compare, of_same_hardware, text, worse
    from fastkd.bench.run import run_suites, to_stderr

    before = before if command.against is not None else of_same_hardware(found, before)
    moves = compare(before, found)
    suspects = sorted({move.suite for move in moves if move.worse})
    if suspects and not command.use:
        to_stderr(f"measuring again, as rows seem worse: {', '.join(suspects)}")
        again, _ = run_suites([SUITES[name] for name in suspects], ask, say=to_stderr)
        found = [*found, *again]
        moves = compare(before, found)
    return found, text(before, found), worse(moves)
