"""A training loop of your own, on one process or several: the loss is inside of the module that DDP wraps.

    python examples/plain_loop_ddp.py build/plain
    torchrun --nproc-per-node 2 examples/plain_loop_ddp.py build/plain-2

Both end with the same weights. A loss outside of the wrapper, of `ddp.module(...)`, would have gradients that are never
exchanged; `linear_kd_loss` refuses it.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastkd
from fastkd import LMHead
from fastkd.teachers import Hidden

VOCAB = 64


class Model(nn.Module):
    """Hidden states and an LM head; the logits are never whole."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, width, dtype=dtype)
        self.mix = nn.GRU(width, width, batch_first=True, dtype=dtype)
        self.lm_head = nn.Parameter(0.1 * torch.randn(VOCAB, width, dtype=dtype))

    def forward(self, input_ids: torch.Tensor) -> Hidden:
        states, _ = self.mix(self.embedding(input_ids))
        return Hidden(states, LMHead(self.lm_head))


def capture(folder: Path) -> None:
    """A cache of some made up documents."""
    torch.manual_seed(0)
    documents = [torch.randint(VOCAB, (int(n),)).tolist() for n in torch.randint(3, 30, (60,))]
    fastkd.capture(Model(32), documents, folder, k=8, draws=4, held_out=0, context=16)


def train(cache: Path, *, epochs: int = 2, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Train a student; in a process group, on all of its processes."""
    torch.manual_seed(1)  # the same new weights in all processes
    model = fastkd.distill_module(Model(16, dtype), alpha=0.3)
    module = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = fastkd.DistillLoader(cache, batch_size=8, micro_tokens=64, rank=None, world_size=None)
    for _ in range(epochs):
        for step in loader:
            fastkd.backward(module, step)
            optimizer.step()
            optimizer.zero_grad()
    return model.model


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        capture(folder / "cache")
    if dist.is_initialized():
        dist.barrier()
    student = train(folder / "cache")
    if first:
        torch.save(student.state_dict(), folder / "student.pt")
        print(f"trained {sum(p.numel() for p in student.parameters()):,} parameters: {folder / 'student.pt'}")
    if dist.is_initialized():
        dist.destroy_process_group()
