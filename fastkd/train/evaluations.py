"""Evaluations by window at each evaluation of a run, so that two runs can be compared step by step.

    RUN/evaluations/step-00000040.npz   for each cache: positions and sums by window, and what was evaluated on

A file has some 50 bytes for each held-out window. At most `MOST` are kept of a run: with more evaluations than that, of
every second one, every fourth one, and so on, and of the last one.
"""

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TrainError
from ..utils.atomic import write_file

if TYPE_CHECKING:
    from ..evaluate.result import Evaluation

FOLDER = "evaluations"
MOST = 64
_NAME = re.compile(r"step-(\d{8,})\.npz")
_ABOUT = ("split", "spec", "content")


def kept_steps(steps: int, every: int) -> list[int]:
    """The evaluations that are kept of a run of `steps` with an evaluation after every `every` steps and at the end."""
    if not every:
        return []
    stride = 1
    while steps // (every * stride) > MOST:
        stride *= 2
    found = list(range(every * stride, steps + 1, every * stride))
    return found if found[-1:] == [steps] else [*found, steps]


def steps_of(run: Path) -> list[int]:
    """The steps of which there are evaluations."""
    folder = run / FOLDER
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name[1]) for name in found if name)


def write(run: Path, step: int, evaluations: "Sequence[Evaluation]") -> None:
    """Keep the evaluations after a step, one for each cache. Raises OSError."""
    arrays: dict[str, Any] = {}
    for number, one in enumerate(evaluations):
        arrays[f"{number}/about"] = np.array(json.dumps({name: getattr(one, name) for name in _ABOUT}))
        arrays[f"{number}/counts"] = one.student.counts
        arrays |= {f"{number}/sums/{name}": row for name, row in one.student.sums.items()}

    def save(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)

    (run / FOLDER).mkdir(exist_ok=True)
    write_file(_path(run, step), save)


def read(run: Path, step: int) -> "list[Evaluation]":
    """The evaluations after a step, without what is not kept: calibration, slices, the teacher. Empty if there are
    none. Raises TrainError if the file is damaged."""
    from ..evaluate.result import Evaluation, Windows

    path = _path(run, step)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
            arrays = dict(data)
        found: list[Evaluation] = []
        while f"{len(found)}/about" in arrays:
            prefix = f"{len(found)}/"
            about = json.loads(str(arrays[f"{prefix}about"]))
            sums = {n.removeprefix(f"{prefix}sums/"): a for n, a in arrays.items() if n.startswith(f"{prefix}sums/")}
            windows = Windows(arrays[f"{prefix}counts"], sums)
            split, spec, content = (str(about[name]) for name in _ABOUT)
            empty = Windows.empty(len(windows.counts))
            found.append(Evaluation(split, spec, content, 0, 0.0, 0, "", windows, empty))
        return found
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TrainError(f"{path}: cannot be read ({error}). Delete it.") from error


def drop_after(run: Path, step: int) -> None:
    """Remove the evaluations of later steps, which will be made again."""
    for later in steps_of(run):
        if later > step:
            _path(run, later).unlink()


def _path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}.npz"
