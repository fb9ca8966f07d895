"""Whether a student is better than what was trained beside it: by measure and by slice of positions, and over steps."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite

from ...errors import StreamError
from ...evaluate.api import Evaluation, compare
from ...evaluate.measures import distinct
from ...evaluate.slices import SAYS
from ...train.arms import CONTROL, WITHOUT_FEATURES
from ...train.verdict import EVEN, HELPED, HURT, LEAST_WINDOWS, NOT_KNOWN, Verdict, judge, verdict
from ...utils.intervals import Interval
from ...utils.numbers import THIN, decimals, percent, with_half
from ...utils.words import counted
from ..measures import MEASURES, TONES, column
from ..page import UNKNOWN, Block, Cell, Chart, Charts, Line, Paragraph, Row, Section, Series, Table
from ..runs import Comparison, Run

POSITION = 12
_MARKS = {HELPED: "▲ helped", HURT: "▼ hurt", EVEN: "= no difference", NOT_KNOWN: "no interval"}
_ASKED = {CONTROL: "Did distillation help?", WITHOUT_FEATURES: "Did the features help?"}


def build(comparison: Comparison) -> Section | None:
    """For each run, and each student beside it: the verdict, a heat map by measure and slice, and the difference after
    each evaluation."""
    blocks: list[Block] = []
    asked: list[str] = []
    series = {id(student): line for student, line in comparison.students}
    for run in comparison.runs:
        for folder, other in ((CONTROL, run.control), (WITHOUT_FEATURES, run.without_features)):
            if other is None:
                continue
            asked += [_ASKED[folder]] * (_ASKED[folder] not in asked)
            found = _judged(folder, run, other)
            if found is None or not run.evaluations:
                text = f"{run.name}: not known; both need an evaluation.json, of the same data."
                if why := run.part("report", "not_compared"):
                    text = f"{run.name}: not compared: {why}"
                blocks.append(Paragraph(text))
                continue
            blocks += [Paragraph(text) for text in _stopped(run, folder, other)]
            blocks += [Paragraph(f"{run.name} {found.sentence()}."), _heat_map(found, run.evaluations)]
            if charts := _curves(found.measure, folder, run, other, (series[id(run)], series[id(other)])):
                blocks.append(Charts(charts))
            if matched := _matched(run) if folder == WITHOUT_FEATURES else "":
                blocks.append(Paragraph(matched, aside=True))
    return Section(" ".join(asked), blocks) if blocks else None


def _judged(against: str, run: Run, other: Run) -> Verdict | None:
    """The verdict from the last evaluations; of a run that was stopped since it was worse, from those after the same
    step."""
    step = run.number("report", "stopped_worse", "step")
    ours, theirs = list(run.evaluations), list(other.evaluations)
    if step is not None:
        ours, theirs = ([one] if (one := of.by_step.get(int(step))) else [] for of in (run, other))
    best, when = str(run.part("settings", "best")), None if step is None else int(step)
    try:
        for measure in (best, "cross_entropy"):
            if (found := judge(against, ours, theirs, run.shares[: len(ours)], measure, step=when)) is not None:
                return replace(found, kind=run.words.kind)
    except StreamError:
        pass
    return None


def _stopped(run: Run, folder: str, other: Run) -> list[str]:
    """What ended a run that was worse than this arm, as at most one sentence."""
    worse = run.part("report", "stopped_worse")
    if not isinstance(worse, Mapping) or worse.get("against") != folder:
        return []
    paths = ("stopped_worse", "step"), ("steps",), ("stopped_worse", "looks")
    step, steps, looks = (decimals(run.number("report", *path) or 0) for path in paths)
    return [
        f"{run.name} was stopped after step {step} of {steps}: there it was worse than {other.name} by "
        f"{worse.get('measure')}, beyond an interval of 95% for all {looks} comparisons together."
    ]


def _curves(name: str, folder: str, run: Run, other: Run, lines: tuple[Series, Series]) -> list[Chart]:
    """The measure that decides after each evaluation that both have: of both, and their paired difference."""
    measure, steps = MEASURES[name], sorted(run.by_step.keys() & other.by_step.keys())
    try:
        found = [compare(run.by_step[step], other.by_step[step])[name] for step in steps]
    except (KeyError, StreamError):
        return []
    if len(steps) < 2 or not all(isfinite(value.half) for value in found):
        return []
    both = [
        Line(line, steps, [measure.scale * one.by_step[s].intervals()[name].mean for s in steps], markers=True)
        for one, line in zip((run, other), lines, strict=True)
    ]
    against = "control" if folder == CONTROL else "the same without features"
    mean, low, high = ([measure.scale * getattr(value, end) for value in found] for end in ("mean", "low", "high"))
    difference = Line(lines[0], steps, mean, (low, high), markers=True)
    title, where = f"Held out: {measure.short}", f"{lines[0].colour}-{folder}-{name}"
    return [
        Chart(f"both-{where}", title, f"Solid: the student; dashed: {against}; {measure.better} is better.", "step",
              f"{measure.short}, {measure.unit}", both),
        Chart(f"difference-{where}", f"Student minus {against}: {measure.short}",
              f"Paired over {run.words.windows}, with its interval of 95% at each evaluation; {measure.better} is "
              "better.", "step", f"difference, {measure.unit}", [difference], (0.0, "no difference")),
    ]  # fmt: skip


def _heat_map(found: Verdict, evaluations: Sequence[Evaluation]) -> Table:
    """A row for all positions, and one for each slice; a column for each measure."""
    names = distinct({name: value.mean for name, value in one.intervals().items()} for one in evaluations)
    known = [measure for measure in MEASURES.values() if measure.name in found.difference and measure.name in names]
    words = evaluations[0].words
    first = f"{counted(found.windows, words.window)}; each interval by itself"
    rows = [Row(f"all {words.positions}", [_cell(found.difference, m.name) for m in known], first, marked=True)]
    for name, cells in found.slices.items():
        held = sum(float(one.slices[name].counts.sum()) for one in evaluations if name in one.slices)
        share = f"{percent(held / sum(one.count for one in evaluations))} of the {words.positions}"
        rows.append(Row(SAYS.get(name, name), [_cell(cells, m.name) for m in known], share))
    caption = (
        f"The student minus {'its control' if found.against == CONTROL else 'the same without features'}, paired over "
        f"{words.windows}. Blue ▲: better; orange ▼: worse; the darker, the more intervals the difference is away from "
        "zero. "
    )
    if found.cells:
        caption += (
            f"All {words.positions}: intervals of 95% each; {found.measure} decides. Slices: {found.cells} cells, "
            f"whose intervals of 95% hold for all of them together (Bonferroni); slices in fewer than {LEAST_WINDOWS} "
            f"{words.windows} are left out. Slices follow the teacher's cached targets: whether its best "
            f"{words.outcome} is the label, its entropy (nats), and its probability of the label. "
        )
    caption += (
        "One training each: the intervals do not include the effect of another seed. Repeat a close one with others."
    )
    return Table(words.positions, [column(m) for m in known], rows, caption)


def _cell(found: Mapping[str, Interval], name: str) -> Cell:
    if name not in found:
        return UNKNOWN
    value, measure = found[name], MEASURES[name]
    mean, half = with_half(*value, scale=measure.scale, sign=True)
    said = verdict(name, value)
    # from the edge of the interval, faint, to four times that, full
    strength = min(1.0, 0.25 * abs(value.mean) / value.half) if value.half else 1.0
    shown = f"±{THIN}{half}" if half else ""
    return Cell(mean, shown, TONES[said], _MARKS[said], strength if said in (HELPED, HURT) else 0.0)


def _matched(run: Run) -> str:
    entries = run.items("settings", "match")
    return f"Matched: {', '.join(map(str, entries))}." if entries else ""
