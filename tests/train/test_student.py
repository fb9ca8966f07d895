"""A student's loss is that of its own logits, whatever it is made of and however its micro-batches are laid out."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import VOCAB, config_of, model_of, saved, tokenizer_of
from torch import Tensor, nn
from train_cases import Tiny, documents, make_cache

from fastkd import DistillLoader, kd_loss
from fastkd.cache import Cache, CacheSpec
from fastkd.errors import TrainError
from fastkd.models.protocol import Hidden
from fastkd.settings import TrainSettings
from fastkd.stream.batch import MicroBatch
from fastkd.train.student import Student, make_student

SETTINGS: dict[str, Any] = {"alpha": 0.3, "temperature": 2.0, "num_items": 50}
KINDS = ["llama", "gpt2", "gemma2", "cohere", "granite", "phi", "opt"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("student") / "cache")


def batch_of(cache: Cache, layout: str = "padded") -> MicroBatch:
    loader = DistillLoader(cache, batch_tokens=60, layout=layout)
    with_pads = next(b for step in loader for b in step.micro_batches if b.count > 20)
    loader.close()
    return with_pads


def expected(logits_of: Any, batch: MicroBatch) -> Tensor:
    """The dense loss of each piece run alone."""
    total = torch.zeros(())
    begins = batch.cu_seqlens.tolist()
    index = batch.targets.index
    assert index is not None
    width = batch.input_ids.shape[1]
    for number, (begin, end) in enumerate(pairwise(begins)):
        first = number * width if batch.layout == "padded" else begin
        at = slice(first, first + end - begin)
        logits = logits_of(batch.input_ids.flatten()[at][None])[0]
        mine = (index >= at.start) & (index < at.stop)
        if mine.any():
            targets = replace(batch.targets[mine], index=index[mine] - first)
            labels = batch.labels.flatten()[at]
            total = total + kd_loss(logits, targets, labels, impl="reference", **SETTINGS).loss
    return total


def check(student: Student, logits_of: Any, batch: MicroBatch) -> None:
    student.eval()
    wanted = expected(logits_of, batch)
    student.zero_grad()
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    out = student(batch, **SETTINGS)
    out["loss"].backward()
    torch.testing.assert_close(out["loss"], wanted.float(), rtol=1e-5, atol=1e-6)
    assert gradients
    for name, p in student.named_parameters():
        if name in gradients:
            assert p.grad is not None, name
            torch.testing.assert_close(p.grad, gradients[name], rtol=2e-4, atol=1e-6, msg=name)
    assert batch.targets.index is not None
    logits = student.logits(batch)
    assert logits.shape == (batch.count, student.vocab_size)
    compact = replace(batch.targets, index=None)
    again = kd_loss(logits, compact, batch.labels.flatten()[batch.targets.index], **SETTINGS)
    torch.testing.assert_close(again.loss, out["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_transformers(kind: str, layout: str, cache: Cache) -> None:
    student = make_student(model_of(kind), cache.spec).student
    assert not student.notes
    if layout == "packed" and kind == "opt":
        with pytest.raises(TrainError, match="layout='padded'"):
            student(batch_of(cache, layout), **SETTINGS)
        return
    model: Any = student.model
    check(student, lambda tokens: model(input_ids=tokens, use_cache=False).logits, batch_of(cache, layout))


@pytest.mark.parametrize("tied", [True, False])
def test_heads_that_are_the_embedding(tied: bool, cache: Cache) -> None:
    student = make_student(config_of("llama", tie_word_embeddings=tied), cache.spec).student
    model: Any = student.model
    check(student, lambda tokens: model(input_ids=tokens, use_cache=False).logits, batch_of(cache))


class Projected(nn.Module):
    """A head that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tiny()

    def forward(self, tokens: Tensor) -> Hidden:
        said = self.inner(tokens)
        return Hidden(said.states, lambda states: states @ self.inner.head.T)


class Object(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Tiny(logits=True)

    def forward(self, tokens: Tensor) -> Any:
        return type("Said", (), {"logits": self.inner(tokens)})()


@pytest.mark.parametrize(
    ("model", "fused"),
    [(Tiny(), True), (Tiny(bias=True), True), (Tiny(logits=True), False), (Projected(), False), (Object(), False)],
)
def test_a_module_of_ones_own(model: nn.Module, fused: bool, cache: Cache) -> None:
    student = make_student(model, cache.spec).student
    assert student.model is not model  # what was given is left alone
    assert (not student.notes) == fused
    plain = Tiny(logits=True, bias=getattr(model, "head_bias", None) is not None)
    ours = student.model if isinstance(model, Tiny) else student.model.inner

    def logits_of(tokens: Tensor) -> Tensor:
        said = ours(tokens)
        if isinstance(said, Tensor):
            return said
        z: Tensor = said.states @ ours.head.T
        return z if ours.head_bias is None else z + ours.head_bias

    assert torch.equal(logits_of(torch.arange(5)[None]), plain(torch.arange(5)[None]))
    check(student, logits_of, batch_of(cache))


def test_a_wider_head_is_a_padded_one_and_a_smaller_one_is_refused(cache: Cache) -> None:
    student = make_student(Tiny(vocab=VOCAB + 7), cache.spec).student
    assert student.vocab_size == VOCAB + 7
    model: Any = student.model
    check(student, lambda tokens: model(tokens).states @ model.head.T, batch_of(cache))
    with pytest.raises(TrainError, match=rf"got a vocabulary of {VOCAB - 1}; expected at least {VOCAB}"):
        make_student(Tiny(vocab=VOCAB - 1), cache.spec)


def test_autocast_brings_states_and_head_together(cache: Cache) -> None:
    student = make_student(config_of("llama"), cache.spec).student.eval()
    batch = batch_of(cache)
    exact = student(batch, **SETTINGS)["loss"]
    student.autocast = torch.bfloat16
    rounded = student(batch, **SETTINGS)["loss"]
    rounded.backward()
    assert rounded != exact
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=0)
    assert {p.grad.dtype for p in student.parameters() if p.grad is not None} == {torch.float32}
    assert student.logits(batch).shape == (batch.count, VOCAB)


def test_weights_in_a_half_type_meet_states_in_float32(cache: Cache) -> None:
    model = Tiny()
    model.head.data = model.head.data.bfloat16()
    student = make_student(model, cache.spec).student
    student(batch_of(cache), **SETTINGS)["loss"].backward()
    assert student.model.head.grad.dtype == torch.bfloat16


def test_where_students_come_from(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, "llama", seed=3)
    loaded = make_student(folder, cache.spec).student
    assert torch.equal(loaded.model.lm_head.weight, model_of("llama", seed=3).lm_head.weight)
    assert loaded.name == "llama"
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_bytes((folder / "config.json").read_bytes())
    new = make_student(tmp_path / "new", cache.spec, TrainSettings(seed=1)).student
    again = make_student(config_of("llama"), cache.spec, TrainSettings(seed=1)).student
    other = make_student(config_of("llama"), cache.spec, TrainSettings(seed=2)).student
    assert torch.equal(new.model.lm_head.weight, again.model.lm_head.weight)
    assert not torch.equal(new.model.lm_head.weight, other.model.lm_head.weight)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    made = make_student("train_cases:tiny", cache.spec).student
    called = make_student(lambda: Tiny(seed=1), cache.spec).student
    assert torch.equal(made.model.head, called.model.head)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere/at/all", "no such file or folder"),
        ("train_cases:nothing", "module that can be imported"),
        (3, "got int; expected a folder, a name"),
        (dict, "got dict from"),
        (nn.Identity(), "nothing to train"),
        (nn.Linear(3, 3), r"fails on token ids of shape \(1, 4\)"),
    ],
)
def test_what_is_no_student(source: Any, message: str, cache: Cache) -> None:
    with pytest.raises(TrainError, match=message):
        make_student(source, cache.spec)


def test_a_folder_of_nothing(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"neither a config\.json nor weights"):
        make_student(tmp_path, cache.spec)


def test_pieces_that_are_too_long(tmp_path: Path) -> None:
    cache = make_cache(tmp_path, documents(longest=100), context=90, shard_positions=200)
    student = make_student(config_of("gpt2"), cache.spec).student
    long = next(
        b for s in DistillLoader(cache, batch_tokens=90, micro_tokens=1) for b in s.micro_batches if b.max_seqlen > 64
    )
    with pytest.raises(TrainError, match=r"tokens from the cache; this student takes 64\. .*context=64"):
        student(long, **SETTINGS)


def test_tokenizers(tmp_path: Path) -> None:
    """The cache says which made its tokens: another is refused, unless that is allowed."""
    ours, theirs = tokenizer_of(), tokenizer_of(words="other words, entirely")
    folder = saved(tmp_path, "llama", vocab_size=300)
    ours.save_pretrained(folder)
    theirs.save_pretrained(tmp_path / "theirs")
    from fastkd.models.tokenizers import load_tokenizer

    spec = CacheSpec(vocab_size=300, k=4, tokenizer=load_tokenizer(folder).fingerprint)
    made = make_student(folder, spec)
    assert made.tokenizer is not None
    with pytest.raises(TrainError, match=r"is not the one of the cache .*--tokenizer"):
        make_student(folder, spec, TrainSettings(tokenizer=str(tmp_path / "theirs")))
    allowed = TrainSettings(tokenizer=str(tmp_path / "theirs"), allow_other_tokenizer=True)
    assert make_student(folder, spec, allowed).tokenizer is not None
    unsaid = replace(spec, tokenizer="")
    assert make_student(folder, unsaid, TrainSettings(tokenizer=str(tmp_path / "theirs"))).tokenizer is not None
