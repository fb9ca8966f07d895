"""Tiny students that can end at an early layer, importable by the processes that tests start."""

from typing import Any

import torch
from hf_cases import VOCAB, model_of
from torch import Tensor, nn
from vision_cases import CLASSES

from fastkd.kernels import LMHead
from fastkd.models.protocol import Hidden

WIDTH = 12


class Layer(nn.Module):
    """What its layers return is all that goes on."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return x + self.dropout(torch.tanh(self.linear(mixed)))


class Stack(nn.Module):
    """A causal model of four layers that returns hidden states, or logits."""

    def __init__(self, *, logits: bool = False, seed: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCAB, WIDTH)
            self.layers = nn.ModuleList(Layer(dropout) for _ in range(4))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.gives_logits = logits

    def forward(self, tokens: Tensor, layers: int = 4) -> Any:
        x = self.embedding(tokens)
        for layer in self.layers[:layers]:
            x = layer(x)
        x = self.norm(x)
        return self.head(x) if self.gives_logits else Hidden(x, LMHead(self.head.weight))


def stack() -> Stack:
    return Stack(dropout=0.1)


def double_stack() -> Stack:
    return Stack().double()


def deep_llama() -> Any:
    return model_of("llama", num_hidden_layers=4, tie_word_embeddings=True)


class Blocks(nn.Module):
    """A classifier of images whose layers all return maps of one shape."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.stem = nn.Conv2d(1, 4, 3, padding=1)
            self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.head = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(torch.relu(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits
