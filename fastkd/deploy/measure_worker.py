"""A process that runs one model and is timed: `python -m fastkd.deploy.measure_worker`. See `measure.py`.

Requests and answers are JSON, a line each. The first request names the model; then "turn", until the input ends.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, TextIO


def main() -> None:
    # libraries print to file descriptor 1: answers go to a copy of it, all else to stderr
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    load = _loader(request)
    before = _reset_peak()
    runtime = load()
    _answer(answers, {"name": runtime.name})
    inputs = _inputs(request)
    for line in sys.stdin:
        decoded = int(json.loads(line)["decode"])
        _answer(answers, _turn(runtime, inputs, decoded, request["kind"], before))
    runtime.close()


def _loader(request: dict[str, Any]) -> Any:
    """A function that loads the model. What it imports in any case is imported here, before memory is looked at."""
    import torch

    from ..models.hub import load_transformers
    from .exported import read_exported
    from .formats.safetensors import TorchRuntime, load

    threads, place = request["threads"], Path(request["place"])
    torch.set_num_threads(threads)
    if request["what"] == "exported":
        exported = read_exported(place)
        if exported.to == "safetensors" and exported.written["factory"] is None:
            load_transformers()
        return lambda: exported.runtime(threads)
    if request["what"] == "module":
        return lambda: TorchRuntime(torch.load(place, weights_only=False), threads)
    if request["factory"] is None:
        load_transformers()
    return lambda: load(place, {"factory": request["factory"]}, threads)


def _inputs(request: dict[str, Any]) -> Any:
    import numpy as np

    if request["kind"] == "examples":
        return np.load(request["inputs"])
    return np.asarray([request["inputs"]], np.int64)


def _turn(runtime: Any, inputs: Any, decoded: int, kind: str, before: int | None) -> dict[str, Any]:
    """Seconds of one turn: of a prefill, and of a decoded token; or of one example. memory: the most that the process
    has had since the model was loaded, above what it had before, in bytes."""
    token = None
    if kind == "examples":
        first = _seconds(lambda: runtime.logits(inputs), decoded)
    else:
        first = _seconds(lambda: runtime.prefill(inputs), 1)
        token = _seconds(lambda: runtime.decode(int(inputs[0, 0])), decoded)
    peak = _status("VmHWM")
    return {"prefill": first, "decode": token, "memory": None if peak is None or before is None else peak - before}


def _seconds(call: Any, times: int) -> float:
    """The median over the calls."""
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return sorted(found)[len(found) // 2]


def _reset_peak() -> int | None:
    """Let the peak of this process's memory begin again. Returns what it has now, in bytes; None where there is no
    /proc of Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def _answer(stream: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=stream, flush=True)


if __name__ == "__main__":
    main()
