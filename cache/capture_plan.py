"""The capture plan, stored as plan.json: how the data were divided into shards (FORMAT.md)."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import CacheError, NotFound, StoreError, expect
from .manifest import read_twice
from .spec import MOST_JSON, MOST_SHARDS, CacheSpec, parse_json
from .stores import Store

PLAN_KEY = "plan.json"
_FORMAT = "fastkd-plan"
_HASH = "content_sha256"
_SPEC = "spec.json"
RESTORE_PLAN = "Restore it; or delete it and run the same capture again, which writes it from the same data."


@dataclass(frozen=True)
class CapturePlan:
    """The contents of plan.json. Targets can be read without it.

    settings: how documents were divided: context, packing, shard_positions, batch_tokens, held_out, seed and others.
    dataset: the fingerprint of the documents. totals: counts of documents, windows, shards, positions, tokens.
    train_shards: the shards from this number on are held out. sha256: of the whole plan, as the cache's spec names it.
    version: of its rules. hashed: whether plan.json had a hash of itself, which older versions did not write.
    """

    settings: Mapping[str, Any]
    dataset: str
    totals: Mapping[str, int]
    train_shards: int
    sha256: str
    version: int = 1
    hashed: bool = field(default=True, compare=False)

    @property
    def shards(self) -> int:
        """The number of shards of the complete cache."""
        return self.totals["shards"]

    def to_json(self) -> bytes:
        """plan.json."""
        document = {"format": _FORMAT, "version": self.version, **asdict(self)}
        del document["hashed"]
        return json.dumps({**document, _HASH: _content_hash(document)}, indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "CapturePlan":
        """The plan in plan.json. CacheError, naming the member, if it is none."""
        document = parse_json(data, PLAN_KEY)
        expect(document.get("format") == _FORMAT, f"{PLAN_KEY}: format", document.get("format"), repr(_FORMAT))
        values = {name: document.get(name) for name in cls.__dataclass_fields__ if name != "hashed"}
        kinds = {"settings": dict, "dataset": str, "totals": dict, "train_shards": int, "sha256": str, "version": int}
        for name, kind in kinds.items():
            expect(type(values[name]) is kind, f"{PLAN_KEY}: {name}", values[name], kind.__name__)
        content = document.pop(_HASH, None)
        plan = cls(**values, hashed=content is not None)  # type: ignore[arg-type]  # checked above
        counts = {"train_shards": plan.train_shards, "totals.shards": plan.totals.get("shards"), **plan.totals}
        for name, count in counts.items():
            good = type(count) is int and 0 <= count < (MOST_SHARDS if "shards" in name else 2**62)
            expect(good, f"{PLAN_KEY}: {name}", count, "an integer from 0 on, below 2^26 of shards")
        expect(plan.train_shards <= plan.shards, f"{PLAN_KEY}: train_shards", plan.train_shards, f"up to {plan.shards}")
        expect(not plan.hashed or content == _content_hash(document), f"{PLAN_KEY}: {_HASH}", content, "the hash of it")
        return plan


def _content_hash(document: Mapping[str, Any]) -> str:
    """sha256 of a plan's other members, as compact JSON with sorted keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_capture_plan(store: Store, spec: CacheSpec | None = None) -> CapturePlan | None:
    """The plan that a cache was captured by; None for a cache without a plan.

    spec: of the cache, which names its plan by hash; None: there is no spec yet.
    Raises CacheError, naming store and member, if plan.json is damaged, or not one that this version can read; and if
    it is not the plan that the spec names.
    """
    expected = None if spec is None else spec.provenance.plan_sha256

    def read() -> CapturePlan:
        plan = CapturePlan.from_json(store.get_tail(PLAN_KEY, MOST_JSON + 1))
        if spec is not None and expected is not None:
            _check_named(plan, spec)
        return plan

    try:
        return read_twice(store, read)
    except NotFound as error:
        if expected is None:
            return None
        raise CacheError(
            f"{store.describe()}: there is no {PLAN_KEY}, although {_SPEC} names one: which shards are held out is "
            f"unknown. {RESTORE_PLAN}"
        ) from error
    except StoreError:
        raise
    except CacheError as error:
        raise CacheError(f"{error}" + ("" if expected is None else f" {RESTORE_PLAN}")) from error


def _check_named(plan: CapturePlan, spec: CacheSpec) -> None:
    """CacheError unless this is the plan that the spec names."""
    source = spec.provenance
    for name, theirs, ours in (
        ("sha256", source.plan_sha256, plan.sha256),
        ("dataset", source.dataset_sha256, plan.dataset),
        ("settings.seed", source.draw_seed, plan.settings.get("seed")),
        ("settings.shard_positions", spec.shard_positions, plan.settings.get("shard_positions")),
    ):
        if theirs != ours:
            raise CacheError(f"{PLAN_KEY}: {name}: got {ours!r}; expected {theirs!r}, as in {_SPEC}.")


def readable_plan(store: Store) -> CapturePlan | None:
    """The plan; None if there is none, or none that can be read: shards can be read without it."""
    try:
        return read_capture_plan(store)
    except StoreError:
        raise
    except CacheError:
        return None
