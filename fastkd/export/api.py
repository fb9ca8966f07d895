"""`fastkd export-cache`: a cache with features, as files of another program, shard by shard. Resumable."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..cache import open_cache
from ..errors import ExportError
from ..models.final_norm import find_final_norm
from ..settings import ModelSettings
from ..teachers.hf import HFTeacher
from ..teachers.load import load_teacher
from ..utils.numbers import size_text
from ..utils.progress import Progress
from ..utils.signals import WORK_REMAINS, Stop
from .formats import find
from .ledger import Ledger
from .samples import samples_of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LAST = "-1"


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote. samples, tokens, bytes: of this call. shards: finished in all, of `of`."""

    out: str
    to: str
    features: tuple[str, ...]
    shards: int
    of: int
    samples: int
    tokens: int
    bytes: int
    seconds: float

    @property
    def status(self) -> int:
        """Exit status: 0 if the export is complete, else 75."""
        return 0 if self.shards == self.of else WORK_REMAINS

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        state = "complete" if not self.status else f"{self.shards:,} of {self.of:,} shards; run it again to resume"
        each = f", {self.bytes / self.tokens:,.0f} bytes a token" if self.tokens else ""
        return (
            f"{self.out}: {self.to}, {state}. Written: {self.samples:,} samples, {self.tokens:,} tokens, "
            f"{size_text(self.bytes)}{each}, in {self.seconds:.0f} s"
        )


def export_cache(
    cache: Any,
    out: str | Path,
    *,
    to: str,
    features: Sequence[str] = (),
    dtype: str = "bfloat16",
    teacher: Any = None,
    settings: ModelSettings | None = None,
    stop: Stop | None = None,
    progress: str = "none",
) -> ExportReport:
    """Write a cache's tokens and hidden states as another program reads them.

    cache: a `Cache`, or what `open_cache` takes. to: a format (see `formats`). features: layers in order; () means all
    states of the cache, and "-1" (what enters the final norm) is always the last.
    dtype: of the states on disk. teacher: a `Teacher` or its name, for formats that need its final norm.
    settings: how the teacher is loaded. stop: ends it after the current sample; the same call resumes.
    Raises ExportError and CacheError.
    """
    begun, stop = time.perf_counter(), stop or Stop()
    cache = cache if hasattr(cache, "read_shard") else open_cache(cache)
    if dtype not in DTYPES:
        raise ExportError(f"--state-dtype: got {dtype!r}; expected one of {', '.join(DTYPES)}.")
    kind = find(to)
    if "tokens" not in cache.spec.inputs:
        raise ExportError(f"{cache!r}: got a cache of examples; expected one of text, with its tokens.")
    chosen = select(cache, features)
    folder = Path(out)
    names = tuple(feature.name for feature in chosen)
    norm = _final_norm(cache, teacher, settings, to) if kind.NEEDS_TEACHER else None
    writer = kind(folder, names, DTYPES[dtype], norm)
    ledger = Ledger(
        folder,
        {
            "to": to,
            "base": cache.spec.hash,
            "features": {feature.name: feature.spec.hash for feature in chosen},
            "dtype": dtype,
        },
    )
    shards = list(cache.shards)
    samples = tokens = size = 0
    stop.gentle = True
    try:
        with Progress(len(shards), unit="shard", already=len(ledger.samples), mode=progress) as bar:
            first = 0
            for shard in shards:
                if shard not in ledger.samples:
                    inputs: dict[str, list[Any]] = {"tokens": [], "loss_mask": []}
                    for sample in samples_of(cache, chosen, shard):
                        if stop.asked:
                            break
                        size += writer.write(first + len(inputs["tokens"]), sample)
                        inputs["tokens"].append(sample.tokens.numpy())
                        inputs["loss_mask"].append(sample.loss_mask.numpy())
                        tokens += len(sample.tokens)
                    samples += len(inputs["tokens"])
                    if stop.asked:
                        break
                    writer.finish_shard(shard, first, inputs)
                    ledger.finish_shard(shard, len(inputs["tokens"]))
                    bar.add(1)
                first += ledger.samples[shard]
    finally:
        stop.gentle = False
    if len(ledger.samples) == len(shards):
        writer.finish(shards)
    seconds = time.perf_counter() - begun
    return ExportReport(str(folder), to, names, len(ledger.samples), len(shards), samples, tokens, size, seconds)


def select(cache: Any, names: Sequence[str]) -> list[Any]:
    """The features to export, the final one last. ExportError unless all are states of all positions of all shards."""
    there = {name: spec for name in cache.features if (spec := cache.features[name].spec).kind == "state"}
    listed = ", ".join(there) or "none"
    names = [part.strip() for text in names for part in text.split(",") if part.strip()]
    wanted = [name for name in (names or sorted(there, key=lambda name: there[name].layer)) if name != LAST]
    found: list[Any] = []
    for name in (*wanted, LAST):
        try:
            feature = cache.features[name]
        except KeyError as error:
            raise ExportError(
                f"--features: {cache!r} has no states of {name} (it has {listed}). Capture them into it with the "
                f"capture's own command and --features {','.join((*wanted, LAST))}."
            ) from error
        if feature.spec.kind != "state" or feature.spec.positions != "all":
            got = f"{feature.spec.kind}s of {feature.spec.positions} positions"
            raise ExportError(f"--features: {name}: got {got}; expected states of all positions.")
        missing = sorted(set(cache.shards) - set(feature.shards))
        if missing:
            raise ExportError(
                f"--features: {name}: {len(missing):,} of the {len(cache.shards):,} shards are missing (the first is "
                f"{missing[0]}). Run the capture of the features again; it writes only what is missing."
            )
        if feature.name in [other.name for other in found]:
            raise ExportError(f"--features: got {name} twice; expected different layers.")
        found.append(feature)
    return found


def _final_norm(cache: Any, teacher: Any, settings: ModelSettings | None, to: str) -> torch.nn.Module:
    """The final norm of the cache's teacher."""
    if teacher is None:
        raise ExportError(
            f"--teacher: {to} stores the states after the teacher's final norm, and the cache has those before it. "
            "Name the teacher: a folder, a GGUF file or a Hub name."
        )
    found = load_teacher(teacher, settings or ModelSettings()) if isinstance(teacher, (str, Path)) else teacher
    if not isinstance(found, HFTeacher):
        raise ExportError(f"--teacher: got {type(found).__name__}; expected a causal model of transformers.")
    _same_weights(cache.spec.teacher, found.fingerprint)
    return find_final_norm(found.model)


def _same_weights(captured: str, given: str) -> None:
    """ExportError if two fingerprints name different weights."""
    one, other = (
        next((part for part in text.split(", ") if part.startswith("sha256 ")), None) for text in (captured, given)
    )
    if one and other and one != other:
        raise ExportError(f"--teacher: got other weights ({other[:19]}…); expected those of the capture ({one[:19]}…).")
