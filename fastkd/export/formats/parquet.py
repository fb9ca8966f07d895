"""`parquet`: tokens and targets as columns, for `datasets`, pandas, DuckDB and people.

    FOLDER/data/train-00000.parquet, data/held_out-00007.parquet     a file for each shard of the cache, by its number
    FOLDER/README.md     names the files of each split, which `datasets.load_dataset("FOLDER")` reads, and the columns

A row is a document, or the part of it that lies in one window: the teacher saw nothing else with it. Position i of a
row is what the teacher said after input_ids[: i + 1]. The rows of a file, one after another, are the shard. Of a cache
of examples, a row is one copy of an example.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ...cache.workspace import Workspace
from ...errors import ExportError
from ...stream.split import SPLITS, plan_of
from ...utils.atomic import write_file, write_text
from ...utils.signals import Stopped
from ...utils.similar import did_you_mean
from ..samples import segments
from . import Options, Written
from ._columns import AXOLOTL, COLUMNS, FASTKD, Rows, dataset_card

if TYPE_CHECKING:
    from ...cache import Cache
    from ...utils.signals import Stop

GROUP = 2**15  # positions of a row group, unless one row has more


class Format:
    """See `formats.Format`."""

    OPTIONS: ClassVar[frozenset[str]] = frozenset({"columns"})
    features: tuple[str, ...] = ()

    def __init__(self, cache: "Cache", folder: Path, options: Options) -> None:
        name = options.columns or FASTKD
        if name not in COLUMNS:
            raise ExportError(
                f"columns: got {name!r}; expected one of {', '.join(COLUMNS)}.{did_you_mean(name, COLUMNS)}"
            )
        self._text = "tokens" in cache.spec.inputs
        if name == AXOLOTL and not (self._text and cache.spec.k):
            got = "without top-k entries" if self._text else "of examples"
            raise ExportError(f"columns: got 'axolotl' for {cache!r}, a cache {got}; expected text with top-k entries.")
        plan = plan_of(cache)
        self._train = None if plan is None else plan.train_shards
        self._cache, self._folder, self._columns = cache, folder, name
        self._workspace = Workspace()
        self.settings: Mapping[str, Any] = {"columns": name}

    def write_shard(self, shard: int, first: int, stop: "Stop") -> Written:
        arrays = self._cache.read_shard(shard, into=self._workspace)
        positions = len(arrays["ids"])
        bounds = np.arange(positions + 1)
        if self._text:
            bounds = np.array([0, *(end for _, end in segments(arrays) if end)])
        rows = Rows(arrays, bounds, self._cache.spec)
        path = self._folder / "data" / f"{self._split(shard)}-{shard:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        written = Written(0, 0, 0, whole=False)

        def write(place: Path) -> None:
            nonlocal written
            schema = COLUMNS[self._columns](rows, 0, 0).schema.with_metadata({"fastkd": json.dumps(self._about())})
            with pq.ParquetWriter(place, schema, compression="zstd") as writer:
                for begin, end in _groups(bounds):
                    if stop.asked:
                        raise Stopped
                    table = COLUMNS[self._columns](rows, begin, end)
                    writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=len(table))
            written = Written(len(bounds) - 1, positions, place.stat().st_size)

        with suppress(Stopped):  # the file of a part of a shard is not kept
            write_file(path, write)
        return written

    def finish(self, shards: Sequence[int]) -> None:
        """Write the README.md, unless there is one."""
        if not (path := self._folder / "README.md").exists():
            splits = [split for split in SPLITS if any(self._split(shard) == split for shard in shards)]
            write_text(path, dataset_card(self._about(), splits, self._columns, text=self._text))

    def _split(self, shard: int) -> str:
        return SPLITS[self._train is not None and shard >= self._train]

    def _about(self) -> dict[str, Any]:
        """What the targets are, for the metadata of the files."""
        spec = self._cache.spec
        names = ("vocab_size", "k", "mass", "draws", "draw_temperature")
        return {"spec": spec.hash, **{n: getattr(spec, n) for n in names}, "temperatures": list(spec.temperatures)}


def _groups(bounds: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """The rows of each row group: whole rows, of at most `GROUP` positions, or one row."""
    begin, rows = 0, len(bounds) - 1
    while begin < rows:
        end = int(np.searchsorted(bounds, bounds[begin] + GROUP, side="right")) - 1
        end = min(max(end, begin + 1), rows)
        yield begin, end
        begin = end
