"""Capture: what is in the cache is what the teacher says, whoever ran it and however often it was interrupted."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_cases import VOCAB, Causal, contents, documents, reference
from torch import Tensor, nn

import fastkd
from fastkd.cache import CacheError, StoreError, open_cache, verify_cache
from fastkd.cache.stores import MemoryStore
from fastkd.capture.runner import capture_text
from fastkd.data.documents import open_documents
from fastkd.data.examples import Examples
from fastkd.errors import DataError, TeacherError
from fastkd.settings import CaptureSettings
from fastkd.teachers.module import ModuleTeacher
from fastkd.teachers.tensor_parallel import rank_and_world_size
from fastkd.utils.signals import Stop

# a fine grid, so that what is read is what was said
SMALL: dict[str, Any] = {"k": 5, "draws": 3, "context": 16, "shard_positions": 64, "batch_tokens": 40, "held_out": 0.2}


def capture(folder: Any, data: Any = None, teacher: Any = None, **changes: Any) -> Any:
    return fastkd.capture(teacher or Causal(), documents() if data is None else data, folder, **{**SMALL, **changes})


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"overlap": 5},
        {"packing": "keep", "batch_tokens": 1},
        {"on_long": "truncate"},
        {"draws": 0, "mass": 0.6},
        {"k": 0, "draws": 6},
    ],
)
def test_the_cache_holds_what_the_teacher_says_of_each_piece_alone(
    hidden: bool, changes: dict[str, Any], tmp_path: Path
) -> None:
    asked = {**SMALL, **changes}
    report = capture(tmp_path, teacher=Causal(hidden=hidden), **changes)
    assert report.complete
    assert report.status == 0
    ask = {name: asked[name] for name in ("k", "draws", "mass") if name in asked}
    expected = reference(documents(), asked["context"], asked.get("overlap", 0), seed=0, **ask)
    if asked.get("on_long") == "truncate":
        expected = {at: target for at, target in expected.items() if at[1] < asked["context"]}
    cache = open_cache(tmp_path)
    assert cache.sealed
    assert (cache.spec.k, cache.spec.draws, cache.spec.vocab_size) == (asked["k"], asked["draws"], VOCAB)
    arrays = cache.sequences(range(report.plan["windows"]))
    lengths = np.concatenate([cache.read_shard(i)["document_lengths"] for i in cache.shards]).astype(int)
    assert lengths.sum() == len(arrays["tokens"]) == report.positions_captured
    begins = np.cumsum(lengths) - lengths
    counts = arrays["logprobs"][:, 0] > -np.inf
    assert counts.tolist() == arrays["loss_mask"].tolist()
    seen: dict[tuple[int, int], int] = {}
    places = _places(arrays, begins, lengths)
    for row in np.flatnonzero(counts):
        at = places[row]
        seen[at] = seen.get(at, 0) + 1
        target = expected[at]
        used = target.logprobs[0] > -torch.inf
        there = arrays["logprobs"][row] > -np.inf
        assert set(arrays["ids"][row][there].tolist()) == set(target.ids[0][used].tolist())
        ids = arrays["ids"][row][there].tolist()
        stored = dict(zip(ids, arrays["logprobs"][row][there].tolist(), strict=True))
        for token, value in zip(target.ids[0][used].tolist(), target.logprobs[0][used].tolist(), strict=True):
            assert abs(stored[token] - value) < 0.21
        assert np.abs(arrays["tail"][row] - target.tail[0].numpy()).max() < 0.04
        assert arrays["outcomes"][row] == target.outcomes[0]
        if asked["draws"]:
            drawn = dict(zip(target.ids[0][used].tolist(), target.draws[0][used].tolist(), strict=True))
            assert dict(zip(ids, arrays["draws"][row][there].tolist(), strict=True)) == drawn
    assert seen == dict.fromkeys(expected, 1)


def _places(arrays: Any, begins: Any, lengths: Any) -> dict[int, tuple[int, int]]:
    """Document and token of each row, found by what the tokens are."""
    data, found = documents(), {}
    done: dict[int, int] = {}
    for begin, length in sorted(
        zip(begins.tolist(), lengths.tolist(), strict=True), key=lambda piece: int(arrays["document"][piece[0]])
    ):
        document = int(arrays["document"][begin])
        tokens = arrays["tokens"][begin : begin + length].tolist()
        context = int((~arrays["loss_mask"][begin : begin + length]).sum())
        start = done.get(document, 0) - context
        assert data[document][start : start + length] == tokens
        done[document] = start + length
        found |= {begin + i: (document, start + i) for i in range(length)}
    return found


def test_nothing_depends_on_batches_or_on_how_the_work_is_cut_up(tmp_path: Path) -> None:
    """A teacher of plain sums is exact in any batch; the shards of one plan are then the same."""
    capture(tmp_path / "a")
    capture(tmp_path / "b", teacher=Causal(hidden=True), threads=3)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert verify_cache(tmp_path / "a", deep=True).ok


def test_held_out_documents_are_apart_and_the_plan_says_where(tmp_path: Path) -> None:
    report = capture(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    cache = open_cache(tmp_path)
    there = [set(cache.read_shard(i)["document"].tolist()) for i in range(report.plan["shards"])]
    train, apart = set().union(*there[: plan["train_shards"]]), set().union(*there[plan["train_shards"] :])
    assert not train & apart
    assert len(apart) == report.plan["held_out"] == 6
    assert len(train) == 23


def test_a_second_call_finds_nothing_to_do(tmp_path: Path) -> None:
    first = capture(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shards").iterdir()}
    teacher = Causal()
    again = capture(tmp_path, teacher=teacher)
    assert (again.complete, again.shards_written, again.positions_captured) == (True, 0, 0)
    assert teacher.calls == [(1, 1)]  # how wide its logits are
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shards").iterdir()}
    assert first.shards_written == first.plan["shards"] > 4


class Stopping(Causal):
    """Asks for a stop during its n-th batch."""

    def __init__(self, stop: Stop, after: int) -> None:
        super().__init__()
        self.stop, self.after = stop, after

    def forward(self, tokens: Tensor) -> Any:
        if len(self.calls) == self.after:
            self.stop()
        return super().forward(tokens)


def test_a_stop_drops_the_shard_and_the_next_call_goes_on(tmp_path: Path) -> None:
    capture(tmp_path / "whole")
    lost: list[int] = []
    for after in range(1, 40, 3):
        stop = Stop()
        teacher = Stopping(stop, after)
        fingerprint = {"fingerprint": "the same"}
        report = capture(tmp_path / "cut", teacher=teacher, stop=stop, **fingerprint)
        if report.complete:
            break
        assert report.status == 75
        assert report.missing
        lost.append(lost_by(report))
        assert verify_cache(tmp_path / "cut").problems == []
    assert report.complete
    assert after > 10
    assert max(lost) > 0
    assert contents(tmp_path / "cut") == {**contents(tmp_path / "whole")}


def lost_by(report: Any) -> int:
    """The positions of the open shard that a stopped capture did not keep, which its text and JSON say too; 0 where it
    was between two shards."""
    lost, text = report.lost, capture_text(report)
    assert ("lost" in report.to_json()) == ("not kept" in text) == (lost is not None)
    if lost is None:
        return 0
    assert any(first <= lost.shard <= last for first, last in report.missing)
    kept = report.plan["shards"] - sum(last - first + 1 for first, last in report.missing)
    assert f"stopped in shard {lost.shard}: {lost.positions:,} positions of it, " in text
    assert f"will be run again; {kept:,} {'shard is' if kept == 1 else 'shards are'} kept" in text
    assert report.to_json()["lost"] == {"shard": lost.shard, "positions": lost.positions, "seconds": lost.seconds}
    return int(lost.positions)


def test_two_workers_share_the_work(tmp_path: Path) -> None:
    capture(tmp_path / "one")
    reports: dict[int, Any] = {}
    data = documents()

    def work(rank: int) -> None:
        reports[rank] = capture(tmp_path / "two", data, rank=rank, world_size=2)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(report.complete for report in reports.values())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sum(r.shards_written for r in reports.values()) == reports[0].plan["shards"]


def test_a_worker_takes_over_what_others_left(tmp_path: Path) -> None:
    """Rank 1 of 3 alone does everything: nobody else claims anything."""
    report = capture(tmp_path, rank=1, world_size=3)
    assert report.complete
    assert report.shards_written == report.plan["shards"]


class Failing(Causal):
    """Says something bad at one token of the data."""

    def __init__(self, value: float, token: int, *, hidden: bool) -> None:
        super().__init__(hidden=hidden)
        self.value, self.token = value, token

    def forward(self, tokens: Tensor) -> Any:
        found = super().forward(tokens)
        values = found.states if self.hidden else found
        values[tokens == self.token] = self.value
        return found


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stop_the_job(value: float, hidden: bool, tmp_path: Path) -> None:
    data = [[1, 2, 3], [4, 5, 96, 6], [7, 8]]
    with pytest.raises(TeacherError, match=r"document 1 \(from 0\), position 2: the teacher failed.*Nothing of shard"):
        capture(tmp_path, data, Failing(value, 96, hidden=hidden), held_out=0.0)
    assert not list((tmp_path / "shards").glob("*"))


class Limited(Causal):
    """Runs out of memory above so many positions a batch."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, tokens: Tensor) -> Any:
        if tokens.numel() > self.most:
            self.calls.append((0, 0))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(tokens)


def test_batches_that_do_not_fit_are_halved_and_that_is_recorded(tmp_path: Path) -> None:
    whole = capture(tmp_path / "whole", fingerprint="x")
    teacher = Limited(16)
    report = capture(tmp_path / "halved", teacher=teacher, fingerprint="x")
    assert report.batches_halved > 0 == whole.batches_halved
    assert contents(tmp_path / "whole") == contents(tmp_path / "halved")
    failed = teacher.calls.count((0, 0))
    assert 0 < failed < 4  # what did not fit once is not tried again
    cache = open_cache(tmp_path / "halved")
    halved = [cache.attributes(i)["record"]["halved"] for i in cache.shards]
    assert sum(map(len, halved)) == report.batches_halved
    assert all(len(parts) > 1 and min(parts) > 0 for some in halved for parts in some.values())
    assert not any(open_cache(tmp_path / "whole").attributes(i)["record"]["halved"] for i in cache.shards)


def test_a_piece_that_does_not_fit_alone_is_named(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"document \d+ .*one segment of 16 positions does not fit"):
        capture(tmp_path, teacher=Limited(15))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 6}, r"\(there, and now: k: 5 and 6\)"),
        ({"draw_temperature": 2.0}, "draw_temperature: 1.0 and 2.0"),
        ({"seed": 4}, "seed: 0 and 4"),
        ({"context": 15}, "context: 16 and 15"),
        ({"batch_tokens": 41}, "batch_tokens: 40 and 41"),
        ({"held_out": 0.1}, "held_out: 0.2 and 0.1"),
        ({"teacher": Causal(seed=1)}, "teacher: 'Causal, state sha256 .*' and 'Causal"),
        ({"data": documents(seed=1)}, "data: sha256"),
    ],
)
def test_what_differs_from_the_cache_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    capture(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CacheError, match=message):
        capture(tmp_path, **changes)
    assert contents(tmp_path) == before


def test_another_tokenizer_or_template_is_another_cache(tmp_path: Path) -> None:
    def text(fingerprint: str) -> Any:
        return open_documents(
            ["some text", "and more"],
            tokenizer=lambda t: [ord(c) % VOCAB for c in t],
            tokenizer_fingerprint=fingerprint,
        )

    capture(tmp_path, text("one"))
    with pytest.raises(
        CacheError, match=r"now: tokenizer: 'tokenizer one, loss_on all' and 'tokenizer two, loss_on all'\)"
    ):
        capture(tmp_path, text("two"))
    with pytest.raises(CacheError, match=r"now: teacher: .*; tokenizer: "):
        capture(tmp_path, text("two"), Causal(seed=1))
    assert open_cache(tmp_path).spec.tokenizer == "tokenizer one, loss_on all"


def test_ids_beyond_the_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"got id {VOCAB} at position 1.*Is this the teacher's tokenizer"):
        capture(tmp_path, [[1, VOCAB]])
    assert not (tmp_path / "spec.json").exists()


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    report = capture(tmp_path)
    assert report.plan["skipped"] == 1


class Full(MemoryStore):
    """Has room for so many shards."""

    room = 3

    def create(self, key: str, data: Any) -> bool:
        if key.startswith("shards/"):
            if not self.room:
                raise StoreError("memory: creation failed: No space left on device.")
            self.room -= 1
        return super().create(key, data)


def test_a_full_disk_stops_the_job_which_then_resumes() -> None:
    store = Full()
    with pytest.raises(StoreError, match="No space left"):
        capture(store)
    there = len(open_cache(store).shards)
    assert there == 3
    store.room = 1000
    report = capture(store)
    assert report.complete
    assert report.shards_written == report.plan["shards"] - there


def test_an_error_while_reading_ahead_surfaces_whole(tmp_path: Path) -> None:
    data = open_documents(documents(), vocab_size=VOCAB)
    read, calls = data.read, []

    def broken(numbers: Any) -> Any:
        calls.append(threading.current_thread().name)
        if len(calls) == 3:
            raise DataError("the disk with the data is gone")
        return read(numbers)

    data.read = broken  # type: ignore[method-assign]
    with pytest.raises(DataError, match="the disk with the data is gone"):
        capture(tmp_path, data)
    assert any(name.startswith("fastkd-rows") for name in calls)
    assert not [t for t in threading.enumerate() if t.name.startswith("fastkd") and "topk" not in t.name]
    assert capture(tmp_path).complete


def test_a_conversation_counts_where_it_says_so(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    data = open_documents(
        [said, said[:1]],
        tokenizer=lambda text: [ord(c) % VOCAB for c in text],
        tokenizer_fingerprint="bytes",
        template=lambda chat, ask: "".join(f"{m['role']}:{m['content']}\n" for m in chat) + "assistant:" * ask,
        template_fingerprint="colons",
        loss_on="assistant",
    )
    teacher = Causal()
    capture(tmp_path, data, teacher, held_out=0.0, context=64, batch_tokens=1)
    arrays = open_cache(tmp_path).read_shard(0)
    assert int(arrays["loss_mask"].sum()) == len("so\n")
    # of what counts nowhere the teacher is asked nothing
    assert len(teacher.calls) == 2


class Classifier(nn.Module):
    """A linear classifier of 3x3 images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(9, 7)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.flatten(1))


def shifted(images: Tensor, seeds: Any) -> Tensor:
    return torch.stack([image.roll(int(s) % 3, 0) for image, s in zip(images, seeds.tolist(), strict=True)])


def test_an_image_classifier_with_replayed_augmentation(tmp_path: Path) -> None:
    images = torch.randn(20, 3, 3)
    data = Examples(images, augment=shifted, fingerprint="roll", copies=4, seed=5)
    report = fastkd.capture(
        Classifier(), data, tmp_path, k=3, draws=0, shard_positions=30, batch_tokens=8, held_out=0.1
    )
    assert report.complete
    assert report.plan["positions"] == 80
    cache = open_cache(tmp_path)
    assert cache.spec.inputs == ("example", "augmentation_seed")
    model, seen = Classifier(), []
    for index in cache.shards:
        arrays = cache.read_shard(index)
        seen += zip(arrays["example"].tolist(), arrays["augmentation_seed"].tolist(), strict=True)
        given = data.read(arrays["example"], arrays["augmentation_seed"])
        logprobs = model(given).log_softmax(1).detach().numpy()
        stored = np.take_along_axis(logprobs, arrays["ids"], 1)
        assert np.abs(stored - arrays["logprobs"]).max() < 0.05
    assert len(set(seen)) == 80
    assert {example for example, _ in seen} == set(range(20))


def test_bad_examples_are_named() -> None:
    with pytest.raises(DataError, match="fingerprint: got '' with augment"):
        Examples(torch.zeros(2, 3), augment=shifted)
    with pytest.raises(DataError, match="copies: got 2 without augment"):
        Examples(torch.zeros(2, 3), copies=2)
    with pytest.raises(DataError, match="expected tensors of one shape"):
        Examples([torch.zeros(2), torch.zeros(3)]).fingerprint()


X = {"fingerprint": "x"}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("absent", {}, "absent: no file or folder here"),
        (3, {}, "expected a module or a callable"),
        (lambda ids: ids, {}, "fingerprint: got none"),
        (lambda ids: ids, X, "got Tensor of .* from the model; expected logits"),
        (
            lambda ids: torch.zeros(2, 3),
            {"fingerprint": "x", "vocab_size": 3},
            r"got an answer of shape \(2, 3\); expected \(1, 3, V\), a row for each position",
        ),
        (
            lambda ids: torch.zeros(*ids.shape, 5),
            {"fingerprint": "x", "vocab_size": 4},
            "got logits of width 5; expected vocab_size, 4",
        ),
    ],
)
def test_what_is_no_teacher_is_named(model: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=message):
        fastkd.capture(model, [[1, 2, 0], [1]], tmp_path, **options)


def test_a_callable_and_an_object_with_logits(tmp_path: Path) -> None:
    model = Causal().eval()

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    capture(tmp_path / "a", teacher=model, fingerprint="it")
    capture(tmp_path / "b", teacher=lambda ids: Output(model(ids)), fingerprint="it")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected settings: temperature"):
        capture(tmp_path, temperature=3)


def test_settings_may_be_given_whole(tmp_path: Path) -> None:
    settings = CaptureSettings(k=3, draws=0, context=8, held_out=0.0)
    fastkd.capture(Causal(), documents(), tmp_path, settings, k=2)
    assert (open_cache(tmp_path).spec.k, open_cache(tmp_path).spec.draws) == (2, 0)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (2, 4)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
    ],
)
def test_a_worker_knows_its_place(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert rank_and_world_size(environment=environment) == expected
    assert rank_and_world_size(3, 5, environment) == (3, 5)


@pytest.mark.parametrize("given", [(1, 1), (-1, 2), (1, None), (None, 2)])
def test_places_that_are_none(given: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="rank"):
        capture(tmp_path, rank=given[0], world_size=given[1])


def test_a_context_longer_than_the_teachers(tmp_path: Path) -> None:
    teacher = ModuleTeacher(Causal(), vocab_size=VOCAB)
    teacher.max_positions = 12
    with pytest.raises(TeacherError, match="context: got 16; expected at most 12"):
        capture(tmp_path, teacher=teacher)
    capture(tmp_path, teacher=teacher, context=None)
    assert json.loads((tmp_path / "plan.json").read_text())["settings"]["context"] == 12


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    capture(tmp_path)
    shard = tmp_path / "shards" / "999.zarr.zip"
    shard.write_bytes((tmp_path / "shards" / "0.zarr.zip").read_bytes())
    with pytest.raises(CacheError, match="got shard 999; expected only the 11 shards"):
        capture(tmp_path)


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    capture(tmp_path)
    good = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(good[:50])
    with pytest.raises(CacheError, match=r"plan\.json: not readable as JSON.*Delete it"):
        capture(tmp_path)
    (tmp_path / "plan.json").unlink()
    assert capture(tmp_path).complete
    assert (tmp_path / "plan.json").read_text() == good


def test_progress_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = capture(tmp_path, progress="events")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shards = [event for event in events if event["event"] == "shard"]
    assert sorted(event["shard"] for event in shards) == list(range(report.plan["shards"]))
    assert sum(event["positions"] for event in shards) == report.plan["positions"]
    assert sum(event["bytes"] for event in shards) == report.bytes_written
