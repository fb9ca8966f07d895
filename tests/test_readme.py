"""Every Python snippet in the README runs, in order."""

import re
from pathlib import Path


def test_snippets_run() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) >= 2
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(snippet, names)
    assert names["out"].loss.isfinite()
    assert names["weight"].grad.any()
