"""The commands that look after a cache: inspect, verify, seal, features; its export, and the mean of several."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..cache.errors import CacheError, StoreError
from ..errors import DataError, ExportError
from ..settings import DataSettings
from ..utils.numbers import size_text
from ..utils.signals import Stop
from ..utils.text import are_missing, features_lines, numbered, printable, report_text, them
from ..utils.words import TEXT, Words, counted, words_of
from .commands import ExportCache, Features, Inspect, MixTargets, Seal, Verify
from .outcome import Outcome, shows_progress, store_of

if TYPE_CHECKING:
    from ..cache import Cache
    from ..cache.progress import Shown
    from ..cache.stores import Store
    from ..cache.verify import Report as VerifyReport


def inspect(command: Inspect) -> Outcome:
    from ..cache import open_cache
    from ..cache.inspect import inspect_cache

    if command.sample < 0:
        raise CacheError(f"sample: got {command.sample}; expected a number of positions.")
    for name, given in (("tokenizer", command.tokenizer), ("classes", command.classes)):
        if given is not None and not command.sample:
            raise CacheError(f"{name}: got {given!r} without --sample; expected both.")
    if command.tokenizer is not None and command.classes is not None:
        raise CacheError("classes: got it with tokenizer; expected one of them.")
    cache = open_cache(store_of(command.cache))
    unfit, fit = ("classes", "tokenizer") if "tokens" in cache.spec.inputs else ("tokenizer", "classes")
    if (given := getattr(command, unfit)) is not None:
        kind = "text" if unfit == "classes" else "examples"
        raise CacheError(f"{unfit}: got {given!r} for a cache of {kind}; expected --{fit}.")
    report = inspect_cache(cache, progress=_shards_shown(command))
    if not command.sample:
        return Outcome(report, report_text(report))
    from .sample import classes_of, hint, sample_text, sampled

    tokenizer, warning = _tokenizer_of(cache, command.tokenizer)
    if command.classes is not None:
        tokenizer, warning = classes_of(command.classes, cache.spec.vocab_size)
    report["sample"] = sampled(cache, command.sample, tokenizer)
    lines = [report_text(report), "", sample_text(report["sample"])]
    lines += [f"  {hint(cache, report['sample'])}"] if tokenizer is None else []
    return Outcome(report, "\n".join(lines), 0, warning)


def _shards_shown(command: Features | Inspect | Seal | Verify) -> "Shown":
    """Progress over shards: a bar on a terminal, lines elsewhere, nothing if the output is JSON."""
    from ..utils.progress import shards_shown

    return shards_shown if shows_progress(json=command.json) else False


def _tokenizer_of(cache: "Cache", name: str | None) -> tuple[Any, str]:
    """The tokenizer of transformers by this name, and a warning if the cache's is another one."""
    if name is None:
        return None, ""
    from ..models.tokenizers import load_tokenizer

    tokenizer, known = load_tokenizer(name), cache.spec.provenance.tokenizer
    other = known is not None and known.sha256 not in (None, tokenizer.identity)
    return tokenizer.backend, f"{name}: it is not the tokenizer of the cache; texts may be others." if other else ""


def verify(command: Verify) -> Outcome:
    """Check the cache. Status 1: a problem was found."""
    from ..cache import verify_cache

    for name, given, least in (("positions", command.positions, 1), ("sample", command.sample, 0)):
        if given is not None and given < least:
            raise CacheError(f"{name}: got {given}; expected an integer from {least} on.")
    store = store_of(command.cache)
    if command.teacher is not None:  # before the shards are read
        from ..teachers.load import check_teacher_name
        from ..utils.factories import check_factory

        check_teacher_name(command.teacher, command)
        if command.examples is not None:
            check_factory(command.examples, DataError)
    found = verify_cache(store, deep=command.deep, progress=_shards_shown(command))
    if found.ok:
        _check_plan(store, found)
    words = _words(store)
    shards = counted(found.shards, "shard")
    read = f"{shards}, {counted(found.positions, words.position)}, {size_text(found.bytes)}"
    count = len(found.problems)
    verdict = f"{count:,} problem{'s' * (count > 1)} found" if count else "no problem found"
    lines = [str(problem) for problem in found.problems]
    if found.missing:
        why, also = "sealed without them", " after deleting manifest.parquet"
        if not found.sealed:
            why, also = "not written yet?", ""
        lines.append(
            f"missing ({why}): {numbered('shard', found.missing)}. Run the same capture again{also} to write "
            f"{them(found.missing)}."
        )
    lines.append(f"{store.describe()}: {verdict} ({read} {'hashed and decoded' if found.deep else 'hashed'})")
    lines += [f"feature {name}: {counts}" for name, counts in _features_checked(found).items()]
    if any(problem.shard is not None and problem.feature is None for problem in found.problems):
        sealed = " and manifest.parquet" if found.sealed else ""
        lines.append(f"To repair the cache, delete the damaged shards{sealed} and run the same capture again.")
    for name in sorted({problem.feature for problem in found.problems if problem.feature is not None}):
        lines.append(
            f"To repair feature {name}, delete its damaged shards and its manifest.parquet, or drop it "
            f"(`fastkd features CACHE --drop {name}`), and run the same capture again."
        )
    text = "\n".join(printable(line) for line in lines)
    what = "only the shards in the manifest were checked, and no features"
    warning = f"{what}. {found.unlisted}" if found.unlisted else ""
    report = {"cache": store.describe(), "ok": found.ok, **asdict(found)}
    if command.teacher is None or not found.ok:
        return Outcome(report, text, 0 if found.ok else 1, warning)
    from ..cache import open_cache
    from ..capture.check import check_teacher, check_text
    from ..data.examples import Examples
    from ..teachers.load import load

    if command.examples is None and not set(open_cache(store).spec.inputs) & {"tokens"}:
        raise DataError(
            f"{store.describe()}: got a cache of examples, which it does not contain, and a teacher to run on them. "
            "Name those that it was captured from with --examples module:factory."
        )
    data = None if command.examples is None else DataSettings(data=(command.examples,))
    loaded = load(command.teacher, command, data, rank=0, world_size=1, progress=shows_progress(json=command.json))
    check = check_teacher(
        open_cache(store),
        loaded.teacher,
        positions=command.positions,
        seed=command.sample,
        data=loaded.data if isinstance(loaded.data, Examples) else None,
        progress=shows_progress(json=command.json),
    )
    report |= {"ok": check.ok, "teacher": check.to_json()}
    return Outcome(report, f"{text}\n\n{check_text(check)}", 0 if check.ok else 1, warning)


def _words(store: "Store") -> Words:
    """The words for a cache's data; those for text if its spec cannot be read, which is a problem of its own."""
    from ..cache.manifest import read_spec

    try:
        return words_of(read_spec(store).inputs)
    except CacheError:
        return TEXT


def _check_plan(store: "Store", found: "VerifyReport") -> None:
    """Add the problem of a plan that has no hash of itself and is not what the lengths of the documents give."""
    from ..cache import open_cache
    from ..cache.verify import Problem
    from ..stream.split import plan_of

    try:
        plan_of(open_cache(store))
    except StoreError:
        raise
    except CacheError as error:
        found.problems.append(Problem(None, None, str(error)))


def _features_checked(found: "VerifyReport") -> dict[str, str]:
    """What was checked of each feature, by name."""
    texts = {}
    for name, feature in found.features.items():
        count = sum(problem.feature == name for problem in found.problems)
        verdict = f"{count:,} problem{'s' * (count > 1)} found" if count else "no problem found"
        read = f"{counted(feature.shards, 'shard')}, {counted(feature.vectors, 'vector')}, {size_text(feature.bytes)}"
        texts[name] = f"{verdict} ({read})"
        if feature.missing:
            texts[name] += f"; missing: {numbered('shard', feature.missing)}. "
            texts[name] += f"Run the same capture again to write {them(feature.missing)}."
    return texts


def seal(command: Seal) -> Outcome:
    """Seal the cache and its features. A sealed cache is reported as such; a cache without shards is refused."""
    from ..cache import open_cache, open_writer
    from ..cache.capture_plan import read_capture_plan
    from ..cache.features.seal import seal_features
    from ..cache.manifest import gaps

    cache = open_cache(store_of(command.cache))
    plan = read_capture_plan(cache.store, cache.spec)
    name = cache.store.describe()
    if not cache.store.readonly and not cache.shards:
        raise CacheError(f"{name}: got a cache without shards; a sealed cache accepts no more. Nothing was written.")
    with open_writer(cache.store) as writer:
        table = writer.seal(progress=_shards_shown(command))
    missing = gaps(table.column("shard").to_numpy(), end=0 if plan is None else plan.shards)
    warnings = []
    if missing:
        warnings.append(
            f"{name}: {are_missing(missing)}, and a sealed cache accepts no more. To write {them(missing)}, delete "
            "manifest.parquet and run the capture again."
        )
    report: dict[str, Any] = {"cache": name, "already": cache.sealed, "shards": len(table)}
    report |= {"positions": sum(table.column("positions").to_pylist()), "missing": missing}
    state = "already sealed" if cache.sealed else "sealed"
    held = counted(report["positions"], words_of(cache.spec.inputs).position)
    lines = [f"{name}: {state}, {counted(report['shards'], 'shard')}, {held}"]
    report["features"] = seal_features(cache, progress=_shards_shown(command))
    for feature, found in report["features"].items():
        if found["missing"]:
            warnings.append(f"feature {feature} is not sealed: {are_missing(found['missing'])}.")
        else:
            how = f"{'already ' * found['already']}sealed"
            lines.append(f"feature {feature}: {how}, {counted(found['shards'], 'shard')}")
    return Outcome(report, "\n".join(map(printable, lines)), 0, " ".join(warnings))


def features(command: Features) -> Outcome:
    """List the features of the cache, or drop some."""
    from ..cache import drop_feature, open_cache
    from ..cache.features.inspect import inspect_features

    store = store_of(command.cache)
    name = store.describe()
    if command.drop:
        dropped = {feature: drop_feature(store, feature) for feature in command.drop}
        lines = [f"{name}: dropped feature {feature}, {count:,} objects" for feature, count in dropped.items()]
        return Outcome({"cache": name, "dropped": dropped}, "\n".join(map(printable, lines)))
    cache = open_cache(store)
    found = inspect_features(cache, progress=_shards_shown(command))
    text = "\n".join(map(printable, features_lines(found, words_of(cache.spec.inputs)))) or printable(
        f"{name}: no features"
    )
    return Outcome({"cache": name, "features": found}, text)


def export_cache(command: ExportCache, stop: Stop) -> Outcome:
    """Write the cache in another program's format. Status 75: work remains."""
    from ..cache import open_cache
    from ..export.api import export_cache as run
    from ..utils.progress import mode_for

    try:
        report = run(
            open_cache(store_of(command.cache)), command.out, to=command.to, features=command.features,
            dtype=command.state_dtype, columns=command.columns, teacher=command.teacher, settings=command, stop=stop,
            progress=mode_for(events=command.json),
        )  # fmt: skip
    except ExportError as error:
        if not (text := str(error)).startswith("dtype: "):
            raise
        raise ExportError(f"state_{text}") from error  # here dtype is the teacher's
    return Outcome({"event": "done", **report.to_json()}, printable(str(report)), report.status)


def mix_targets(command: MixTargets, stop: Stop) -> Outcome:
    """Write the mean of several caches. Status 75: work remains."""
    from ..cache import open_store
    from ..capture.mix_caches import mix_targets as run
    from ..capture.mix_caches import mix_text
    from ..utils.progress import mode_for

    report = run(
        [store_of(place) for place in command.caches], open_store(command.out, create=True), weights=command.weights,
        k=command.k, draws=command.draws, threads=command.threads, stop=stop, progress=mode_for(events=command.json),
    )  # fmt: skip
    return Outcome({"event": "done", **report.to_json()}, mix_text(report), report.status)
