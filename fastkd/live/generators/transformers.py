"""`generate` of transformers: prompts padded at the left, with a cache of keys and values."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import StreamError
from ...models.hub import load_transformers
from ..sampling import sample, uniforms
from . import Ints, Sampling, SamplingStudent


class Generator:
    """See `generators.Generator`. Tokens are chosen by a logits processor, by the keys of their rows: `generate` itself
    would draw them from torch's generator, whose state depends on the batch."""

    def __init__(self, student: SamplingStudent) -> None:
        if not hasattr(student.model, "generate"):
            raise StreamError(
                f"rollout_generator: got 'transformers', and {student.name} has no `generate`. Use loop, or auto."
            )
        self._student = student

    def __call__(self, prompts: Sequence[Ints], keys: NDArray[np.uint64], sampling: Sampling) -> list[Ints]:
        model, longest = self._student.model, max(map(len, prompts))
        device = next(model.parameters()).device
        tokens_BL = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask_BL = torch.zeros_like(tokens_BL)
        for row, prompt in enumerate(prompts):
            tokens_BL[row, longest - len(prompt) :] = torch.from_numpy(prompt)
            mask_BL[row, longest - len(prompt) :] = 1
        uniform_BT = torch.from_numpy(uniforms(keys, sampling.tokens)).to(device)

        def choose(tokens_BT: Tensor, logits_BV: Tensor) -> Tensor:
            """Logits whose largest is that of the sampled token."""
            logits_BV = logits_BV[:, : sampling.vocab_size]
            ids_B = sample(logits_BV, uniform_BT[:, tokens_BT.shape[1] - longest], sampling.temperature)
            return torch.full_like(logits_BV, -torch.inf).scatter_(1, ids_B[:, None], 0.0)

        transformers = load_transformers()
        config = transformers.GenerationConfig(
            max_new_tokens=sampling.tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=list(sampling.eos) or None,
            pad_token_id=sampling.eos[0] if sampling.eos else 0,
        )
        # what a model's own config adds to the one given here, such as a repetition penalty, is not of the student's
        # distribution
        own, model.generation_config = model.generation_config, config
        try:
            with self._student.sampling(), _eager():
                found = model.generate(
                    tokens_BL.to(device),
                    attention_mask=mask_BL.to(device),
                    generation_config=config,
                    logits_processor=[choose],
                )
        finally:
            model.generation_config = own
        return [sampling.cut(row) for row in found[:, longest:].cpu().numpy()]

    def close(self) -> None:
        pass


def _eager() -> Any:
    """Compiled layers would be compiled again for each length."""
    return torch.compiler.set_stance("force_eager")
