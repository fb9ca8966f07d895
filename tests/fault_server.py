"""Runs commands in which a system call fails. Started with fault.c preloaded; each command is forked after all imports.

A line of JSON in: {"argv", "folder", "classes", "nth", "error", "forever", "log"}; out: [status, calls that
failed, calls by class]. The command's output goes to the file `log`.
"""

import ctypes
import gc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any


def child(argv: list[str], log: str) -> None:
    """Run `fastkd` as a person does."""
    from fastkd.__main__ import run

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    sys.argv = ["fastkd", *argv]
    run()


def prepare() -> None:
    """Import and compile what the commands need."""
    gc.disable()  # what is imported stays
    import torch
    import torch.utils.serialization
    import train_cases

    import fastkd.cache.inspect
    import fastkd.report.sections.held_out
    import fastkd.sweep.api
    import fastkd.train.api  # noqa: F401
    from fastkd.cli.parse import parse
    from fastkd.report.page import Page
    from fastkd.report.render import to_html

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train_cases.make_cache(Path(folder) / "cache")
    parse(["inspect", "x"])
    to_html(Page("", "", []))
    gc.freeze()
    gc.enable()


def main() -> None:
    """Serve until the input ends."""
    prepare()
    library: Any = ctypes.CDLL(None)
    library.fault_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    library.fault_calls.restype = library.fault_failed.restype = ctypes.c_long
    for line in iter(sys.stdin.readline, ""):
        do = json.loads(line)
        process = os.fork()
        if not process:
            status = 1
            try:
                library.fault_arm(do["folder"].encode(), do["classes"], do["nth"], do["error"], do["forever"])
                child(do["argv"], do["log"])
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        calls = [library.fault_calls(number) for number in range(6)]
        print(json.dumps([status, library.fault_failed(), calls]), flush=True)


if __name__ == "__main__":
    main()
