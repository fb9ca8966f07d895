"""A cache of examples needs the data set that it was captured from: whether the one that is given is that one."""

from collections.abc import Sequence
from typing import Any

from ..cache.capture_plan import read_capture_plan
from ..cache.reader import Cache
from ..data.examples import EXAMPLE_COLUMNS, Examples
from ..errors import StreamError


def check_data(caches: Sequence[Cache], data: Any) -> None:
    """StreamError where caches cannot be streamed with this data: text with data, examples without, examples of other
    data than the cache's spec names (with what differs), or without labels that the teacher has classes for."""
    for cache in caches:
        columns = cache.spec.inputs
        if "tokens" in columns:
            if data is not None:
                raise StreamError(f"data: got {type(data).__name__} for {cache!r}, which is of text. Leave it out.")
            continue
        if not set(EXAMPLE_COLUMNS) <= set(columns):
            raise StreamError(
                f"{cache!r}: its input columns are {', '.join(columns) or 'none'}; `tokens` of text, or of examples "
                f"{' and '.join(EXAMPLE_COLUMNS)}, are needed. Capture it with fastkd.capture."
            )
        if not isinstance(data, Examples):
            raise StreamError(
                f"data: got {type(data).__name__} for {cache!r}, which is of examples and does not hold them. Give "
                "the fastkd.data.examples.Examples that it was captured from (data=, or --data module:factory)."
            )
        _check_same(cache, data)
        if not data.labelled:
            raise StreamError(f"data: found no labels, and {cache!r} holds none. Give Examples(..., labels=...).")
        if data.classes > cache.spec.vocab_size:
            raise StreamError(
                f"data: found a label {data.classes - 1}; the teacher of {cache!r} has classes 0 to "
                f"{cache.spec.vocab_size - 1}."
            )


def _check_same(cache: Cache, data: Examples) -> None:
    theirs, ours = cache.spec.provenance.dataset_sha256, data.fingerprint()
    if theirs == ours:
        return
    if theirs is None:
        raise StreamError(
            f"{cache!r}: its spec names no data set (it says {cache.spec.dataset!r}), so that none can be told to be "
            "the right one. Capture it with fastkd.capture."
        )
    found = [f"{name}: {a} there, {b} here" for name, a, b in _planned(cache, data) if a != b]
    different = "; ".join(found) or "the examples' values, what augments them, or its seed"
    raise StreamError(
        f"data: not the data set that {cache!r} was captured from: sha256 {theirs[:12]}… there, {ours[:12]}… here "
        f"({different}). Give the one that it was captured from."
    )


def _planned(cache: Cache, data: Examples) -> list[tuple[str, Any, int]]:
    """What the cache's plan says of its data, and what these are: (name, there, here)."""
    plan = read_capture_plan(cache.store)
    if plan is None:
        return []
    return [
        ("examples", plan.totals.get("documents"), len(data)),
        ("copies", plan.settings.get("context"), data.copies),
    ]
