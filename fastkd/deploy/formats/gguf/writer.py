"""The format: which type of file a quantisation is, the file written and compared with the student, and loaded.

| --quantize | type | |
|---|---|---|
| none | f16 | norms and biases f32 |
| int8 | q8_0 | |
| int4 | q4_0, ends q8_0 | of a student that was trained for int4 |
| int4 | q4_K_M | by llama.cpp's `llama-quantize`, where it is on the PATH and 256 divides the widths |
| int4 | iq4_nl, ends q8_0 | otherwise |
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ....errors import ExportError
from ....models.quantization import noted_scheme
from ...calibration import Calibration
from ...model import Deployable
from ...smoothing import smoothed
from .architectures import add_hyperparameters, architecture_of, tensors
from .blocks import BLOCK, encode, type_of
from .llama_cpp import LlamaCpp
from .vocabulary import TEXTS, Vocabulary, read_vocabulary

EXTRA = "gguf"
PACKAGES = ("gguf", "transformers", "xllamacpp")
QUANTIZE = ("none", "int8", "int4")

FILE = "model.gguf"
_TYPES = {"none": "f16", "int8": "q8_0", "int4": "iq4_nl"}
_TRAINED_TYPE = "q4_0"
_FILE_TYPES = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0", "iq4_nl": "MOSTLY_IQ4_NL",
}  # fmt: skip
_TOOL, _K_TYPE, _K_BLOCK = "llama-quantize", "Q4_K_M", 256
# of the logits, relative to their norm: what else than rounding would make is far above
_MAY_DIFFER = {"f32": 1e-3, "f16": 0.03, "q8_0": 0.3}


def check(model: Deployable, quantize: str) -> None:
    architecture_of(model)
    read_vocabulary(model.tokenizer, model.vocab_size)
    if quantize == "none":
        return
    for _, name, weight in tensors(model):
        if weight.ndim > 1 and weight.shape[-1] % BLOCK:
            raise ExportError(
                f"quantize: got {quantize!r} for {name} of {model.name}, which has {weight.shape[-1]} inputs; expected "
                f"a multiple of {BLOCK}, the block of GGUF's {_TYPES[quantize]}."
            )


def write(
    model: Deployable,
    folder: Path,
    quantize: str,
    calibration: Calibration | None,
    *,
    dtype: str | None = None,
) -> dict[str, Any]:
    """See `Format.write`. dtype: "f32", in place of the type of "none"."""
    vocabulary = read_vocabulary(model.tokenizer, model.vocab_size)
    kind = dtype or _TYPES[quantize]
    path = folder / FILE
    notes: list[str] = []
    if quantize == "int8":  # a tied LM head stays as it is: llama.cpp has no token embedding that is divided
        model, notes = smoothed(model, calibration, tied=False)
    trained = model.folder is not None and noted_scheme(model.folder) == "int4"
    if quantize == "int4":
        odd = next((int(w.shape[-1]) for _, _, w in tensors(model) if w.ndim > 1 and w.shape[-1] % _K_BLOCK), None)
        tool = shutil.which(_TOOL)
        if tool is not None and not trained and odd is None:
            plain = folder / f".{FILE}"
            _write(model, vocabulary, plain, "f16")
            _compare(model, vocabulary, plain, "f16")
            _quantize(tool, plain, path)
            plain.unlink()
            return {"file": FILE, "type": _K_TYPE.lower()}
        kind = _TRAINED_TYPE if trained else kind
        notes.append(f"4 bits are GGUF's {kind}{_why(trained, odd)}.")
    _write(model, vocabulary, path, kind)
    _compare(model, vocabulary, path, kind)
    return {"file": FILE, "type": kind, "notes": notes}


def load(folder: Path, written: dict[str, Any], threads: int) -> LlamaCpp:
    return LlamaCpp(folder / written["file"], threads, exact=written["type"] == "f32")


def _why(trained: bool, odd: int | None) -> str:
    if trained:
        return ", which the student was trained for"
    if odd is not None:
        return f": q4_K needs widths that are multiples of {_K_BLOCK}, and one is {odd}"
    return (
        f", as llama.cpp's {_TOOL} is not on the PATH; for q4_K, export with --quantize none and type {_TOOL} "
        f"FOLDER/{FILE} q4_k.gguf {_K_TYPE}"
    )


def _write(model: Deployable, vocabulary: Vocabulary, path: Path, kind: str) -> None:
    """The file, a weight in memory at a time beside the model."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture_of(model).name)
    try:
        writer.add_name(model.name)
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
        if "q" in kind:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_hyperparameters(writer, model)
        vocabulary.add_to(writer)
        for name, _, weight in tensors(model):
            number = gguf.GGMLQuantizationType[type_of(name, weight, kind).upper()]
            values, size = gguf.GGML_QUANT_SIZES[number]
            writer.add_tensor_info(
                name, tuple(weight.shape), np.dtype(np.float32), weight.numel() // values * size, raw_dtype=number
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, weight in tensors(model):
            stored = type_of(name, weight, kind)
            writer.write_tensor_data(encode(name, weight, stored, model.name))
    finally:
        writer.close()


def _quantize(tool: str, source: Path, path: Path) -> None:
    found = subprocess.run([tool, str(source), str(path), _K_TYPE], capture_output=True, text=True, check=False)
    if found.returncode or not path.is_file():
        said = (found.stderr.strip() or found.stdout.strip() or "it said nothing").splitlines()[-1]
        raise ExportError(f"quantize: {tool} ended with exit status {found.returncode} ({said}).")


def _compare(model: Deployable, vocabulary: Vocabulary, path: Path, kind: str) -> None:
    """Raise ExportError if llama.cpp does not find the student's token ids, or not its logits, in a file."""
    runtime = LlamaCpp(path, torch.get_num_threads(), exact=kind == "f32")
    try:
        if vocabulary.backend is not None:
            for text in (*TEXTS, "".join(str(token) for token in vocabulary.backend.all_special_tokens)):
                ours, theirs = list(vocabulary.backend(text)["input_ids"]), runtime.tokenize(text)
                if ours != theirs:
                    raise ExportError(
                        f"tokenizer: got {theirs[:12]}… from llama.cpp for {text!r}; expected {ours[:12]}…, the ids of "
                        f"{model.tokenizer}. Export it to onnx."
                    )
        if (limit := _MAY_DIFFER.get(kind)) is None:
            return
        with torch.no_grad():
            expected = model.plain(model.example).double().numpy()
        error = np.linalg.norm(runtime.logits(model.example.numpy()) - expected) / np.linalg.norm(expected)
        if not error <= limit:
            raise ExportError(
                f"to: got logits from llama.cpp that differ from those of {model.name} by {error:.2g} of their norm; "
                f"expected at most {limit} for {kind}. Its config has what GGUF does not hold; export it to onnx."
            )
    finally:
        runtime.close()
