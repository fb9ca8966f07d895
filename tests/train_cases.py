"""Tiny caches and students for the tests of training, importable by the processes that these start."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hf_cases import VOCAB, config_of
from safetensors.torch import save_file
from torch import Tensor, nn

import fastkd
from fastkd.cache import Cache, open_cache
from fastkd.kernels.lm_head import LMHead
from fastkd.models.protocol import Hidden
from fastkd.train.checkpoint import FOLDER, Checkpoint, read
from fastkd.utils.signals import Stop

WIDTH = 12
# at least eight shards, of segments of many lengths
CAPTURE: dict[str, Any] = {"k": 6, "draws": 3, "context": 16, "shard_positions": 48, "held_out": 0.2}
# keep: what is compared after a run is the optimizer's state, too
SMALL: dict[str, Any] = {
    "batch_tokens": 60, "micro_tokens": 32, "steps": 10, "rate": 0.01, "evaluate_every": 0, "keep": 2,
}  # fmt: skip


class Tiny(nn.Module):
    """A causal model: each position sees a decaying sum of all up to it. Hidden states and an LM head, or logits."""

    def __init__(
        self, *, vocab: int = VOCAB, seed: int = 0, logits: bool = False, dropout: float = 0.0, bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator).to(dtype))

        self.embedding = nn.Embedding(vocab, WIDTH, _weight=drawn(vocab, WIDTH).data)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(3))
        for layer in self.layers:
            layer.weight, layer.bias = drawn(WIDTH, WIDTH), drawn(WIDTH)
        self.norm = nn.LayerNorm(WIDTH, dtype=dtype)
        self.head = drawn(vocab, WIDTH)
        self.head_bias = drawn(vocab) if bias else None
        self.dropout = nn.Dropout(dropout)
        self.gives_logits = logits

    def forward(self, tokens: Tensor) -> Any:
        x = self.embedding(tokens)
        for layer in self.layers:
            mixed = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None].to(x.dtype).sqrt()
            x = x + self.dropout(torch.tanh(layer(mixed) / 4))
        x = self.norm(x)
        if self.gives_logits:
            z: Tensor = x @ self.head.T
            return z if self.head_bias is None else z + self.head_bias
        return Hidden(x, LMHead(self.head, self.head_bias))


def tiny() -> Tiny:
    """A factory for module:factory."""
    return Tiny(seed=1)


def wide() -> Tiny:
    """For the ids of a tokenizer."""
    return Tiny(seed=1, vocab=300)


def seeded() -> Tiny:
    """Weights that depend on torch's seed."""
    return Tiny(seed=int(torch.randint(0, 10_000, ())))


def double() -> Tiny:
    return Tiny(seed=1, dtype=torch.float64)


def other_double() -> Tiny:
    return Tiny(seed=2, dtype=torch.float64)


def third_double() -> Tiny:
    return Tiny(seed=3, dtype=torch.float64, logits=True)


def dropping() -> Tiny:
    return Tiny(seed=1, dropout=0.2)


def llama(**changes: Any) -> Any:
    return config_of("llama", **changes)


def documents(count: int = 60, longest: int = 30, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, int(n)).tolist() for n in random.integers(2, longest, count)]


def make_cache(folder: Path, data: Any = None, **changes: Any) -> Cache:
    """A cache of some documents by a teacher of the same kind."""
    teacher = Tiny(seed=7)
    fastkd.capture(teacher, documents() if data is None else data, folder, **{**CAPTURE, **changes})
    return open_cache(folder)


class Toy:
    """An objective from outside the package: cross-entropy, and a penalty on large logits that fades out."""

    signals = ("labels", "targets")
    outputs = ("logits",)

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def schedule(self, step: int, steps: int) -> dict[str, float]:
        return {"strength": self.strength * (1 - step / steps)}

    def losses(self, batch: Any, outputs: Any, *, num_items: Any, strength: Any) -> dict[str, Tensor]:
        logits = outputs["logits"]
        labels = batch.labels.flatten()[batch.targets.index]
        cross_entropy = nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items
        l2 = strength * logits.square().mean(1).sum() / num_items
        return {"loss": cross_entropy + l2, "cross_entropy": cross_entropy, "l2": l2}

    def describe(self) -> dict[str, Any]:
        return {"strength": self.strength}


def toy_objective(strength: float) -> Any:
    return Toy(strength)


def write_version_1(run: Path, step: int, groups: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """A checkpoint of version 1, as fastkd wrote it before DCP."""
    folder = run / FOLDER / f"step-{step:08d}"
    folder.mkdir(parents=True)
    files = {}
    for name, group in groups.items():
        path = folder / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in group.items()}, path)
        data = path.read_bytes()
        files[path.name] = [len(data), hashlib.sha256(data).hexdigest()]
    document = {"format": "fastkd-checkpoint", "version": 1, "step": step, "files": files, "state": state}
    (folder / "state.json").write_text(json.dumps(document))


def bits(run: Path, step: int) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """All tensors of a checkpoint, as bytes: equal only if they are equal bit by bit."""
    found = read(run, step)
    assert isinstance(found, Checkpoint), found
    return {
        f"{group}.{name}": (t.dtype, t.shape, t.flatten().contiguous().view(torch.uint8).numpy().tobytes())
        for group in ("model", "optimizer")
        for name, t in found.tensors(group).items()
    }


def tied_llama() -> Any:
    return llama(tie_word_embeddings=True)


def stopped() -> Stop:
    """A stop after one step."""
    stop = Stop()
    stop()
    return stop
