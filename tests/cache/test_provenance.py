"""Provenance and capture plan: written, read, parsed from old specs, and refused where they were changed."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastkd.cache import CacheError, CacheSpec, create_cache, open_cache
from fastkd.cache.capture_plan import CapturePlan, read_capture_plan, readable_plan
from fastkd.cache.provenance import Identity, Provenance
from fastkd.cache.stores import MemoryStore

A, B, C, D, E = (letter * 64 for letter in "abcde")
TEACHER = f"LlamaForCausalLM, 135 parameters, sha256 {A}, bfloat16, attention sdpa"
FULL = Provenance(
    teacher=Identity(TEACHER, "LlamaForCausalLM", A),
    tokenizer=Identity(f"sha256 {B}, documents end with </s> (2)", "", B),
    template=Identity(f"sha256 {C}", "", C),
    loss_on="assistant",
    text_documents="blank-line",
    dataset_sha256=D,
    plan_sha256=E,
    draw_seed=7,
)
TEXTS = {
    "teacher": TEACHER,
    "tokenizer": f"tokenizer sha256 {B}, documents end with </s> (2), template sha256 {C}, loss_on assistant, "
    "text_documents blank-line",
    "dataset": f"sha256 {D}, plan {E}, draws of seed 7",
}
PLAN = CapturePlan({"context": 8}, D, {"shards": 3, "documents": 5}, train_shards=2, sha256=E)


def spec_of(**changes: Any) -> CacheSpec:
    return CacheSpec(vocab_size=8, k=2, **changes)


@pytest.mark.parametrize(
    "provenance",
    [
        FULL,
        Provenance(),
        Provenance(Identity.of("mine"), Identity.of("bytes"), loss_on="all", dataset_sha256=D),
        Provenance(teacher=Identity.of(f"Net, state sha256 {A}"), dataset_sha256=D, plan_sha256=E, draw_seed=0),
    ],
)
def test_texts_and_fields_say_the_same(provenance: Provenance) -> None:
    assert Provenance.from_texts(**provenance.texts()) == provenance
    spec = spec_of(**provenance.texts())
    assert spec.provenance == provenance
    assert CacheSpec.from_json(spec.to_json()).provenance == provenance


def test_the_texts_are_those_of_older_caches() -> None:
    """Their hash is the spec's: a capture that was begun before goes on with the same one."""
    assert FULL.texts() == TEXTS


def test_free_text_is_a_fingerprint() -> None:
    free = Provenance.from_texts("a teacher", f"sha256 {B}, by hand", "by hand")
    assert free == Provenance(Identity("a teacher", "a teacher"), Identity(f"sha256 {B}, by hand", "", B))
    assert Identity.of(f"Net, state sha256 {A}") == Identity(f"Net, state sha256 {A}", "Net", A)
    assert Provenance.from_texts("", "", f"sha256 {D}, plan {E}, draws of seed {'9' * 5000}") == Provenance()


def test_spec_json_has_the_fields(tmp_path: Path) -> None:
    create_cache(tmp_path, spec_of(**TEXTS)).close()
    document = json.loads((tmp_path / "spec.json").read_text())
    assert document["optional"] == ["provenance"]
    assert document["provenance"]["teacher"] == {"fingerprint": TEACHER, "name": "LlamaForCausalLM", "sha256": A}
    assert document["provenance"]["plan_sha256"] == E
    # a spec of before, and one of a later version
    del document["provenance"]
    assert CacheSpec.from_json(json.dumps(document).encode()) == spec_of(**TEXTS)
    document["provenance"] = {"poet": "unknown", "draw_seed": 7}
    assert CacheSpec.from_json(json.dumps(document).encode()).provenance == FULL


@pytest.mark.parametrize(
    "change",
    [{"draw_seed": 8}, {"teacher": {"fingerprint": TEACHER, "name": "Another", "sha256": A}}, {"tokenizer": None}],
)
def test_fields_that_differ_from_the_texts_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    create_cache(tmp_path, spec_of(**TEXTS)).close()
    document = json.loads((tmp_path / "spec.json").read_text())
    for provenance in ({**document["provenance"], **change}, "text", [1]):
        (tmp_path / "spec.json").write_text(json.dumps({**document, "provenance": provenance}))
        with pytest.raises(CacheError, match="`provenance` differs from `teacher`, `tokenizer` and `dataset`"):
            open_cache(tmp_path)


def test_a_plan_is_read_back() -> None:
    store = MemoryStore()
    assert read_capture_plan(store) is None
    assert readable_plan(store) is None
    store.create("plan.json", PLAN.to_json())
    assert read_capture_plan(store) == PLAN
    assert (readable_plan(store) or PLAN).shards == PLAN.shards == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format: got 'other'; expected 'fastkd-plan'"),
        ({"totals": {}}, r"totals\.shards: got None; expected an integer"),
        ({"totals": {"shards": 3, "windows": -1}}, "windows: got -1; expected an integer"),
        ({"train_shards": True}, "train_shards: got True; expected int"),
        ({"settings": None}, "settings: got None; expected dict"),
    ],
)
def test_a_bad_plan_is_named(change: dict[str, Any], message: str) -> None:
    store = MemoryStore("here")
    store.create("plan.json", json.dumps({**json.loads(PLAN.to_json()), **change}).encode())
    with pytest.raises(CacheError, match=rf"memory://here: plan\.json: {message}"):
        read_capture_plan(store)
    assert readable_plan(store) is None
