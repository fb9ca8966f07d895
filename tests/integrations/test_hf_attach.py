"""attach and DistillDataset, the parts of a DistillTrainer."""

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import model_of
from torch.utils.data import DataLoader
from train_cases import Tiny, Toy, make_cache

from fastkd import DistillLoader, backward, distill_module, linear_kd_loss
from fastkd.cache import Cache
from fastkd.errors import StreamError, TrainError
from fastkd.integrations.hf import DistillDataset, attach, detach
from fastkd.models.hub import load_transformers
from fastkd.stream import batch_to_tensors
from fastkd.train.objective import TokenKD, WeightedSum
from fastkd.train.objectives.hidden import HiddenKD

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("attach") / "cache")


@pytest.fixture(scope="module")
def step(cache: Cache) -> Any:
    return next(iter(DistillLoader(cache, batch_size=6, micro_tokens=40)))


def test_the_loss_is_the_fused_one(step: Any) -> None:
    """In the units of the whole step, with the gradient of a loop of one's own; and the model's own forward stays."""
    model, plain = model_of("llama"), model_of("llama")
    assert attach(model, alpha=0.3, temperature=2.0) is model
    assert not model.training
    for batch in step.micro_batches:
        out = model(**batch_to_tensors(batch))
        hidden = plain.model(input_ids=batch.input_ids).last_hidden_state
        expected = linear_kd_loss(hidden, plain.lm_head.weight, batch.targets, batch.labels, alpha=0.3, temperature=2.0,
                                  num_items=step.count)  # fmt: skip
        assert torch.equal(out.loss, expected.loss)
        assert (out["hard"], out.soft) == (expected.hard, expected.soft)
        assert not [t for t in out.values() if t.ndim]
        out.loss.backward()
        expected.loss.backward()
        # a Trainer's collator and columns beside them change nothing
        again = model(**batch_to_tensors(batch), num_items_in_batch=torch.tensor(step.count), attention_mask=None)
        assert torch.equal(again.loss, out.loss)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    tokens = step.micro_batches[0].input_ids
    assert torch.equal(model(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    assert torch.equal(model(input_ids=tokens, labels=tokens).loss, plain(input_ids=tokens, labels=tokens).loss)


def test_a_model_is_what_it_was(step: Any, tmp_path: Path) -> None:
    """Its class, state dict, signature, folder, copies and pickles; and detached, it has no loss of ours."""
    model, tensors = model_of("llama"), batch_to_tensors(step.micro_batches[0])
    kind, names, signature = type(model), list(model.state_dict()), inspect.signature(model.forward)
    attach(model, alpha=0.3)
    assert isinstance(model, kind)
    assert (type(model).__name__, type(model).__module__) == (kind.__name__, kind.__module__)
    assert list(model.state_dict()) == names
    assert inspect.signature(model.forward) == signature
    loss = model(**tensors).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(**tensors).loss, loss)
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert not torch.equal(other(**tensors).loss, loss)
    assert torch.equal(model(**tensors).loss, loss)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    loaded = load_transformers().AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert torch.equal(attach(loaded, alpha=0.3)(**tensors).loss, loss)
    assert type(detach(model)) is kind
    assert "_kd" not in vars(model)
    with pytest.raises(TrainError, match="that is not attached"):
        detach(model)
    attach(model, alpha=0.5)
    assert not torch.equal(model(**tensors).loss, loss)


def test_generate_and_logits(step: Any) -> None:
    model = attach(model_of("llama"))
    assert model.generate(torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=2, do_sample=False).shape == (1, 5)
    batch = step.micro_batches[0]
    rows = model(**batch_to_tensors(batch), kd_logits=True).logits
    assert torch.allclose(rows, model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.targets.index], atol=1e-5)


def test_an_objective_of_ones_own(step: Any) -> None:
    model = attach(model_of("llama"), Toy(0.1))
    out = model(**batch_to_tensors(step.micro_batches[0]), kd_scheduled={"strength": 0.5})
    assert out.loss == out.parts["cross_entropy"] + out.parts["l2"]
    assert out.hard is None


class Twice(torch.nn.Module):
    """An LM head that is no matrix."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head

    def forward(self, states: Any) -> Any:
        return 2 * self.head(states) + 1


def test_what_a_step_is_refused_for(step: Any) -> None:
    """A vocabulary that does not fit, which is seen without the cache; and what is mixed up in a loop of one's own."""
    narrow = "LlamaForCausalLM: got a vocabulary of 50; expected at least 96"
    with pytest.raises(TrainError, match=narrow):
        attach(model_of("llama", vocab_size=50))(**batch_to_tensors(step.micro_batches[0]))
    with pytest.raises(TrainError, match=narrow):
        backward(distill_module(model_of("llama", vocab_size=50)), step)
    model = model_of("llama")
    with pytest.raises(TrainError, match=r"got LlamaForCausalLM; expected distill_module\(model\)"):
        backward(model, step)
    with pytest.raises(TrainError, match="got MicroBatch; expected a Step"):
        backward(distill_module(model), step.micro_batches[0])


def test_what_is_refused(step: Any) -> None:
    with pytest.raises(TrainError, match="attach: got Tiny; expected a causal model of transformers"):
        attach(Tiny())
    with pytest.raises(TrainError, match="not a causal model"):
        attach(model_of("bert"))
    model = model_of("llama")
    model.lm_head = Twice(model.lm_head)
    with pytest.raises(TrainError, match=r"whose LM head is not found as one matrix .* With full_logits=True they are"):
        attach(model)
    assert attach(model, full_logits=True)(**batch_to_tensors(step.micro_batches[0])).loss.requires_grad
    model = attach(model_of("llama"))
    with pytest.raises(TrainError, match="attached already"):
        attach(model)
    with pytest.raises(TrainError, match="expected one of the two"):
        attach(model_of("llama"), TokenKD(), alpha=0.2)
    with pytest.raises(TypeError, match="unexpected settings: rate"):
        attach(model_of("llama"), rate=0.1)
    with pytest.raises(TrainError, match="alpha: got 2"):
        attach(model_of("llama"), alpha=2)
    trained = WeightedSum({"a": TokenKD(), "b": HiddenKD("20", "state:1", projector=torch.nn.Linear(2, 2))})
    with pytest.raises(
        TrainError, match=r"WeightedSum with parameters.* Use `fastkd train --match 20:16:mse:0\.1`, or"
    ):
        attach(model_of("llama"), trained)
    tensors = batch_to_tensors(step.micro_batches[0])
    with pytest.raises(TrainError, match="got output_attentions beside the tensors of a micro-batch"):
        model(**tensors, output_attentions=True)
    with pytest.raises(StreamError, match="got kd_facts, input_ids without"):
        model(kd_facts=tensors["kd_facts"], input_ids=tensors["input_ids"])
    prepared = model_of("llama")
    prepared.forward = prepared.forward
    with pytest.raises(TrainError, match="whose forward was replaced"):
        attach(prepared)


def test_a_dataset_is_the_source_in_order(cache: Cache) -> None:
    """Also from any step on, in any epoch, and by a DataLoader that accelerate divides over ranks."""
    source = DistillLoader(cache, batch_size=6, micro_batches=2, micro_tokens=None, seed=3)
    expected = {}
    steps = source.steps()
    for epoch in range(2):
        for number in range(len(source)):
            expected[epoch, number] = [b.input_ids.tolist() for b in next(steps).micro_batches]
    source.close()
    dataset = DistillDataset(cache, batch_size=6, micro_batches=2, seed=3)
    assert len(dataset) == 2 * len(source)
    assert dataset.sequences == source.described[0]["sequences"]

    def taken(indices: Any) -> list[Any]:
        return [dataset[i].input_ids.tolist() for i in indices]

    everything = {epoch: [b for n in range(len(source)) for b in expected[epoch, n]] for epoch in range(2)}
    assert taken(range(len(dataset))) == everything[0]
    dataset.set_epoch(1)
    assert taken(range(len(dataset))) == everything[1]
    assert taken([4, 4, 5]) == [everything[1][4], *everything[1][4:6]]
    dataset.set_epoch(0)
    assert taken([2]) == [everything[0][2]]
    with pytest.raises(IndexError):
        dataset[len(dataset)]
    with pytest.raises(StreamError, match=r"got micro-batch 1 of step 3 after \(1, 0\), which is not the order"):
        dataset[7]
    loader: Any = DataLoader(dataset, batch_size=1, sampler=dataset.sampler(), collate_fn=dataset.collate)
    loader.sampler.set_epoch(1)
    assert [one["input_ids"].tolist() for one in loader] == everything[1]
    dealt = list(dataset.sampler(3))
    assert [dealt[rank::3] for rank in range(3)] == [list(range(len(dataset)))] * 3
    with pytest.raises(StreamError, match="got 2 micro-batches at once"):
        next(iter(DataLoader(dataset, batch_size=2, collate_fn=dataset.collate)))
    with pytest.raises(StreamError, match="with workers"):
        next(iter(DataLoader(dataset, batch_size=1, num_workers=1, collate_fn=dataset.collate)))
    dataset.close()


def test_steps_that_are_dealt_out_to_ranks(cache: Cache) -> None:
    """As rows are, by a Trainer with a sampler of its own: each rank would have its share of other steps. A resume, of
    its own sampler, begins at any step."""
    dataset = DistillDataset(
        cache, batch_size=6, rank=0, world_size=2, reduce=lambda counts: lambda: [2 * count for count in counts]
    )
    assert dataset[0].sequences.numel()
    with pytest.raises(StreamError, match=r"got micro-batch 0 of step 2 after \(0, 0\), which is not the order"):
        dataset[2]
    loader: Any = DataLoader(dataset, batch_size=1, sampler=dataset.sampler(1), collate_fn=dataset.collate)
    iter(loader.sampler)
    assert dataset[3].sequences.numel()
    assert dataset[4].sequences.numel()
    dataset.close()


def test_skipping_decodes_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import skip_first_batches

    dataset = DistillDataset(cache, batch_size=6, seed=3)
    last = [dataset[i] for i in range(len(dataset))][-1].input_ids
    dataset.close()
    read: list[int] = []
    shard = Cache.read_shard
    monkeypatch.setattr(Cache, "read_shard", lambda self, index, **k: read.append(index) or shard(self, index, **k))
    plain = DataLoader(dataset, batch_size=1, sampler=dataset.sampler(), collate_fn=dataset.collate)
    (batch,) = skip_first_batches(plain, len(dataset) - 1)
    assert torch.equal(batch["input_ids"], last)
    assert len(set(read)) < len(cache.shards)
    dataset.close()
