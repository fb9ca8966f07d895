"""The commands that were typed, and notes on the students."""

from ...utils.text import without_credentials
from ..comparison import Comparison
from ..page import Block, Code, Paragraph, Section

POSITION = 60


def build(comparison: Comparison) -> Section:
    """Each run's command, its control's if it is another, and the report's own."""
    blocks: list[Block] = []
    for run in comparison.runs:
        for one in (run, run.control):
            if one is not None and one.command and (one is run or one.command != run.command):
                blocks.append(Code(one.command, one.name))
    if missing := [run.name for run in comparison.runs if not run.command]:
        blocks.append(Paragraph(f"No command was recorded for {', '.join(missing)}.", aside=True))
    if comparison.command:
        blocks.append(Code(comparison.command, "this page"))
    for run, _ in comparison.students:
        blocks += [Paragraph(f"{run.name}: {without_credentials(note)}", aside=True) for note in run.notes]
    return Section("Commands", blocks)
