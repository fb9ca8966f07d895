"""`generate` of transformers, with a cache of keys and values; prompts are padded at the left where that is proven."""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

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
        lengths = np.array([len(prompt) for prompt in prompts])
        if len(set(lengths.tolist())) == 1 or _pads(self._student.model):
            return self._batch(prompts, keys, sampling)
        found: dict[int, Ints] = {}
        for length in np.unique(lengths).tolist():
            some = np.flatnonzero(lengths == length)
            said = self._batch([prompts[i] for i in some.tolist()], keys[some], sampling)
            found |= zip(some.tolist(), said, strict=True)
        return [found[i] for i in range(len(prompts))]

    def _batch(self, prompts: Sequence[Ints], keys: NDArray[np.uint64], sampling: Sampling) -> list[Ints]:
        model, longest = self._student.model, max(map(len, prompts))
        device = next(model.parameters()).device
        uniform_BT = torch.from_numpy(uniforms(keys, sampling.tokens)).to(device)

        def choose(tokens_BT: Tensor, logits_BV: Tensor) -> Tensor:
            """Logits whose largest is that of the sampled token."""
            logits_BV = logits_BV[:, : sampling.vocab_size]
            ids_B = sample(logits_BV, uniform_BT[:, tokens_BT.shape[1] - longest], sampling.temperature)
            return torch.full_like(logits_BV, -torch.inf).scatter_(1, ids_B[:, None], 0.0)

        with self._student.sampling():
            found = _generate(model, prompts, sampling.tokens, sampling.eos, choose)
        return [sampling.cut(row) for row in found[:, longest:].cpu().numpy()]

    def close(self) -> None:
        pass


_PADS: MutableMapping[Any, bool] = WeakKeyDictionary()
"""By model, whether `generate` gives a row the same logits with padding at its left as without."""
_TOLERANCE = 1e-3  # of the largest logit


def _pads(model: Any) -> bool:
    """Whether prompts of several lengths can share a batch: proven on a few tokens. A recurrent model may take padding
    for a part of the prompt."""
    if model not in _PADS:
        training, seen = model.training, []

        def note(tokens_BT: Tensor, logits_BV: Tensor) -> Tensor:
            seen.append(logits_BV[-1].float())
            return logits_BV

        most = model.get_input_embeddings().weight.shape[0]
        short, long = (np.arange(n) % most for n in (3, 8))
        model.eval()
        try:
            with torch.no_grad():
                for batch in ([short], [long, short]):
                    _generate(model, batch, 2, (), note)
        finally:
            model.train(training)
        alone, padded = torch.stack(seen[:2]), torch.stack(seen[2:])
        _PADS[model] = bool((alone - padded).abs().max() <= _TOLERANCE * alone.abs().max())
    return _PADS[model]


def _generate(
    model: Any, prompts: Sequence[Ints], tokens: int, eos: Sequence[int], choose: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`generate` with the most likely token of the logits that `choose` returns: prompts and tokens, `[B, L + tokens]`
    at most."""
    device, longest = next(model.parameters()).device, max(map(len, prompts))
    tokens_BL = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask_BL = torch.zeros_like(tokens_BL)
    for row, prompt in enumerate(prompts):
        tokens_BL[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask_BL[row, longest - len(prompt) :] = 1
    config = load_transformers().GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(eos) or None,
        pad_token_id=eos[0] if eos else 0,
    )
    # what a model's own config adds to the one given here, such as a repetition penalty, is not of its distribution
    own, model.generation_config = model.generation_config, config
    try:
        # eager: compiled layers would be compiled again for each length
        with torch.compiler.set_stance("force_eager"):
            found: Tensor = model.generate(
                tokens_BL.to(device),
                attention_mask=mask_BL.to(device),
                generation_config=config,
                logits_processor=[choose],
            )
    finally:
        model.generation_config = own
    return found
