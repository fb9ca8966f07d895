"""For any causal model: a forward of all tokens for each new one. No cache of keys and values, no left padding."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..sampling import sample, uniforms
from . import Ints, Sampling, SamplingStudent


class Generator:
    """See `generators.Generator`. Rows that have ended leave the batch."""

    def __init__(self, student: SamplingStudent) -> None:
        self._student = student

    def __call__(self, prompts: Sequence[Ints], keys: NDArray[np.uint64], sampling: Sampling) -> list[Ints]:
        uniform_BT = torch.from_numpy(uniforms(keys, sampling.tokens))
        lengths_B = torch.tensor([len(prompt) for prompt in prompts])
        tokens_BL = torch.zeros(len(prompts), int(lengths_B.max()) + sampling.tokens, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens_BL[row, : len(prompt)] = torch.from_numpy(prompt)
        active_A, done_B = torch.arange(len(prompts)), lengths_B.clone()
        device = next(self._student.model.parameters()).device
        with self._student.sampling() as logits_of:
            for step in range(sampling.tokens):
                length = int(done_B[active_A].max())
                rows_A = torch.arange(len(active_A)) * length + done_B[active_A] - 1
                logits_AV = logits_of(tokens_BL[active_A, :length].to(device), rows_A.to(device))
                logits_AV = logits_AV[:, : sampling.vocab_size]
                ids_A = sample(logits_AV, uniform_BT[active_A, step].to(device), sampling.temperature).cpu()
                tokens_BL[active_A, done_B[active_A]] = ids_A
                done_B[active_A] += 1
                active_A = active_A[~torch.isin(ids_A, torch.tensor(sampling.eos, dtype=torch.int64))]
                if not len(active_A):
                    break
        pairs = zip(tokens_BL.numpy(), lengths_B.tolist(), done_B.tolist(), strict=True)
        return [tokens[begin:end].copy() for tokens, begin, end in pairs]

    def close(self) -> None:
        pass
