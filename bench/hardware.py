"""The hardware and versions that figures were measured with, and the size of the last-level cache."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "fastkd",
    "torch",
    "triton",
    "numpy",
    "zarr",
    "pcodec",
    "numba",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
)
_UNKNOWN_CACHE = 64 << 20  # assumed if the system does not report the size of the last-level cache


def hardware(device: str) -> dict[str, Any]:
    """The machine, by what figures depend on."""
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        return {"device": "cuda", "name": found.name, "memory_GB": round(found.total_memory / 1e9)}
    return {"device": "cpu", "name": _cpu_name(), "cores": cores(), "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Versions of Python and of the PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # an optional one
    if torch.version.cuda:
        found["cuda"] = str(torch.version.cuda)
    return found


def named(machine: dict[str, Any]) -> str:
    """The machine as one line of text."""
    if machine["device"] == "cuda":
        return f"{machine['name']}, {machine['memory_GB']} GB"
    cores = machine["cores"]
    threads = f", {machine['threads']} threads" if machine["threads"] != cores else ""
    return f"{machine['name']}, {cores} core{'s' * (cores != 1)}{threads}"


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache between the cores and the memory."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    sizes = [_bytes(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=_UNKNOWN_CACHE)


def _bytes(text: str) -> int:
    """ "2048K" as a number of bytes."""
    text = text.strip()
    return int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]] if text[-1:].isalpha() else int(text)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
