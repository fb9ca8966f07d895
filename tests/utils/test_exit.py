"""How the command's process ends."""

import os
import subprocess
import sys
from typing import Any

import pytest

_BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

CODE = """
import atexit, os, sys
from fastkd.utils.signals import end, grouped

class Kept:
    def __del__(self, write=os.write):
        write(1, b"taken apart")

atexit.register(print, "functions registered for the end")
kept = Kept()
if sys.argv[1] == "grouped":
    grouped()
sys.stdout.write("unflushed, ")
end(75)
"""


@pytest.mark.parametrize(("how", "last"), [("grouped", ""), ("alone", "taken apart")])
def test_one_of_a_group_is_not_taken_apart(how: str, last: str) -> None:
    found = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, timeout=60)
    assert found.returncode == 75, found.stderr
    assert found.stdout == "unflushed, functions registered for the end\n" + last


def _end(code: str, how: str, **options: Any) -> subprocess.CompletedProcess[str]:
    joined = "grouped()" if how == "grouped" else ""
    lines = ["import sys", "from fastkd.utils.signals import end, grouped", joined, code, "end(75)"]
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], text=True, timeout=60, **options)


@pytest.mark.parametrize("how", ["grouped", "alone"])
def test_what_other_threads_have_begun_is_finished(how: str) -> None:
    code = (
        "import threading, time\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def work(name):\n"
        "    time.sleep(0.2)\n"
        "    print(name, flush=True)\n"
        "pool = ThreadPoolExecutor(1)\n"
        "pool.submit(work, 'submitted')\n"
        "time.sleep(0.1)\n"
        "threading.Thread(target=work, args=('started',)).start()\n"
    )
    found = _end(code, how, capture_output=True)
    assert (found.returncode, found.stdout) == (75, "submitted\nstarted\n"), found.stderr


@pytest.mark.parametrize("how", ["grouped", "alone"])
@pytest.mark.parametrize("code", ["sys.stdout = sys.stderr = None", "sys.stdout.close()"])
def test_the_status_does_not_depend_on_somebody_listening(how: str, code: str) -> None:
    found = _end(code, how, capture_output=True)
    assert (found.returncode, found.stderr) == (75, "")


@pytest.mark.parametrize("how", ["grouped", "alone"])
def test_output_that_is_lost_is_a_failure(how: str) -> None:
    """As Python has it: 120."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as nobody:
        found = _end("sys.stdout.write('lost')", how, stdout=nobody, stderr=subprocess.PIPE, env=_BUFFERED)
    assert found.returncode == 120
    assert "BrokenPipeError" in found.stderr
