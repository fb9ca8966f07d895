"""The machine: its cores and what else they do, memory, disk."""

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from ..utils.numbers import size_text
from .result import Found

BUSY = 0.5
"""Load per core above which measured times say little."""
SMALL_DISK = 5 * 10**9
"""Bytes below which the disk is worth a note."""


def check_machine(folder: Path) -> Iterator[Found]:
    """folder: where the disk is looked at."""
    yield Found("system", "ok", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    yield check_load(os.getloadavg()[0] if hasattr(os, "getloadavg") else None, _cores(), torch.get_num_threads())
    if (memory := _available_memory()) is not None:
        yield Found("memory", "ok", f"{size_text(memory)} available")
    yield check_disk(folder)


def check_load(load: float | None, cores: int, threads: int) -> Found:
    """load: processes that want a core, on average over a minute; None where it is not known."""
    text = f"{cores} that this process may use; PyTorch uses {threads} thread{'s' * (threads != 1)}"
    if load is None:
        return Found("cores", "ok", text)
    text += f"; load {load:.1f}"
    if load > BUSY * cores:
        return Found("cores", "note", f"{text}: other work is running, so times that are measured now say little")
    return Found("cores", "ok", text)


def check_disk(folder: Path) -> Found:
    """Free bytes, and whether files can be made there."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        return Found("disk", "problem", f"{there}: a file; expected a folder.")
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Found("disk", "problem", f"{there}: no permission to write. Choose another folder.")
    return Found("disk", "note" if free < SMALL_DISK else "ok", f"{size_text(free)} free at {there}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available_memory() -> int | None:
    """Bytes that can be allocated without swapping, where Linux tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else int(kilobytes) * 1024
