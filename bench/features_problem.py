"""Two small problems to tell whether features help: handwritten digits, and bytes of English text.

Each has a teacher that is trained here, on labels, and a cache of its answers and inner states. What is held out is
known to neither teacher nor students.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastkd
from fastkd.cache import Cache, open_cache
from fastkd.cache.stores import MemoryStore
from fastkd.data.examples import Examples
from fastkd.data.packing import held_out_documents
from fastkd.demo.corpus import language_reference
from fastkd.demo.digits_inputs import CLASSES, HELD_OUT, digits, new_net, train_teacher
from fastkd.kernels import LMHead
from fastkd.models.protocol import Hidden

LENGTH = 64  # bytes of a document
COPIES = 8  # of a digit
STEP = 0.2  # of the features' codes


@dataclass(frozen=True, eq=False)
class Problem:
    """A cache with features, and students for it.

    cache: of a teacher's answers and features. data: of the digits. student: makes a new one by a seed. says: in words.
    """

    cache: Cache
    student: Callable[[int], nn.Module]
    says: str
    data: Examples | None = None


def digits_problem(*, seed: int = 0, width: int = 8, epochs: int = 30, images: int = 1797) -> Problem:
    """Digits in 8 augmented copies; a teacher of width 32, its maps after the second and the third convolution."""
    data = digits(seed, images=images, copies=COPIES)
    teacher = train_teacher(32, data, seed, epochs=epochs)
    store = MemoryStore()
    fastkd.capture(
        teacher, data, store, vocab_size=CLASSES, k=CLASSES, draws=0, held_out=HELD_OUT, seed=seed,
        shard_positions=1024, batch_tokens=1024, features=("layers.3", "layers.6"), feature_step=STEP,
    )  # fmt: skip
    says = f"digits: a network of width {width} from one of width 32"
    return Problem(open_cache(store), partial(new_net, width), says, data)


class Layer(nn.Module):
    """Causal attention and a gated product, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleDict({name: nn.RMSNorm(width) for name in ("attention", "product")})
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 6 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(self.norms["attention"](x)).view(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(found.transpose(1, 2).reshape(b, n, d))
        gate, value = self.up(self.norms["product"](x)).chunk(2, -1)
        y: Tensor = x + self.down(F.silu(gate) * value)
        return y


class ByteModel(nn.Module):
    """A causal transformer over bytes."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                depth = math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(weight, std=0.5 / math.sqrt(width) / depth if "layers" in name else 0.02)

    def forward(self, tokens: Tensor) -> Hidden:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return Hidden(self.norm(x), LMHead(self.head.weight))


def made(kind: type[nn.Module], *sizes: int, seed: int) -> nn.Module:
    """A module with random weights of a seed. Does not change torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(*sizes)


def documents_of(text: str, count: int | None = None) -> tuple[np.ndarray, int]:
    """Documents `[n, LENGTH]` of byte numbers, and how many bytes there are."""
    data = np.frombuffer(text.encode(), np.uint8)
    known, ids = np.unique(data, return_inverse=True)
    documents = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    return documents[:count], len(known)


def train_byte_teacher(
    model: ByteModel, documents: np.ndarray, *, steps: int, rows: int = 16, seed: int = 0
) -> ByteModel:
    """Train on documents, in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    random = np.random.default_rng(seed)
    for _ in range(steps):
        tokens = torch.from_numpy(documents[random.integers(0, len(documents), rows)]).long()
        found: Any = model(tokens[:, :-1])
        loss = F.cross_entropy((found.states @ found.lm_head.weight.T).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def bytes_problem(
    *, seed: int = 0, steps: int = 400, width: int = 64, layers: int = 4, count: int | None = None
) -> Problem:
    """Bytes of CPython's language reference; a teacher of width 64, the states in its middle and at its end."""
    documents, vocabulary = documents_of(next(language_reference()), count)
    held = held_out_documents(np.arange(len(documents), dtype=np.int32), 0.1, seed)
    teacher = made(ByteModel, vocabulary, width, layers, 4, seed=seed)
    assert isinstance(teacher, ByteModel)
    train_byte_teacher(teacher, documents[~held], steps=steps, seed=seed)
    store = MemoryStore()
    fastkd.capture(
        teacher, documents.tolist(), store, k=32, draws=8, context=LENGTH, packing="keep", held_out=0.1, seed=seed,
        features=(str(layers // 2), "-1"), feature_step=STEP, shard_positions=2**15,
    )  # fmt: skip
    says = "bytes of English: a transformer of width 24 from one of width 64"
    return Problem(open_cache(store), lambda s: made(ByteModel, vocabulary, 24, 2, 2, seed=s), says)
