"""`compile=True`: a run is compiled a handful of times, whatever the lengths of its documents, and ends the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import saved
from torch import nn
from train_cases import documents, make_cache

import fastkd
from fastkd.train.checkpoint import newest

LAYERS = 4


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that are compiled from now on. They are run as they are, without generated code."""
    graphs: list[Any] = []

    def noting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def compile_module(module: Any, **options: Any) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=noting, **options)

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    return graphs


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")  # of torch itself, as it compiles
@pytest.mark.parametrize(
    ("layout", "lora"),
    [
        ("padded", None),
        ("padded", {"lora_rank": 2}),
        pytest.param(
            "padded", {"lora_rank": 2, "lora_dropout": 0.2, "lora_targets": ("q_proj",)}, marks=pytest.mark.soak
        ),
        pytest.param("packed", None, marks=pytest.mark.soak),
        pytest.param("packed", {"lora_rank": 2}, marks=pytest.mark.soak),
    ],
)
def test_a_run_is_compiled_a_handful_of_times(
    tmp_path: Path, compilations: list[Any], layout: str, lora: dict[str, Any] | None
) -> None:
    """Segments of 2 to 48 positions, alone and with others; smaller last steps; evaluations. Without buckets and
    dynamic shapes it was five times for padded micro-batches."""
    cache = make_cache(tmp_path / "cache", documents(60, 60), context=48, shard_positions=200)
    changes = {"batch_tokens": 300, "micro_tokens": 128, "steps": 7, "rate": 1e-3, "evaluate_every": 4}
    student = saved(tmp_path, "llama", num_hidden_layers=2 if lora else LAYERS)
    weights, evaluations = [], []
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        report = fastkd.train(student, cache, out, layout=layout, compile=compiled, **changes, **(lora or {}))
        found = newest(out)
        assert found is not None
        weights.append(found.tensors("model"))
        evaluations.append(report.evaluation)
    # training and evaluating, of one row and of more, with a mask and without: a first compilation and three more. With
    # a frozen base, the first layer's input has no gradient, which is a case of its own in training
    assert 2 <= len(compilations) <= (6 if lora else 4)
    if lora and lora.get("lora_dropout"):  # drawn for the pads of a bucket, too
        return
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=2e-5)
    assert evaluations[1]["cross_entropy"] == pytest.approx(evaluations[0]["cross_entropy"], abs=1e-5)
