"""`onnx`: a graph that ONNX Runtime runs, written by `torch.onnx.export`; weights in float32, or quantised.

`graph.py` says what the graphs take and return, `weights.py` how weights are quantised, `static.py` when inputs of
convolutions are.
"""

from pathlib import Path
from typing import Any

from ....errors import ExportError
from ....models.hub import brief
from ....models.quantization import SCHEMES, problem_of
from ...calibration import Calibration
from ...model import Deployable
from ...smoothing import smoothed
from .graph import cached_graph, keys_and_values, plain_graph
from .runtime import OnnxRuntime
from .static import has_convolutions, quantise_convolutions
from .weights import place_weights

EXTRA = "onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
QUANTIZE = ("none", "int8", "int4")
FILE = "model.onnx"
EXTERNAL = 2**27  # bytes of weights, from which on they are in a file beside the graph: a graph may have 2 GB


def check(model: Deployable, quantize: str) -> None:
    if quantize in SCHEMES and (problem := problem_of(model.model, SCHEMES[quantize])) is not None:
        raise ExportError(f"quantize: {problem}.")


def write(model: Deployable, folder: Path, quantize: str, calibration: Calibration | None) -> dict[str, Any]:
    smoothing: list[str] = []
    if quantize == "int8":
        model, smoothing = smoothed(model, calibration)
    graph, notes = _graph_of(model)
    notes += smoothing
    static = quantize == "int8" and model.kind == "examples" and has_convolutions(graph)
    if static and calibration is None:
        notes.append("convolutions have 8-bit weights and float32 inputs: without a cache there is no range of inputs.")
    static = static and calibration is not None
    place_weights(graph, model.model, quantize, convolutions=not static)
    if static:
        assert calibration is not None
        whole = folder / "float32.onnx"
        _save(graph, whole)
        quantise_convolutions(whole, folder / FILE, calibration)
        for path in folder.glob("float32.onnx*"):
            path.unlink()
    else:
        _save(graph, folder / FILE)
    return {"file": FILE, "notes": notes}


def load(folder: Path, written: dict[str, Any], threads: int) -> OnnxRuntime:
    return OnnxRuntime(folder / written["file"], threads)


def _graph_of(model: Deployable) -> tuple[Any, list[str]]:
    """The graph of a student, with a KV cache where that can be; and notes."""
    if model.config is None:
        return plain_graph(model), []
    found = keys_and_values(model)
    if isinstance(found, str):
        reason = found
    else:
        try:
            return cached_graph(model, found), []
        except Exception as error:  # the graph without one may still be exported, which the note says
            reason = brief(error)
    return plain_graph(model), [f"the graph has no KV cache: each new token runs the sequence again ({reason})."]


def _save(graph: Any, path: Path) -> None:
    import onnx_ir as ir

    weights = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    graph.producer_name = "fastkd"
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()  # what the exporter notes of each would be most of a small file
    ir.save(graph, path, external_data=f"{path.name}.data" if weights >= EXTERNAL else None)
