"""How the command's process ends."""

import subprocess
import sys

import pytest

CODE = """
import atexit, os, sys
from fastkd.ending import end, grouped

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
