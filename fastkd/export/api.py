"""`fastkd export-cache`: a cache as files of another program, shard by shard. Resumable."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cache import open_cache
from ..settings import ModelSettings
from ..utils.numbers import size_text
from ..utils.progress import Progress
from ..utils.signals import WORK_REMAINS, Stop
from .formats import DTYPE, Options, find
from .ledger import Ledger, check_folder


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
    dtype: str = DTYPE,
    columns: str | None = None,
    teacher: Any = None,
    settings: ModelSettings | None = None,
    stop: Stop | None = None,
    progress: str = "none",
) -> ExportReport:
    """Write a cache as another program reads it.

    cache: a `Cache`, or what `open_cache` takes. to: a format (see `formats`).
    features, dtype, columns, teacher, settings: see `formats.Options`; those that the format does not take are refused.
    stop: ends it after the current sample, or group of rows; the same call resumes.
    Raises ExportError and CacheError.
    """
    begun, stop = time.perf_counter(), stop or Stop()
    cache = cache if hasattr(cache, "read_shard") else open_cache(cache)
    kind = find(to)
    options = Options(tuple(features), dtype, columns, teacher, settings or ModelSettings())
    options.check(kind, to)
    folder = Path(out)
    check_folder(folder)
    writer = kind(cache, folder, options)
    ledger = Ledger(folder, {"to": to, "base": cache.spec.hash, **writer.settings})
    shards = list(cache.shards)
    samples = tokens = size = 0
    stop.gentle = True
    try:
        with Progress(len(shards), unit="shard", already=len(ledger.samples), mode=progress) as bar:
            first = 0
            for shard in shards:
                if shard not in ledger.samples:
                    done = writer.write_shard(shard, first, stop)
                    samples, tokens, size = samples + done.samples, tokens + done.tokens, size + done.bytes
                    if not done.whole:
                        break
                    ledger.finish_shard(shard, done.samples)
                    bar.add(1)
                first += ledger.samples[shard]
    finally:
        stop.gentle = False
    if len(ledger.samples) == len(shards):
        writer.finish(shards)
    seconds = time.perf_counter() - begun
    return ExportReport(
        str(folder), to, writer.features, len(ledger.samples), len(shards), samples, tokens, size, seconds
    )
