"""The capture plan, stored as plan.json: how the data were divided into shards (FORMAT.md)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import CacheError, NotFound, StoreError
from .spec import parse_json
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
        document = {
            "format": _FORMAT,
            "version": self.version,
            "settings": dict(self.settings),
            "dataset": self.dataset,
            "totals": dict(self.totals),
            "train_shards": self.train_shards,
            "sha256": self.sha256,
        }
        return json.dumps(document, indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "CapturePlan":
        """The plan in plan.json. CacheError, naming the member, if it is none."""
        document = parse_json(data, PLAN_KEY)
        if document.get("format") != _FORMAT:
            raise CacheError(f"{PLAN_KEY}: got format {document.get('format')!r}; expected {_FORMAT!r}.")
        values = {name: document.get(name) for name in cls.__dataclass_fields__}
        kinds = {"settings": dict, "dataset": str, "totals": dict, "train_shards": int, "sha256": str, "version": int}
        for name, kind in kinds.items():
            if type(values[name]) is not kind:
                raise CacheError(f"{PLAN_KEY}: {name}: got {values[name]!r}; expected {kind.__name__}.")
        plan = cls(**values)  # type: ignore[arg-type]  # checked above
        counts = {"train_shards": plan.train_shards, "totals.shards": plan.totals.get("shards"), **plan.totals}
        for name, count in counts.items():
            if type(count) is not int or not 0 <= count < 2**62:
                raise CacheError(f"{PLAN_KEY}: {name}: got {count!r}; expected an integer from 0 on.")
        return plan


def read_capture_plan(store: Store) -> CapturePlan | None:
    """The plan that a cache was captured by; None for a cache without a plan.

    Raises CacheError, naming store and member, if plan.json is not one that this version can read.
    """
    try:
        data = store.get(PLAN_KEY)
    except NotFound:
        return None
    try:
        return CapturePlan.from_json(data)
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
