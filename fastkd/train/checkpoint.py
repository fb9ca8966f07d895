"""Checkpoints on disk: a folder each, complete or absent, written and read by torch.distributed.checkpoint.

    RUN/checkpoints/step-00000120/  .metadata  __0_0.distcp  __1_0.distcp ...  state.json

Each process writes its own part of the tensors into a folder with a temporary name; the first one renames it when all
are done. state.json has the size and sha256 of every other file, and a sha256 of its own contents, so that a damaged
checkpoint is detected. Any number of processes can load a checkpoint. Version 1 (model.safetensors,
optimizer.safetensors) can still be read.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict, load
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict, save
from torch.distributed.tensor import distribute_tensor

from ..errors import TrainError
from ..utils.atomic import clean as clean_folder
from ..utils.atomic import (
    commit_folder,
    drop_folder,
    read_sealed,
    remove_folder,
    sealed,
    start_folder,
    temporary_folder,
)  # fmt: skip
from ..utils.distributed import ALONE, Processes, is_dtensor

FORMAT, VERSION = "fastkd-checkpoint", 2
FOLDER = "checkpoints"
STATE = "state.json"
MODEL, OPTIMIZER = "model", "optimizer"
"""Names of the groups of tensors in a checkpoint."""
_NAME = re.compile(r"step-(\d{8,})")

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. state: the JSON document given to `write`. version: of the format on disk."""

    folder: Path
    step: int
    state: dict[str, Any]
    version: int = VERSION

    def shapes(self, group: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor of a group, by name. Raises TrainError if the files cannot be read."""
        with self._readable():
            if self.version == 1:
                return {name: (tuple(t.shape), t.dtype) for name, t in self._safetensors(group).items()}
            stored = FileSystemReader(self.folder).read_metadata().state_dict_metadata
            return {
                name.removeprefix(f"{group}."): (tuple(one.size), one.properties.dtype)
                for name, one in stored.items()
                if name.startswith(f"{group}.") and isinstance(one, TensorStorageMetadata)
            }

    def load(self, group: str, tensors: Tensors, processes: Processes = ALONE) -> None:
        """Load a group into tensors in place. Every process calls it, and reads only its own part of DTensors.

        tensors: all with the shapes that `shapes` returns. Raises TrainError if the files cannot be read.
        """
        with self._readable(), torch.no_grad():
            if self.version == 1:
                stored = self._safetensors(group)
                for name, tensor in tensors.items():
                    whole = stored[name].to(tensor.device)
                    if is_dtensor(tensor):
                        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
                    tensor.copy_(whole)
                return
            named = {f"{group}.{name}": tensor for name, tensor in tensors.items()}
            reader = FileSystemReader(self.folder)
            metadata = reader.read_metadata()
            # read by DCP, a failure would be a log of tracebacks and an AssertionError
            reader.read_metadata = lambda *_, **__: metadata  # type: ignore[method-assign]
            if processes.group is None:  # torch 2.6 has no public way for one process alone of several
                _load_state_dict(named, reader, no_dist=True)
            else:
                load(named, storage_reader=reader, process_group=processes.group)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """A group as complete tensors on the CPU. One process may call it alone."""
        found = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self.shapes(group).items()}
        self.load(group, found)
        return found

    def _safetensors(self, group: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{group}.safetensors")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            with _cause_of_failure():
                yield
        except (OSError, RuntimeError, SafetensorError) as error:
            raise TrainError(
                f"{self.folder}: cannot be read ({error}). Train again; if that does not help, delete it, and an older "
                "checkpoint is taken."
            ) from error


def write(
    run: Path, step: int, groups: Mapping[str, Tensors], state: Mapping[str, Any], processes: Processes = ALONE
) -> Path:
    """Write a checkpoint, replacing one of the same step. Every process calls it. Returns its folder.

    groups: named tensors, on any device; DTensors are written in parts, other tensors by the first process.
    state: what JSON can hold. Raises OSError, on all processes, if one of them cannot write.
    """
    final = run / FOLDER / f"step-{step:08d}"
    temporary = temporary_folder(final)
    try:
        with processes.all_or_none():
            if processes.first:
                start_folder(final)
        _save({f"{group}.{name}": t for group, tensors in groups.items() for name, t in tensors.items()}, temporary,
              processes)  # fmt: skip
        mine: dict[str, Any] = {}
        with processes.all_or_none():
            own = [*temporary.glob(f"__{processes.rank}_*"), *([temporary / ".metadata"] if processes.first else [])]
            mine = {path.name: _identity(path) for path in own}
        files = {name: identity for part in processes.gather(mine) for name, identity in part.items()}
        with processes.all_or_none():
            if processes.first:
                document = {"format": FORMAT, "version": VERSION, "step": step, "files": files, "state": dict(state)}
                (temporary / STATE).write_text(json.dumps(sealed(document), allow_nan=False))
                commit_folder(final)
    except BaseException:
        if processes.first:
            drop_folder(final)
        raise
    return final


def drop_optimizer(run: Path, step: int) -> None:
    """Write a checkpoint again without its optimizer's state, if it has one and is not damaged. For one process: it has
    the weights in memory."""
    found = read(run, step)
    if not isinstance(found, Checkpoint) or not found.shapes(OPTIMIZER):
        return
    write(run, step, {MODEL: found.tensors(MODEL)}, found.state)


def newest(run: Path, warn: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
    """The newest complete checkpoint of a run, or None if there are none. warn: called for each damaged one.

    Raises TrainError if all are damaged: starting from scratch must be the user's decision.
    """
    problem = ""
    for step in sorted(steps_of(run), reverse=True):
        found = read(run, step)
        if isinstance(found, Checkpoint):
            return found
        problem = f"{run / FOLDER / f'step-{step:08d}'}: {found}"
        warn(f"{problem}; an older checkpoint is used.")
    if problem:
        raise TrainError(f"{problem}, and there is no other complete checkpoint. Delete {run / FOLDER} to start anew.")
    return None


def read(run: Path, step: int, *, verify: bool = True) -> Checkpoint | str:
    """The checkpoint of a step, or a description of what is wrong with it. verify: compare sizes and hashes of files.

    Raises TrainError for a version of the format that is not known.
    """
    folder = run / FOLDER / f"step-{step:08d}"
    try:
        document = read_sealed(folder / STATE)
    except (OSError, ValueError, RecursionError) as error:
        return f"{STATE} cannot be read ({error})"
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        return f"{STATE} is not that of a checkpoint"
    if (version := document.get("version")) not in (1, VERSION):
        raise TrainError(
            f"{folder}: got version {version!r}; expected at most {VERSION}. Use the fastkd that wrote it, or train "
            "into another folder."
        )
    files, state = document.get("files"), document.get("state")
    if document.get("step") != step or not isinstance(files, dict) or not isinstance(state, dict):
        return f"{STATE} is not that of step {step}"
    for name, expected in files.items() if verify else ():
        try:
            if _identity(folder / name) != expected:
                return f"{name} has changed since it was written"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({error})"
    return Checkpoint(folder, step, state, version)


def steps_of(run: Path) -> list[int]:
    """The steps that have a checkpoint, complete or damaged."""
    folder = run / FOLDER
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))


def prune(run: Path, *, keep: int, best: int | None, last: int) -> None:
    """Remove all checkpoints except those of the last `keep` steps up to `last`, and of the best step."""
    steps = steps_of(run)
    kept = [step for step in steps if step <= last][-keep:]
    for step in set(steps) - {best, *kept}:
        remove_folder(run / FOLDER / f"step-{step:08d}")


def clean(run: Path) -> None:
    """Remove the temporary files and folders that an interrupted run left."""
    for folder in (run, run / FOLDER):
        clean_folder(folder)


def _save(tensors: Tensors, folder: Path, processes: Processes) -> None:
    # buffers may differ between processes: those of the first one are kept
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    writer = FileSystemWriter(folder)
    try:
        with _cause_of_failure():
            if processes.group is None:  # as when loading: one process, maybe alone of several
                _save_state_dict(dict(tensors), writer, no_dist=True, planner=planner)
            else:
                save(dict(tensors), storage_writer=writer, planner=planner, process_group=processes.group)
    except RuntimeError as error:
        if "inline_container" in str(error):  # torch's own writer, as on a full disk
            raise OSError(errno.EIO, str(error).split("\n")[0]) from error
        raise


@contextmanager
def _cause_of_failure() -> Iterator[None]:
    """Raise what CheckpointException, itself no Exception, wraps. Only errors of input and output can be retried."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise cause from error


def _identity(path: Path) -> list[Any]:
    with open(path, "rb") as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, shared ones once, less those that a student leaves out (the frozen
    base of adapters). They share memory with the model."""
    stored = model.state_dict().keys()  # without buffers that are not persistent
    named = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in stored}}
    left_out: frozenset[str] = getattr(model, "left_out", frozenset())
    return {name: tensor.detach() for name, tensor in named.items() if name not in left_out}


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The state of each parameter, named `parameter.key`. They share memory with the optimizer."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}.{key}": value
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state[p].items()
    }


def load_model(checkpoint: Checkpoint, model: nn.Module, processes: Processes = ALONE) -> None:
    """Load a checkpoint's weights. Raises TrainError if they are those of another student."""
    tensors = model_tensors(model)
    _check(tensors, checkpoint, getattr(model, "absent", ()), getattr(model, "left_out", frozenset()))
    checkpoint.load(MODEL, tensors, processes)


def load_optimizer(
    checkpoint: Checkpoint, optimizer: torch.optim.Optimizer, model: nn.Module, processes: Processes = ALONE
) -> None:
    """Load a checkpoint's optimizer state, after `load_model` has checked that the parameters fit. Raises TrainError
    if it has none."""
    shapes = checkpoint.shapes(OPTIMIZER)
    if not shapes and any(p.requires_grad for p in model.parameters()):
        raise TrainError(
            f"{checkpoint.folder}: got the weights alone; expected the optimizer's state too, which is removed when a "
            f"run is finished. It cannot be continued from here: delete {checkpoint.folder.parent} to train again from "
            "the first step."
        )
    parameters, absent = dict(model.named_parameters()), getattr(model, "absent", ())
    on_device = {
        id(p) for group in optimizer.param_groups if group["fused"] or group["capturable"] for p in group["params"]
    }
    for full, (shape, dtype) in shapes.items():
        if full.startswith(absent):
            continue
        name, _, key = full.rpartition(".")
        p = parameters[name]
        if key == "step":  # a counter, not sharded as the parameter is; torch wants it on the CPU or beside it
            optimizer.state[p][key] = torch.empty(shape, dtype=dtype, device=p.device if id(p) in on_device else None)
        else:
            optimizer.state[p][key] = torch.empty_like(p, dtype=dtype, requires_grad=False)
    checkpoint.load(OPTIMIZER, optimizer_tensors(optimizer, model), processes)


def _check(ours: dict[str, Tensor], checkpoint: Checkpoint, absent: tuple[str, ...], left_out: frozenset[str]) -> None:
    shapes = checkpoint.shapes(MODEL)
    theirs = {name: one for name, one in shapes.items() if not name.startswith(absent) and name not in left_out}
    advice = "Train into another folder, or with the student the run began with."
    where = checkpoint.folder
    if names := sorted(ours.keys() ^ theirs.keys()):
        side = "the checkpoint's student" if names[0] in theirs else "this student"
        raise TrainError(f"{where}: {names[0]} is in {side} alone ({len(names)} such tensors). {advice}")
    for name, tensor in ours.items():
        shape, dtype = theirs[name]
        if (shape, dtype) != (tuple(tensor.shape), tensor.dtype):
            raise TrainError(
                f"{where}: {name} is {shape} {dtype} there, {tuple(tensor.shape)} {tensor.dtype} in this student. "
                f"{advice}"
            )
