"""Sweeps: the arms ranked, each as the mean over its seeds, and each against hard labels alone; and their curves."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from ...evaluate.measures import MEASURES, SWEEP, Measure, distinct, printed_in
from ...utils.numbers import THIN, figures, with_half
from ...utils.words import counted
from ..measures import VERDICTS, column, verdict
from ..page import (
    UNKNOWN,
    Block,
    Card,
    Cards,
    Cell,
    Chart,
    Charts,
    Column,
    Line,
    Paragraph,
    Row,
    Section,
    Series,
    Spread,
    Table,
)
from ..runs import Comparison
from ..sweeps import Arm, Sweep

POSITION = -10
OF_SWEEPS = True
_DRAWN = 8  # arms with a line of their own; the others are grey
_SHOWN = printed_in(SWEEP)


def build(comparison: Comparison) -> list[Section] | None:
    """A section for each sweep."""
    several = len(comparison.sweeps) + len(comparison.runs) > 1
    return [_section(sweep, f"Sweep: {sweep.name}" if several else "Ranking") for sweep in comparison.sweeps] or None


def _section(sweep: Sweep, title: str) -> Section:
    blocks: list[Block] = []
    if sweep.document.get("complete"):
        blocks.append(Paragraph(str(sweep.document.get("verdict", ""))))
    else:
        blocks.append(Paragraph("This sweep is not complete: the same command goes on with it. What there is so far:"))
    series = series_of(sweep)
    if cards := _cards(sweep):
        blocks.insert(0, Cards(cards))
    chart = _falls(sweep, series) if sweep.auto else _ranking(sweep, series)
    blocks.append((_rungs if sweep.auto else _table)(sweep, series))
    blocks += [Charts([chart, *_curves(sweep, series)])] if chart is not None else []
    blocks += [Paragraph(str(note), aside=True) for note in sweep.document.get("notes") or []]
    return Section(title, blocks)


def series_of(sweep: Sweep) -> dict[str, Series]:
    """The line of each arm: of the first ones, of the default settings and of hard labels one of their own."""
    named = [name for key in ("default", "hard") if isinstance(name := sweep.document.get(key), str)]
    found: dict[str, Series] = {}
    for arm in sweep.arms:
        own = len(found) < _DRAWN or arm.name in named
        number = sum(series.colour is not None for series in found.values())
        found[arm.name] = Series(arm.short if own else "other arms", number if own else None, dashed=_hard(sweep, arm))
    return found


def _hard(sweep: Sweep, arm: Arm) -> bool:
    return arm.name == sweep.document.get("hard") if sweep.auto else sweep.is_hard(arm)


def _cards(sweep: Sweep) -> list[Card]:
    measure, best = MEASURES.get(sweep.measure), next((arm for arm in sweep.arms if arm.name == sweep.best), None)
    if measure is None or best is None or not best.values.get(sweep.measure):
        return []
    mean, more = _mean(best.values[sweep.measure], measure)
    cards = [Card("chosen" if sweep.auto else "best arm", best.short, f"{measure.label}: {mean} {measure.unit} {more}")]
    control = sweep.control_of(best)
    if control is not None and (found := sweep.against(best, control)) is not None:
        tone = verdict(measure, found)
        mean, half = with_half(*found, scale=measure.scale, sign=True)
        more = f"{_interval(half)} {measure.unit} against hard labels alone".lstrip()
        cards.append(Card(VERDICTS[tone], mean, more, "" if tone == "even" else tone))
    count = counted(sum(len(arm.folders) for arm in sweep.arms), "training")
    cards.append(Card("arms", str(len(sweep.arms)), count if not sweep.auto else "halved at each rung"))
    return cards


def _mean(values: Sequence[float], measure: Measure) -> tuple[str, str]:
    """The mean over seeds, and the standard deviation between them as "± ..."; "" for one seed."""
    if len(values) < 2:
        return figures(fmean(values) * measure.scale, 4), ""
    mean, spread = with_half(fmean(values), stdev(values), scale=measure.scale)
    return mean, f"±{THIN}{spread}"


def _table(sweep: Sweep, series: Mapping[str, Series]) -> Table:
    """A row for each arm: its measures, the distance to the best, and to hard labels alone."""
    names = distinct({name: fmean(found) for name, found in arm.values.items() if found} for arm in sweep.arms)
    known = [measure for measure in _SHOWN if measure.name in names]
    decides = MEASURES.get(sweep.measure)
    controls = {arm.name: control for arm in sweep.arms if (control := sweep.control_of(arm)) is not None}
    columns = [*(column(measure) for measure in known), Column("behind the best", decides.unit if decides else "")]
    columns += [Column("against hard labels", "same rate")] if controls else []
    rows = []
    for rank, arm in enumerate(sweep.arms, 1):
        cells = [_cell(arm, measure) for measure in known]
        cells.append(_behind(sweep, arm, decides))
        if controls:
            cells.append(_against(sweep, arm, controls.get(arm.name), decides))
        name = f"{rank}. {arm.short}" if arm.values else arm.short
        rows.append(
            Row(name, cells, note=arm.ended or _seeds(arm), series=series[arm.name], marked=arm.name == sweep.best)
        )
    caption = (
        "Held out. Means over the seeds, ± the standard deviation between them. Distances with intervals of 95%, over "
        "seeds or over held-out data, whichever is wider; each pair by itself, so that the best of many looks better "
        "than it is. With one seed there is no interval."
    )
    return Table("arm", columns, rows, caption)


def _seeds(arm: Arm) -> str:
    count = max((len(values) for values in arm.values.values()), default=0)
    return f"{count} seed{'s' * (count != 1)}"


def _cell(arm: Arm, measure: Measure) -> Cell:
    values = arm.values.get(measure.name)
    return Cell(*_mean(values, measure)) if values else UNKNOWN


def _behind(sweep: Sweep, arm: Arm, measure: Measure | None) -> Cell:
    if arm.name == sweep.best:
        return Cell("best", tone="good")
    if arm.behind is None or measure is None:
        return UNKNOWN
    mean, half = with_half(*arm.behind, scale=measure.scale)
    apart = arm.behind.mean > arm.behind.half
    if not half:
        return Cell(mean, "", "", VERDICTS[""])
    return Cell(mean, _interval(half), "bad" if apart else "even", "worse" if apart else "not distinguishable")


def _against(sweep: Sweep, arm: Arm, control: Arm | None, measure: Measure | None) -> Cell:
    found = None if control is None else sweep.against(arm, control)
    if found is None or measure is None:
        return UNKNOWN
    tone = verdict(measure, found)
    mean, half = with_half(*found, scale=measure.scale, sign=True)
    return Cell(mean, _interval(half), tone, VERDICTS[tone])


def _interval(half: str) -> str:
    return f"±{THIN}{half}" if half else ""


def _ranking(sweep: Sweep, series: Mapping[str, Series]) -> Chart | None:
    """The arms from the best down, with their seeds and the interval of the distance to the best."""
    measure = MEASURES.get(sweep.measure)
    arms = [arm for arm in sweep.arms if arm.values.get(sweep.measure)]
    if measure is None or not arms:
        return None
    spreads = []
    for arm in arms:
        values = [measure.scale * value for value in arm.values[measure.name]]
        half = arm.behind.half * measure.scale if arm.behind is not None and math.isfinite(arm.behind.half) else None
        spreads.append(Spread(series[arm.name]._replace(name=arm.short), values, fmean(values), half))
    caption = (
        "Bar: mean over the seeds; markers: the seeds; line: 95% interval of the distance to the best; "
        f"{measure.better} is better."
    )
    label = f"{measure.label}, {measure.unit}"
    return Chart("ranking", f"Ranking by {measure.short}", caption, label, "arm", [], spreads=spreads)


def _rungs(sweep: Sweep, series: Mapping[str, Series]) -> Table:
    """A row for each arm of --auto: its value at each rung."""
    measure = MEASURES.get(sweep.measure)
    steps = sorted({step.step for arm in sweep.arms for step in arm.rungs})
    columns = [*(Column(f"step {step}", measure.unit if measure else "") for step in steps), Column("behind the best")]
    says = {sweep.document.get("default"): "the default settings", sweep.document.get("hard"): "hard labels alone"}
    rows = []
    for arm in sweep.arms:
        there = {step.step: step for step in arm.rungs}
        cells = [_rung(there[step].value, measure) if step in there else UNKNOWN for step in steps]
        cells.append(Cell("chosen", tone="good") if arm.name == sweep.best else _behind(sweep, arm, measure))
        rows.append(Row(arm.short, cells, says.get(arm.name, ""), series[arm.name], marked=arm.name == sweep.best))
    caption = (
        "Held out, one seed. At each rung the worse half ends; last column: with its interval of 95%, where it fell."
    )
    return Table("arm", columns, rows, caption)


def _rung(value: float | None, measure: Measure | None) -> Cell:
    return (
        Cell("diverged", tone="bad") if value is None else Cell(figures(value * (measure.scale if measure else 1), 4))
    )


def _falls(sweep: Sweep, series: Mapping[str, Series]) -> Chart | None:
    """Each arm of --auto up to the rung where it fell."""
    measure = MEASURES.get(sweep.measure)
    scale = measure.scale if measure else 1.0
    lines = []
    for arm in sweep.arms:
        points = [(step.step, step.value * scale) for step in arm.rungs if step.value is not None]
        if points:
            x, y = zip(*points, strict=True)
            lines.append(Line(series[arm.name], x, y, markers=True))
    if not lines:
        return None
    label = f"{measure.label}, {measure.unit}" if measure else sweep.measure
    caption = "Each arm up to the rung where it fell; grey: the other arms; dashed: hard labels alone."
    return Chart("rungs", "Successive halving", caption, "step", label, lines)


def _curves(sweep: Sweep, series: Mapping[str, Series]) -> list[Chart]:
    """The measure of the ranking at each evaluation, means over the seeds of an arm."""
    measure = MEASURES.get(sweep.measure)
    if measure is None or sweep.auto:
        return []
    lines = []
    for arm in sweep.arms:
        runs = sweep.runs_of[arm.name]
        by_step: dict[int, list[float]] = {}
        for run in runs:
            for point in run.points:
                if measure.name in point.measures:
                    by_step.setdefault(point.step, []).append(measure.scale * point.measures[measure.name].mean)
        steps = sorted(step for step, values in by_step.items() if len(values) == len(runs))
        if len(steps) > 1:
            lines.append(Line(series[arm.name], steps, [fmean(by_step[step]) for step in steps], markers=True))
    if not lines:
        return []
    grey = " Grey: the arms after the first eight." if any(line.series.colour is None for line in lines) else ""
    caption = f"Held out, means over the seeds; {measure.better} is better. Dashed: hard labels alone.{grey}"
    return [Chart("arms", measure.short, caption, "step", f"{measure.short}, {measure.unit}", lines)]
