"""A student with adapters: its fused loss is that of the logits of its own forward, whatever is adapted, and what is
frozen costs nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import peak_bytes
from hf_cases import model_of
from lora_cases import ATTENTION, adapted, randomized
from test_student import SETTINGS, batch_of
from train_cases import make_cache

from fastkd import kd_loss
from fastkd.cache import Cache
from fastkd.errors import TrainError
from fastkd.kernels import LMHead
from fastkd.models.lm_head import LowRankHead
from fastkd.train.student import Student, make_student

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return make_cache(tmp_path_factory.mktemp("adapters") / "cache")


def tied(**changes: Any) -> Any:
    return adapted(base=model_of("llama", tie_word_embeddings=True), **changes)


def injected() -> Any:
    """By transformers, without a PeftModel."""
    from peft import LoraConfig

    model = model_of("llama")
    model.name_or_path = "tiny"
    model.add_adapter(LoraConfig(r=3, target_modules=ATTENTION))
    return randomized(model)


FUSED: dict[str, Any] = {
    "frozen head": lambda: adapted(),
    "new": lambda: adapted(trained=False),
    "every linear layer": lambda: adapted(target_modules="all-linear"),
    "a trained head": lambda: adapted(modules_to_save=["lm_head"]),
    "a trained head with a bias": lambda: adapted(base=model_of("phi"), modules_to_save=["lm_head"]),
    "trained embeddings and head": lambda: adapted(modules_to_save=["embed_tokens", "lm_head"]),
    "tied": lambda: tied(),
    "tied, trained embeddings": lambda: tied(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "LoRA on the head": lambda: adapted(target_modules=[*ATTENTION, "lm_head"]),
    "LoRA on a head with a bias": lambda: adapted(base=model_of("phi"), target_modules=[*ATTENTION, "lm_head"]),
    "LoRA on a head with a softcap": lambda: adapted(
        base=model_of("gemma2", tie_word_embeddings=False), target_modules=["q_proj", "lm_head"]
    ),
    "LoRA on the head with dropout": lambda: adapted(target_modules=["lm_head"], lora_dropout=0.5),
    "LoRA on embeddings": lambda: adapted(target_modules=["q_proj", "embed_tokens"]),
    "rank-stabilised": lambda: adapted(target_modules=["q_proj", "lm_head"], use_rslora=True),
    "DoRA": lambda: adapted(use_dora=True),
    "IA3": lambda: adapted("IA3Config"),
    "LoHa": lambda: adapted("LoHaConfig", r=3),
    "AdaLoRA": lambda: adapted("AdaLoraConfig", total_step=10),
    "injected": injected,
    "gpt2": lambda: adapted(base=model_of("gpt2"), target_modules=["c_attn"], fan_in_fan_out=True),
}
UNFUSED: dict[str, Any] = {
    "DoRA on the head": lambda: adapted(target_modules=["q_proj", "lm_head"], use_dora=True),
    "LoRA with a bias on the head": lambda: adapted(
        base=model_of("phi"), target_modules=["q_proj", "lm_head"], lora_bias=True
    ),
    "LoHa on the head": lambda: adapted("LoHaConfig", r=3, target_modules=["q_proj", "lm_head"]),
    "trained tokens, tied": lambda: tied(trainable_token_indices=[1, 5]),
}


def check(student: Student, model: Any, cache: Cache) -> None:
    """Losses and gradients are those of the reference on the logits of the model's own forward."""
    batch = batch_of(cache)
    student.eval()
    index = batch.targets.index
    assert index is not None
    logits = model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[index]
    targets, labels = replace(batch.targets, index=None), batch.labels.flatten()[index]
    wanted = kd_loss(logits, targets, labels, impl="reference", **SETTINGS).loss
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, p in student.named_parameters() if p.requires_grad}
    student.zero_grad()
    found = student(batch, **SETTINGS)["loss"]
    found.backward()
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-6)
    for name, p in student.named_parameters():
        assert (p.grad is None) == (name not in gradients), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, gradients[name], rtol=2e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(student.logits(batch), logits.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FUSED)
def test_fused(kind: str, cache: Cache) -> None:
    student = make_student(FUSED[kind](), cache.spec).student
    assert student.notes == [
        "AdaLoRA is trained with the ranks it has now, and without its penalty for orthogonality"
    ] * (kind == "AdaLoRA")
    head = student.run(batch_of(cache)).lm_head  # type: ignore[union-attr]
    adapted_head = "lm_head" in str(student.model.peft_config["default"].target_modules)
    assert isinstance(head, LowRankHead if adapted_head else LMHead)
    check(student, student.model, cache)


@pytest.mark.parametrize("kind", UNFUSED)
def test_not_fused_and_said(kind: str, cache: Cache) -> None:
    student = make_student(UNFUSED[kind](), cache.spec).student
    assert "full logits" in student.notes[0]
    check(student, student.model, cache)


def test_a_wrapper_that_does_more_than_its_layers(cache: Cache) -> None:
    """The head is compared with the wrapper's own logits, with other values in a new adapter, which does nothing."""
    model = adapted(trained=False)

    class WithoutItsAdapter(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            with self.disable_adapter():
                return super().forward(*args, **kwargs)

    model.__class__ = WithoutItsAdapter
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    student = make_student(model, cache.spec).student
    assert "full logits" in student.notes[0]
    assert all(torch.equal(p, before[name]) for name, p in student.model.named_parameters())


def test_packed_rows(cache: Cache) -> None:
    student = make_student(adapted(target_modules="all-linear"), cache.spec).student.eval()
    padded, packed = (student(batch_of(cache, layout), **SETTINGS) for layout in ("padded", "packed"))
    torch.testing.assert_close(padded["loss"], packed["loss"], rtol=1e-5, atol=0)


def test_adapters_that_are_switched_off_or_merged(cache: Cache) -> None:
    """The head is read anew in each forward."""
    student = make_student(adapted(target_modules=["q_proj", "lm_head"]), cache.spec).student.eval()
    model: Any = student.model
    batch, plain = batch_of(cache), make_student(model_of("llama"), cache.spec).student.eval()
    with_adapters = student(batch, **SETTINGS)["loss"].item()
    with torch.no_grad(), model.disable_adapter():
        without = student(batch, **SETTINGS)["loss"]
    assert without.item() == plain(batch, **SETTINGS)["loss"].item() != with_adapters
    model.merge_adapter()
    with torch.no_grad():  # a merged adapter is not trained
        assert student(batch, **SETTINGS)["loss"].item() == pytest.approx(with_adapters, rel=1e-5)
    trained = make_student(adapted(modules_to_save=["lm_head"]), cache.spec).student.eval()
    with torch.no_grad(), trained.model.disable_adapter():
        assert trained(batch, **SETTINGS)["loss"].item() == without.item()


def test_dropout_of_an_adapter_on_the_head(cache: Cache) -> None:
    """It drops inputs of the adapter alone, as in its own forward."""
    student = make_student(adapted(target_modules=["lm_head"], lora_dropout=0.5), cache.spec).student
    model: Any = student.model
    head, batch = model.get_base_model().lm_head, batch_of(cache)
    output: Any = student.run(batch)
    for training in (True, False):
        student.train(training)
        torch.manual_seed(1)
        wanted = head(output.states)
        torch.manual_seed(1)
        torch.testing.assert_close(output.lm_head(output.states), wanted)
    assert not torch.allclose(wanted, head.base_layer(output.states))


@pytest.mark.parametrize("targets", [ATTENTION, [*ATTENTION, "lm_head"]])
def test_half_precision(targets: list[str], cache: Cache) -> None:
    """A base in bfloat16 under autocast, and what an adapter adds below bfloat16's rounding of the base."""
    model = adapted(base=model_of("llama", dtype=torch.bfloat16), target_modules=targets)
    student, batch = make_student(model, cache.spec).student.eval(), batch_of(cache)
    assert not student.notes
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    exact = make_student(adapted(base=model_of("llama", dtype=torch.bfloat16).float(), target_modules=targets), None)
    wanted = exact.student.eval()(batch, **SETTINGS)["loss"]
    for autocast in (None, torch.bfloat16):
        student.autocast = autocast
        found = student(batch, **SETTINGS)["loss"]
        found.backward()
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0)
        assert all((p.grad is not None) == p.requires_grad for p in student.parameters())


def test_memory(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither [positions, V] nor a gradient of the frozen head, whose storage is the largest there is."""
    monkeypatch.setattr("fastkd.kernels.loss.linear.CPU_CHUNK_BYTES", 1)
    rows, vocab, width = 1024, 4096, 128
    base = model_of("llama", vocab_size=vocab, hidden_size=width, num_hidden_layers=1, intermediate_size=width)
    student = make_student(adapted(base=base), None).student
    batch = batch_of(cache)
    index = torch.arange(rows)
    wide = replace(
        batch, input_ids=torch.randint(vocab, (4, rows // 4)), labels=torch.randint(vocab, (4, rows // 4)),
        targets=replace(batch.targets[index % batch.count], index=index, vocab_size=vocab),
    )  # fmt: skip

    def step() -> None:
        student(wide, **SETTINGS)["loss"].backward()

    step()  # gradients of what is trained are there from now on
    chunk, logits, gradient = 64 * vocab * 4, rows * vocab * 4, vocab * width * 4
    found = peak_bytes("cpu", step)
    student.model.get_base_model().lm_head.requires_grad_(True)
    step()
    trained = peak_bytes("cpu", step)
    assert found < 0.8 * logits
    assert trained > found + 0.9 * gradient, (found, trained, gradient, chunk)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "PromptTuningConfig",
            {"num_virtual_tokens": 3},
            "got an adapter of the kind PROMPT_TUNING, which puts virtual",
        ),
        ("PrefixTuningConfig", {"num_virtual_tokens": 3}, "the kind PREFIX_TUNING, .* positions are not those"),
        (
            "LoraConfig",
            {"target_modules": ATTENTION, "alora_invocation_tokens": [3]},
            "activated LoRA, which is active",
        ),
    ],
)
def test_refused(kind: str, changes: dict[str, Any], message: str, cache: Cache) -> None:
    import peft

    model = peft.get_peft_model(model_of("llama"), getattr(peft, kind)(task_type="CAUSAL_LM", **changes))
    with pytest.raises(TrainError, match=message):
        make_student(model, cache.spec)


def test_mixed_adapters_are_refused(cache: Cache) -> None:
    import peft

    model = peft.get_peft_model(model_of("llama"), peft.LoraConfig(target_modules=ATTENTION), mixed=True)
    with pytest.raises(TrainError, match="mixed kinds, which cannot be saved"):
        make_student(model, cache.spec)
