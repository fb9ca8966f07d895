"""A window plan and a capture's report as text."""

from ..utils.numbers import duration, size_text
from ..utils.text import printable, ranges
from .runner import CaptureReport
from .window_plan import WindowPlan


def plan_text(plan: WindowPlan) -> str:
    """One line: the data, and how they are divided."""
    totals, settings = plan.totals, plan.settings
    parts = [f"{totals['documents']:,} documents"]
    notes = [
        (totals["skipped"], "empty, left out"),
        (totals["held_out"], "held out"),
        (totals["long"], f"longer than the context of {settings.context}: {settings.on_long}"),
    ]
    if counted := [f"{count:,} {what}" for count, what in notes if count]:
        parts[0] += f" ({'; '.join(counted)})"
    if totals["dropped_tokens"]:
        parts.append(f"{totals['dropped_tokens']:,} tokens dropped")
    parts.append(f"{totals['positions']:,} positions in {totals['windows']:,} windows and {totals['shards']:,} shards")
    return "plan: " + ", ".join(parts)


def large_k_text(k: int, draws: int, vocab_size: int) -> list[str]:
    """A line if k exceeds the teacher's number of outcomes; none otherwise."""
    if k <= vocab_size:
        return []
    no_draws = f", and the {draws:,} draws are unused" if draws else ""
    return [f"k = {k:,} exceeds the teacher's {vocab_size:,} outcomes: every target holds all of them{no_draws}"]


def capture_text(report: CaptureReport) -> str:
    """What a capture did, and what remains to be done."""
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
        lines.append(f"{report.batches_halved:,} batches did not fit into memory and were halved; this is recorded")
    if not report.complete:
        lines.append("Run the same command again to continue.")
    return "\n".join(printable(line) for line in lines)
