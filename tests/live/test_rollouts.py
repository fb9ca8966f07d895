"""Steps in which the student continues a part of the sequences itself: which, from where, how they are scored, kept and
read again."""

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from live_cases import TEXT, text_data, text_teacher
from rollout_cases import plain_cache, rollout_source, score
from source_cases import BatchSourceTests, take
from train_cases import Tiny

from fastkd.cache import Cache, open_cache
from fastkd.data.columns import LOSS_MASK, TEXT_SETTINGS
from fastkd.data.documents import open_documents
from fastkd.errors import DataError, StreamError, WorkRemains
from fastkd.kernels import topk_targets
from fastkd.live import LiveSource, planned
from fastkd.live.prompts import PromptRule, chosen
from fastkd.live.rollouts import RolloutBatch, RolloutSource
from fastkd.live.rounds import rounds_in
from fastkd.stream import CachedSource
from fastkd.stream.gather import IGNORED, TextInputs
from fastkd.stream.mixture import MixedSequences
from fastkd.train.student import of_module


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return plain_cache(tmp_path_factory.mktemp("rollouts") / "cache")


@pytest.fixture(scope="module")
def made(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rounds of twelve steps."""
    folder = tmp_path_factory.mktemp("made") / "rollouts"
    take(rollout_source(cache, folder), 12)
    return folder


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rounds of the tests of all sources."""
    return tmp_path_factory.mktemp("larger") / "rollouts"


class TestRolloutSource(BatchSourceTests):
    @pytest.fixture(autouse=True)
    def _made(self, cache: Cache, larger: Path) -> None:
        self.cache, self.folder = cache, larger

    def source(self, **changes: Any) -> RolloutSource:
        return rollout_source(self.cache, self.folder, batch_size=16, rollout_every=2, **changes)

    def other(self) -> RolloutSource:
        return self.source(rollout_tokens=4)


def rows(tokens: Any, batch: Any) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(tokens, batch.cu_seqlens.diff().tolist(), strict=True)]


def contents(step: Any) -> tuple[list[list[int]], list[list[int]]]:
    """The sequences of a step: of the data, and of the rollouts."""
    found: tuple[list[list[int]], list[list[int]]] = ([], [])
    for batch in step.micro_batches:
        found[isinstance(batch, RolloutBatch)].extend(rows(batch.input_ids, batch))
    return found


def test_each_sequence_is_trained_on_once_as_it_is_or_continued(cache: Cache, made: Path) -> None:
    plain = take(CachedSource(cache, batch_size=6, micro_tokens=64), 12)
    steps = take(rollout_source(cache, made), 12)
    some = 0
    for before, step in zip(plain, steps, strict=True):
        whole = [row for batch in before.micro_batches for row in rows(batch.input_ids, batch)]
        data, continued = contents(step)
        left = [row for row in whole if row not in data]
        assert len(data) + len(left) == len(whole) == step.sequences
        assert len(continued) == len(left)
        for row in continued:  # its prompt is a prefix of one of those left out
            assert any(row[0] == one[0] for one in left)
        assert step.positions == sum(map(len, [*data, *continued]))
        assert step.metrics["rollout/sequences"] == len(continued)
        some += len(continued)
    assert 0.35 < some / sum(step.sequences for step in steps) < 0.65


def test_the_targets_are_the_teachers_on_what_the_student_said(cache: Cache, made: Path) -> None:
    network = Tiny(seed=7)
    for step in take(rollout_source(cache, made), 4):
        total = 0
        for batch in step.micro_batches:
            total += batch.count
            assert batch.counts["targets"] == step.count
            if not isinstance(batch, RolloutBatch):
                continue
            said = network(batch.input_ids)
            logits = (said.states @ said.lm_head.weight.T).flatten(0, 1)[batch.targets.index]
            dense = topk_targets(logits.detach(), 6)
            assert torch.equal(batch.targets.ids[:, 0], dense.ids[:, 0])
            torch.testing.assert_close(batch.targets.logprobs[:, :6], dense.logprobs, atol=0.1, rtol=0)
            labels = batch.labels.flatten()[batch.targets.index]
            assert torch.equal(labels, batch.input_ids.flatten()[batch.targets.index + 1])
        assert total == step.count
    rounds = rollout_source(cache, made)._rounds
    found = rounds.read(0)
    assert found is not None
    for i, tokens in enumerate(found.tokens):
        new = tokens[found.prompts[i] :]
        assert 1 <= len(new) <= 5
        assert found.ended[i] == (new[-1] == 22)
        assert 22 not in new[:-1]
        assert found.loss_mask(i).sum() == len(new)
    assert 0 < found.ended.mean() < 1


def test_a_round_is_made_once_with_the_students_weights_of_its_first_step(cache: Cache, tmp_path: Path) -> None:
    asked: list[str] = []

    def noted(tokens: Path, out: Path, settings: Any) -> None:
        asked.append(tokens.name)
        score(tokens, out, settings)

    student = of_module(Tiny(seed=3), "student")
    source = rollout_source(cache, tmp_path / "r", score=noted, bound=False)
    source.bind(student)
    states = []
    for _, _ in zip(range(7), source.steps(), strict=False):
        states.append(source.state_dict())
        with torch.no_grad():
            student.model.head *= 0.5  # as an optimizer would
    source.close()
    assert asked == [f"round-{i:05d}.parquet" for i in range(3)]
    files = {path.name: path.read_bytes() for path in (tmp_path / "r").glob("*.parquet")}
    # gone back to the middle of a round, with other weights: nothing is made again
    source.load_state_dict(json.loads(json.dumps(states[1])))
    take(source, 5)
    assert len(asked) == 3
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").glob("*.parquet")} == files
    # a later student says something else
    other = rollout_source(cache, tmp_path / "other")
    take(other, 4)
    assert (tmp_path / "other" / "round-00000.parquet").read_bytes() == files["round-00000.parquet"]
    assert (tmp_path / "other" / "round-00001.parquet").read_bytes() != files["round-00001.parquet"]


def test_in_the_middle_of_a_round_its_tokens_have_to_be_there(cache: Cache, tmp_path: Path) -> None:
    source = rollout_source(cache, tmp_path)
    take(source, 4)
    (tmp_path / "round-00001.parquet").unlink()
    again = rollout_source(cache, tmp_path)
    again.load_state_dict(source.state_dict())
    with pytest.raises(StreamError, match=r"round-00001.parquet: there is no such file, and the training is 1 steps"):
        take(again, 1)
    (tmp_path / "round-00001.parquet").write_bytes(b"none")
    with pytest.raises(StreamError, match=r"round-00001.parquet: cannot be read as a round"):
        take(again, 1)


def test_rounds_of_another_run_are_refused(cache: Cache, tmp_path: Path) -> None:
    take(rollout_source(cache, tmp_path), 1)
    with pytest.raises(StreamError, match=r"rollouts of another run \(rollout_tokens: 5 there, 6 here\)"):
        take(rollout_source(cache, tmp_path, rollout_tokens=6), 1)
    other = rollout_source(cache, tmp_path)
    other.bind(of_module(Tiny(seed=4), "another"))
    with pytest.raises(StreamError, match=r"rollouts of another run \(student: "):
        take(other, 1)
    with pytest.raises(StreamError, match="bind"):
        take(rollout_source(cache, tmp_path, bound=False), 1)


def test_others_score_a_round(cache: Cache, tmp_path: Path) -> None:
    """With the command that the error gives, to the bytes of a cache that the training makes."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    wanted = take(rollout_source(cache, ours), 2)
    source = rollout_source(cache, theirs, score=None)
    with pytest.raises(WorkRemains, match="fastkd capture --teacher TEACHER --data") as raised:
        take(source, 1)
    assert source.state_dict()["made"] == 0
    words = str(raised.value).partition("fastkd ")[2].partition(";")[0].split()
    words[words.index("TEACHER")] = "rollout_cases:teacher"
    from fastkd.cli.main import main

    assert main(words) == 0
    found = take(source, 2)
    assert [contents(step) for step in found] == [contents(step) for step in wanted]
    one, other = (open_cache(folder / "round-00000") for folder in (ours, theirs))
    assert one.spec.hash == other.spec.hash  # not the notes
    assert one.content(0) == other.content(0)
    for key in ("plan.json", "lengths.npz"):
        assert (ours / "round-00000" / key).read_bytes() == (theirs / "round-00000" / key).read_bytes(), key


def test_targets_of_another_kind_are_refused(cache: Cache, tmp_path: Path) -> None:
    def wrong(tokens: Path, out: Path, settings: Any) -> None:
        score(tokens, out, replace(settings, temperatures=(1.0, 3.0)))

    with pytest.raises(StreamError, match=r"got temperatures \(1.0, 3.0\); expected \(1.0, 1.5, 2.0, 4.0\)"):
        take(rollout_source(cache, tmp_path, score=wrong), 1)


def test_rounds_are_a_mixture_for_another_student(cache: Cache, made: Path, tmp_path: Path) -> None:
    mixture = rounds_in(made)
    assert mixture is not None
    assert len(mixture) == len(list(made.glob("*.parquet")))
    source = CachedSource(mixture, batch_size=8)
    total = sum(len(pq.read_table(path)) for path in made.glob("*.parquet"))
    assert sum(step.sequences for step in source) == total
    both = CachedSource([(cache, 1.0), (mixture[0][0], 1.0)], batch_size=8)  # beside the cache of the data
    assert len(list(both)) > 1
    assert rounds_in(tmp_path) is None
    (tmp_path / "rollouts.json").write_text("{}")
    with pytest.raises(StreamError, match="without targets"):
        rounds_in(tmp_path)


def test_no_rollouts_are_no_change(cache: Cache, tmp_path: Path) -> None:
    """A round in which nothing was chosen has no cache."""
    found = take(rollout_source(cache, tmp_path, rollouts=1e-9), 3)
    plain = take(CachedSource(cache, batch_size=6, micro_tokens=64), 3)
    for one, other in zip(found, plain, strict=True):
        assert one.count == other.count
        for a, b in zip(one.micro_batches, other.micro_batches, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    assert not (tmp_path / "round-00000").exists()
    whole = take(rollout_source(cache, tmp_path / "all", rollouts=1.0), 2)
    assert all(isinstance(batch, RolloutBatch) for step in whole for batch in step.micro_batches)
    assert [step.sequences for step in whole] == [6, 6]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_ranks_divide_the_rollouts(cache: Cache, made: Path, layout: str) -> None:
    source = rollout_source(cache, made, layout=layout, micro_tokens=32)
    whole = take(source, 3)
    for step, number in zip(whole, range(3), strict=True):
        current = source._current() if source._round is None else source._round
        which = current.rollouts.of_step(number)
        parts = [current.micro_batches(which, rank, 3) for rank in range(3)]
        assert len({len(part) for part in parts}) == 1
        tokens = sorted(
            row.tolist()
            for part in parts
            for batch in part
            if batch.positions
            for row in torch.split(batch.input_ids[batch.padding_mask()], batch.cu_seqlens.diff().tolist())
        )
        assert tokens == sorted(current.rollouts.tokens[i].tolist() for i in which)
        assert sum(batch.count for part in parts for batch in part) == step.micro_batches[0].counts["rollouts"]


def sequences(count: int, source: int = 0) -> MixedSequences:
    number = np.arange(count)
    return MixedSequences(np.full(count, source), number % 7, number // 7, number)


def test_sequences_are_chosen_by_seed_epoch_and_their_number() -> None:
    whole = sequences(2000)
    masks = [chosen(seed, 0.3, epoch, whole) for seed in range(2) for epoch in range(2)]
    for mask in masks:
        assert abs(mask.mean() - 0.3) < 0.05
    assert len({mask.tobytes() for mask in masks}) == 4
    some = np.array([5, 800, 3])
    part = MixedSequences(*(column[some] for column in whole))
    assert chosen(1, 0.3, 1, part).tolist() == masks[3][some].tolist()
    assert (chosen(0, 0.3, 0, sequences(2000, 1)) != masks[0]).any()
    assert chosen(0, 1.0, 0, whole).all()
    assert not chosen(0, 0.0, 0, whole).any()
    assert (masks[0] <= chosen(0, 0.6, 0, whole)).all()


def inputs(*segments: list[bool]) -> TextInputs:
    """Segments of one sequence; where the next token counts. The last position of a segment has no label."""
    labels = np.concatenate([np.where([*one[:-1], False], 5, IGNORED) for one in segments])
    ends = np.cumsum([0, *map(len, segments)])
    return TextInputs(np.arange(ends[-1]), labels, ends, np.array([0, len(segments)]))


def lengths_of(rule: PromptRule, given: TextInputs) -> list[list[int]]:
    found = [list(rule.prompts(given, 0, epoch, (0, 0))) for epoch in range(200)]
    for one in found:
        assert [begin for begin, _ in one] == [int(b) for b in given.segments[:-1] if b in {x for x, _ in one}]
    return [[end - begin for begin, end in one] for one in found]


def test_prompts_of_text_are_cut_anywhere() -> None:
    plain = PromptRule(0, False, None, None, 4)
    found = lengths_of(plain, inputs([True] * 6, [True], [True] * 2))
    assert {one[0] for one in found} == {1, 2, 3, 4, 5}
    assert {tuple(one[1:]) for one in found} == {(1, 1)}
    # room is left for the continuation
    assert {one[0] for one in lengths_of(replace(plain, limit=7), inputs([True] * 6))} == {1, 2, 3}
    assert {tuple(one) for one in lengths_of(replace(plain, limit=1), inputs([True] * 6))} == {()}
    assert {one[0] for one in lengths_of(replace(plain, tokens=3), inputs([True] * 6))} == {3}
    assert {one[0] for one in lengths_of(replace(plain, tokens=3), inputs([True] * 3))} == {2}


def test_prompts_of_conversations_end_where_the_assistant_begins() -> None:
    rule = PromptRule(0, True, None, None, 4)
    turns = [False, False, True, True, False, False, True, True, False]  # tokens 3, 4 and 7, 8 are the assistant's
    assert {tuple(one) for one in lengths_of(rule, inputs(turns))} == {(3,), (7,)}
    assert {tuple(one) for one in lengths_of(replace(rule, limit=7), inputs(turns))} == {(3,)}
    assert {tuple(one) for one in lengths_of(rule, inputs([False] * 4))} == {()}
    assert {tuple(one) for one in lengths_of(rule, inputs([True] * 4))} == {(1,)}


def test_token_ids_with_a_loss_mask_in_their_file(tmp_path: Path) -> None:
    ids = [[1, 2, 3], [], [4, 5]]
    masks: Any = [[False, True, True], [], [True, False]]

    def write(name: str, masks: Any, kind: Any = None, **metadata: str) -> Path:
        table = pa.table({"tokens": pa.array(ids, pa.list_(pa.int32())), "mask": pa.array(masks, kind)})
        pq.write_table(table.replace_schema_metadata(metadata or None), tmp_path / name)
        return tmp_path / name

    stated = {LOSS_MASK: "mask", TEXT_SETTINGS: json.dumps({"tokenizer": "sha256 " + "0" * 64})}
    documents = open_documents(write("a.parquet", masks, **stated), column="tokens")
    assert documents.read([2, 0, 1]).loss_mask.tolist() == [True, False, False, True, True]
    assert documents.text_settings == {"tokenizer": "sha256 " + "0" * 64}
    plain = open_documents(write("b.parquet", masks), column="tokens")
    assert plain.read([0]).loss_mask.tolist() == [True] * 3
    assert plain.text_settings == {}
    assert documents.fingerprint() != plain.fingerprint()
    for name, wrong, message in (
        ("c.parquet", [[True], [], [True, False]], "got 3 token ids, and 1 values in 'mask'"),
        ("d.parquet", [[0, 1, 1], [], [1, 0]], "expected lists of bool"),
        ("e.parquet", [[True, None, True], [], [True, False]], "no nulls"),
        ("f.parquet", [[True, True, True], None, [True, False]], "no nulls"),
    ):
        with pytest.raises(DataError, match=message):
            open_documents(write(name, wrong, **stated), column="tokens").lengths()
    both = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    with pytest.raises(DataError, match="expected the same in all files"):
        open_documents(both, column="tokens")


def test_the_hash_of_documents_without_such_metadata_is_what_it_was(tmp_path: Path) -> None:
    table = pa.table({"tokens": pa.array([[1, 2, 3]], pa.list_(pa.int32()))})
    pq.write_table(table, tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    named = {"columns": ["tokens"], "tokenizer": "", "template": "", "loss_on": "all"}
    whole = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
    whole.update(json.dumps(["a.parquet", len(data), hashlib.sha256(data).hexdigest()]).encode())
    assert open_documents(tmp_path / "a.parquet").fingerprint() == whole.hexdigest()


def test_documents_are_read_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the loader's threads, and by the one that makes a round."""
    source, reading = LiveSource(text_data(), text_teacher(), TEXT, batch_size=4), []
    read = planned.read_shard_rows

    def slow(*arguments: Any) -> Any:
        reading.append(None)
        time.sleep(0.01)
        assert len(reading) == 1
        reading.pop()
        return read(*arguments)

    monkeypatch.setattr(planned, "read_shard_rows", slow)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda row: source.text_inputs(0, row)[1], range(4)))
    assert found == [0, 1, 2, 3]
