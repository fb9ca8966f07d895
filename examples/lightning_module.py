"""A student in Lightning: a batch is a whole optimizer step, of as many micro-batches as it takes.

    python examples/lightning_module.py build/lightning
    torchrun --nproc-per-node 2 examples/lightning_module.py build/lightning-2

Lightning saves the loader's position with its checkpoints and restores it: `trainer.fit(module, ckpt_path=...)`
continues with the next step, also in the middle of an epoch. Run it again, and it resumes.
"""

import os
import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from plain_loop_ddp import Model, capture

import fastkd


class Distillation(lightning.LightningModule):
    """A model and the loss of its micro-batches, from a cache."""

    def __init__(self, model: torch.nn.Module, cache: Path) -> None:
        super().__init__()
        self.loss, self.cache = fastkd.distill_module(model, alpha=0.3), cache
        self.automatic_optimization = False  # the number of micro-batches varies

    def train_dataloader(self) -> fastkd.DistillLoader:
        return fastkd.DistillLoader(self.cache, batch_size=8, micro_tokens=64, rank=None, world_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def training_step(self, step: fastkd.Step, number: int) -> None:
        optimizer = self.optimizers()
        for i, batch in enumerate(step.micro_batches, 1):
            with optimizer.toggle_model(sync_grad=i == len(step.micro_batches)):
                losses = self.loss(batch, num_items=step.count)  # the positions of the whole step, of all processes
                self.manual_backward(losses["loss"] * self.trainer.world_size)  # DDP averages: a sum is wanted
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if os.environ.get("RANK", "0") == "0":
        capture(folder / "cache")
    torch.manual_seed(1)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")), max_epochs=2, default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=5, save_last=True, save_top_k=0)], logger=False,
    )  # fmt: skip
    last = folder / "last.ckpt"
    trainer.fit(Distillation(Model(16), folder / "cache"), ckpt_path=str(last) if last.exists() else None)
