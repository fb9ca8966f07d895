"""Whether a student is better than what was trained beside it: by measure and by slice of positions, and over steps."""

from collections.abc import Mapping

from ...errors import StreamError
from ...evaluate.api import Evaluation
from ...evaluate.slices import SAYS
from ...train.arms import CONTROL, WITHOUT_FEATURES
from ...train.verdict import EVEN, HELPED, HURT, LEAST_WINDOWS, Verdict, judge, verdict
from ...utils.intervals import Interval
from ...utils.numbers import THIN, percent, with_half
from ..measures import MEASURES, TONES, column
from ..page import UNKNOWN, Block, Cell, Paragraph, Row, Section, Table
from ..runs import Comparison, Run

POSITION = 12
_MARKS = {HELPED: "▲ helped", HURT: "▼ hurt", EVEN: "= no difference"}
_ASKED = {CONTROL: "Did distillation help?", WITHOUT_FEATURES: "Did the features help?"}


def build(comparison: Comparison) -> Section | None:
    """For each run, and each student beside it: the verdict, and a heat map by measure and slice."""
    blocks: list[Block] = []
    asked: list[str] = []
    for run in comparison.runs:
        for folder, other in ((CONTROL, run.control), (WITHOUT_FEATURES, run.without_features)):
            if other is None:
                continue
            asked += [_ASKED[folder]] * (_ASKED[folder] not in asked)
            found = _judged(folder, run, other)
            if found is None or run.evaluation is None:
                text = f"{run.name}: not known; both need an evaluation.json, of the same windows."
                blocks.append(Paragraph(text))
                continue
            blocks.append(Paragraph(f"{run.name} {found.sentence()}."))
            blocks.append(_heat_map(found, run.evaluation))
            if matched := _matched(run) if folder == WITHOUT_FEATURES else "":
                blocks.append(Paragraph(matched, aside=True))
    return Section(" ".join(asked), blocks) if blocks else None


def _judged(against: str, run: Run, other: Run) -> Verdict | None:
    if run.evaluation is None or other.evaluation is None:
        return None
    best = run.part("settings", "best")
    try:
        given = [run.evaluation], [other.evaluation], [1.0]
        return judge(against, *given, str(best)) or judge(against, *given, "cross_entropy")
    except StreamError:
        return None


def _heat_map(found: Verdict, evaluation: Evaluation) -> Table:
    """A row for all positions, and one for each slice; a column for each measure."""
    known = [measure for measure in MEASURES.values() if measure.name in found.difference]
    first = f"{found.windows} windows; each interval by itself"
    rows = [Row("all positions", [_cell(found.difference, m.name) for m in known], first, marked=True)]
    for name, cells in found.slices.items():
        share = percent(evaluation.slices[name].counts.sum() / evaluation.count)
        rows.append(Row(SAYS.get(name, name), [_cell(cells, m.name) for m in known], f"{share} of the positions"))
    caption = (
        f"The student minus {'its control' if found.against == CONTROL else 'the same without features'}, paired over "
        "windows. Blue ▲: better; orange ▼: worse; the darker, the more intervals the difference is away from zero. "
    )
    if found.cells:
        caption += (
            f"All positions: intervals of 95% each; {found.measure} decides. Slices: {found.cells} cells, whose "
            f"intervals of 95% hold for all of them together (Bonferroni); slices in fewer than {LEAST_WINDOWS} "
            "windows are left out. Slices follow the teacher's cached targets: whether its best token is the label, "
            "its entropy (nats), and its probability of the label, q(label). "
        )
    caption += (
        "One training each: the intervals do not include the effect of another seed. Repeat a close one with others."
    )
    return Table("positions", [column(m) for m in known], rows, caption)


def _cell(found: Mapping[str, Interval], name: str) -> Cell:
    if name not in found:
        return UNKNOWN
    value, measure = found[name], MEASURES[name]
    mean, half = with_half(*value, scale=measure.scale, sign=True)
    said = verdict(name, value)
    # from the edge of the interval, faint, to four times that, full
    strength = min(1.0, 0.25 * abs(value.mean) / value.half) if value.half else 1.0
    return Cell(mean, f"±{THIN}{half or '∞'}", TONES[said], _MARKS[said], 0.0 if said == EVEN else strength)


def _matched(run: Run) -> str:
    entries = run.items("settings", "match")
    return f"Matched: {', '.join(map(str, entries))}." if entries else ""
