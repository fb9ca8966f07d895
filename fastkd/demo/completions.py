"""What models make of held-out prefixes: the five most likely next tokens, and a completion."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..models.hub import load_transformers
from ..report.page import Answer, Example
from .artifacts import Json

PREFIXES, LENGTH, TOPS, WRITTEN = 8, 40, 5, 24


def held_out_prefixes(windows: NDArray[Any]) -> NDArray[np.int64]:
    """The beginnings `[eight, 40]` of held-out windows `[n, L]`, evenly chosen; fewer and shorter where they are."""
    count, length = min(PREFIXES, len(windows)), min(LENGTH, windows.shape[1] // 2)
    return windows[np.linspace(0, len(windows) - 1, count).round().astype(int), :length].astype(np.int64)


@torch.inference_mode()
def completions_of(model: Any, tokenizer: Path, prefixes: NDArray[np.int64]) -> Json:
    """What a causal model of transformers expects next, and what it writes when it always takes the most likely token.

    prefixes `[n, L]`. tokenizer: the folder where it lies. With `prefixes`, the text of each; `tops`, the likeliest
    tokens and their probabilities; `written`, the completions.
    """
    words = load_transformers().AutoTokenizer.from_pretrained(tokenizer)
    model.eval()
    tokens = torch.from_numpy(prefixes).to(model.device)
    probabilities = model(input_ids=tokens, use_cache=False).logits[:, -1].float().softmax(-1).topk(TOPS)
    written = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=WRITTEN, do_sample=False,
        pad_token_id=words.eos_token_id,
    )  # fmt: skip
    pairs = zip(probabilities.indices.tolist(), probabilities.values.tolist(), strict=True)
    return {
        "prefixes": words.batch_decode(prefixes.tolist()),
        "tops": [[[words.decode([i]), p] for i, p in zip(ids, ps, strict=True)] for ids, ps in pairs],
        "written": words.batch_decode(written[:, tokens.shape[1] :].tolist(), skip_special_tokens=True),
    }


def student_completions(student: Path, tokenizer: Path, prefixes: NDArray[np.int64]) -> Json:
    """`completions_of` a student's folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_transformers().AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).to(device)
    return completions_of(model, tokenizer, prefixes)


def examples(answers: dict[str, Json]) -> Sequence[Example]:
    """For a page: each prefix with what every model makes of it."""
    first = next(iter(answers.values()))
    return [
        Example(
            prefix,
            [
                Answer(name, [(str(token), float(p)) for token, p in found["tops"][i]], found["written"][i])
                for name, found in answers.items()
            ],
        )
        for i, prefix in enumerate(first["prefixes"])
    ]
