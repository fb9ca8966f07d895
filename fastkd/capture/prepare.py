"""Before the first shard: the plan and the spec of a capture, kept in its cache; and what may not be continued."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from ..cache import CacheError, CacheSpec, NotFound, StoreError
from ..cache.capture_plan import PLAN_KEY, CapturePlan, read_capture_plan
from ..cache.provenance import Identity, Provenance
from ..cache.scan import read_spec
from ..cache.spec import differences
from ..cache.stores import Store
from ..data.documents import Documents
from ..data.examples import EXAMPLE_COLUMNS, Examples
from ..data.lengths import lengths_from_npz, lengths_to_npz
from ..errors import DataError, TeacherError
from ..settings import CaptureSettings
from ..teachers.protocol import Teacher
from .claims import Claims
from .rows import TEXT
from .teacher_pass import TopKConfig
from .window_plan import VERSION, Plan, PlanSettings, make_plan

LENGTHS_KEY = "lengths.npz"
DEFAULT_CONTEXT = 2048
_WAIT_SECONDS = 2.0


@dataclass(frozen=True, eq=False)
class Prepared:
    """The plan of a capture, and the spec of its cache."""

    plan: Plan
    spec: CacheSpec


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
) -> Prepared:
    """Measure the data and plan. With a store, lengths that are kept there are taken, and others are kept there.

    progress: bars on stderr. say: told what is waited for.
    Raises CacheError where the store holds the cache of another teacher, other data or other settings, naming which.
    """
    dataset = data.fingerprint(progress=progress)
    if store is not None and (there := _plan_there(store)) is not None and there.dataset != dataset:
        raise _refusal(store, _other_data(store, teacher, data, there.dataset, dataset))
    if store is None or claims is None:
        lengths = data.lengths(progress=progress)
    else:
        lengths = _lengths(data, dataset, store, claims, progress=progress, say=say)
    plan = make_plan(lengths, plan_settings(settings, data, teacher, lengths), dataset, progress=progress)
    spec = spec_of(teacher, data, settings, plan, notes)
    if store is not None:
        _check_same(store, plan, spec)
    return Prepared(plan, spec)


def keep_plan(store: Store, plan: Plan) -> None:
    """Write the plan, unless it is there. CacheError where another one is, naming what differs."""
    if not store.create(PLAN_KEY, plan.to_json()):
        there = _plan_there(store)
        if there is not None and there.sha256 != plan.hash:
            # the same settings and data make another plan by other rules
            versions = f"version of the plan: {there.version} and {VERSION}"
            raise _refusal(store, _other_plan(there, plan) or [versions])


def kept_plan(store: Store, spec: CacheSpec) -> tuple[Plan, int]:
    """The plan that a cache was captured by, and the seed of its draws. DataError where they are not to be had."""
    source = spec.provenance
    if source.dataset_sha256 is None or source.draw_seed is None:
        raise DataError("its spec names no plan: it was not made by fastkd.capture.")
    try:
        plan_json, lengths_npz = store.get(PLAN_KEY), store.get(LENGTHS_KEY)
    except NotFound as error:
        raise DataError(f"{PLAN_KEY} or {LENGTHS_KEY} is not in it.") from error
    lengths = lengths_from_npz(lengths_npz, source.dataset_sha256, LENGTHS_KEY)
    if lengths is None:
        raise DataError(f"{LENGTHS_KEY} in it is of other data.")
    plan = Plan.from_json(plan_json, lengths)
    if plan.hash != source.plan_sha256:
        raise DataError(f"{PLAN_KEY} is another plan than the one its spec names.")
    return plan, source.draw_seed


def plan_settings(
    settings: CaptureSettings, data: Documents | Examples, teacher: Teacher, lengths: NDArray[np.int32]
) -> PlanSettings:
    """How the data are cut up: the settings, with numbers in the places of None."""
    kept = int(np.count_nonzero(lengths))
    held_out = settings.held_out if settings.held_out is not None else 0.01 * (kept > 1)
    shard_positions = settings.shard_positions
    if shard_positions is None:
        shard_positions = min(max(-(-int(lengths.sum(dtype=np.int64)) // 64), 2**14), 2**20)
    if isinstance(data, Examples):
        return PlanSettings(
            context=data.copies,
            packing="keep",
            shard_positions=max(shard_positions, data.copies),
            batch_tokens=settings.batch_tokens,
            held_out=held_out,
            seed=settings.seed,
        )
    longest = teacher.max_positions
    context = settings.context
    if context is None:
        context = min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
    elif longest is not None and context > longest:
        raise TeacherError(f"context: got {context}; this teacher takes {longest} positions at most.")
    return PlanSettings(
        context=context,
        packing=settings.packing,
        on_long=settings.on_long,
        overlap=settings.overlap,
        shard_positions=max(shard_positions, context) if settings.shard_positions is None else shard_positions,
        batch_tokens=settings.batch_tokens,
        held_out=held_out,
        seed=settings.seed,
    )


def ask_for(settings: CaptureSettings, keeping: tuple[int, int, float | None] | None = None) -> TopKConfig:
    """What is kept of each row: by the settings, or by k, draws and mass in place of theirs."""
    k, draws, mass = keeping or (settings.k, settings.draws, settings.mass)
    return TopKConfig(
        k=k,
        draws=draws,
        draw_temperature=settings.draw_temperature,
        mass=mass,
        temperatures=settings.temperatures,
        seed=settings.seed,
    )


def spec_of(
    teacher: Teacher, data: Documents | Examples, settings: CaptureSettings, plan: Plan, notes: str = ""
) -> CacheSpec:
    """The spec of the cache that this capture fills."""
    return CacheSpec(
        vocab_size=teacher.vocab_size,
        k=settings.k,
        draws=settings.draws,
        draw_temperature=settings.draw_temperature,
        mass=settings.mass,
        temperatures=settings.temperatures,
        shard_positions=plan.settings.shard_positions,
        codec=settings.codec,
        inputs=EXAMPLE_COLUMNS if isinstance(data, Examples) else TEXT,
        notes=notes,
        **provenance_of(teacher, data, plan.dataset, plan.hash, settings.seed).texts(),
    )


def provenance_of(
    teacher: Teacher, data: Documents | Examples, dataset: str, plan: str | None = None, seed: int | None = None
) -> Provenance:
    """The provenance of a cache of this teacher and these data. dataset, plan: hashes. seed: of the draws."""
    text = {} if isinstance(data, Examples) else data.text_settings
    tokenizer, template = (Identity.of(text[name]) if name in text else None for name in ("tokenizer", "template"))
    return Provenance(
        teacher=Identity.of(teacher.fingerprint),
        tokenizer=tokenizer,
        template=template,
        loss_on=text.get("loss_on"),
        text_documents=text.get("text_documents"),
        dataset_sha256=dataset,
        plan_sha256=plan,
        draw_seed=seed,
    )


def _plan_there(store: Store) -> CapturePlan | None:
    """The plan that a cache has; None where it has none."""
    try:
        return read_capture_plan(store)
    except StoreError:
        raise
    except CacheError as error:
        raise CacheError(f"{error} Delete it; it is made again from the same data.") from error


def _lengths(
    data: Documents | Examples,
    dataset: str,
    store: Store,
    claims: Claims,
    *,
    progress: bool,
    say: Callable[[str], None],
) -> NDArray[np.int32]:
    """The documents' lengths: those in the store; or measured, by one worker for all."""
    said = False
    while True:
        with suppress(NotFound):
            if (found := _kept_lengths(store, data, dataset)) is not None:
                return found
            # a run that came to nothing left those of other data, and nothing was planned by them
            return data.lengths(progress=progress)
        left = claims.take("lengths")
        if not left:
            break
        if not said:
            say("another worker measures the data")
            said = True
        time.sleep(min(left, _WAIT_SECONDS))
    try:
        with claims.kept():
            lengths = data.lengths(progress=progress)
        kept = store.create(LENGTHS_KEY, lengths_to_npz(lengths, dataset))
    except BaseException:
        claims.drop("lengths")
        raise
    claims.done("lengths")
    # another was faster: all plan by the same
    found = None if kept else _kept_lengths(store, data, dataset)
    return lengths if found is None else found


def _kept_lengths(store: Store, data: Documents | Examples, dataset: str) -> NDArray[np.int32] | None:
    """The lengths in the store; None where they are of other data."""
    where = f"{store.describe()}, {LENGTHS_KEY}"
    lengths = lengths_from_npz(store.get(LENGTHS_KEY), dataset, where)
    if lengths is None:
        return None
    if len(lengths) != len(data):
        raise DataError(
            f"{where}: found the lengths of {len(lengths)} documents, where there are {len(data)}. Delete it; they are "
            "found anew."
        )
    return lengths


def _other_plan(there: CapturePlan, plan: Plan) -> list[str]:
    """What differs between the plan that is there and ours: settings and data."""
    theirs = there.settings
    found = [f"{n}: {theirs.get(n)!r} and {v!r}" for n, v in asdict(plan.settings).items() if theirs.get(n) != v]
    return found if there.dataset == plan.dataset else [*found, _two_data(there.dataset, plan.dataset)]


def _two_data(theirs: str, ours: str) -> str:
    return f"data: sha256 {theirs[:12]}… and {ours[:12]}…"


def _other_data(store: Store, teacher: Teacher, data: Documents | Examples, theirs: str, ours: str) -> list[str]:
    """What differs where the data do: of what makes tokens of them the dataset's fingerprint speaks, too."""
    spec = _spec_there(store)
    found = []
    if spec is not None:
        now = provenance_of(teacher, data, ours).texts()
        pairs = {name: (getattr(spec, name), now[name]) for name in ("teacher", "tokenizer")}
        found = [f"{name}: {a!r} and {b!r}" for name, (a, b) in pairs.items() if a != b]
    if not any(text.startswith("tokenizer") for text in found):
        found.append(_two_data(theirs, ours))
    return found


def _check_same(store: Store, plan: Plan, spec: CacheSpec) -> None:
    """CacheError where the store holds another capture's cache, naming what differs."""
    theirs = _spec_there(store)
    if theirs is None or theirs.hash == spec.hash:
        return
    there = _plan_there(store)
    different = _other_plan(there, plan) if there is not None else []
    others = differences(theirs, spec)
    # the plan, where it differs, says it better than its hash
    different += [text for text in others if not (different and text.startswith(("dataset:", "shard_positions:")))]
    raise _refusal(store, different)


def _spec_there(store: Store) -> CacheSpec | None:
    try:
        return read_spec(store)
    except CacheError as error:
        if isinstance(error.__cause__, NotFound):
            return None
        raise


def _refusal(store: Store, different: list[str]) -> CacheError:
    return CacheError(
        f"{store.describe()}: the cache there is not what is asked for now (there, and now: {'; '.join(different)}). "
        "Write to another place, or capture with what it was begun with."
    )
