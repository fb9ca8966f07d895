"""An attached model that is compiled as a whole, its loss included: one graph for batches of all shapes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_trainer_cases import student
from train_cases import documents, make_cache

from fastkd import DistillLoader
from fastkd.integrations.hf import attach
from fastkd.stream import batch_to_tensors
from fastkd.stream.tensors import ITEMS, for_compiled


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")  # of torch itself, as it compiles
def test_one_graph_for_all_batches(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", documents(30, 60), context=48, shard_positions=200)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def noting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model = attach(student(num_hidden_layers=1), alpha=0.3, temperature=2.0)
    compiled, shapes = torch.compile(model, backend=noting, fullgraph=True), set()
    for step in DistillLoader(cache, batch_tokens=250, micro_tokens=160, buckets=True):
        for batch in step.micro_batches:
            if len(batch.input_ids) == 1:  # a case of its own
                continue
            shapes.add((*batch.input_ids.shape, batch.count))
            given, found = batch_to_tensors(batch), []
            scheduled = {"alpha": torch.tensor(0.1 + 0.05 * step.number), "temperature": torch.tensor(2.0)}
            for run, tensors in ((model, given), (compiled, for_compiled(given))):
                model.zero_grad()
                loss = run(**tensors, kd_scheduled=scheduled)["loss"]
                loss.backward()
                found.append([loss.detach(), *(p.grad for p in model.parameters())])
            assert tensors[ITEMS] == step.count
            torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
    assert len({rows for rows, _, _ in shapes}) > 1
    assert len({length for _, length, _ in shapes}) > 1
    assert len(graphs) == 1
    torch._dynamo.reset()
