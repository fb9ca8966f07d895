"""Checks that the data set given with a cache of examples is the one that the cache was captured from."""

from collections.abc import Sequence
from typing import Any

from ..cache.capture_plan import read_capture_plan
from ..cache.reader import Cache
from ..data.examples import EXAMPLE_COLUMNS, Examples
from ..errors import StreamError


def check_data(caches: Sequence[Cache], data: Any) -> None:
    """StreamError if the caches cannot be read with this data: data with a cache of text; none with a cache of
    examples, other examples than those in its spec (naming the differences), or labels outside the teacher's classes.
    """
    for cache in caches:
        columns = cache.spec.inputs
        if "tokens" in columns:
            if data is not None:
                raise StreamError(f"data: got {type(data).__name__} for {cache!r}, which is of text. Leave it out.")
            continue
        if not set(EXAMPLE_COLUMNS) <= set(columns):
            raise StreamError(
                f"{cache!r}: got input columns {', '.join(columns) or 'none'}; expected `tokens` for text, or "
                f"{' and '.join(EXAMPLE_COLUMNS)} for examples. Capture it with fastkd.capture."
            )
        if not isinstance(data, Examples):
            raise StreamError(
                f"data: got {type(data).__name__} for {cache!r}, a cache of examples that does not contain them. Give "
                "the fastkd.data.examples.Examples that it was captured from (data=, or --data module:factory)."
            )
        _check_same(cache, data)
        if not data.labelled:
            raise StreamError(f"data: got no labels, and {cache!r} contains none. Use Examples(..., labels=...).")
        if data.classes > cache.spec.vocab_size:
            raise StreamError(
                f"data: got a label {data.classes - 1}; expected classes from 0 to {cache.spec.vocab_size - 1}, those "
                f"of the teacher of {cache!r}."
            )


def _check_same(cache: Cache, data: Examples) -> None:
    theirs, ours = cache.spec.provenance.dataset_sha256, data.fingerprint()
    if theirs == ours:
        return
    if theirs is None:
        raise StreamError(
            f"{cache!r}: its spec has no hash of the data set (dataset: {cache.spec.dataset!r}), so the data cannot be "
            "checked. Capture it with fastkd.capture."
        )
    plan, differences = read_capture_plan(cache.store), []
    if plan is not None:
        counts = (
            ("examples", plan.totals.get("documents"), len(data)),
            ("copies", plan.settings.get("context"), data.copies),
        )
        differences = [f"{name}: {a} in the cache, {b} here" for name, a, b in counts if a != b]
    raise StreamError(
        f"data: got sha256 {ours[:12]}…; expected {theirs[:12]}…, the data set that {cache!r} was captured from "
        f"({'; '.join(differences) or 'the values of the examples, their augmentation, or its seed differ'})."
    )
