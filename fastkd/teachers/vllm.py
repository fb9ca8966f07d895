"""`--teacher vllm:NAME`: a causal model in vLLM, in this process: its engine computes the last hidden states.

vLLM runs the model as a pooling model that returns the states of all tokens, after the final norm, as it gives them to
the LM head when it generates. The LM head is read from the model's files: so the answer is `Hidden`, and everything
that a cache can hold is made of it, as of a model of transformers.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TeacherError, TeacherUnavailable
from ..models.head_files import read_lm_head
from ..models.hub import brief, load_transformers, resolve
from ..models.protocol import Hidden
from ..models.tokenizers import Tokenizer, load_tokenizer
from ..settings import ModelSettings
from .hf import DTYPES, weights_sha256
from .options import parse_options
from .registry import register_teacher

INSTALL = "pip install 'fastkd[vllm]'"
_TASK = "token_embed"
# of the device's memory, for the engine: the LM head and its logits are there, too, and on a CPU much else
_MEMORY = {"cuda": 0.8, "cpu": 0.3}
# Engine arguments that do not change what is computed, but for rounding.
_SILENT = {
    "gpu_memory_utilization", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "enforce_eager",
    "distributed_executor_backend", "tensor_parallel_size", "pipeline_parallel_size",
}  # fmt: skip


@dataclass(frozen=True)
class VLLMOptions:
    """Arguments of vLLM's engine, by its names; None: its default."""

    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    enforce_eager: bool | None = None
    distributed_executor_backend: str | None = None


class VLLMTeacher:
    """A `Teacher` whose last hidden states are computed by vLLM.

    source: a folder with safetensors, or a name on the Hugging Face Hub (with revision). dtype: as of `load_hf`.
    attention: a backend of vLLM; None: its choice. device: of the LM head; the engine has its own.
    engine: further arguments of `vllm.LLM`, such as tensor_parallel_size, pipeline_parallel_size or quantization (awq,
    gptq, fp8, ...; None: as the model's config says).
    Raises TeacherError if vLLM cannot load the model, or if its states do not fit the LM head.
    """

    in_flight = 0  # one batch at a time: the engine schedules its rows

    def __init__(
        self,
        source: str | Path,
        *,
        dtype: str = "auto",
        attention: str | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        progress: bool = False,
        **engine: Any,
    ) -> None:
        if dtype != "auto" and dtype not in DTYPES:
            raise TeacherError(f"dtype: got {dtype!r}; expected one of auto, {', '.join(DTYPES)}.")
        self._files = resolve(source, revision)
        if self._files.gguf:
            raise TeacherError(f"{source}: got a GGUF file; expected safetensors for vLLM. Use it without vllm:.")
        self.name, self.notes, self._progress = self._files.name, list[str](), progress
        self._trust_remote_code = trust_remote_code
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        self.device = torch.device(self.device)
        self._vllm, self._llm = _engine(
            source,
            model=str(self._files.folder),
            dtype="float32" if dtype == "auto" and self.device.type == "cpu" else dtype,
            trust_remote_code=trust_remote_code,
            **({"attention_backend": attention} if attention else {}),
            **({"gpu_memory_utilization": _MEMORY.get(self.device.type, 0.8)} | engine),
        )
        config: Any = self._llm.llm_engine.model_config
        self._engine, self._attention = engine, attention
        self.dtype: torch.dtype = config.dtype
        self.max_positions: int | None = int(config.max_model_len)
        self.lm_head = read_lm_head(
            source, self._files, dtype=self.dtype, device=self.device, trust_remote_code=trust_remote_code
        )
        self.vocab_size = len(self.lm_head.weight)
        self._quantization = config.quantization
        self._architecture = str(config.architectures[0])
        width, expected = self._states([[0, 1, 2]])[0].shape[1], self.lm_head.weight.shape[1]
        if width != expected:
            raise TeacherError(
                f"{source}: got hidden states of {width} components from vLLM; expected {expected}, the width of the "
                "LM head: something projects them in between. Use it without vllm:."
            )

    @cached_property
    def fingerprint(self) -> str:
        """Architecture, engine and its version, sha256 of weights and config, dtype, quantization and options."""
        options = {k: v for k, v in self._engine.items() if k not in {*_SILENT, "quantization"} and v is not None}
        parts = [
            self._architecture,
            f"vLLM {self._vllm.__version__}",
            f"sha256 {weights_sha256(self._files, self._trust_remote_code, progress=self._progress)}",
            str(self.dtype).removeprefix("torch."),
            f"quantization {self._quantization or 'none'}",
        ]
        parts += [f"attention {self._attention}"] * bool(self._attention)
        return ", ".join(parts + [f"{name} {value}" for name, value in sorted(options.items())])

    def tokenizer(self, *, append_eos: bool = True, template: str | Path | None = None) -> Tokenizer:
        """The tokenizer in the model's folder; see `load_tokenizer`."""
        return load_tokenizer(
            self._files.path, append_eos=append_eos, template=template, trust_remote_code=self._trust_remote_code
        )

    def __call__(self, inputs: Tensor, lengths: Sequence[int] | None = None) -> Hidden:
        """inputs: token ids, int64 `[B, L]`, padded at the end; states of rows are computed up to their lengths, and
        are 0 beyond. TeacherError if L exceeds `max_positions`."""
        lengths = [inputs.shape[1]] * len(inputs) if lengths is None else lengths
        if self.max_positions is not None and max(lengths) > self.max_positions:
            raise TeacherError(
                f"{self.name}: got {max(lengths)} tokens; expected at most {self.max_positions}. Split them."
            )
        rows = inputs.tolist()
        found = self._states([tokens[:length] for tokens, length in zip(rows, lengths, strict=True)])
        states = torch.zeros((*inputs.shape, found[0].shape[1]), dtype=self.dtype, device=self.device)
        for row, state in enumerate(found):
            states[row, : len(state)] = state
        return Hidden(states, self.lm_head)

    def submit(self, inputs: Tensor, lengths: Sequence[int]) -> "LaterBatch":
        """A batch whose rows have these lengths without padding, which the engine is not given."""
        return LaterBatch(lambda: self(inputs, lengths))

    def close(self) -> None:
        """End the engine."""
        self._llm = None

    def _states(self, rows: list[list[int]]) -> list[Tensor]:
        """The last hidden states of some texts, `[L, D]` each."""
        try:
            found = self._llm.encode(
                [{"prompt_token_ids": tokens} for tokens in rows], pooling_task=_TASK, use_tqdm=False
            )
        except Exception as error:
            if "EngineDead" in type(error).__name__:
                raise TeacherUnavailable(f"{self.name}: vLLM's engine ended ({brief(error)}). See its log.") from error
            raise TeacherError(f"{self.name}: vLLM failed ({brief(error)}).") from error
        states = [one.outputs.data for one in found]
        for tokens, state in zip(rows, states, strict=True):
            if len(state) != len(tokens):
                raise TeacherError(
                    f"{self.name}: got the states of {len(state)} tokens from vLLM; expected {len(tokens)}. Leave out "
                    "engine arguments that change what it returns."
                )
        return states


class LaterBatch:
    """A batch that is answered when its turn comes; see `teachers.protocol.Begun`."""

    def __init__(self, answer: Callable[[], Hidden]) -> None:
        self._answer = answer

    def result(self, timeout: float | None = None) -> Hidden:
        """See `Begun`."""
        return self._answer()

    def cancel(self) -> None:
        """See `Begun`."""


@register_teacher("vllm")
def load(name: str, settings: ModelSettings) -> VLLMTeacher:
    """The teacher of `vllm:NAME`."""
    options = parse_options(settings.teacher_options, VLLMOptions, "vLLM")
    return VLLMTeacher(
        name,
        dtype=settings.dtype,
        attention=settings.attention,
        device=settings.device,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        **{name: value for name, value in asdict(options).items() if value is not None},
    )


def _engine(source: str | Path, **arguments: Any) -> tuple[Any, Any]:
    """The package vLLM, and an engine that returns the last hidden states of all tokens."""
    # standard output belongs to the command
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    load_transformers()
    try:
        vllm = import_module("vllm")
        pooling = import_module("vllm.config").PoolerConfig(task=_TASK, use_activation=False)
    except ImportError as error:
        raise TeacherError(f"vllm:{source}: vLLM cannot be imported ({brief(error)}). Use `{INSTALL}`.") from error
    try:
        return vllm, vllm.LLM(
            runner="pooling",
            convert="embed",
            pooler_config=pooling,
            enable_prefix_caching=False,  # states of a prefix in its cache would not be returned
            # in the model's own type: as float32, twice as many bytes would be copied, of the same values
            hf_overrides={"head_dtype": "model"},
            **arguments,
        )
    except Exception as error:
        raise TeacherError(
            f"{source}: vLLM cannot load it ({brief(error, 300)}). See what its processes said above; check that it "
            "is a causal language model that vLLM supports, and the options (quantization, parallel sizes, memory)."
        ) from error
