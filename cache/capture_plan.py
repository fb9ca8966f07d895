"""The capture plan, stored as plan.json: how the data were divided into shards (FORMAT.md)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .errors import CacheError, NotFound, StoreError, expect
from .spec import MOST_SHARDS, parse_json
from .stores import Store

PLAN_KEY = "plan.json"
_FORMAT = "fastkd-plan"


@dataclass(frozen=True)
class CapturePlan:
    """The contents of plan.json. Targets can be read without it.

    settings: how documents were divided: context, packing, shard_positions, batch_tokens, held_out, seed and others.
    dataset: the fingerprint of the documents. totals: counts of documents, windows, shards, positions, tokens.
    train_shards: the shards from this number on are held out. sha256: of the whole plan. version: of its rules.
    """

    settings: Mapping[str, Any]
    dataset: str
    totals: Mapping[str, int]
    train_shards: int
    sha256: str
    version: int = 1

    @property
    def shards(self) -> int:
        """The number of shards of the complete cache."""
        return self.totals["shards"]

    def to_json(self) -> bytes:
        """plan.json."""
        return json.dumps({"format": _FORMAT, "version": self.version, **asdict(self)}, indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "CapturePlan":
        """The plan in plan.json. CacheError, naming the member, if it is none."""
        document = parse_json(data, PLAN_KEY)
        expect(document.get("format") == _FORMAT, f"{PLAN_KEY}: format", document.get("format"), repr(_FORMAT))
        values = {name: document.get(name) for name in cls.__dataclass_fields__}
        kinds = {"settings": dict, "dataset": str, "totals": dict, "train_shards": int, "sha256": str, "version": int}
        for name, kind in kinds.items():
            expect(type(values[name]) is kind, f"{PLAN_KEY}: {name}", values[name], kind.__name__)
        plan = cls(**values)  # type: ignore[arg-type]  # checked above
        counts = {"train_shards": plan.train_shards, "totals.shards": plan.totals.get("shards"), **plan.totals}
        for name, count in counts.items():
            good = type(count) is int and 0 <= count < (MOST_SHARDS if "shards" in name else 2**62)
            expect(good, f"{PLAN_KEY}: {name}", count, "an integer from 0 on, below 2^26 of shards")
        return plan


def read_capture_plan(store: Store) -> CapturePlan | None:
    """The plan that a cache was captured by; None for a cache without a plan.

    Raises CacheError, naming store and member, if plan.json is not one that this version can read.
    """
    try:
        return CapturePlan.from_json(store.get(PLAN_KEY))
    except NotFound:
        return None
    except StoreError:
        raise
    except CacheError as error:
        raise CacheError(f"{store.describe()}: {error}") from error


def planned_shards(store: Store) -> int:
    """The number of shards by the plan; 0 if there is no plan, or none that can be read."""
    try:
        plan = read_capture_plan(store)
    except StoreError:
        raise
    except CacheError:  # shards can be read without their plan
        return 0
    return plan.shards if plan else 0
