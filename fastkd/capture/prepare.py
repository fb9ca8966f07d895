"""Before the first shard: a capture's window plan and the spec of its cache, and whether it may continue a cache."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray

from ..cache import CacheError, CacheSpec, NotFound
from ..cache.capture_plan import PLAN_KEY
from ..cache.credentials import without_credentials
from ..cache.provenance import Identity, Provenance
from ..cache.spec import differences
from ..cache.stores import Store
from ..data.documents import Documents
from ..data.examples import EXAMPLE_COLUMNS, Examples
from ..data.lengths import LENGTHS_KEY, lengths_from_npz, lengths_to_npz
from ..errors import DataError
from ..settings import CaptureSettings
from ..teachers.protocol import Teacher
from ..utils.secrets import masked
from .claims import Claims, wait_for
from .existing import DELETE, differing, existing_plan, existing_spec, plan_differences, refusal, text_provenance
from .rows import TEXT
from .window_plan import (
    DEFAULT_CONTEXT,
    VERSION,
    WindowPlan,
    before_the_floor,
    cache_spec,
    make_window_plan,
    window_plan_settings,
)


def prepare(
    teacher: Teacher,
    data: Documents | Examples,
    settings: CaptureSettings,
    store: Store | None = None,
    claims: Claims | None = None,
    *,
    progress: bool = False,
    say: Callable[[str], None] = lambda text: None,
    notes: str = "",
) -> tuple[WindowPlan, CacheSpec]:
    """Read the lengths of the documents, from the store if they are there, and plan the windows: a capture's window
    plan, and the spec of its cache.

    store: where the lengths are stored, if given with claims. progress: progress bars on stderr. say: called with a
    line when this worker waits for another. notes: for the spec.
    Raises CacheError if the store holds a cache of another teacher, other data or other settings, naming which.
    """
    dataset = data.fingerprint(progress=progress)
    there = None if store is None else existing_plan(store)
    if store is not None and there is not None and there.dataset != dataset:
        # the fingerprint of the data also depends on the tokenizer
        texts, theirs = provenance_of(teacher, data, dataset).texts(), existing_spec(store)
        names = ("teacher", "tokenizer") if theirs is not None else ()
        different = differing((name, getattr(theirs, name), texts[name]) for name in names)
        if not any(text.startswith("tokenizer") for text in different):
            different += plan_differences(there, dataset, {})
        raise refusal(store, different)
    if store is None or claims is None:
        lengths = data.lengths(progress=progress)
    else:
        lengths = _lengths(data, dataset, store, claims, progress=progress, say=say)
    before = there.sha256 if there is not None else None
    if store is not None and there is None:  # its plan may be lost
        known = existing_spec(store)
        before = None if known is None else known.provenance.plan_sha256
    plan = _plan(teacher, data, settings, lengths, dataset, before, progress=progress)
    spec = cache_spec(
        settings,
        vocab_size=teacher.vocab_size,
        shard_positions=plan.settings.shard_positions,
        inputs=EXAMPLE_COLUMNS if isinstance(data, Examples) else TEXT,
        notes=masked(notes),
        **provenance_of(teacher, data, dataset, plan.hash, settings.seed).texts(),
    )
    if store is not None:
        _check_same(store, plan, spec)
    return plan, spec


def _plan(
    teacher: Teacher,
    data: Documents | Examples,
    settings: CaptureSettings,
    lengths: NDArray[np.int32],
    dataset: str,
    before: str | None,
    *,
    progress: bool,
) -> WindowPlan:
    """The window plan; of a cache from before more was held out of small data, or it was packed into shorter windows,
    the one that it has. before: the hash of the plan that the cache was begun with, if it was."""
    longest, copies = teacher.max_positions, data.copies if isinstance(data, Examples) else None
    chosen = window_plan_settings(settings, lengths, longest=longest, copies=copies)
    plan = make_window_plan(lengths, chosen, dataset, progress=progress)
    if before not in (None, plan.hash):
        older = [chosen]
        if settings.context is None and copies is None:
            same = replace(settings, context=min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT))
            older.append(window_plan_settings(same, lengths, longest=longest))
        if settings.held_out is None:
            older += [before_the_floor(one, int(np.count_nonzero(lengths))) for one in older]
        others = (make_window_plan(lengths, one, dataset, progress=progress) for one in older[1:] if one != chosen)
        plan = next((found for found in others if found.hash == before), plan)
    if before is None and isinstance(data, Documents) and np.minimum(plan.lengths, chosen.context).max() < 2:
        raise DataError(
            f"data: got {plan.totals['documents'] - plan.totals['skipped']:,} documents of one token each, with a "
            f"context of {chosen.context}; expected two tokens or more, as nothing else is to be predicted."
        )
    return plan


def write_window_plan(store: Store, plan: WindowPlan) -> None:
    """Write the plan, unless the store has it. CacheError if it has another one, naming what differs."""
    ours = plan.capture_plan()
    if store.create(PLAN_KEY, ours.to_json()) or (there := existing_plan(store)) is None or there == ours:
        return
    if there.sha256 == ours.sha256:
        raise CacheError(
            f"{store.describe()}: {PLAN_KEY}: damaged: got {there.train_shards} training shards of {there.shards}; "
            f"expected {ours.train_shards} of {ours.shards}. {DELETE}"
        )
    # with the same settings and data, the rules differ
    versions = f"version of the window plan: {there.version} and {VERSION}"
    raise refusal(store, plan_differences(there, plan.dataset, asdict(plan.settings)) or [versions])


def read_window_plan(store: Store, spec: CacheSpec) -> tuple[WindowPlan, int]:
    """The window plan that a cache was captured with, and the seed of its draws. DataError if it has none."""
    source = spec.provenance
    if source.dataset_sha256 is None or source.draw_seed is None:
        raise DataError("its spec names no plan; expected a cache written by fastkd.capture.")
    try:
        plan_json, lengths_npz = store.get(PLAN_KEY), store.get(LENGTHS_KEY)
    except NotFound as error:
        raise DataError(f"it lacks {PLAN_KEY} or {LENGTHS_KEY}.") from error
    lengths = lengths_from_npz(lengths_npz, source.dataset_sha256, LENGTHS_KEY)
    if lengths is None:
        raise DataError(f"its {LENGTHS_KEY} belongs to other data.")
    plan = WindowPlan.from_json(plan_json, lengths)
    if plan.hash != source.plan_sha256:
        raise DataError(f"its {PLAN_KEY} is not the plan that its spec names.")
    return plan, source.draw_seed


def provenance_of(
    teacher: Teacher, data: Documents | Examples, dataset: str, plan: str | None = None, seed: int | None = None
) -> Provenance:
    """The provenance of a cache of this teacher and data. dataset, plan: hashes. seed: of the draws."""
    return Provenance(
        teacher=Identity.of(without_credentials(teacher.fingerprint)),
        **text_provenance(data),
        dataset_sha256=dataset,
        plan_sha256=plan,
        draw_seed=seed,
    )


def _lengths(
    data: Documents | Examples,
    dataset: str,
    store: Store,
    claims: Claims,
    *,
    progress: bool,
    say: Callable[[str], None],
) -> NDArray[np.int32]:
    """The documents' lengths: from the store, or measured by one worker and stored for all."""

    def attempt() -> tuple[float, NDArray[np.int32] | None]:
        with suppress(NotFound):
            there = _stored_lengths(store, data, dataset)
            # others are left by a run with other data that failed before it wrote a plan
            return 0.0, data.lengths(progress=progress) if there is None else there
        return claims.take("lengths"), None

    there = wait_for(attempt, lambda: say("waiting for another worker, which reads the lengths of the data"))
    if there is not None:
        return there
    try:
        lengths = data.lengths(progress=progress, on_part=claims.keep)
        written = store.create(LENGTHS_KEY, lengths_to_npz(lengths, dataset))
    except BaseException:
        claims.drop("lengths")
        raise
    claims.done("lengths")
    # if another worker was faster, use its lengths: all workers need the same plan
    found = None if written else _stored_lengths(store, data, dataset)
    return lengths if found is None else found


def _stored_lengths(store: Store, data: Documents | Examples, dataset: str) -> NDArray[np.int32] | None:
    """The lengths in the store; None if they belong to other data. NotFound if there are none."""
    where = f"{store.describe()}, {LENGTHS_KEY}"
    lengths = lengths_from_npz(store.get(LENGTHS_KEY), dataset, where)
    if lengths is None:
        return None
    if len(lengths) != len(data):
        raise DataError(f"{where}: got the lengths of {len(lengths)} documents; expected {len(data)}. Delete it.")
    return lengths


def _check_same(store: Store, plan: WindowPlan, spec: CacheSpec) -> None:
    """CacheError if the store holds another capture's cache, naming what differs."""
    theirs = existing_spec(store)
    if theirs is None or theirs.hash == spec.hash:
        return
    there = existing_plan(store)
    different = plan_differences(there, plan.dataset, asdict(plan.settings)) if there is not None else []
    clearer: tuple[str, ...] = ("dataset:", "shard_positions:") if different else ()
    if there is None:  # the spec has only a hash of the lost plan
        clearer, different = ("dataset:",), _dataset_differences(theirs.provenance, spec.provenance)
    # differences of the plan are clearer than those of its hash
    raise refusal(store, different + [text for text in differences(theirs, spec) if not text.startswith(clearer)])


def _dataset_differences(theirs: Provenance, ours: Provenance) -> list[str]:
    """What differs of the data of a cache whose plan is lost, by the hashes in its spec."""
    found = differing([("draws: seed", theirs.draw_seed, ours.draw_seed)])
    if (there := theirs.dataset_sha256) != (here := ours.dataset_sha256):
        return [*found, f"data: sha256 {str(there)[:12]}… and {str(here)[:12]}…"]
    if theirs.plan_sha256 != ours.plan_sha256:
        found.append(
            "how the data are divided: context, packing, on_long, overlap, held_out, shard_positions, batch_tokens or "
            f"seed is another one; {PLAN_KEY}, which is lost, said which. Put a copy of it back to see it"
        )
    return found
