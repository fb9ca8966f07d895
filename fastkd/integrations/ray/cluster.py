"""A connection to a Ray cluster, and what its workers are given."""

import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ...errors import ClusterError
from ...utils.secrets import masked
from ...utils.signals import SIGNALS

CONNECT_SECONDS = 10.0
_START = "Start one with `ray start --head`, or set RAY_ADDRESS to one's HOST:PORT."


class Resources(NamedTuple):
    """What Ray reserves for one worker. gpus, cpus: numbers, or fractions of one."""

    cpus: float = 1.0
    gpus: float = 0.0

    def options(self) -> dict[str, Any]:
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


def import_ray() -> Any:
    """The module. ClusterError if it is not installed."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ClusterError("ray: it is not installed. Install it with `pip install 'fastkd[ray]'`.") from error
    return ray


@contextmanager
def connected() -> Iterator[Any]:
    """Ray, connected to the cluster at RAY_ADDRESS, or to the one that runs on this machine. A connection that exists
    is used, and kept. ClusterError if there is no cluster. Handlers of signals stay as they are."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    _connect(ray, os.environ.get("RAY_ADDRESS") or "auto")
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    _check_reachable(address)
    # ray.init replaces the handler of SIGTERM by one that exits at once
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS} if here else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(_no_cluster(address, error)) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _no_cluster(address: str, error: Exception) -> str:
    """In a sentence or two, that there is no cluster, and what to do."""
    text = f"ray: no cluster at {masked(address)!r}: {str(error).partition(chr(10))[0].rstrip('. ')}. {_START}"
    # Ray says that a token is missing in its log alone, and does not send one to an address that is named
    if type(error) is ConnectionError and address != "auto" and os.environ.get("RAY_AUTH_MODE") != "token":
        text += " If the cluster was started with a token (~/.ray/auth_token), set RAY_AUTH_MODE=token here."
    return text


def _check_reachable(address: str) -> None:
    """ClusterError if nothing answers at an address of the form HOST:PORT: Ray itself would wait for minutes."""
    where = address.partition("://")[2] or address
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS: got {masked(address)!r}, the address of a dashboard; expected HOST:PORT of the cluster. Use "
            "it with `ray job submit`, or leave it out on a machine of the cluster."
        )
    host, _, port = where.rpartition(":")
    if not (host and port.isdecimal()):
        return  # auto, local
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(_no_cluster(address, error)) from error


def enter_folder(folder: str) -> None:
    """On a worker: look for relative names where the driver does, if this machine has the folder."""
    if os.path.isdir(folder):
        os.chdir(folder)


def resources_of(ray: Any, cpus: float, gpus: float | None) -> Resources:
    """The resources of a worker. gpus: None for one if the cluster has any. ClusterError if they are not possible."""
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    for name, value in (("cpus_per_worker", cpus), ("gpus_per_worker", gpus)):
        if not 0 <= value < math.inf:
            raise ClusterError(f"{name}: got {value!r}; expected a number from 0 on.")
    return Resources(cpus, gpus)


def workers_that_fit(ray: Any, each: Resources) -> int:
    """How many workers the cluster has room for now. ClusterError if none."""
    there = ray.cluster_resources()
    pairs = ((there.get("CPU", 0.0), each.cpus), (there.get("GPU", 0.0), each.gpus))
    count = min((int(have / need) for have, need in pairs if need), default=1)
    if count < 1:
        have = Resources(pairs[0][0], pairs[1][0])
        raise ClusterError(
            f"workers: the cluster has {have}; expected at least {each} for one worker. Give --workers to wait for "
            "machines that join, or lower --gpus-per-worker."
        )
    return count
