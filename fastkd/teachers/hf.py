"""A causal language model of transformers as a teacher: from a folder, a GGUF file, or a name on the Hub.

teacher = load_hf("HuggingFaceTB/SmolLM2-135M")
said = teacher(tokens)  # Hidden(states, head), wherever its logits are made of them as its config says
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TeacherError
from ..models.hf import check_causal, check_weights, max_positions, some_tokens
from ..models.hub import Place, brief, load_transformers, resolve
from ..models.lm_head import find_head
from ..models.protocol import Hidden, Logits, Output
from ..models.tokenizers import Tokenizer, load_tokenizer
from ..utils.hashing import files_sha256
from .tensor_parallel import ParallelGroup

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a config.json holds beside the model: where it was, who wrote it, what the fingerprint says apart.
_VOLATILE = {"_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # in the order in which transformers looks for them


class HFTeacher:
    """A causal model of transformers; made by `load_hf`. See protocol.py for what a teacher is.

    name: for people. notes: what they should know of it, a line each. model: the model itself.
    """

    def __init__(
        self, model: Any, place: Place, *, name: str, notes: list[str], code: bool = False, progress: bool = False
    ) -> None:
        self.model = model
        self.name = name
        self.notes = notes
        self._place, self._code, self._progress = place, code, progress
        self.device: torch.device = model.device
        self.max_positions = max_positions(model.config, notes)
        tokens = some_tokens(model, self.max_positions).to(self.device)
        with torch.inference_mode():
            try:
                logits = model(input_ids=tokens, use_cache=False).logits
            except Exception as error:
                raise TeacherError(
                    f"{name}: {type(model).__name__} is there, but fails on {tokens.numel()} tokens ({brief(error)}). "
                    "Try another attention implementation, dtype or device."
                ) from error
            check_causal(model, tokens, logits, name)
            self._found = find_head(model, tokens)
        self.vocab_size = int(logits.shape[-1])
        if self._found is None:
            notes.append(
                f"{type(model).__name__}: no reading of its config makes its logits of its last hidden states, so they "
                "are taken whole: [positions, V] is held for every batch, which costs memory and time."
            )

    def __call__(self, inputs: Tensor) -> Output:
        """tokens int64 `[B, L]`, padded behind; TeacherError where L is more than it takes."""
        if self.max_positions is not None and inputs.shape[1] > self.max_positions:
            raise TeacherError(f"{self.name}: got {inputs.shape[1]} tokens; it takes {self.max_positions}. Split them.")
        # no attention mask: pads come last, and a causal model never looks there
        if self._found is None:
            return Logits(self.model(input_ids=inputs, use_cache=False).logits)
        states = self.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        return Hidden(states.to(self._found.dtype), self._found.head)

    def tokenizer(self, *, append_eos: bool = True, template: str | Path | None = None) -> Tokenizer:
        """The tokenizer that lies beside it; see `load_tokenizer`."""
        return load_tokenizer(self._place.path, append_eos=append_eos, template=template, trust_remote_code=self._code)

    @cached_property
    def fingerprint(self) -> str:
        """Architecture, number of parameters, sha256 of weights and config, dtype, attention, and whether a GGUF."""
        files, config = _files(self._place, self._code)
        digests = [digest for digest, _ in files_sha256(files, progress=self._progress)]
        whole = hashlib.sha256(json.dumps([digests, config], sort_keys=True).encode()).hexdigest()
        parts = [
            type(self.model).__name__,
            f"{sum(p.numel() for p in self.model.parameters())} parameters",
            f"sha256 {whole}",
            str(self.model.dtype).removeprefix("torch."),
            f"attention {self.model.config._attn_implementation}",
        ]
        return ", ".join(parts + ["GGUF"] * bool(self._place.gguf))


def load_hf(
    place: str | Path,
    *,
    dtype: str = "auto",
    attention: str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    parallel: ParallelGroup | None = None,
    progress: bool = False,
) -> HFTeacher:
    """A causal language model in evaluation mode.

    place: a folder, a GGUF file, or a name on the Hugging Face Hub (with revision: a branch, a tag or a commit).
    dtype: "float32", "bfloat16", "float16", or "auto": the model's own on a GPU, float32 on a CPU, where bfloat16
        takes five times as long. A GGUF is dequantised into it.
    attention: an attention implementation of transformers ("eager", "sdpa", "flash_attention_2"...); None: its choice.
    device: default: the GPU where there is one.
    trust_remote_code: run the Python code that comes with the model.
    parallel: the processes over which its layers are divided. All of them load it so, and make the same calls of it,
        and of the head that it gives, in the same order.
    progress: a bar on stderr while the weights are hashed.

    Raises TeacherError where it cannot be loaded, is no causal language model, or lacks weights.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise TeacherError(f"dtype: got {dtype!r}; expected one of auto, {', '.join(DTYPES)}.")
    transformers = load_transformers()
    found = resolve(place, revision)
    on = _device(device, parallel)
    if (found.folder / "adapter_config.json").exists() and not found.gguf:
        raise TeacherError(f"{place}: an adapter, which is no whole model. Merge it into its model, and name that.")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, **found.arguments}
    options["dtype"] = DTYPES.get(dtype, torch.float32 if on.type == "cpu" else "auto")
    if found.gguf:
        # packed, it would be dequantised at every call, and whether it is would depend on what else is installed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if attention is not None:
        options["attn_implementation"] = attention
    if parallel is not None and parallel.size > 1:
        options["distributed_config"] = parallel.plan()
    elif on.type != "cpu":
        options["device_map"] = {"": on}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            found.folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:
        raise TeacherError(
            f"{place}: transformers cannot load it as a causal language model ({brief(error)}). Check that it is one, "
            "that its files are whole, and that this machine has what the settings ask for."
        ) from error
    notes: list[str] = []
    check_weights(place, info, notes)
    if parallel is not None:
        parallel.check(place, model)
    model.eval().requires_grad_(False)
    return HFTeacher(model, found, name=found.name, notes=notes, code=trust_remote_code, progress=progress)


def _device(device: str | torch.device | None, parallel: ParallelGroup | None) -> torch.device:
    if parallel is not None:
        if device is not None and torch.device(device).type != parallel.device.type:
            raise TeacherError(f"device: got {device}, the processes that share the teacher are on {parallel.device}.")
        return parallel.device
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise TeacherError(f"device: got {device!r} ({brief(error, 80)}); expected cpu, cuda or cuda:N.") from error


def _files(place: Place, code: bool) -> tuple[list[Path], Any]:
    """The files that hold a model's weights (and its code), by name, and what its config.json says of it."""
    if place.gguf:
        return [place.folder / place.gguf], None
    config = json.loads((place.folder / "config.json").read_text())
    first = config.get("transformers_weights") or next((n for n in _WEIGHTS if (place.folder / n).exists()), None)
    if first is None:
        raise TeacherError(f"{place.folder}: none of {', '.join(_WEIGHTS)} is there to be hashed.")
    names = {first}
    if first.endswith(".index.json"):
        names = set(json.loads((place.folder / first).read_text())["weight_map"].values())
    scripts = place.folder.glob("*.py") if code else ()
    return [place.folder / name for name in sorted(names)] + sorted(scripts), _lasting(config)


def _lasting(value: Any) -> Any:
    """A parsed config without what does not decide what the model says."""
    if isinstance(value, dict):
        return {key: _lasting(part) for key, part in value.items() if key not in _VOLATILE}
    return [_lasting(part) for part in value] if isinstance(value, list) else value
