"""Whether the features that a student matched helped it: each run against the same training without them."""

from collections.abc import Mapping

from ...train.arms import FeatureHelp
from ...utils.intervals import Interval
from ...utils.numbers import THIN, with_half
from ..measures import MEASURES, VERDICTS, verdict
from ..page import Block, Card, Cards, Paragraph, Section
from ..runs import Comparison, Run, paired_differences

POSITION = 12


def build(comparison: Comparison) -> Section | None:
    """For each run with such an arm: its verdict, a card per measure, and what was matched."""
    blocks: list[Block] = []
    for run in comparison.runs:
        if run.without_features is None:
            continue
        if pairs := paired_differences(run, run.without_features):
            blocks += [Paragraph(_verdict(run, pairs)), Cards(_cards(pairs)), Paragraph(_matched(run), aside=True)]
        else:
            text = f"{run.name}: not known; both need an evaluation.json, of the same windows."
            blocks.append(Paragraph(text))
    return Section("Did the features help?", blocks) if blocks else None


def _verdict(run: Run, pairs: Mapping[str, Interval]) -> str:
    best = run.part("settings", "best")
    measure = best if isinstance(best, str) and best in pairs else "cross_entropy"
    assert run.evaluation is not None
    return f"{run.name}: {FeatureHelp(measure, pairs, run.evaluation.windows).text}"


def _cards(pairs: Mapping[str, Interval]) -> list[Card]:
    cards = []
    for name, measure in MEASURES.items():
        if name in pairs:
            mean, half = with_half(*pairs[name], scale=measure.scale, sign=True)
            unit = "points" if measure.unit == "%" else measure.unit
            tone = verdict(measure, pairs[name])
            cards.append(Card(measure.label, f"{mean}{THIN}{unit}", f"{VERDICTS[tone]}: ±{THIN}{half or '∞'}", tone))
    return cards


def _matched(run: Run) -> str:
    entries = run.items("settings", "match")
    matched = f"Matched: {', '.join(map(str, entries))}. " if entries else ""
    return (
        f"{matched}Differences to the same student, settings and order without features; intervals of 95%, paired over "
        "windows. They do not include the effect of another seed: repeat a close one with other seeds."
    )
