"""The caches that the runs were trained from."""

import re
from collections.abc import Mapping

from ...cache import CacheError, open_cache
from ...cache.inspect import inspect_cache
from ...utils.numbers import percent
from ...utils.text import report_text
from ..page import Block, Code, Paragraph, Section
from ..runs import Comparison, Run, finite

POSITION = 50
OF_SWEEPS = True


def build(comparison: Comparison) -> Section | None:
    """What `fastkd inspect` says of each cache, once; and notes on those that are not opened, or were replaced."""
    caches: dict[str, tuple[str, str, str]] = {}
    for run in comparison.trainings:
        for place, spec in run.caches:
            caches.setdefault(spec or place, (run.name, place, spec))
    blocks: list[Block] = []
    notes: list[Block] = [Paragraph(text) for run in comparison.runs if (text := _mixture(run))]
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


def _mixture(run: Run) -> str:
    """What a run was trained on, if that was several caches."""
    parts = []
    for cache in run.items("caches"):
        if isinstance(cache, Mapping) and (share := finite(cache.get("share"))) is not None:
            chats = re.search(r", template .*, loss_on (\w+)", str(cache.get("tokenizer")))
            what = f"conversations, loss on {chats[1]}" if chats else "text"
            parts.append(f"{percent(share)} of the positions from {cache.get('place')} ({what})")
    text = f"{run.name} was trained on a mixture: {'; '.join(parts)}. Its measures are means over these caches."
    return text if parts else ""
