"""What draws the pictures of the documentation and shows its notebook. `make docs` runs the rest of docs/tools."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from doc_pages import ROOT

import fastkd
from fastkd.cache import open_cache


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_of_a_cache(tmp_path: Path) -> None:
    """The shares of the probability are the teacher's own, and the bytes are those of the file."""
    plots = tool("plots")
    logits = 3 * torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    teacher = torch.nn.Embedding.from_pretrained(logits.expand(20, 20))  # the same distribution after every token
    fastkd.capture(teacher, [list(range(20))] * 3, tmp_path / "cache", k=6, draws=2, held_out=0)
    cache = open_cache(tmp_path / "cache")
    arrays = cache.read_shard(0)
    held = plots.kept_mass(arrays, cache.spec.temperatures, 6)
    for temperature in (1.0, 2.0):
        whole = (logits[0] / temperature).softmax(0).sort(descending=True)[0].cumsum(0)
        assert np.allclose(held[temperature], whole[:6], atol=0.02)
    path = tmp_path / "cache" / "shards" / "0.zarr.zip"
    sizes = plots.shard_sizes(path, 60)
    assert sum(sizes.values()) == pytest.approx(path.stat().st_size / 60)
    assert all(size > 0 for size in sizes.values())
    plots.save("shard", plots.shard(sizes), tmp_path / "pictures")
    light, dark = ((tmp_path / "pictures" / f"shard-{name}.svg").read_text() for name in ("light", "dark"))
    assert "tail at each temperature" in light
    assert light != dark


def test_a_notebook_is_shown_with_its_outputs(tmp_path: Path) -> None:
    output = {"output_type": "stream", "text": ["2\n"]}
    cells = [
        {"cell_type": "markdown", "source": ["# Title"]},
        {"cell_type": "code", "source": ["print(1 + 1)"], "execution_count": 1, "outputs": [output]},
    ]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    notebook = tool("notebook")
    assert notebook.as_markdown(path).text == "# Title\n\n```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n"
    cells[1]["execution_count"] = None
    path.write_text(json.dumps({"cells": cells}))
    with pytest.raises(ValueError, match="cell 1 was never run"):
        notebook.as_markdown(path)
