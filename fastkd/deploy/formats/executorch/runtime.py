"""Files of ExecuTorch run in its own runtime, with XNNPACK. Imports the runtime alone, not the exporter beside it."""

import importlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ....errors import ExportError
from ....utils.quiet import quiet
from ...runtime import Floats

FILE, WEIGHTS = "model.pte", "weights.ptd"
"""The program; and the weights, of a program that does not hold them itself."""


class Method:
    """The method `forward` of a folder's program, from tensors to its one output, which the next call overwrites."""

    def __init__(self, folder: Path, names: Sequence[str], threads: int) -> None:
        path, *others = (folder / name for name in names)
        for needed in (path, *others):
            if not needed.is_file():
                raise ExportError(f"{needed}: there is no such file; export the student again.")
        try:
            with quiet():
                # executorch.runtime, which is the public name, imports all of the exporter: seconds, and 200 MB
                runtime: Any = importlib.import_module("executorch.extension.pybindings._C")
                _load_operators()
                if runtime._threadpool_get_thread_count() != threads:
                    runtime._unsafe_reset_threadpool(threads)
                weights = str(others[0]) if others else None
                self._program: Any = runtime._load_program(str(path), data_path=weights)
                self._method: Any = self._program.load_method("forward")
        except RuntimeError as error:
            raise ExportError(
                f"{path}: ExecuTorch {version('executorch')} cannot load it ({error}); it is damaged, or of another "
                "version. Export the student again."
            ) from error

    def __call__(self, *inputs: torch.Tensor) -> Floats:
        found: Floats = self._method(inputs, clone_outputs=False)[0].numpy()
        return found

    @property
    def first_size(self) -> int:
        """The largest first dimension of its first input."""
        return int(self._method.method_meta().input_tensor_meta(0).sizes()[0])

    def close(self) -> None:
        self._method = self._program = None


class CachedRuntime:
    """See `Runtime`. Of a language model with a KV cache of one sequence: rows run one by one, in parts of `chunk`."""

    def __init__(self, folder: Path, written: dict[str, Any], threads: int) -> None:
        self.name = _name()
        self._length, self._chunk = int(written["length"]), int(written["chunk"])
        self._method = Method(folder, written["files"], threads)
        self._position = 0

    def logits(self, inputs: NDArray[Any]) -> Floats:
        found: Floats | None = None
        for index, row in enumerate(torch.from_numpy(np.ascontiguousarray(inputs, np.int64))):
            self._position = 0
            for begin in range(0, len(row), self._chunk):
                part = row[None, begin : begin + self._chunk]
                logits = self._run(part, torch.arange(part.shape[1]))
                if found is None:
                    found = np.empty((*inputs.shape, logits.shape[-1]), np.float32)
                found[index, begin : begin + self._chunk] = logits[0]
        if found is None:
            raise ExportError(f"got inputs {list(inputs.shape)}; expected at least one token.")
        return found

    def prefill(self, ids: NDArray[np.int64]) -> Floats:
        self._position = 0
        return self._continue(torch.from_numpy(np.ascontiguousarray(ids, np.int64)))

    def decode(self, token: int) -> Floats:
        return self._continue(torch.tensor([[token]]))

    def close(self) -> None:
        self._method.close()

    def _continue(self, ids: torch.Tensor) -> Floats:
        for begin in range(0, ids.shape[1], self._chunk):
            part = ids[:, begin : begin + self._chunk]
            logits = self._run(part, torch.tensor([part.shape[1] - 1]))
        last: Floats = logits[0, -1].copy()
        return last

    def _run(self, ids: torch.Tensor, rows: torch.Tensor) -> Floats:
        end = self._position + ids.shape[1]
        if end > self._length:
            raise ExportError(f"got a sequence of {end} tokens; expected at most {self._length}, the file's KV cache.")
        found = self._method(ids.contiguous(), torch.tensor([self._position]), rows)
        self._position = end
        return found


class PlainRuntime:
    """See `Runtime`. Of a classifier, at most `rows` examples a call; of a language model that has no KV cache, one
    sequence, which runs again for each token."""

    def __init__(self, folder: Path, written: dict[str, Any], threads: int) -> None:
        self.name = _name()
        self._length = written["length"]
        self._method = Method(folder, written["files"], threads)
        # lowering a convolution narrows the bound of the batch that was asked for: in torch 2.13, from 32 to 15
        self._rows = min(int(written["rows"]), self._method.first_size)
        self._sequence = np.zeros((1, 0), np.int64)

    def logits(self, inputs: NDArray[Any]) -> Floats:
        if self._length is not None and inputs.shape[1] > self._length:
            raise ExportError(f"got a sequence of {inputs.shape[1]} tokens; expected at most {self._length}.")
        batch = torch.from_numpy(np.ascontiguousarray(inputs))
        parts = (batch[begin : begin + self._rows] for begin in range(0, len(batch), self._rows))
        return np.concatenate([self._method(part).copy() for part in parts])

    def prefill(self, ids: NDArray[np.int64]) -> Floats:
        self._sequence = np.asarray(ids, np.int64)
        found: Floats = self.logits(self._sequence)[0, -1]
        return found

    def decode(self, token: int) -> Floats:
        return self.prefill(np.append(self._sequence, [[token]], 1))

    def close(self) -> None:
        self._method.close()


def load(folder: Path, written: dict[str, Any], threads: int) -> CachedRuntime | PlainRuntime:
    if written["chunk"] is None:
        return PlainRuntime(folder, written, threads)
    return CachedRuntime(folder, written, threads)


def _load_operators() -> None:
    """The operators `llama::*` for the runtime, which ExecuTorch ships as a library of their own."""
    package = importlib.import_module("executorch.extension.llm").__path__[0]
    operators: Any = torch.ops
    for library in sorted(Path(package, "custom_ops").glob("*custom_ops_aot_lib.*")):
        operators.load_library(str(library))


def _name() -> str:
    return f"ExecuTorch {version('executorch')}"
