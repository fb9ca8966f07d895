"""GGUF files: llama.cpp answers as transformers does, with its token ids; and transformers loads the files again."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from deploy_cases import text_run
from hf_cases import SPECIAL, TEMPLATE, tokenizer_of

from fastkd.deploy import export
from fastkd.deploy.formats import gguf as exporter
from fastkd.deploy.formats.gguf import llama_cpp
from fastkd.deploy.formats.gguf.vocabulary import TEXTS
from fastkd.deploy.model import Deployable, load_deployable
from fastkd.deploy.runtime import greedy
from fastkd.errors import ExportError
from fastkd.models.hub import load_transformers
from fastkd.models.quantization import NOTE, SCHEMES, fake_quantize, quantised_weights

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

# weights so large that attention, windows and caps matter
USUAL = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "initializer_range": 0.2,
    "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA = USUAL | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", USUAL | {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", USUAL | {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("Llama", USUAL | {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama-linear": ("Llama", USUAL | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("Mistral", USUAL | {"sliding_window": None}),
    "qwen2": ("Qwen2", USUAL),
    "qwen2-yarn": ("Qwen2", USUAL | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                                         "original_max_position_embeddings": 64}}),
    "qwen3": ("Qwen3", USUAL | {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("Gemma", USUAL | {"head_dim": 16}),
    "gemma2": ("Gemma2", GEMMA | {"num_hidden_layers": 3, "attn_logit_softcapping": 5.0,
                                  "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", GEMMA | {"num_hidden_layers": 7, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}}),
}  # fmt: skip


def model_of(name: str, **changes: Any) -> Any:
    kind, arguments = CASES[name]
    torch.manual_seed(0)
    transformers = load_transformers()
    config = getattr(transformers, f"{kind}Config")(**(arguments | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, which are ones and zeros
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def deployable(name: str, **changes: Any) -> Deployable:
    return load_deployable(model_of(name, **changes))


def ids_of(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 320, (rows, length))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_answers_as_transformers(name: str, tmp_path: Path) -> None:
    model = deployable(name)
    exporter.check(model, "none")
    runtime = exporter.load(tmp_path, exporter.write(model, tmp_path, "none", None, dtype="f32"), 1)
    with torch.no_grad():
        for ids in (ids_of(3, 23), ids_of(1, 100)):
            expected = model.plain(torch.from_numpy(ids)).numpy()
            # llama.cpp looks up GELU in a table of float16
            assert difference(runtime.logits(ids), expected) < (2e-3 if name.startswith("gemma") else 1e-4)
    assert expected[0].std(0).mean() > 0.1 * expected.std()  # positions differ
    prompt = torch.from_numpy(ids_of(1, 9))
    module: Any = model.model
    expected = module.generate(prompt, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 9:]
    assert greedy(runtime, prompt[0].tolist(), 32) == expected.tolist()
    runtime.close()


def test_a_completion_may_be_longer_than_expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The context is begun again with more room, and goes on with the same tokens."""
    monkeypatch.setattr(llama_cpp, "_MOST_TOKENS", 16)
    model = deployable("llama", num_hidden_layers=1)
    runtime = exporter.load(tmp_path, exporter.write(model, tmp_path, "none", None, dtype="f32"), 1)
    ids = ids_of(1, 80)
    found = [runtime.prefill(ids[:, :30]), *(runtime.decode(int(token)) for token in ids[0, 30:])]
    with torch.no_grad():
        expected = model.plain(torch.from_numpy(ids)).numpy()
    assert difference(np.array(found), expected[0, 29:]) < 1e-4
    with pytest.raises(ExportError, match=r"got tokens up to 320; expected 0 to 319"):
        runtime.decode(320)
    runtime.close()


def test_an_export_is_evaluated_in_llama_cpp(tmp_path: Path) -> None:
    """From a run's folder, by `fastkd.deploy.export`; the cost of 8 bits is small, and not nothing."""
    student, cache = text_run(tmp_path / "run")
    report = export(student, "gguf", tmp_path / "out", quantize="int8", cache=cache, threads=1)
    assert report.quality is not None
    assert report.runtime.startswith("llama.cpp (xllamacpp")
    assert 0 < abs(report.quality.cost.mean) < 0.01
    assert report.quality.exported.intervals()["student_agreement"].mean > 0.9


def test_a_version_that_is_not_recognised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SimpleNamespace(llama_context_default_params=llama_cpp._Settings)
    with pytest.raises(ExportError, match=r"cannot be called here, as its settings have other members; expected one"):
        llama_cpp._context_settings(other, 512, 64, exact=False)
    monkeypatch.setitem(llama_cpp._FUNCTIONS, "llama_no_such", (None, []))
    with pytest.raises(ExportError, match="as it does not export llama_no_such"):
        llama_cpp._library.__wrapped__()


# Tokenizers


def saved(folder: Path, tokenizer: Any, name: str = "llama", **changes: Any) -> Deployable:
    model_of(name, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_deployable(str(folder))


def trained(*steps: Any, ignore_merges: bool = False) -> Any:
    """A byte-level tokenizer of 320 ids with these steps before merging."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    raw.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    raw.train_from_iterator(TEXTS, trainer)
    return load_transformers().PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")


def split_by(pattern: str, *, ignore_merges: bool = False) -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return trained(
        split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), ignore_merges=ignore_merges
    )


def pieces(*, prefix: bool, bos: bool) -> Any:
    """A tokenizer as of sentencepiece: BPE over characters that falls back to bytes. prefix: a space before a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

    replace = normalizers.Replace(" ", "▁")
    raw = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    raw.train_from_iterator(
        ["the quick brown fox is quick", "a fox"],
        trainers.BpeTrainer(vocab_size=318, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False),
    )
    # bytes are no special tokens there, only tokens of the model
    parts = json.loads(raw.to_str())
    parts["added_tokens"] = parts["added_tokens"][:3]
    raw = Tokenizer.from_str(json.dumps(parts))
    raw.add_tokens([AddedToken("<|plain|>", normalized=False)])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return load_transformers().PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


LLAMA3_SPLIT = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def digits() -> Any:
    from tokenizers import pre_tokenizers

    return trained(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))


TOKENIZERS: dict[str, tuple[Any, str]] = {
    "gpt-2": (tokenizer_of, "gpt-2"),
    "gpt-2 with bos": (lambda: tokenizer_of(bos=True), "gpt-2"),
    "smollm": (digits, "smollm"),
    "llama3": (lambda: split_by(LLAMA3_SPLIT, ignore_merges=True), "llama-bpe"),
    "dbrx": (lambda: split_by(LLAMA3_SPLIT), "dbrx"),
    "qwen2": (lambda: split_by(LLAMA3_SPLIT.replace("{1,3}", "")), "qwen2"),
    "llama2": (lambda: pieces(prefix=True, bos=True), "default"),
    "gemma": (lambda: pieces(prefix=False, bos=True), "default"),
}
OTHERS = (
    "The quick brown fox jumps over the lazy dog, and the other dogs.", "a", "  ", "\n", "", "x" * 70,
    "The 2024-11-28T01:02:03Z log: ERROR (42) can't re-open '/tmp/файл.txt' — §4.2; ½⅔ x²·10³",
    "if x<0:\n\t\treturn\t-x\n\n\n    else:\r\n  y+=1", "\x00\x7f\ufffd\U0001d518\U0001d52b \uff46\u3000\uff57 e\u0301",
    "<|end|> between<|begin|>tokens <|turn|>", "<s>a</s> b<|plain|>c <unk>",
)  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_finds_the_same_ids(name: str, tmp_path: Path) -> None:
    import gguf

    make, pre = TOKENIZERS[name]
    model = saved(tmp_path, make(), num_hidden_layers=1)
    tokenizer = load_transformers().AutoTokenizer.from_pretrained(tmp_path)
    exporter.check(model, "none")
    (out := tmp_path / "out").mkdir()
    runtime = exporter.load(out, exporter.write(model, out, "none", None), 1)
    for text in (*OTHERS, *TEXTS):
        assert runtime.tokenize(text) == list(tokenizer(text)["input_ids"]), text
    runtime.close()
    fields = gguf.GGUFReader(out / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == pre
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    if "gpt-2" in name:
        assert fields["tokenizer.chat_template"].contents() == TEMPLATE


# Types of weights


def values_of(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file as float32 `[O, I]`, by their names there."""
    import gguf

    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_transformers_loads_the_file_again(name: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "student", tokenizer_of(), name, tie_word_embeddings=True)
    (out := tmp_path / "out").mkdir()
    exporter.write(model, out, "none", None, dtype="f32")
    transformers = load_transformers()
    again = transformers.AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    expected = model.model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for key, weight in again.state_dict().items():
        assert torch.allclose(weight, expected[key], atol=1e-6), key
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    theirs = transformers.AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    assert [theirs(text)["input_ids"] for text in TEXTS] == [ours(text)["input_ids"] for text in TEXTS]


def test_weights_in_8_and_4_bits(tmp_path: Path) -> None:
    import gguf

    model = saved(tmp_path, tokenizer_of(), "qwen2", tie_word_embeddings=False)
    found = {}
    for quantize in ("none", "int8", "int4"):
        exporter.check(model, quantize)
        (out := tmp_path / quantize).mkdir()
        written = exporter.write(model, out, quantize, None)
        found[written["type"]] = values_of(out / written["file"])
        runtime = exporter.load(out, written, 1)
        with torch.no_grad():
            expected = model.plain(torch.from_numpy(ids := ids_of(2, 20))).numpy()
        assert difference(runtime.logits(ids), expected) < {"none": 5e-3, "int8": 0.1, "int4": 0.7}[quantize]
        runtime.close()
    assert list(found) == ["f16", "q8_0", "iq4_nl"]
    for name, key, exact in named(model):
        for kind, values in found.items():
            array = torch.from_numpy(values[name].copy())
            if exact.ndim == 1:
                assert torch.equal(array, exact)
            elif kind == "f16":
                assert torch.equal(array, exact.half().float())
            elif kind == "iq4_nl" and "proj" in key:  # less than the 4 bits that the package gguf writes
                q4 = gguf.GGMLQuantizationType.Q4_0
                others = gguf.quants.dequantize(gguf.quants.quantize(exact.numpy(), q4), q4)
                assert (array - exact).norm() < 0.95 * np.linalg.norm(others - exact.numpy())
            else:  # half a step, and the scale in float16
                step = exact.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True) / 127
                error = ((array - exact).unflatten(1, (-1, 32)).abs() / step).double()
                assert error.max() <= 0.6
                assert 0.2 < error.mean() < 0.3


def test_a_student_trained_for_4_bits_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes that it was trained with are written, also where llama-quantize is installed."""
    install_tool(tmp_path / "bin", monkeypatch, "exit 3")
    module = model_of("qwen2", **WIDE)
    setattr(module.config, NOTE, SCHEMES["int4"].to_json())
    module.save_pretrained(tmp_path / "student")
    model = load_deployable(str(tmp_path / "student"))
    (out := tmp_path / "out").mkdir()
    written = exporter.write(model, out, "int4", None)
    assert written["type"] == "q4_0"
    assert "trained for" in written["notes"][0]
    values, ways, seen = values_of(out / "model.gguf"), quantised_weights(module, SCHEMES["int4"]), 0
    for name, key, exact in named(model):
        if key in ways and ways[key].bits == 4:
            assert np.allclose(values[name], fake_quantize(exact, ways[key]), rtol=2**-10, atol=0)
            seen += 1
    assert seen == 7


def named(model: Deployable) -> list[tuple[str, str, torch.Tensor]]:
    """Parameters of a model of qwen2, whose rows stay where they are: name in GGUF, name, values."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    parameters = model.model.named_parameters()
    return [(names.get_name(key, (".weight", ".bias")), key, value.detach()) for key, value in parameters]


WIDE = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 256}


def install_tool(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A stand-in for llama.cpp's llama-quantize, first on the PATH."""
    folder.mkdir()
    (tool := folder / "llama-quantize").write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_the_tool_of_llama_cpp_makes_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deployable("llama", **WIDE)
    (out := tmp_path / "out").mkdir()
    written = exporter.write(model, out, "int4", None)
    assert written["type"] == "iq4_nl"
    assert "llama-quantize FOLDER/model.gguf q4_k.gguf Q4_K_M" in written["notes"][0]
    (again := tmp_path / "again").mkdir()
    install_tool(tmp_path / "bin", monkeypatch, f'cp "$1" "$2"; echo "$3" > {tmp_path / "asked"}')
    assert exporter.write(model, again, "int4", None) == {"file": "model.gguf", "type": "q4_k_m"}
    assert (tmp_path / "asked").read_text() == "Q4_K_M\n"
    assert [path.name for path in again.iterdir()] == ["model.gguf"]
    exporter.load(again, {"file": "model.gguf", "type": "q4_k_m"}, 1).close()
    # a width of 64 is no multiple of the 256 of its blocks
    written = exporter.write(deployable("llama"), again, "int4", None)
    assert written["type"] == "iq4_nl"
    assert "multiples of 256, and one is 64" in written["notes"][0]
    (tmp_path / "bin" / "llama-quantize").write_text("#!/bin/sh\necho main: no room >&2; exit 3\n")
    with pytest.raises(ExportError, match=r"llama-quantize ended with exit status 3 \(main: no room\)"):
        exporter.write(model, again, "int4", None)


# What cannot be written, or loaded


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'; expected 'silu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE scaling"),
        ("mistral", {"sliding_window": 8}, "sliding_attention in layer 0; expected full_attention"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "full_attention in layer 0; expected sliding_attention"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64; expected head_dim, 16"),
        ("gemma2", {"attn_logit_softcapping": None}, "softcapping"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ExportError, match=said) as error:
        exporter.check(deployable(name, **changes), "none")
    assert str(error.value).endswith("Export it to onnx.")


def test_other_architectures_and_modules() -> None:
    transformers = load_transformers()
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4))
    with pytest.raises(ExportError, match="model_type is 'gpt2'; expected one of llama, mistral, qwen2"):
        exporter.check(load_deployable(gpt2), "none")
    with pytest.raises(ExportError, match=r"a classifier; expected a language model of transformers"):
        exporter.check(load_deployable(torch.nn.Linear(4, 3), examples=torch.ones(2, 4)), "none")


def test_a_width_that_blocks_do_not_divide() -> None:
    model = deployable("llama", intermediate_size=80)
    exporter.check(model, "none")
    for quantize in ("int8", "int4"):
        with pytest.raises(ExportError, match=r"down_proj.weight of .*, which has 80 inputs; expected a multiple of"):
            exporter.check(model, quantize)


def test_a_value_that_float16_cannot_hold(tmp_path: Path) -> None:
    model = deployable("llama")
    with torch.no_grad():
        model.model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = 1e5
    with pytest.raises(ExportError, match=r"got 100000 in blk.1.ffn_up.weight of .*; expected at most 65504, for f16"):
        exporter.write(model, tmp_path, "none", None)


def test_tokenizers_that_gguf_does_not_hold(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    kinds = load_transformers().PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ExportError, match=r"tokenizer of type WordLevel; expected BPE, as GGUF can hold"):
        exporter.check(saved(tmp_path / "words", kinds(tokenizer_object=words, eos_token="b")), "none")
    other = trained(pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    with pytest.raises(ExportError, match=r"a pre-tokenizer that llama.cpp has no name for; expected one of gpt-2"):
        exporter.check(saved(tmp_path / "other", other), "none")
    with pytest.raises(ExportError, match=r"got ids up to \d+ in .*; expected less than 200, the tokens of the model"):
        exporter.check(saved(tmp_path / "small", tokenizer_of(), vocab_size=200), "none")


def test_a_tokenizer_of_which_llama_cpp_makes_other_ids(tmp_path: Path) -> None:
    """A normalizer is not stored, and so the difference is found when the file is written."""
    from tokenizers import normalizers

    lower = tokenizer_of()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    model = saved(tmp_path, lower)
    (out := tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match=r"from llama.cpp for 'Hello world'; expected \["):
        exporter.write(model, out, "none", None)


def test_a_model_that_the_file_does_not_describe(tmp_path: Path) -> None:
    """Whatever is not known to be different is found by its logits."""
    model = deployable("llama")
    config: Any = model.config
    config.rope_parameters["rope_theta"] = 50.0  # not what the module was made with
    with pytest.raises(ExportError, match=r"got logits from llama.cpp that differ from those of"):
        exporter.write(model, tmp_path, "none", None)


def test_damaged_files(tmp_path: Path) -> None:
    written = exporter.write(deployable("llama"), tmp_path, "none", None)
    path = tmp_path / "model.gguf"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"GGML" + whole[4:], b""):
        path.write_bytes(damaged)
        with pytest.raises(ExportError, match=r"model.gguf: llama.cpp cannot load it \(\w"):
            exporter.load(tmp_path, written, 1)
    path.unlink()
    with pytest.raises(ExportError, match="cannot load it"):
        exporter.load(tmp_path, written, 1)
