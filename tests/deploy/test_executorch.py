"""Files of ExecuTorch in its own runtime: the logits of the model in PyTorch, or those of its quantised weights."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastkd.deploy.formats import executorch, find
from fastkd.deploy.formats.executorch.graph import CachedLM, CodedEmbedding, quantise
from fastkd.deploy.model import Deployable, load_deployable
from fastkd.deploy.runtime import greedy
from fastkd.deploy.smoothing import DividedEmbedding, smoothed
from fastkd.errors import ExportError
from fastkd.models.quantization import (
    SCHEMES,
    Codes,
    Weights,
    dequantize,
    fake_quantize_rows,
    quantised_modules,
    quantize,
)  # fmt: skip

pytest.importorskip("executorch", reason="the extra executorch is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 96


def tiny(family: str = "Llama", **options: Any) -> Any:
    """A causal model of one layer with random weights, large enough that its answers differ from token to token."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 192, "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**{**sizes, **options})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def exported(model: Deployable, folder: Path, quantize: str) -> Any:
    executorch.check(model, quantize)
    return executorch.load(folder, executorch.write(model, folder, quantize, None), 1)


def quantised_by_the_reference(model: nn.Module, scheme_name: str, scales: torch.dtype = torch.float32) -> nn.Module:
    """A copy with the weights of the scheme, and inputs of linear layers quantised for each row. scales: of groups."""
    scheme = SCHEMES[scheme_name]
    found = copy.deepcopy(model)
    for module, how in list(quantised_modules(found, scheme)):
        quantised = quantize(module.weight, how)
        if how.group is not None:
            quantised = Codes(quantised.codes, quantised.scales.to(scales).float())
        module.weight = nn.Parameter(dequantize(quantised))
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (fake_quantize_rows(args[0]),))
    return found


def relative(found: np.ndarray, expected: torch.Tensor) -> float:
    return float(np.abs(found - expected.numpy()).max() / expected.abs().max())


@pytest.fixture(scope="module")
def model() -> Deployable:
    return load_deployable(tiny())


EXPORT = """
import json, logging, sys
from pathlib import Path
from fastkd.models.hub import load_transformers
load_transformers()
from fastkd.deploy.formats import executorch
from fastkd.deploy.model import load_deployable
from tests.deploy.test_executorch import tiny
model = load_deployable(tiny())
executorch.check(model, "none")
folder = Path(sys.argv[1])
written = executorch.write(model, folder, "none", None)
(folder / "written.json").write_text(json.dumps(written))
assert not logging.getLogger().handlers, "the root logger has a handler"
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder, written by a process of its own; and what that process printed."""
    folder = tmp_path_factory.mktemp("none")
    command = [sys.executable, "-c", EXPORT, str(folder)]
    return folder, subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="module")
def runtime(export):
    folder, _ = export
    runtime = executorch.load(folder, json.loads((folder / "written.json").read_text()), 1)
    yield runtime
    runtime.close()


def test_nothing_that_the_libraries_say_is_seen(export):
    done = export[1]
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestLanguageModel:
    @pytest.mark.parametrize("shape", [(1, 1), (3, 37), (2, 150)])
    def test_logits_are_those_of_pytorch_for_every_batch_and_length(self, model, runtime, shape):
        ids = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected = model.plain(ids)
        found = runtime.logits(ids.numpy())
        assert found.shape == (*shape, VOCAB)
        assert relative(found, expected) < 1e-4

    def test_completes_greedily_as_transformers(self, model, runtime):
        prompt = torch.arange(1, 9)[None]
        expected = model.model.generate(prompt, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert greedy(runtime, prompt[0].tolist(), 32) == expected[0, 8:].tolist()
        assert len(set(expected[0, 8:].tolist())) > 4

    def test_a_sequence_leaves_nothing_to_the_next(self, runtime):
        ids = np.arange(5, dtype=np.int64)[None]
        before = runtime.prefill(ids)
        runtime.logits(np.ones((1, 100), np.int64))
        np.testing.assert_array_equal(runtime.prefill(ids), before)

    def test_a_sequence_longer_than_its_cache_is_refused(self, runtime):
        with pytest.raises(ExportError, match="got a sequence of 193 tokens; expected at most 192"):
            runtime.logits(np.zeros((1, 193), np.int64))

    def test_the_model_is_as_it_was(self, model):
        executorch.check(model, "int4")
        assert model.model.config._attn_implementation == "sdpa"
        assert not any(hasattr(module, "fastkd_layers") for module in model.model.modules())


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_weights_have_the_codes_of_the_scheme(scheme):
    model = tiny()
    expected = quantised_by_the_reference(model, scheme)
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    ids = torch.arange(VOCAB)[None]
    embedded = expected.get_input_embeddings()(ids)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = CachedLM(load_deployable(model))
    quantise(graph.model, SCHEMES[scheme], embedding=graph.model.get_input_embeddings())
    for name in names:
        found = graph.model.get_submodule(name).weight.dequantize()
        torch.testing.assert_close(found, expected.get_submodule(name).weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(graph.model.get_input_embeddings()(ids), embedded)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)  # those of the student are left as they are


def test_a_token_embedding_that_smoothing_has_divided_gives_the_same_rows():
    model = load_deployable(tiny())
    ids = torch.arange(VOCAB)[None]
    found = smoothed(model, [ids])[0].model.get_input_embeddings()
    coded = CodedEmbedding(found, Weights(8))
    expected = model.model.get_input_embeddings()(ids).detach()
    assert isinstance(found, DividedEmbedding)
    assert coded.factor is found.factor
    torch.testing.assert_close(coded(ids), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


class TestRefused:
    def test_a_group_that_does_not_divide_the_width(self):
        model = load_deployable(tiny(intermediate_size=80))
        with pytest.raises(ExportError, match=r"int4 for .*down_proj, which has 80 inputs; expected a multiple of 32"):
            executorch.check(model, "int4")

    @pytest.mark.parametrize(
        ("family", "options", "why"),
        [
            ("Bloom", {"n_layer": 1, "n_head": 4}, "takes no positions"),
            ("Gemma2", {}, "has a cap on its scores in its attention"),
            ("Mamba", {"state_size": 4}, "takes no positions|without transformers' interface"),
            ("Lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "answers otherwise"),
        ],
    )
    def test_an_architecture_whose_state_the_cache_does_not_hold(self, family, options, why):
        model = load_deployable(tiny(family, **options))
        with pytest.raises(ExportError, match=f"'executorch' for .*{why}"):
            executorch.check(model, "none")

    def test_a_missing_package(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ExportError, match=r"needs executorch, torchao; .*pip install 'fastkd\[executorch\]'"):
            find("executorch")

    def test_a_file_that_is_none(self, tmp_path):
        (tmp_path / "model.pte").write_bytes(b"no program" * 100)
        with pytest.raises(ExportError, match=r"model\.pte: ExecuTorch .* cannot load it"):
            executorch.load(tmp_path, {"length": 8, "chunk": 8, "rows": None, "files": ["model.pte"]}, 1)


@pytest.mark.soak
class TestMore:
    @pytest.mark.parametrize("family", ["Qwen3", "Gemma3Text", "GPT2"])
    def test_other_families(self, family, tmp_path):
        options = {"sliding_window": 40, "layer_types": ["sliding_attention"]} if family == "Gemma3Text" else {}
        model = load_deployable(tiny(family, **options))
        ids = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            expected = model.plain(ids)
        assert relative(exported(model, tmp_path, "none").logits(ids.numpy()), expected) < 1e-4

    @pytest.mark.parametrize("scheme", ["int8", "int4"])
    def test_quantised_files_compute_with_the_codes_of_the_scheme(self, scheme, model, tmp_path):
        ids = torch.randint(0, VOCAB, (2, 21), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            # XNNPACK keeps the scales of groups in bfloat16
            expected = quantised_by_the_reference(model.model, scheme, torch.bfloat16)(ids).logits
            unquantised = model.plain(ids)
        found = exported(model, tmp_path, scheme).logits(ids.numpy())
        assert relative(found, expected) < 0.05  # rounding of the inputs: alone, it costs 0.02 here
        assert scheme == "int8" or relative(found, unquantised) > 0.2

    @pytest.mark.parametrize("quantize", ["none", "int8"])
    def test_a_classifier_of_any_batch(self, quantize, tmp_path):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        network = nn.Sequential(*layers, nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10))
        model = load_deployable(network, examples=torch.randn(2, 1, 8, 8))
        inputs = torch.randn(45, 1, 8, 8)
        with torch.no_grad():
            expected = network.eval()(inputs)
        found = exported(model, tmp_path, quantize).logits(inputs.numpy())
        assert relative(found, expected) < (1e-4 if quantize == "none" else 0.05)
