"""A graph of `graph.py` in ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....errors import ExportError
from ....models.hub import brief
from ...runtime import Floats
from .graph import KEEP


class OnnxRuntime:
    """See `Runtime`. path: of the graph. threads: of ONNX Runtime, for one operation."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(
                f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({brief(error)}); expected the graph of "
                "an export. Export again."
            ) from error
        self.name = f"onnxruntime {onnxruntime.__version__}"
        self._session: Any = session
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._past = {
            value.name: (int(value.shape[1]), int(value.shape[3]))
            for value in session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self._outputs = [value.name for value in session.get_outputs()]
        self._state: dict[str, Any] = {}
        self._sequence = np.zeros((1, 0), np.int64)

    def logits(self, inputs: NDArray[Any]) -> Floats:
        if not self._past:
            found: Floats = self._session.run(["logits"], {"input": inputs})[0]
            return found
        return self._run(inputs, self._empty(len(inputs)), 0, ["logits"])[0].numpy()  # type: ignore[no-any-return]

    def prefill(self, ids: NDArray[np.int64]) -> Floats:
        self._sequence, self._state = ids[:, :0], self._empty(1)
        return self._continued(ids)

    def decode(self, token: int) -> Floats:
        return self._continued(np.array([[token]], np.int64))

    def close(self) -> None:
        self._session, self._state = None, {}

    def _continued(self, ids: NDArray[np.int64]) -> Floats:
        before = self._sequence.shape[1]
        self._sequence = np.concatenate([self._sequence, ids], 1)
        if not self._past:
            return self.logits(self._sequence)[0, -1]  # type: ignore[no-any-return]
        logits, *present = self._run(ids, self._state, before, self._outputs)
        names = [name.replace("present.", "past_key_values.", 1) for name in self._outputs[1:]]
        self._state = dict(zip(names, present, strict=True))
        return logits.numpy()[0, -1]  # type: ignore[no-any-return]

    def _run(self, ids: NDArray[np.int64], past: dict[str, Any], before: int, outputs: list[str]) -> list[Any]:
        """Outputs for ids `[B, L]` behind `before` tokens. All rows get logits if none is kept, else the last alone."""
        batch, length = ids.shape
        inputs = {
            "input_ids": np.ascontiguousarray(ids),
            "attention_mask": np.ones((batch, before + length), np.int64),
            "position_ids": np.tile(np.arange(before, before + length, dtype=np.int64), (batch, 1)),
            KEEP: np.array(0 if len(outputs) == 1 else 1, np.int64),
        }
        feed = {name: self._value(value) for name, value in inputs.items()} | past
        found: list[Any] = self._session.run_with_ort_values(outputs, feed)
        return found

    def _empty(self, batch: int) -> dict[str, Any]:
        return {
            name: self._value(np.zeros((batch, heads, 0, width), np.float32))
            for name, (heads, width) in self._past.items()
        }
