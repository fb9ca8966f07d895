"""The final norm of a causal model of transformers: found by its place, proven on a probe."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TeacherError
from .adapters import base_of
from .taps import Taps

_TOKENS = 8


def find_final_norm(model: Any) -> nn.Module:
    """The module between the last layer and the LM head: the one that turns what the last layer returns into the
    model's last hidden states, on a probe. TeacherError if no module does.
    """
    base = base_of(model).base_model
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(0, vocabulary, (1, _TOKENS), generator=generator).to(model.device)
    with torch.no_grad(), Taps(model, ["-1"]) as taps:
        expected = base(input_ids=tokens, use_cache=False).last_hidden_state
        before = taps.values["-1"]
        # from the end, as at initialization all norms are equal
        modules: list[nn.Module] = list(base.modules())
        for module in reversed(modules):
            if "norm" in type(module).__name__.lower() and _gives(module, before, expected):
                return module
    raise TeacherError(
        f"{type(model).__name__}: no norm of it turns what its last layer returns into its last hidden states, so the "
        "states after the final norm cannot be computed."
    )


def _gives(module: nn.Module, states: Tensor, expected: Tensor) -> bool:
    try:
        found = module(states)
    except (RuntimeError, TypeError):  # a norm of heads, of another width
        return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.equal(found, expected)
