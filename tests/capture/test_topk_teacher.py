"""Teachers that answer with top-k entries, as an inference server does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_cases import SMALL, VOCAB, Causal, capture, documents
from torch import Tensor

from fastkd.cache import open_cache, verify_cache
from fastkd.capture.answers import targets_of
from fastkd.errors import TeacherError
from fastkd.kernels import KDError, topk_targets
from fastkd.settings import CaptureSettings
from fastkd.teachers import Hidden, LMHead, Logits, TopK

ENTRIES, TEMPERATURES = 8, (1.0, 2.0)
SERVED: dict[str, Any] = SMALL | {"draws": 0, "temperatures": (1.0,)}


class Served:
    """A toy server: the entries of each position in shuffled order, with the prompt's next token among them."""

    vocab_size, fingerprint, max_positions = VOCAB, "served", None
    device = torch.device("cpu")

    def __init__(self, tails: tuple[float, ...] = ()) -> None:
        self.model, self.tails = Causal().eval(), tails

    def __call__(self, inputs: Tensor) -> TopK:
        logprobs = self.model(inputs).log_softmax(-1)
        ids = logprobs.topk(ENTRIES).indices
        ids[:, :, -1] = torch.where((ids[:, :, :-1] == inputs[:, :, None]).any(-1), ids[:, :, -1], inputs)
        ids = ids[:, :, torch.randperm(ENTRIES, generator=torch.Generator().manual_seed(0))]
        rest = logprobs.scatter(2, ids, -torch.inf)
        tail = torch.stack([(rest / t).logsumexp(2) for t in self.tails], 2) if self.tails else None
        return TopK(ids, logprobs.gather(2, ids), tail, self.tails or (1.0,))


class Declared(Served):
    """A server that says beforehand what it answers with."""

    tail_temperatures, max_k = (1.0,), ENTRIES


def stored(folder: Path) -> dict[str, Any]:
    cache = open_cache(folder)
    assert cache.sealed
    assert verify_cache(cache.store, deep=True).ok
    shards = [{n: a.copy() for n, a in cache.read_shard(index).items()} for index in cache.shards]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in ("ids", "logprobs", "tail", "outcomes")}


@pytest.mark.parametrize("tails", [(), TEMPERATURES])
def test_its_cache_is_that_of_the_logits(tmp_path: Path, tails: tuple[float, ...]) -> None:
    settings = SERVED | ({"temperatures": TEMPERATURES} if tails else {})
    settings["fingerprint"] = ""
    assert capture(tmp_path / "served", teacher=Served(tails), **settings).complete
    capture(tmp_path / "whole", **settings | {"fingerprint": "the model"})
    served, whole = stored(tmp_path / "served"), stored(tmp_path / "whole")
    for name in ("ids", "outcomes"):
        np.testing.assert_array_equal(served[name], whole[name])
    for name in ("logprobs", "tail"):
        np.testing.assert_allclose(served[name], whole[name], atol=0.07)


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        (Declared(), {"draws": 3}, "draws: got 3; expected 0"),
        (Declared(), {"temperatures": (1.0, 2.0)}, r"temperatures: got 2\.0; expected none but 1\.0"),
        (Declared(), {"k": 9}, "k: got 9; expected at most 8"),
        (Served(), {"draws": 3}, "draws: got 3; expected 0"),
        (Served(), {"temperatures": (1.0, 2.0)}, r"temperatures: got 2\.0; expected none but 1\.0"),
        (Served(), {"k": 9}, "k: got 9; expected at most 8"),
    ],
)
def test_settings_beyond_its_answers_are_refused(
    teacher: Served, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match=message):
        capture(tmp_path, teacher=teacher, **SERVED | changes)
    assert not list(tmp_path.glob("shards/*"))
    if isinstance(teacher, Declared):  # before anything is written: other settings need no other folder
        assert capture(tmp_path, teacher=teacher, **SERVED).complete


def answer(logprobs: Any, ids: Any = None) -> TopK:
    values = torch.tensor([logprobs], dtype=torch.float32)
    return TopK(torch.arange(values.shape[1])[None] if ids is None else torch.tensor([ids]), values)


def targets(answer: Any, **changes: Any) -> Any:
    settings = CaptureSettings(**{"k": 2, "draws": 0, "temperatures": (1.0,)} | changes)
    at = torch.zeros(1, dtype=torch.int64)
    return targets_of(answer, at, at, settings, torch.Size([1]), 5)


def test_entries_that_are_not_kept_are_in_the_tail() -> None:
    logits = torch.tensor([[3.0, -1.0, 2.0, 0.0, 1.0]])
    logprobs = logits.log_softmax(1)
    for mass in (None, 0.5):
        found = targets(answer(logprobs[0, :4].tolist()), mass=mass)
        wanted = topk_targets(logits, 2, temperatures=(1.0,), mass=mass)
        for name in ("ids", "logprobs", "tail", "outcomes"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), check_dtype=False)
    short = targets(answer([-0.1, -torch.inf, -torch.inf]))
    assert short.ids.tolist() == [[0, 0]]
    assert short.outcomes.tolist() == [4]


def test_a_missing_mass_that_rounding_hides_is_a_small_one() -> None:
    found = targets(answer([0.0, -20.0]))
    assert -17 < float(found.tail[0, 0]) < -16
    whole = targets(answer([-0.1, -5.0, -6.0, -3.0, -4.0]), k=5)
    assert (whole.outcomes.tolist(), whole.tail.tolist()) == ([0], [[-torch.inf]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (answer([-1.0, torch.nan]), "got NaN"),
        (answer([-1.0, -2.0], [3, 5]), "expected ids from 0 to 4"),
        (answer([-torch.inf, -torch.inf]), "got no entry"),
        (answer([-1.0, -2.0], [3, 3]), "got an id twice"),
        (answer([-0.1, -0.2]), "sum to more than 1"),
    ],
)
def test_entries_that_are_no_distribution(given: TopK, message: str) -> None:
    with pytest.raises(KDError, match=message) as error:
        targets(given)
    assert error.value.row == 0


def test_a_bad_position_is_named(tmp_path: Path) -> None:
    class Broken(Served):
        def __call__(self, inputs: Tensor) -> TopK:
            found = super().__call__(inputs)
            return TopK(found.ids, found.logprobs.masked_fill((inputs == 5)[:, :, None], torch.nan))

    data = documents()
    data[3] = [1, 2, 5, 7]
    with pytest.raises(TeacherError, match=r"position \d+: the teacher failed there: its top-k entries: got NaN"):
        capture(tmp_path, data, Broken(), **SERVED)


def test_answers_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"got an answer of shape \(1, 2\); expected \(1, 1, K\)"):
        targets_of(
            answer([-1.0, -2.0]), *[torch.zeros(1, dtype=torch.int64)] * 2, CaptureSettings(), torch.Size([1, 1]), 5
        )
    with pytest.raises(TeacherError, match="expected vocab_size, 5"):
        targets(Logits(torch.zeros(1, 4)))


class Odd(Served):
    """A server that answers with what no targets can be made of."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def __call__(self, inputs: Tensor) -> Any:
        return self.answer(self.model(inputs))


@pytest.mark.parametrize(
    "answer",
    [
        lambda logits: Logits(logits.long()),
        lambda logits: Logits(logits.to(torch.complex64)),
        lambda logits: Hidden(logits[..., :3].half(), LMHead(torch.zeros(VOCAB, 3))),
        lambda logits: Hidden(logits[..., :3], LMHead(torch.zeros(VOCAB, 4))),
        lambda logits: Hidden(logits[..., :3], lambda states: states.long()),
        lambda logits: Hidden(logits[..., :3], lambda states: torch.zeros(1, 2)),
    ],
)
def test_an_answer_of_the_wrong_type_is_an_error_of_the_teacher(answer: Any, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="teacher: "):
        capture(tmp_path, teacher=Odd(answer), **(SERVED | {"fingerprint": ""}))
