"""The loops of examples/, importable by the processes that the tests start."""

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fastkd
from fastkd.kernels import KDError

EXAMPLES = Path(__file__).parent.parent / "examples"
EXACT = torch.float64


def example(name: str) -> Any:
    """A file of examples/ as a module."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def plain(cache: Path) -> dict[str, Tensor]:
    return dict(example("plain_loop_ddp").train(cache, dtype=EXACT).state_dict())


def accelerated(cache: Path) -> dict[str, Tensor]:
    from accelerate import Accelerator

    return dict(example("accelerate_loop").train(Accelerator(cpu=True), cache, dtype=EXACT).state_dict())


def lightning(cache: Path, *, resume: Path | None = None, processes: int = 1, **options: Any) -> dict[str, Tensor]:
    """The weights that the example's module ends with."""
    import lightning

    given: dict[str, Any] = {
        "accelerator": "cpu", "devices": processes, "max_epochs": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "precision": "64-true",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(**(given | options))
        torch.manual_seed(1)
        # in float64 from the beginning: the precision of the Trainer converts afterwards
        module = example("lightning_module").Distillation(example("plain_loop_ddp").Model(16, EXACT), cache)
        trainer.fit(module, ckpt_path=resume)
    return dict(module.loss.model.state_dict())


def both_processes(cache: Path, out: Path) -> None:
    """The loops in one of two processes; what the wrong ways of computing a loss raise."""
    import os

    dist.init_process_group("gloo")
    found: dict[str, Any] = {"plain": plain(cache), "wrong": wrong_ways(cache), "accelerate": accelerated(cache)}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}  # as torchrun's
    found["lightning"] = lightning(cache, processes=2, strategy="ddp")
    torch.save(found, out / f"{os.environ['RANK']}.pt")


def wrong_ways(cache: Path) -> dict[str, str]:
    """What losses outside of a wrapper's forward say, by name; "" for nothing."""
    made, said = example("plain_loop_ddp"), {}
    loader = fastkd.DistillLoader(cache, batch_size=8, micro_tokens=64, rank=None, world_size=None)
    batch = next(iter(loader)).micro_batches[0]
    loader.close()

    def attempt(name: str, ddp: DistributedDataParallel, frozen: bool = False, logits: bool = False) -> None:
        model = ddp.module
        model.lm_head.requires_grad_(not frozen)
        output = (ddp if name.startswith("right") else model)(batch.input_ids)
        try:
            if logits:
                z = output.states @ output.lm_head.weight.T
                fastkd.kd_loss(z, batch.targets, batch.labels).loss.backward()
            else:
                fastkd.linear_kd_loss(output.states, output.lm_head, batch.targets, batch.labels).loss.backward()
            said[name] = ""
        except KDError as error:
            said[name] = str(error)

    def wrapped(frozen: bool = False) -> DistributedDataParallel:
        model = made.Model(16)
        model.lm_head.requires_grad_(not frozen)
        return DistributedDataParallel(model)

    attempt("states", wrapped())
    attempt("a frozen head", wrapped(frozen=True), frozen=True)
    attempt("logits", wrapped(), logits=True)
    attempt("right, states", ddp := wrapped())
    ddp.zero_grad()
    attempt("not wrapped", Bare(made.Model(16)))
    ddp = wrapped()
    with ddp.no_sync():
        attempt("no exchange wanted", ddp)
    with torch.no_grad():
        model = wrapped().module
        output = model(batch.input_ids)
        fastkd.linear_kd_loss(output.states, output.lm_head, batch.targets, batch.labels)
    bare = made.Model(16)
    attempt("before it is wrapped", Bare(bare))
    for parameter in bare.parameters():
        parameter.grad = None
    attempt("after it is wrapped", DistributedDataParallel(bare))
    try:
        fastkd.backward(made.Model(16), fastkd.Step([batch], 1, 1, 1, 0, 0))
        said["not exchanged"] = ""
    except fastkd.errors.TrainError as error:
        said["not exchanged"] = str(error)
    return said


class Bare(torch.nn.Module):
    """A module that wraps another, and does nothing."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
