"""The problem of the quality suite: to map an early layer of a real teacher to its last hidden states.

The teacher runs once. Its dense logits at a position are `states @ head.T`, which is cheap to recompute. The vocabulary
is reduced to the tokens of the text and the most likely others, and the teacher's distribution is conditional on these.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTH = 256  # tokens per window
RIDGE = 0.01  # of the least squares, relative to the inputs' mean square
_ROWS = 1024  # of logits at a time


@dataclass(frozen=True, eq=False)
class Problem:
    """N positions, in windows of `LENGTH`; the last `held` of them are never trained on.

    inputs `[N, D]`: hidden states of an early layer, normed. states `[N, D]`: the last ones, inputs of the LM head.
    labels `[N]`: the token after each. head `[V, D]`: the LM head. mass: the teacher's probability of the V tokens.
    """

    inputs_ND: Tensor
    states_ND: Tensor
    labels_N: Tensor
    head_VD: Tensor
    held: int
    mass: float

    @property
    def trained(self) -> int:
        """Positions to train on; the first ones."""
        return len(self.states_ND) - self.held

    def logits(self, rows: Tensor | slice) -> Tensor:
        """The teacher's logits at some positions, `[n, V]`."""
        return self.states_ND[rows] @ self.head_VD.T

    @cached_property
    def fit_DD(self) -> Tensor:
        """Least squares from inputs to last states over the training positions, which initialize every student."""
        x, y = self.inputs_ND[: self.trained], self.states_ND[: self.trained]
        damped = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1])
        found: Tensor = torch.linalg.solve(damped, x.T @ y)
        return found


@torch.inference_mode()
def read_states(model: Any, windows_WL: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """A decoder's hidden states after `layer` layers, normed without a gain, and its last ones, `[W * L, D]` each."""
    inputs, last = [], []
    for window in windows_WL:
        found = model.model(window[None], output_hidden_states=True, use_cache=False).hidden_states
        early = found[layer][0].float()
        inputs.append(F.rms_norm(early, early.shape[1:]))
        last.append(found[-1][0].float())
    return torch.cat(inputs), torch.cat(last)


def cut(head_VD: Tensor, states_ND: Tensor, labels_N: Tensor, size: int) -> tuple[Tensor, Tensor, float]:
    """An LM head for `size` tokens: the labels, and those with the highest mean probability.

    Returns it, the labels as its rows, and the mean probability of its tokens.
    """
    probability_V = torch.zeros(len(head_VD))
    for some_ND in states_ND.split(_ROWS):
        probability_V += (some_ND @ head_VD.T).softmax(1).sum(0) / len(states_ND)
    present = labels_N.unique()
    if len(present) > size:
        raise ValueError(f"vocabulary: got {size}; expected at least {len(present)}, the number of tokens in the text.")
    rank_V = probability_V.clone()
    rank_V[present] += 1.0
    kept = rank_V.topk(min(size, len(head_VD))).indices
    number_V = torch.empty(len(head_VD), dtype=torch.int64)
    number_V[kept] = torch.arange(len(kept))
    return head_VD[kept].clone(), number_V[labels_N], float(probability_V[kept].sum())


def read_problem(teacher: Path | None, *, windows: int, held: int, layer: int, vocabulary: int) -> Problem:
    """The problem of a causal model (None: SmolLM2-135M-Instruct) and windows spread over CPython's language reference.

    windows, held: numbers of training and held-out windows. layer: whose hidden states the students get.
    """
    from fastkd.bench.teacher import load_teacher, text_ids

    model, tokenizer = load_teacher(teacher)
    ids = text_ids(tokenizer)
    count = windows + held
    if count * LENGTH >= len(ids):
        raise ValueError(
            f"windows: got {count} of {LENGTH} tokens each; expected no more than the {len(ids)} tokens of the text."
        )
    starts = torch.linspace(0, len(ids) - LENGTH - 1, count).long()
    # held-out windows are spread over the text
    starts = starts[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    windows_WL = torch.stack([ids[s : s + LENGTH + 1] for s in starts.tolist()])
    inputs_ND, states_ND = read_states(model, windows_WL[:, :-1], layer)
    weight_VD = model.lm_head.weight.detach().float()
    with torch.inference_mode():
        head_VD, labels_N, mass = cut(weight_VD, states_ND, windows_WL[:, 1:].flatten(), vocabulary)
    # inference tensors cannot be part of a graph
    return Problem(inputs_ND.clone(), states_ND.clone(), labels_N.clone(), head_VD.clone(), held * LENGTH, mass)


def made_up(windows: int, held: int, vocabulary: int, width: int, seed: int = 0) -> Problem:
    """A random teacher that draws its own labels; the inputs are its states with noise."""
    g = torch.Generator().manual_seed(seed)
    n = (windows + held) * LENGTH
    states_ND = 2.0 * torch.randn(n, width, generator=g)
    head_VD = torch.randn(vocabulary, width, generator=g) / width**0.5
    labels_N = (states_ND @ head_VD.T).softmax(1).multinomial(1, generator=g)[:, 0]
    inputs_ND = states_ND.tanh() + 0.3 * torch.randn(n, width, generator=g)
    return Problem(F.rms_norm(inputs_ND, [width]), states_ND, labels_N, head_VD, held * LENGTH, 1.0)
