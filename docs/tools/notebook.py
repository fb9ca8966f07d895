"""A Jupyter notebook: as Markdown for the site, and executed.

python docs/tools/notebook.py NOTEBOOK [--write]    execute it; with --write keep its outputs in the file
"""

import argparse
import base64
import json
from pathlib import Path
from typing import Any, NamedTuple


class Shown(NamedTuple):
    text: str
    pictures: dict[str, bytes | str]
    """Contents by file name, which the text shows."""


def as_markdown(path: Path) -> Shown:
    """The cells of a notebook, each code cell with its outputs. Raises ValueError for a cell that was never run."""
    cells = json.loads(path.read_text())["cells"]
    parts: list[str] = []
    pictures: dict[str, bytes | str] = {}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        if cell["execution_count"] is None:
            raise ValueError(
                f"{path}: cell {number} was never run; run `python docs/tools/notebook.py {path} --write`."
            )
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data: dict[str, Any] = output.get("data", {})
            name = f"{path.stem}-{len(pictures)}"
            if "image/svg+xml" in data:
                pictures[f"{name}.svg"] = "".join(data["image/svg+xml"])
                parts.append(f"![Plot of the cell above]({name}.svg)")
            elif "image/png" in data:
                pictures[f"{name}.png"] = base64.b64decode(data["image/png"])
                parts.append(f"![Plot of the cell above]({name}.png)")
            else:
                text = "".join(output.get("text", "") or data.get("text/plain", ""))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return Shown("\n\n".join(parts) + "\n", pictures)


def execute(path: Path, *, write: bool) -> None:
    """Run all cells in a new kernel. Raises nbclient's CellExecutionError at the first that fails."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": path.parent}}
    NotebookClient(notebook, timeout=300, startup_timeout=300, kernel_name="python3", resources=where).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of this run
    if write:
        nbformat.write(notebook, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    execute(chosen.notebook, write=chosen.write)
