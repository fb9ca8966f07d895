"""Every Python snippet in the README runs, in order."""

import re
from pathlib import Path

import torch
from torch import Tensor


def test_snippets_run() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) >= 2
    names: dict[str, object] = {}
    gradients = []
    for snippet in snippets:
        exec(snippet, names)
        if ".backward()" in snippet and "optimizer" not in snippet:
            gradients.append(names["weight"].grad)
        for value in names.values():
            if isinstance(value, Tensor):
                value.grad = None  # what one snippet leaves would pass for the next one's
    assert names["out"].loss.isfinite()
    assert len(gradients) == 2
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    # both are of the same eight positions: whole, and in two parts of one step
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)
