"""Convolutions in 8 bits, weights and inputs: the ranges of inputs are fixed, as measured on the training split.

By onnxruntime's `quantize_static`, with a scale per output channel for weights and one for each input.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ....utils.quiet import quiet
from ...calibration import Calibration

OPERATORS = ["Conv", "Relu", "Clip", "MaxPool"]  # Relu, Clip: their output is quantised, not what comes before it


def has_convolutions(model: Any) -> bool:
    """Whether an `onnx_ir.Model` has convolutions."""
    return any(node.op_type == "Conv" for node in model.graph.all_nodes())


def quantise_convolutions(source: Path, out: Path, calibration: Calibration) -> None:
    """Write a graph with one input, "input", whose convolutions are quantised."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self._batches: Iterator[Any] = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"input": batch.numpy()}

    with quiet():  # it advises to prepare the graph, which the exporter has done
        quantize_static(
            str(source), str(out), Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=OPERATORS,
            per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
