"""What a capture plans, and what it did, for a person."""

from ..utils.progress import duration
from ..utils.text import printable, ranges, size_text
from .runner import CaptureReport
from .window_plan import Plan


def plan_text(plan: Plan) -> str:
    """One line: what the data are, and how they are cut up."""
    totals, settings = plan.totals, plan.settings
    parts = [f"{totals['documents']:,} documents"]
    notes = [
        (totals["skipped"], "empty, left out"),
        (totals["held_out"], "held out"),
        (totals["long"], f"longer than the context of {settings.context}: {settings.on_long}"),
    ]
    if told := [f"{count:,} {what}" for count, what in notes if count]:
        parts[0] += f" ({'; '.join(told)})"
    if totals["dropped_tokens"]:
        parts.append(f"{totals['dropped_tokens']:,} tokens dropped")
    parts.append(f"{totals['positions']:,} positions in {totals['windows']:,} windows and {totals['shards']:,} shards")
    return "plan: " + ", ".join(parts)


def beyond_text(k: int, draws: int, vocab_size: int) -> list[str]:
    """A line where more entries are asked for than the teacher has outcomes; none otherwise."""
    if k <= vocab_size:
        return []
    nothing = f", and the {draws:,} draws have nothing left to draw from" if draws else ""
    return [
        f"k = {k:,} is more than the teacher's {vocab_size:,} outcomes: every target holds all of them exactly{nothing}"
    ]


def capture_text(report: CaptureReport) -> str:
    """What a capture did, and what is left."""
    totals = report.plan
    lines = [f"{report.cache}: {totals['positions']:,} positions in {totals['shards']:,} shards"]
    lines[0] += (
        ", complete and sealed" if report.complete else f"; work remains: shards {ranges(report.missing)} are missing"
    )
    if report.shards_written:
        speed = report.positions_captured / report.seconds
        each = report.bytes_written / report.positions_written
        lines.append(
            f"this run: {report.shards_written:,} shards, {report.positions_written:,} positions in "
            f"{duration(report.seconds)}, {speed:,.0f} positions/s, teacher busy {report.teacher_busy:.0%}, "
            f"{size_text(report.bytes_written)}, {each:.1f} B each"
        )
    elif report.complete:
        lines.append("this run: nothing to do, the teacher did not run")
    if report.batches_halved:
        lines.append(f"{report.batches_halved:,} batches did not fit into memory and were halved; it is recorded")
    if not report.complete:
        lines.append("The same command again goes on from here.")
    return "\n".join(printable(line) for line in lines)
