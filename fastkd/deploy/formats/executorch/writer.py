"""The program of a student: what it takes, how it is exported, and how it is lowered to XNNPACK.

Language models of transformers have a KV cache, of one sequence and a fixed length, and take 1 to CHUNK tokens a call.
Their weights are in weights.ptd beside it, where a tied token embedding and LM head are one array; in a .pte file they
would be two. int8 and int4 quantise the inputs of linear layers too, in int8 by each row's range (8da8w and 8da4w).
"""

import copy
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import ExportError
from ....models.quantization import SCHEMES, problem_of
from ....utils.quiet import quiet
from ...calibration import Calibration
from ...model import Deployable
from ...smoothing import smoothed
from .graph import CHUNK, MAX_LENGTH, CachedLM, Unfit, quantise, refusal, unsupported
from .runtime import FILE, WEIGHTS

EXTRA = "executorch"
PACKAGES = ("executorch", "torchao")
QUANTIZE = ("none", "int8", "int4")
ROWS = 32
"""Examples in a call of a classifier at most."""


def check(model: Deployable, quantize: str) -> None:
    if quantize in SCHEMES and (problem := problem_of(model.model, SCHEMES[quantize])) is not None:
        raise ExportError(f"quantize: {problem}.")
    _graph(model)


def write(model: Deployable, folder: Path, quantize: str, calibration: Calibration | None) -> dict[str, Any]:
    notes: list[str] = []
    if quantize == "int8":
        model, notes = smoothed(model, calibration)
    graph = _graph(model)
    if quantize in SCHEMES:
        scheme = SCHEMES[quantize]
        embedding = graph.model.get_input_embeddings() if isinstance(graph, CachedLM) else None
        if left := list(unsupported(graph.model, scheme)):
            notes.append(f"{len(left)} convolutions stay in float32: torchao quantises linear layers alone.")
        quantise(graph.model, scheme, embedding=embedding)
    if isinstance(graph, CachedLM):
        chunk = min(CHUNK, graph.length)
        written = {"length": graph.length, "chunk": chunk, "rows": None, "files": [FILE, WEIGHTS]}
        notes.append(f"sequences of at most {graph.length} tokens, one at a time: the size of its KV cache.")
        inputs: tuple[Tensor, ...] = (model.example[:1], torch.tensor([0]), torch.arange(model.example.shape[1]))
        dims: Any = ({1: _upto("tokens", chunk)}, None, {0: _upto("rows", chunk)})
    elif model.kind == "text":
        length = min(MAX_LENGTH, model.max_positions or MAX_LENGTH)
        written = {"length": length, "chunk": None, "rows": 1, "files": [FILE]}
        notes.append(f"sequences of at most {length} tokens, without a KV cache.")
        inputs, dims = (model.example[:1],), ({1: _upto("tokens", length)},)
    else:
        written = {"length": None, "chunk": None, "rows": ROWS, "files": [FILE]}
        inputs, dims = (model.example,), ({0: _upto("rows", ROWS)},)
    program = _lowered(model, graph, inputs, dims)
    with quiet(), (folder / FILE).open("wb") as file:
        program.write_to_file(file)
        program.write_tensor_data_to_file(str(folder))
    return {**written, "notes": notes}


def _graph(model: Deployable) -> Any:
    """The module that is exported, whose `model` shares the parameters of the model. ExportError if it has none."""
    if model.config is None:
        return copy.deepcopy(model.plain, {id(tensor): tensor for tensor in _tensors(model.model)})
    try:
        with quiet():
            importlib.import_module("executorch.extension.llm.custom_ops.custom_ops")  # the operators of attention
            return CachedLM(model)
    except Unfit as problem:
        raise refusal(model, str(problem)) from problem


def _lowered(model: Deployable, graph: nn.Module, inputs: tuple[Tensor, ...], dims: Any) -> Any:
    """The program of a module, with the subgraphs that XNNPACK runs."""
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.backend.compile_spec_schema import CompileSpec
        from executorch.exir.backend.partitioner import DelegationSpec
        from executorch.exir.passes import MemoryPlanningPass

    def step(what: str, function: Any) -> Any:
        try:
            with quiet(), torch.no_grad():
                return function()
        except Exception as error:
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise refusal(model, f"{what} cannot take ({first.strip().rstrip('.')})") from error

    partitioner = XnnpackPartitioner()
    if isinstance(graph, CachedLM):
        # of XNNPACK's passes only that for linear layers: the others are for convolutions, and took half the time
        only_linear = [CompileSpec("dqlinear_partitioner", b"")]
        partitioner.delegation_spec = DelegationSpec("XnnpackBackend", only_linear)

    exported = step(
        "torch.export", lambda: torch.export.export(graph.eval(), inputs, dynamic_shapes=dims, strict=False)
    )
    # the attention's operators are no part of the edge dialect, whose check would refuse them
    compiled = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    edge = step(
        "ExecuTorch",
        lambda: to_edge_transform_and_lower(exported, partitioner=[partitioner], compile_config=compiled),
    )
    options: dict[str, Any] = {"memory_planning_pass": MemoryPlanningPass(alloc_graph_input=False)}
    if isinstance(graph, CachedLM):
        options["external_constants"] = lambda node: WEIGHTS
        store = edge._named_data_store  # those of XNNPACK; there is no public way to have them in the same file
        store.external_data[WEIGHTS], store.pte_data = store.pte_data, {}
    return step("ExecuTorch", lambda: edge.to_executorch(ExecutorchBackendConfig(**options)))


def _upto(name: str, most: int) -> Any:
    return torch.export.Dim(name, min=1, max=most)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
