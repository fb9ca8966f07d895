"""Latency and memory: the student in PyTorch and its exports, each in a process of its own, timed by turns.

Turns: every model runs once, then every model runs again, so that a machine that slows down slows all of them. A ratio
is the median over the turns of the export's time over PyTorch's in the same turn. Between turns a process waits for its
input and uses no core. The first turn warms up and is not counted.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import ExportError
from .exported import Exported
from .model import Deployable

PROMPT = 128
"""Tokens of a prefill."""
TURNS, DECODED = 7, 8
_OWN = "fastkd.errors.ExportError: "  # how the last line of a traceback begins
_ERRORS = 2000  # characters of a process's stderr that are looked at


class Measured(NamedTuple):
    """Medians over the turns. prefill: seconds of a prefill, or of one example. decode: seconds of a decoded token;
    None for examples. memory: bytes at its peak, above what the process had before it loaded the model; None where it
    is not known. ratios: to the first model, of "prefill", "decode" and "memory"."""

    runtime: str
    prefill: float
    decode: float | None
    memory: int | None
    ratios: dict[str, float]


class Subject(NamedTuple):
    """A student to run in PyTorch. ids: token ids that it takes are below this. module: the module itself, and example
    an input batch, where they are needed: for one that nothing can load again, and for a classifier."""

    kind: str
    ids: int
    max_positions: int | None
    folder: Path | None = None
    factory: str | None = None
    module: nn.Module | None = None
    example: Tensor | None = None

    @classmethod
    def of(cls, model: Deployable) -> "Subject":
        again = model.folder is not None and (model.config is not None or model.factory is not None)
        ids = model.vocab_size if model.config is not None else int(model.example.max()) + 1
        module = None if again else model.model
        return cls(model.kind, ids, model.max_positions, model.folder, model.factory, module, model.example)


def measure(model: Subject, exports: Sequence[Exported], threads: int, *, turns: int = TURNS) -> list[Measured]:
    """Measure a student in PyTorch, and then its exports. Batch 1; a prefill of 128 tokens, or fewer if the student
    does not take as many. Raises ExportError if a process ends early."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        inputs = _inputs(model, Path(place))
        requests = [_of_student(model, Path(place)), *({"what": "exported", "place": str(e.folder)} for e in exports)]
        common = {"threads": threads, "kind": model.kind, "inputs": inputs}
        workers = [stack.enter_context(_worker(request | common, threads)) for request in requests]
        for worker in workers:  # all of them load at the same time
            worker.name = worker.answer()["name"]
        table = [[worker.turn() for worker in workers] for _ in range(turns + 1)][1:]
        return [_measured(worker.name, [row[i] for row in table], [row[0] for row in table])
                for i, worker in enumerate(workers)]  # fmt: skip


def _measured(name: str, turns: list[dict[str, Any]], firsts: list[dict[str, Any]]) -> Measured:
    values: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for key in ("prefill", "decode"):
        known = turns[0][key] is not None
        values[key] = median(turn[key] for turn in turns) if known else None
        if known:
            ratios[key] = median(turn[key] / first[key] for turn, first in zip(turns, firsts, strict=True))
    memory, first_memory = (some[-1]["memory"] for some in (turns, firsts))
    if memory is not None and first_memory:
        ratios["memory"] = memory / first_memory
    return Measured(name, values["prefill"], values["decode"], memory, ratios)


class _Worker:
    """A process of `measure_worker`. name: of its runtime."""

    def __init__(self, process: "subprocess.Popen[str]", errors: Any, what: str) -> None:
        self._process, self._errors, self._what = process, errors, what
        self.name = ""

    def turn(self) -> dict[str, Any]:
        self.ask({"decode": DECODED})
        return self.answer()

    def ask(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer tells why
            print(json.dumps(request), file=self._process.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """The next answer. Raises ExportError if the process has ended."""
        assert self._process.stdout is not None
        try:
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        except ValueError as error:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read()[-_ERRORS:].strip().splitlines() or ["no message"]
            if lines[-1].startswith(_OWN):  # its own sentence is all that there is to say
                raise ExportError(lines[-1].removeprefix(_OWN)) from error
            raise ExportError(
                f"{self._what}: the process that measures it ended with status {self._process.returncode} "
                f"({lines[-1]})."
            ) from error
        return answer


@contextmanager
def _worker(request: dict[str, Any], threads: int) -> Iterator[_Worker]:
    path = os.pathsep.join([entry or os.getcwd() for entry in sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastkd.deploy.measure_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, text=True, env=environment,
        )  # fmt: skip
        try:
            worker = _Worker(process, errors, str(request["place"]))
            worker.ask(request)
            yield worker
        finally:
            process.kill()  # it holds nothing that has to be finished
            process.communicate()


def _of_student(model: Subject, place: Path) -> dict[str, Any]:
    if model.module is None:
        return {"what": "student", "place": str(model.folder), "factory": model.factory}
    path = place / "module.pt"
    torch.save(model.module, path)
    return {"what": "module", "place": str(path)}


def _inputs(model: Subject, place: Path) -> Any:
    if model.kind == "text":
        return prompt(model).tolist()
    assert model.example is not None
    np.save(place / "example.npy", model.example[:1].numpy())
    return str(place / "example.npy")


def prompt(model: Subject) -> NDArray[np.int64]:
    """Token ids of a prefill `[128]`; fewer if the student takes fewer than these and the decoded tokens."""
    most = PROMPT if model.max_positions is None else min(PROMPT, model.max_positions - DECODED)
    return np.random.default_rng(0).integers(0, model.ids, max(1, most))
