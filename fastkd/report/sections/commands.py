"""The commands that were typed, and notes on the students."""

from ..page import Block, Code, Paragraph, Section
from ..runs import Comparison

POSITION = 60
OF_SWEEPS = True


def build(comparison: Comparison) -> Section:
    """Each run's command, its control's if it is another, and the report's own."""
    blocks: list[Block] = []
    sweeps = {id(run): sweep.name for sweep in comparison.sweeps for run in sweep.runs}
    for run in comparison.trainings:
        if run.command and not any(isinstance(block, Code) and block.text == run.command for block in blocks):
            blocks.append(Code(run.command, sweeps.get(id(run), run.name)))
    if missing := [run.name for run in comparison.runs if not run.command]:
        blocks.append(Paragraph(f"No command was recorded for {', '.join(missing)}.", aside=True))
    if comparison.command:
        blocks.append(Code(comparison.command, "this page"))
    for run, _ in comparison.students:
        blocks += [Paragraph(f"{run.name}: {note}", aside=True) for note in run.items("student", "notes")]
    return Section("Commands", blocks)
