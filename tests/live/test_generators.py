"""How a student continues prompts: with its own distribution, by the keys of the sequences, in any batch."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hf_cases import VOCAB, model_of
from train_cases import Tiny

from fastkd.errors import StreamError
from fastkd.live.generators import Sampling, find
from fastkd.live.generators.transformers import _pads
from fastkd.live.sampling import keys_of, sample, uniforms
from fastkd.train.student import Student, of_module, of_transformers

PROMPTS = [np.arange(2, 2 + n) for n in (1, 5, 3, 9, 2)]


def student_of(name: str, **changes: Any) -> Student:
    model = model_of(name, **changes)
    torch.manual_seed(1)
    for parameter in model.parameters():  # so that the distributions are not flat
        parameter.data += 0.3 * torch.randn_like(parameter)
    return of_transformers(model, name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "recurrent_gemma"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cache_of_keys_and_values_changes_no_token(name: str, temperature: float) -> None:
    """In a batch of prompts of several lengths, padded at the left, against forwards of whole sequences."""
    student = student_of(name, eos_token_id=7)
    eos = tuple(range(5, 20)) if temperature else (7,)
    sampling = Sampling(12, temperature, VOCAB, eos)
    keys = keys_of(len(PROMPTS), 0, 3)
    found = {kind: find(kind, student)(PROMPTS, keys, sampling) for kind in ("auto", "loop")}
    for one, other in zip(found["auto"], found["loop"], strict=True):
        assert one.tolist() == other.tolist()
    assert len({tuple(one.tolist()) for one in found["loop"]}) > 1
    if temperature:
        assert {len(one) for one in found["loop"]} != {12}, "some end early"
        for one in found["loop"]:
            assert not np.isin(one[:-1], eos).any()
            assert len(one) == 12 or one[-1] in eos
    assert student.training
    assert _pads(student.model) == (name != "recurrent_gemma")  # which takes padding for a part of the prompt


def test_tokens_do_not_depend_on_the_batch() -> None:
    student = student_of("llama")
    keys, sampling = keys_of(len(PROMPTS), 5), Sampling(6, 1.0, VOCAB)
    generator = find("auto", student)
    whole = generator(PROMPTS, keys, sampling)
    for i in (0, 3):
        assert generator(PROMPTS[i : i + 1], keys[i : i + 1], sampling)[0].tolist() == whole[i].tolist()
    others = generator(PROMPTS, keys_of(len(PROMPTS), 6), sampling)
    assert [one.tolist() for one in others] != [one.tolist() for one in whole]


def test_a_models_own_settings_do_not_change_its_distribution() -> None:
    student = student_of("llama")
    plain = find("auto", student)(PROMPTS, keys_of(5, 1), Sampling(8, 1.0, VOCAB))
    student.model.generation_config.repetition_penalty = 3.0
    student.model.generation_config.temperature = 0.1
    again = find("auto", student)(PROMPTS, keys_of(5, 1), Sampling(8, 1.0, VOCAB))
    assert [one.tolist() for one in again] == [one.tolist() for one in plain]
    assert student.model.generation_config.repetition_penalty == 3.0


def test_ids_beyond_the_teachers_vocabulary_are_never_sampled() -> None:
    for student in (student_of("llama"), of_module(Tiny(), "tiny")):
        found = find("auto", student)(PROMPTS, keys_of(5, 1), Sampling(30, 4.0, 11))
        assert max(one.max() for one in found) == 10


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_have_the_softmaxs_frequencies(temperature: float) -> None:
    logits = torch.tensor([1.0, -1.0, 0.5, -torch.inf, 2.0])
    count = 40_000
    uniform = torch.from_numpy(uniforms(keys_of(count // 4, 2), 4)).flatten()
    found = sample(logits.expand(count, -1), uniform, temperature).bincount(minlength=5) / count
    expected = torch.softmax(logits / temperature, 0)
    assert found[3] == 0
    # five standard deviations
    assert (found - expected).abs().max() < 5 * (0.25 / count) ** 0.5
    assert sample(logits[None], torch.tensor([1 - 2.0**-53]), temperature).item() == 4
    assert sample(logits[None], torch.tensor([0.0]), temperature).item() == 0


def test_keys_of_sequences_rounds_and_seeds_differ() -> None:
    found = [uniforms(keys_of(50, seed, round_), 8) for seed in range(3) for round_ in range(3)]
    numbers = np.concatenate(found).flatten()
    assert len(np.unique(numbers)) == numbers.size
    assert abs(numbers.mean() - 0.5) < 0.03


def test_unknown_generators_are_refused() -> None:
    student = of_module(Tiny(), "tiny")
    with pytest.raises(StreamError, match=r"rollout_generator: got 'other'; expected one of auto, loop, transformers"):
        find("other", student)
    with pytest.raises(StreamError, match=r"tiny has no `generate`. Use loop"):
        find("transformers", student)


def test_vllm_is_asked_for_the_students_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which runs on GPUs: what it is given, and what is made of what it returns."""
    with pytest.raises(StreamError, match=r"vllm', which is not installed"):
        find("vllm", student_of("llama"))
    seen: list[Any] = []

    class LLM:
        llm_engine = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB))

        def __init__(self, model: str, **options: Any) -> None:
            from safetensors.torch import load_file

            seen.append(load_file(f"{model}/model.safetensors"))

        def generate(self, inputs: Any, options: Any, **more: Any) -> Any:
            seen.append((inputs, options))
            said = [([5, 6], None), ([5], 7), ([5, 7], 7)]
            return [
                SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, stop_reason=reason)]) for ids, reason in said
            ]

    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    student = student_of("llama")
    generator = find("vllm", student)
    found = generator(PROMPTS[:3], keys_of(3, 0), Sampling(4, 0.7, VOCAB - 6, (7,)))
    assert [one.tolist() for one in found] == [[5, 6], [5, 7], [5, 7]]
    weights, (inputs, options) = seen
    assert torch.equal(weights["model.norm.weight"], student.model.model.norm.weight)
    assert [one["prompt_token_ids"] for one in inputs] == [prompt.tolist() for prompt in PROMPTS[:3]]
    assert len({one.seed for one in options}) == 3
    assert {one.temperature for one in options} == {0.7}
    assert options[0].allowed_token_ids == list(range(VOCAB - 6))
    generator.close()
    with pytest.raises(StreamError, match="no model of transformers"):
        find("vllm", of_module(Tiny(), "tiny"))
