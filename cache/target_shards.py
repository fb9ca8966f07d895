"""The shards of a cache's targets, as a kind of shard: their attributes, arrays, and columns of the manifest."""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from .checks import check_decoded
from .errors import CacheError
from .shard.container import LARGEST, Damage, Expected
from .shard.kind import ShardKind, need
from .shard.layout import COUNTS, decode_shard, expected_arrays
from .spec import CacheSpec

Array = NDArray[Any]
STATISTICS = ("mean", "p05", "p50", "p95")


class TargetShards(ShardKind):
    """The shards of a cache's targets."""

    noun, whole = "target", "cache"
    counts = COUNTS
    hashes = ("content",)
    floats = tuple(f"{what}_{which}" for what in ("mass", "entropy") for which in STATISTICS)

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__(spec.hash)
        self.spec = spec

    def check_counts(self, attributes: Mapping[str, Any]) -> None:
        spec, statistics = self.spec, attributes.get("statistics")
        for what in ("mass", "entropy"):
            values = statistics.get(what) if isinstance(statistics, dict) else None
            good = isinstance(values, list) and len(values) == 4 and all(v is None or _is_number(v) for v in values)
            need(good, attributes, "statistics", "four numbers each")
        n, counts = attributes["positions"], {name: attributes[name] for name in COUNTS}
        fits = 1 <= n <= spec.shard_positions and n * spec.width * 4 <= LARGEST
        need(fits, attributes, "positions", f"1 to {spec.shard_positions}, and a shard of at most {LARGEST} bytes")
        need(1 <= counts["sequences"] <= n, attributes, "sequences", f"1 to {n}")
        need(counts["counted"] <= n, attributes, "counted", f"at most {n}")
        for name, most in (("head_entries", min(spec.k, spec.vocab_size)), ("draw_entries", spec.draws)):
            need(counts[name] <= n * most, attributes, name, f"at most {n * most}")

    def floats_of(self, attributes: Mapping[str, Any]) -> dict[str, float | None]:
        found = attributes["statistics"]
        return {f"{what}_{which}": found[what][i] for what in ("mass", "entropy") for i, which in enumerate(STATISTICS)}

    def expected(self, attributes: Mapping[str, Any]) -> dict[str, Expected]:
        return expected_arrays(self.spec, attributes)

    def check_values(self, attributes: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        try:
            check_decoded(self.spec, decode_shard(self.spec, attributes, arrays))
        except CacheError as error:
            raise Damage(f"its targets cannot be a teacher's: {error}") from error


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**62  # neither NaN nor infinite
