"""vLLM, where it is installed: faster for long continuations on a GPU.

An engine is started for each round, from the student's weights in a temporary folder, and ended with it, so that it
takes no memory while the student is trained. Each continuation has its own seed; but the numbers of vLLM's kernels
depend on the batch, so that only committed rounds are the same after a kill.
"""

import gc
import tempfile
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import StreamError
from ...models.adapters import has_adapters
from . import Ints, Sampling, SamplingStudent

MEMORY = 0.4  # of the GPU, for the engine: the student and its optimizer are there too


class Generator:
    """See `generators.Generator`."""

    def __init__(self, student: SamplingStudent) -> None:
        if not hasattr(student.model, "save_pretrained"):
            raise StreamError(
                f"rollout_generator: got 'vllm', and {student.name} is no model of transformers. Use loop, or auto."
            )
        if has_adapters(student.model):
            raise StreamError(
                f"rollout_generator: got 'vllm' for {student.name}, which has an adapter; expected a whole model. Use "
                "transformers, loop, or auto."
            )
        try:
            self._vllm: Any = import_module("vllm")
        except ImportError as error:
            raise StreamError(
                f"rollout_generator: got 'vllm', which is not installed ({error}). pip install vllm, or use auto."
            ) from error
        with tempfile.TemporaryDirectory() as folder:
            student.model.save_pretrained(folder)
            # token ids go in and come out, so no tokenizer is needed
            self._engine: Any = self._vllm.LLM(
                model=folder, skip_tokenizer_init=True, dtype="auto", gpu_memory_utilization=MEMORY
            )

    def __call__(self, prompts: Sequence[Ints], keys: NDArray[np.uint64], sampling: Sampling) -> list[Ints]:
        options = [
            self._vllm.SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.tokens,
                seed=int(key >> np.uint64(2)),
                stop_token_ids=list(sampling.eos),
                allowed_token_ids=list(range(sampling.vocab_size)) if self._padded(sampling) else None,
                detokenize=False,
            )
            for key in keys
        ]
        inputs = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        found = self._engine.generate(inputs, options, use_tqdm=False)
        # an id that stops a continuation may be left out of it
        continued = []
        for one in found:
            tokens, reason = list(one.outputs[0].token_ids), one.outputs[0].stop_reason
            if isinstance(reason, int) and tokens[-1:] != [reason]:
                tokens.append(reason)
            continued.append(sampling.cut(np.array(tokens, np.int64)))
        return continued

    def close(self) -> None:
        self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _padded(self, sampling: Sampling) -> bool:
        """Whether the student's vocabulary is larger than the teacher's."""
        return int(self._engine.llm_engine.model_config.get_vocab_size()) > sampling.vocab_size
