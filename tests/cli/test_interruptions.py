"""Ctrl-C: what a command says of what it has done, and that it quits when it is asked again."""

import signal
import subprocess
import sys
from typing import Any

import pytest

from fastkd.cli import main as cli
from fastkd.cli.commands import Export, Plan, Train


def interrupted(*given: Any) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (Train, "train --student m:f --cache c --out o", "o: interrupted. What was finished is kept: run the same"),
        (Export, "export s --to onnx --out o", "interrupted; o was not written"),
        (Plan, "plan --teacher t --data d", "interrupted\n"),
        (Train, "train --student m:f --cache c --out o --dry-run", "interrupted\n"),
    ],
)
def test_what_is_said_at_once(
    command: type, arguments: str, expected: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for commands in (cli._LONG, cli._COMMANDS, cli._DRY_RUNS):
        if command in commands:
            monkeypatch.setitem(commands, command, interrupted)
    assert cli.main(arguments.split()) == 130
    said = capfd.readouterr().err
    assert said.startswith(f"fastkd: {expected}")


SLOW = """
import time
from fastkd.utils.signals import final, stopping

final()
with stopping() as stop:
    stop.gentle = True
    try:
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
    finally:
        print("cleaning up", flush=True)
        time.sleep(60)
"""


def test_the_third_time_it_does_not_clean_up() -> None:
    """First it stops by itself, then it is interrupted, then it ends."""
    process = subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "SIGINT: stopping after the current batch; Ctrl-C again to quit now\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning up\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.stdout.close()
    process.stderr.close()
