"""Completions of held-out prefixes: the five most likely next tokens, and a greedy continuation."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..models.hub import load_transformers
from ..report.page import Answer, Example, Paragraph, Section
from .artifacts import Json

PREFIXES, PREFIX_TOKENS, TOP_TOKENS, NEW_TOKENS = 8, 40, 5, 24
NOTE = (
    "Prefixes from held-out text. Bars: each model's five most likely next tokens and their probabilities; below them "
    "its greedy completion."
)


def prefixes_of(windows: NDArray[Any]) -> NDArray[np.int64]:
    """The first tokens `[8, 40]` of evenly chosen windows `[n, L]`; fewer and shorter if n or L are small."""
    count, length = min(PREFIXES, len(windows)), min(PREFIX_TOKENS, windows.shape[1] // 2)
    return windows[np.linspace(0, len(windows) - 1, count).round().astype(int), :length].astype(np.int64)


@torch.inference_mode()
def completions_of(model: Any, tokenizer: Path, prefixes: NDArray[np.int64]) -> Json:
    """A causal model's continuations of prefixes `[n, L]`.

    Returns "prefixes", their text; "tops", [token, probability] of each one's most likely next tokens; "written", the
    greedy continuations.
    """
    words = load_transformers().AutoTokenizer.from_pretrained(tokenizer)
    model.eval()
    tokens = torch.from_numpy(prefixes).to(model.device)
    top = model(input_ids=tokens, use_cache=False).logits[:, -1].float().softmax(-1).topk(TOP_TOKENS)
    written = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False,
        pad_token_id=words.eos_token_id,
    )  # fmt: skip
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return {
        "prefixes": words.batch_decode(prefixes.tolist()),
        "tops": [[[words.decode([i]), p] for i, p in zip(ids, ps, strict=True)] for ids, ps in pairs],
        "written": words.batch_decode(written[:, tokens.shape[1] :].tolist(), skip_special_tokens=True),
    }


def student_completions(student: Path, tokenizer: Path, prefixes: NDArray[np.int64]) -> Json:
    """`completions_of` the model in a folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_transformers().AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).to(device)
    return completions_of(model, tokenizer, prefixes)


def completions_section(answers: dict[str, Json]) -> Section:
    """Each prefix with the answers of all models. answers: `completions_of`, by model."""
    examples = [
        Example(prefix, [Answer(name, found["tops"][i], found["written"][i]) for name, found in answers.items()])
        for i, prefix in enumerate(next(iter(answers.values()))["prefixes"])
    ]
    return Section("Completions", [Paragraph(NOTE), *examples])
