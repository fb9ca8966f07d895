"""A loop with accelerate: it prepares the module with the loss and the optimizer, and not the loader.

    python examples/accelerate_loop.py build/accelerate
    accelerate launch --cpu --num-processes 2 examples/accelerate_loop.py build/accelerate-2

The loader knows its processes, divides each step over them, and counts its positions on all. Its steps have different
numbers of micro-batches, equally many on each process, so gradients are exchanged after the last (`no_sync`), and
`gradient_accumulation_steps` of accelerate stays 1.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from plain_loop_ddp import Model, capture

import fastkd


def train(accelerator: Accelerator, cache: Path, *, epochs: int = 2, dtype: torch.dtype = torch.float32) -> Model:
    """Train a student on all processes of the accelerator."""
    torch.manual_seed(1)  # the same new weights in all processes
    model = fastkd.distill_module(Model(16, dtype), alpha=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    module, optimizer = accelerator.prepare(model, optimizer)
    loader = fastkd.DistillLoader(
        cache, batch_size=8, micro_tokens=64, rank=None, world_size=None, device=accelerator.device
    )
    for _ in range(epochs):
        for step in loader:
            for i, batch in enumerate(step.micro_batches, 1):
                with nullcontext() if i == len(step.micro_batches) else accelerator.no_sync(module):
                    loss = module(batch, num_items=step.count)["loss"]
                    accelerator.backward(loss * accelerator.num_processes)  # DDP averages: a sum is wanted
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(module).model


if __name__ == "__main__":
    accelerator, folder = Accelerator(), Path(sys.argv[1])
    if accelerator.is_main_process:
        capture(folder / "cache")
    accelerator.wait_for_everyone()
    student = train(accelerator, folder / "cache")
    if accelerator.is_main_process:
        torch.save(student.state_dict(), folder / "student.pt")
    accelerator.end_training()
