"""Teachers of transformers: what they say is what the model says, however it was saved, batched or headed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import VOCAB, model_of, saved, tokenizer_of, write_gguf
from torch import Tensor

from fastkd import linear_topk_targets, topk_targets
from fastkd.errors import TeacherError
from fastkd.kernels.lm_head import LMHead
from fastkd.models.hub import load_transformers, resolve
from fastkd.models.lm_head import logits_of
from fastkd.models.protocol import Hidden, Logits
from fastkd.teachers.hf import HFTeacher, load_hf
from fastkd.teachers.protocol import Teacher

CAUSAL = [
    "llama", "gpt2", "gemma2", "gemma3", "cohere", "granite", "hyperclovax", "minicpm3", "phi", "opt", "mixtral",
    "bloom", "mamba", "recurrent_gemma", "phi3",
]  # fmt: skip
NO_SDPA = {"gemma2", "bloom", "mamba"}  # transformers has none for them


@torch.inference_mode()
def said(teacher: Teacher, tokens: Tensor) -> Tensor:
    """Its logits `[B, L, V]`."""
    output = teacher(tokens)
    return logits_of(output.states, output.lm_head) if isinstance(output, Hidden) else output.values


def some_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


# What it says


@pytest.mark.parametrize("name", CAUSAL)
def test_hidden_states_and_head_are_the_model(tmp_path: Path, name: str) -> None:
    teacher = load_hf(saved(tmp_path, name))
    tokens = some_tokens(3, 20)
    with torch.inference_mode():
        output = teacher(tokens)
    assert isinstance(output, Hidden)
    assert isinstance(output.lm_head, LMHead)
    expected = model_of(name)(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(said(teacher, tokens), expected, atol=1e-5, rtol=1e-4)
    assert teacher.vocab_size == VOCAB
    # and so are the targets that are made of them
    head = output.lm_head
    targets = linear_topk_targets(
        output.states, head.weight, 8, bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale
    )
    whole = topk_targets(expected.detach(), 8)
    torch.testing.assert_close(targets.logprobs, whole.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(targets.tail, whole.tail, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "scale", "softcap"),
    [
        ("llama", {}, None, None),
        ("gemma2", {}, None, 0.5),
        ("gemma2", {"final_logit_softcapping": 30.0}, None, 30.0),  # the model's logits are far below it
        ("recurrent_gemma", {}, None, 0.5),
        ("cohere", {}, 0.0625, None),
        ("granite", {}, 1 / 8, None),
        ("hyperclovax", {}, 8.0, None),
        # a config may name what the model leaves alone
        ("llama", {"logit_scale": 3.0, "final_logit_softcapping": 2.0}, None, None),
        ("mixtral", {"logits_scaling": 4.0}, None, None),
    ],
)
def test_a_config_is_believed_as_far_as_the_model_proves_it(
    tmp_path: Path, name: str, changes: dict[str, Any], scale: float | None, softcap: float | None
) -> None:
    folder = saved(tmp_path, name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    output = load_hf(folder)(some_tokens(1, 5))
    assert isinstance(output, Hidden)
    assert isinstance(output.lm_head, LMHead)
    assert (output.lm_head.logit_scale, output.lm_head.softcap) == (scale, softcap)


def test_a_head_that_no_config_explains_gives_logits_and_says_so(tmp_path: Path) -> None:
    transformers = load_transformers()
    folder = saved(tmp_path, "bert", is_decoder=True)  # its head has a layer before the matrix
    teacher = load_hf(folder)
    tokens = some_tokens(2, 9)
    with torch.inference_mode():
        assert isinstance(teacher(tokens), Logits)
    assert ["BertLMHeadModel" in note and "materialized" in note for note in teacher.notes] == [True]
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    torch.testing.assert_close(said(teacher, tokens), expected, atol=1e-6, rtol=1e-5)


def test_a_cap_that_the_config_does_not_name_is_noticed(tmp_path: Path) -> None:
    model = model_of("llama")
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: 15 * torch.tanh(output / 15))
    teacher = HFTeacher(model, resolve(saved(tmp_path, "llama")), name="capped", notes=[])
    tokens = some_tokens(2, 6)
    torch.testing.assert_close(said(teacher, tokens), model(tokens).logits, atol=1e-6, rtol=1e-5)
    with torch.inference_mode():
        output = teacher(tokens)
    # the head's module has it, where its matrix has not
    assert isinstance(output, Hidden)
    assert not isinstance(output.lm_head, LMHead)


def test_a_head_wider_than_the_tokenizer_or_the_logits(tmp_path: Path) -> None:
    """V is what the model gives: some leave out the rows that pad their head's matrix."""
    model = model_of("llama")
    forward = model.forward

    def cut(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits[..., :90]
        return output

    model.forward = cut
    teacher = HFTeacher(model, resolve(saved(tmp_path, "llama")), name="cut", notes=[])
    assert teacher.vocab_size == 90
    assert said(teacher, some_tokens(2, 6)).shape == (2, 6, 90)


@pytest.mark.parametrize(
    ("name", "attention"), [(n, a) for n in CAUSAL for a in ("eager", "sdpa") if a == "eager" or n not in NO_SDPA]
)
def test_pads_behind_a_piece_change_nothing(tmp_path: Path, name: str, attention: str) -> None:
    teacher = load_hf(saved(tmp_path, name), attention=attention)
    tokens, lengths = some_tokens(4, 20), [20, 1, 7, 13]
    padded = torch.where(torch.arange(20) < torch.tensor(lengths)[:, None], tokens, 0)
    together = said(teacher, padded)
    for row, length in enumerate(lengths):
        alone = said(teacher, tokens[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_that_looks_ahead_is_refused(tmp_path: Path, attention: str) -> None:
    with pytest.raises(TeacherError, match=r"bert: BertLMHeadModel is not a causal model.*decoder"):
        load_hf(saved(tmp_path, "bert"), attention=attention)


def test_it_is_at_rest(tmp_path: Path) -> None:
    """No dropout, no gradients, no cache of keys: the same twice, whatever the config says."""
    folder = saved(tmp_path, "gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    teacher = load_hf(folder)
    assert not any(module.training for module in teacher.model.modules())
    assert not any(p.requires_grad for p in teacher.model.parameters())
    tokens = some_tokens(2, 9)
    assert torch.equal(said(teacher, tokens), said(teacher, tokens))
    with torch.inference_mode():
        assert teacher.model.base_model(input_ids=tokens, use_cache=False).past_key_values is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(tmp_path: Path, dtype: str) -> None:
    """On a CPU a model of 16 bits is widened, unless it is asked for as it is."""
    folder = saved(tmp_path, "gemma2", dtype=getattr(torch, dtype))
    wide, narrow = load_hf(folder, device="cpu"), load_hf(folder, dtype=dtype, device="cpu")
    tokens = some_tokens(2, 9)
    for teacher, expected in ((wide, torch.float32), (narrow, getattr(torch, dtype))):
        output = teacher(tokens)
        assert isinstance(output, Hidden)
        assert isinstance(output.lm_head, LMHead)
        assert output.states.dtype == output.lm_head.weight.dtype == expected
    torch.testing.assert_close(said(narrow, tokens), said(wide, tokens), atol=0.02, rtol=0.02)
    with pytest.raises(TeacherError, match="dtype: got 'int8'; expected one of auto, float32"):
        load_hf(folder, dtype="int8")


@pytest.mark.parametrize(
    ("name", "changes", "most"),
    [
        ("llama", {"max_position_embeddings": 77}, 77),
        ("gpt2", {}, 64),
        ("bloom", {}, None),
        ("mamba", {}, None),
        ("phi3", {}, 32),
    ],
)
def test_the_longest_piece(tmp_path: Path, name: str, changes: dict[str, Any], most: int | None) -> None:
    teacher = load_hf(saved(tmp_path, name, **changes))
    assert teacher.max_positions == most
    if most is not None:
        said(teacher, some_tokens(1, most))
        with pytest.raises(TeacherError, match=f"got {most + 1} tokens; expected at most {most}"):
            teacher(some_tokens(1, most + 1))


def test_why_long_pieces_of_longrope_are_refused(tmp_path: Path) -> None:
    """Beyond its first length, another piece in the batch would change what it says of a short one."""
    folder = saved(tmp_path, "phi3")
    (note,) = load_hf(folder).notes
    assert "32 of its 128 tokens" in note
    model = model_of("phi3")
    short = some_tokens(1, 20)
    alone = model(short).logits
    padded = model(torch.nn.functional.pad(short, (0, 20))).logits[:, :20]
    assert not torch.allclose(alone, padded, atol=1e-3)


# Which one it is


def test_fingerprint_is_of_contents(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    first = load_hf(folder).fingerprint
    kind, parameters, digest, dtype, attention = first.split(", ")
    assert (kind, dtype, attention) == ("LlamaForCausalLM", "float32", "attention sdpa")
    assert parameters == f"{sum(p.numel() for p in model_of('llama').parameters())} parameters"
    assert len(digest) == len("sha256 ") + 64
    # neither where it lies, nor who saved it
    shutil.copytree(folder, other := tmp_path / "elsewhere" / "renamed")
    config = json.loads((other / "config.json").read_text())
    config |= {"_name_or_path": "somebody/else", "transformers_version": "9.0", "use_cache": False}
    (other / "config.json").write_text(json.dumps(config))
    assert load_hf(other).fingerprint == first
    # but everything that decides what it says
    changed = {load_hf(folder, attention="eager").fingerprint, load_hf(folder, dtype="bfloat16").fingerprint}
    changed.add(load_hf(saved(tmp_path / "seed", "llama", seed=1)).fingerprint)
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    changed.add(load_hf(other).fingerprint)
    assert len(changed | {first}) == 5


def test_fingerprint_of_a_model_in_parts_is_of_the_files_that_are_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    model_of("llama").save_pretrained(folder, max_shard_size="20KB")
    parts = sorted(folder.glob("*.safetensors"))
    assert len(parts) > 2
    first = load_hf(folder).fingerprint
    (folder / "pytorch_model.bin").write_bytes(b"the same in another format")
    (folder / "consolidated.safetensors").write_bytes(b"and again")
    assert load_hf(folder).fingerprint == first
    data = bytearray(parts[1].read_bytes())
    data[-1] ^= 1
    parts[1].write_bytes(data)
    assert load_hf(folder).fingerprint != first


def test_name_is_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, "llama")
    assert load_hf(folder).name == "llama"
    monkeypatch.chdir(folder)
    assert load_hf(".").name == "llama"


# Where it lies


def hub_cache(root: Path, folder: Path, name: str, commit: str = "a" * 40) -> None:
    """Lay out a folder as the Hub's client keeps what it fetched."""
    home = root / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(folder, home / "snapshots" / commit)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    load_transformers()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_name_on_the_hub_that_was_fetched_before(tmp_path: Path, hub: Path) -> None:
    folder = saved(tmp_path, "llama")
    hub_cache(hub, folder, "someone/tiny")
    teacher = load_hf("someone/tiny")
    assert teacher.name == "tiny"
    assert teacher.fingerprint == load_hf(folder).fingerprint
    assert load_hf("someone/tiny", revision="a" * 40).fingerprint == teacher.fingerprint


def test_a_name_that_is_not_to_be_had(hub: Path) -> None:
    for name, revision in (("someone/tiny", None), ("someone/tiny", "v2"), ("gpt99", None)):
        with pytest.raises(TeacherError, match=r"^[^\n]*cannot be downl.*HF_HUB_OFFLINE[^\n]*hf download \S+`\)\.$"):
            load_hf(name, revision=revision)


def test_of_the_hub_only_what_is_loaded_is_fetched(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    tree = ["config.json", "tokenizer.json", "pytorch_model.bin", "onnx/model.onnx", "original/a.safetensors", "a.gguf"]
    asked: list[set[str]] = []

    def fetched(name: str, *, revision: Any, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        kept = huggingface_hub.utils.filter_repo_objects(
            tree, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        asked.append(set(kept))
        for file in asked[-1]:
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    resolve("someone/tiny")
    # pickled weights where there are no others
    assert asked == [{"config.json", "tokenizer.json"}, {"config.json", "tokenizer.json", "pytorch_model.bin"}]
    place = resolve("someone/tiny/a.gguf")
    assert (asked[2:], place.path, place.name) == ([{"a.gguf"}], tmp_path / "a.gguf", "a")
    with pytest.raises(TeacherError, match=r"there is no file b\.gguf in someone/tiny"):
        resolve("someone/tiny/b.gguf")


def test_the_network_is_forbidden_by_the_demo_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.demo import smollm2

    monkeypatch.delenv("HF_HUB_OFFLINE")
    load_transformers()
    assert "HF_HUB_OFFLINE" not in os.environ
    smollm2.load_transformers()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_gguf_file_is_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    words = tokenizer_of()
    model = model_of("llama", vocab_size=len(words))
    path = write_gguf(tmp_path / "tiny-f32.gguf", model, words)
    teacher = load_hf(path)
    tokens = some_tokens(2, 15)
    torch.testing.assert_close(said(teacher, tokens), model(tokens).logits, atol=1e-5, rtol=1e-4)
    assert (teacher.vocab_size, teacher.name) == (len(words), "tiny-f32")
    assert teacher.fingerprint.endswith(", GGUF")
    assert load_hf(path.rename(tmp_path / "renamed.gguf")).fingerprint == teacher.fingerprint
    own = load_hf(tmp_path / "renamed.gguf").tokenizer()
    text = "the quick brown fox, Ärger 🐈"
    assert own.encode(text) == [*words(text)["input_ids"], words.eos_token_id]
    assert own.template([{"role": "user", "content": "hi"}], True) == "<|turn|>user\nhi<|end|>\n<|turn|>assistant\n"


@pytest.mark.soak
def test_a_real_teacher_reads_english() -> None:
    """SmolLM2-135M-Instruct as its package has it, of quantised weights."""
    from fastkd.demo.smollm2 import find_gguf

    teacher = load_hf(find_gguf())
    assert (teacher.vocab_size, teacher.max_positions, teacher.notes) == (49152, 8192, [])
    ids = torch.tensor(
        [teacher.tokenizer(append_eos=False).encode("The capital of France is Paris. The capital of Italy is")]
    )
    targets = topk_targets(said(teacher, ids)[0], 5)
    assert teacher.tokenizer().encode(" Rome")[0] == int(targets.ids[-1, 0])


def test_places_that_hold_no_teacher(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_text("")
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "a.gguf").write_text("")
    adapter = saved(tmp_path / "lora", "llama")
    (adapter / "adapter_config.json").write_text("{}")
    for place, message in (
        (tmp_path / "nowhere", "there is no such file or folder"),
        ("./no/such/folder", "there is no such file or folder"),
        (tmp_path / "empty", "transformers cannot load it"),
        (tmp_path / "model.bin", "expected a .gguf file"),
        (tmp_path / "ggufs", r"Name one of them: .*a\.gguf"),
        (tmp_path / "ggufs" / "a.gguf", "transformers cannot load it"),
        (adapter, "got no base_model_name_or_path"),
    ):
        with pytest.raises(TeacherError, match=message) as error:
            load_hf(place)
        assert "\n" not in str(error.value)
        assert str(place) in str(error.value)


def test_settings_that_this_machine_cannot_have(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    for wrong, message in (
        ({"attention": "nonsense"}, "nonsense"),
        ({"attention": "flash_attention_2"}, "[Ff]lash"),
        ({"device": "nonsense"}, "device: got 'nonsense'"),
    ):
        with pytest.raises(TeacherError, match=message):
            load_hf(folder, **wrong)  # type: ignore[arg-type]


def test_a_model_that_was_not_saved_whole_is_refused(tmp_path: Path) -> None:
    """What is missing would be drawn at random."""
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    lacking = {k: v for k, v in weights.items() if "layers.1.mlp" not in k}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"3 of the model's weights are not in its files.*layers\.1\.mlp\.down_proj"):
        load_hf(folder)
    wrong = weights | {"lm_head.weight": torch.zeros(VOCAB, 31)}
    save_file(wrong, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"1 of the model's weights.*or have another shape: lm_head.weight"):
        load_hf(folder)
    save_file(weights | {"extra": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_hf(folder).notes == ["1 of the weights in its files are not used by the model: extra."]


def test_without_transformers() -> None:
    code = """
import sys
sys.modules["transformers"] = None
from fastkd.errors import TeacherError
from fastkd.teachers.hf import load_hf
try:
    load_hf(".")
except TeacherError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "pip install 'fastkd[hf]'" in found.stdout, found.stderr
