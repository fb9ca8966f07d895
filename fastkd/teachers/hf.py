"""A causal language model of transformers as a teacher: from a folder, a GGUF file, or a name on the Hub.

teacher = load_hf("HuggingFaceTB/SmolLM2-135M")
output = teacher(tokens)  # Hidden(states, lm_head), or Logits if the LM head cannot be read from the model's config
"""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TeacherError
from ..models.adapters import CONFIG, WEIGHTS, adapter_files
from ..models.hf import Declared, declared_by, load_causal_lm, probe_causal_lm
from ..models.hub import ModelFiles, resolve
from ..models.protocol import Hidden, Logits, Output
from ..models.tokenizers import Tokenizer, load_tokenizer
from ..utils.distributed import local_device
from ..utils.hashing import files_sha256
from .tensor_parallel import ParallelGroup

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Keys of config.json, and of an adapter's, that do not change the output, or that the fingerprint states separately.
_VOLATILE = {
    "_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "base_model_name_or_path", "inference_mode", "peft_version",
}  # fmt: skip
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # in the order in which transformers looks for them


class HFTeacher:
    """A `Teacher` that runs a causal model of transformers; made by `load_hf`.

    name: for people. notes: remarks for a person, a line each. model: the model itself.
    """

    def __init__(
        self,
        model: Any,
        files: ModelFiles,
        *,
        name: str,
        notes: list[str],
        trust_remote_code: bool = False,
        progress: bool = False,
    ) -> None:
        self.model, self.name, self.notes = model, name, notes
        self._files, self._trust_remote_code, self._progress = files, trust_remote_code, progress
        self.device: torch.device = model.device
        probed = probe_causal_lm(model, name, notes)
        self.vocab_size, self.max_positions, self._lm_head = probed.vocab_size, probed.max_positions, probed.lm_head
        if self._lm_head is None:
            notes.append(
                f"{type(model).__name__}: no reading of its config reproduces its logits from its last hidden states, "
                "so full logits [positions, V] are materialized for every batch, which costs memory and time."
            )

    def __call__(self, inputs: Tensor) -> Output:
        """inputs: token ids, int64 `[B, L]`, padded at the end. TeacherError if L exceeds `max_positions`."""
        if self.max_positions is not None and inputs.shape[1] > self.max_positions:
            raise TeacherError(
                f"{self.name}: got {inputs.shape[1]} tokens; expected at most {self.max_positions}. Split them."
            )
        # no attention mask: padding comes last, and a causal model never attends to it
        if self._lm_head is None:
            return Logits(self.model(input_ids=inputs, use_cache=False).logits)
        states = self.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        return Hidden(states.to(self._lm_head.dtype), self._lm_head.lm_head)

    def tokenizer(self, *, append_eos: bool = True, template: str | Path | None = None) -> Tokenizer:
        """The tokenizer in the model's folder; see `load_tokenizer`."""
        return load_tokenizer(
            self._files.path, append_eos=append_eos, template=template, trust_remote_code=self._trust_remote_code
        )

    @cached_property
    def fingerprint(self) -> str:
        """Architecture, number of parameters, sha256 of weights and config, dtype, attention, and whether GGUF."""
        parts = [
            type(self.model).__name__,
            f"{sum(p.numel() for p in self.model.parameters())} parameters",
            f"sha256 {weights_sha256(self._files, self._trust_remote_code, progress=self._progress)}",
            str(self.model.dtype).removeprefix("torch."),
            f"attention {self.model.config._attn_implementation}",
        ]
        return ", ".join(parts + ["GGUF"] * bool(self._files.gguf))


def load_hf(
    source: str | Path,
    *,
    dtype: str = "auto",
    attention: str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    parallel: ParallelGroup | None = None,
    progress: bool = False,
    check: Callable[[Declared], None] = lambda declared: None,
) -> HFTeacher:
    """Load a causal language model, in evaluation mode, as a teacher.

    source: a folder, a GGUF file, or a name on the Hugging Face Hub (with revision: a branch, a tag or a commit).
    dtype: "float32", "bfloat16", "float16", or "auto": the model's own on a GPU, float32 on a CPU, where bfloat16
        takes five times as long. GGUF weights are dequantized to it.
    attention: an attention implementation of transformers ("eager", "sdpa", "flash_attention_2"...); None: its default.
    device: default: the GPU of this process's local rank, if there is one.
    trust_remote_code: run the Python code that comes with the model.
    parallel: the processes that the model's layers are divided over. Each of them loads it with the same arguments, and
        calls it and its LM head in the same order.
    progress: a progress bar on stderr while the weights are hashed.
    check: called with what its config declares, before the weights are loaded.

    Raises TeacherError if the model cannot be loaded, is not a causal language model, or lacks weights.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise TeacherError(f"dtype: got {dtype!r}; expected one of auto, {', '.join(DTYPES)}.")
    files = resolve(source, revision)
    check(declared_by(files.folder))
    if parallel is None:
        target = local_device(device, TeacherError)
    elif device is not None and torch.device(device).type != parallel.device.type:
        raise TeacherError(f"device: got {device}; expected {parallel.device}, as its group of processes has.")
    else:
        target = parallel.device
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "dtype": DTYPES.get(dtype, torch.float32 if target.type == "cpu" else "auto"),
    }
    if parallel is not None and parallel.size > 1:
        options["distributed_config"] = parallel.distributed_config()
    elif target.type != "cpu":
        options["device_map"] = {"": target}
    notes: list[str] = []
    model = load_causal_lm(source, files, attention=attention, notes=notes, **options)
    if parallel is not None:
        parallel.check(source, model)
    model.eval().requires_grad_(False)
    return HFTeacher(model, files, name=files.name, notes=notes, trust_remote_code=trust_remote_code, progress=progress)


def weights_sha256(files: ModelFiles, with_code: bool, *, progress: bool = False) -> str:
    """The sha256 of a model's weights and config (and its code)."""
    paths, config = _hashed_files(files, with_code)
    digests = [digest for digest, _ in files_sha256(paths, progress=progress)]
    return hashlib.sha256(json.dumps([digests, config], sort_keys=True).encode()).hexdigest()


def _hashed_files(files: ModelFiles, with_code: bool) -> tuple[list[Path], Any]:
    """The files of a model's weights (and its code), sorted by name, and its config.json without volatile keys."""
    if files.gguf:
        return [files.path], None
    if (adapter := adapter_files(files)) is not None:
        base, config = _hashed_files(adapter.base_files, with_code)
        own = _without_volatile(json.loads((files.folder / CONFIG).read_text()))
        return [*base, files.folder / WEIGHTS], [config, own]
    config = json.loads((files.folder / "config.json").read_text())
    first = config.get("transformers_weights") or next((n for n in _WEIGHTS if (files.folder / n).exists()), None)
    if first is None:
        raise TeacherError(f"{files.folder}: got a folder without weights to hash; expected {' or '.join(_WEIGHTS)}.")
    names = {first}
    if first.endswith(".index.json"):
        names = set(json.loads((files.folder / first).read_text())["weight_map"].values())
    scripts = files.folder.glob("*.py") if with_code else ()
    return [files.folder / name for name in sorted(names)] + sorted(scripts), _without_volatile(config)


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(part) for key, part in value.items() if key not in _VOLATILE}
    return [_without_volatile(part) for part in value] if isinstance(value, list) else value
