"""What teachers and students share about causal language models of transformers: checks and limits."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TeacherError

_PROBE = (2, 12)  # pieces and tokens that a model is tried on when it is loaded


def check_weights(place: str | Path, info: dict[str, Any], notes: list[str]) -> None:
    """Refuse a model of which a part would have been drawn at random."""
    if lacking := sorted({*map(str, info["missing_keys"]), *(str(key[0]) for key in info["mismatched_keys"])}):
        raise TeacherError(
            f"{place}: {len(lacking)} of the model's weights are not in its files, or of another shape: "
            f"{', '.join(lacking[:3])}{', …' * (len(lacking) > 3)}. It is of another kind, or was not saved whole."
        )
    if unused := sorted(map(str, info["unexpected_keys"])):
        listed = ", ".join(unused[:3]) + ", …" * (len(unused) > 3)
        notes.append(f"{len(unused)} of the weights in its files are no part of the model: {listed}.")


def check_causal(model: Any, tokens: Tensor, logits: Tensor, name: str) -> None:
    """Refuse a model that looks ahead: pads behind a piece would change what it says of the piece."""
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % int(tokens.max() + 1)
    changed = model(input_ids=other, use_cache=False).logits
    before, after = (z[:, :-1].float() for z in (logits, changed))
    eps = torch.finfo(model.dtype).eps
    moved = ((before - after).abs() > max(1e-5, 4 * eps) * before.abs().max()).any(-1)
    # In 16 bits a mixture of experts may route a token or two otherwise once an expert's batch is of another size.
    if int(moved.sum()) > (0 if eps < 1e-5 else moved.numel() // 2):
        raise TeacherError(
            f"{name}: {type(model).__name__} is no causal model: another last token changed what it says of positions "
            "before it. A decoder is needed (some models are one with is_decoder in their config)."
        )


def some_tokens(model: Any, longest: int | None) -> Tensor:
    """Tokens to try a model on, the same in every process."""
    rows, length = _PROBE[0], min(_PROBE[1], longest or _PROBE[1])
    ids = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, ids, (rows, length), generator=torch.Generator().manual_seed(0))


def max_positions(config: Any, notes: list[str]) -> int | None:
    """The longest piece that a model takes."""
    text = config.get_text_config()
    if getattr(text, "alibi", False):
        return None
    most = next((n for key in ("max_position_embeddings", "n_positions") if (n := getattr(text, key, None))), None)
    rope = getattr(text, "rope_parameters", None) or {}
    for kind in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        short = kind.get("original_max_position_embeddings")
        if kind.get("rope_type") == "longrope" and short and (most is None or short < most):
            notes.append(
                f"pieces are kept to {short} of its {most} tokens: beyond, what it says of any position of a batch "
                "changes with the longest piece in it (rope_type longrope)."
            )
            most = int(short)
    return None if most is None else int(most)
