"""The caches that the runs were trained from."""

from ...cache import CacheError, open_cache
from ...cache.inspect import inspect_cache
from ...utils.text import report_text
from ..page import Block, Code, Paragraph, Section
from ..runs import Comparison

POSITION = 50
OF_SWEEPS = True


def build(comparison: Comparison) -> Section | None:
    """What `fastkd inspect` says of each cache, once; and notes on those that are not opened, or were replaced."""
    caches: dict[str, tuple[str, str, str]] = {}
    for run in comparison.trainings:
        for place, spec in run.caches:
            caches.setdefault(spec or place, (run.name, place, spec))
    blocks: list[Block] = []
    notes: list[Block] = []
    for name, place, spec in caches.values():
        if "://" in place and not comparison.fetch:  # a run folder may be a stranger's
            text = f"The cache of {name} is at an address, {place}, which was not asked. --fetch asks it."
            notes.append(Paragraph(text, aside=True))
            continue
        try:
            report = inspect_cache(open_cache(place))
        except (CacheError, OSError) as error:
            text = f"The cache of {name}, {place}, cannot be read: {error}"
            notes.append(Paragraph(text, aside=True))
            continue
        if spec and report["spec_sha256"] != spec:
            text = f"{place} now holds another cache than the one that {name} was trained from."
            notes.append(Paragraph(text, aside=True))
        else:
            blocks.append(Code(report_text(report)))
    return Section("Cache" if len(blocks) < 2 else "Caches", blocks + notes) if blocks or notes else None
