"""The most important numbers of the first run, in large type."""

from ...utils.numbers import THIN, percent, with_half
from ..measures import MEASURES, VERDICTS, cell, verdict
from ..page import Card, Cards, Section
from ..runs import Comparison, paired_differences

POSITION = 0


def build(comparison: Comparison) -> Section | None:
    """The first run against its control, and how long its training waited for data."""
    run, cards = comparison.runs[0], []
    pairs = paired_differences(run, run.control)
    for key in ("kl_bucket", "kl_sampled", "agreement", "cross_entropy"):
        if key not in run.measures or (key == "kl_sampled" and "kl_bucket" in run.measures):
            continue
        measure = MEASURES[key]
        mean, half = with_half(*run.measures[key], scale=measure.scale)
        unit = f"{THIN}%" if measure.unit == "%" else ""
        more, tone = (f"±{THIN}{half}{unit or ' ' + measure.unit}" if half else ""), ""
        if key in pairs:
            tone = verdict(measure, pairs[key])
            shown = [part for part in with_half(*pairs[key], scale=measure.scale, sign=True) if part]
            difference = " ± ".join(shown).replace(" ", THIN)
            more = f"{VERDICTS[tone]}: {difference}{' points' if unit else ''} against the control"
        elif run.control is not None and not pairs and key in run.control.measures:
            more = f"control: {cell(measure, run.control.measures).text}{unit}"
        # exact, it is the same by any treatment of the tail
        label = measure.short if key == "kl_bucket" and comparison.exact else measure.label
        cards.append(Card(label, mean + unit, more, tone))
    if run.waiting is not None:
        cards.append(Card("waiting for data", percent(run.waiting, 2), "of the training time; lower is better"))
    return Section(run.name if len(comparison.runs) > 1 else "", [Cards(cards)]) if cards else None
