"""The recipes of docs/clusters.md, run with stand-ins of fastkd and of the schedulers' commands."""

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

PAGE = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
FASTKD = """#!/bin/bash
echo "$@ RANK=$RANK" >> "$LOG"
trap 'exit 75' TERM
[ -n "$SLEEP" ] && { sleep "$SLEEP" & wait $!; }
[ "$(wc -l < "$LOG")" -ge "$LAST" ] && exit 0
exit "$STATUS"
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


class Stand:
    """A folder of stand-ins. `run` returns the exit status; `said` has a line for each call."""

    def __init__(self, folder: Path) -> None:
        self.log, self.bin = folder / "log", folder / "bin"
        self.bin.mkdir()
        for name, text in (("fastkd", FASTKD), ("scontrol", '#!/bin/bash\necho "scontrol $@" >> "$LOG"\n')):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        self.log.touch()

    def start(self, script: str, **environment: str) -> "subprocess.Popen[bytes]":
        given = {"LOG": str(self.log), "LAST": "99", "STATUS": "75", "TEACHER": "t", "DATA": "d", "PAUSE": "0"}
        path = {"PATH": f"{self.bin}:{os.environ['PATH']}"}
        return subprocess.Popen(["bash", "-c", script], env=os.environ | given | path | environment)

    @property
    def said(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


SLURM = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "64", "SLURM_ARRAY_JOB_ID": "17"}


@pytest.mark.parametrize(("status", "queued"), [("75", True), ("0", False), ("1", False)])
def test_slurm_requeues_what_has_work_left(stand: Stand, status: str, queued: bool) -> None:
    (script,) = blocks("bash")
    assert stand.start(script, STATUS=status, **SLURM).wait(60) == int(status)
    assert "--rank 3 --world-size 64" in stand.said[0]
    assert stand.said[1:] == ["scontrol requeue 17_3"] * queued


def test_slurm_passes_a_stop_on(stand: Stand) -> None:
    (script,) = blocks("bash")
    process = stand.start(script, STATUS="0", SLEEP="30", **SLURM)
    while not stand.said:
        time.sleep(0.02)
    time.sleep(0.2)  # until both have set their traps
    process.terminate()
    assert process.wait(20) == 75
    assert stand.said[1:] == ["scontrol requeue 17_3"]


def test_kubernetes_retries_75_and_not_1(stand: Stand) -> None:
    job: dict[str, Any] = yaml.safe_load(blocks("yaml")[0])
    spec = job["spec"]
    (worker,) = spec["template"]["spec"]["containers"]
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][1:]}
    assert codes == {"Ignore": [75], "FailJob": [1, 2]}
    assert spec["completionMode"] == "Indexed"
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # or the policy is refused
    assert worker["command"] == ["bash", "-c"]
    (script,) = worker["args"]
    assert stand.start(script, JOB_COMPLETION_INDEX="5").wait(60) == 75
    assert f"--rank 5 --world-size {spec['completions']}" in stand.said[0]


@pytest.mark.parametrize(("last", "status", "ends", "calls"), [("3", "75", 0, 3), ("99", "1", 1, 1)])
def test_skypilot_tries_75_again(stand: Stand, last: str, status: str, ends: int, calls: int) -> None:
    task = yaml.safe_load(blocks("yaml")[1])
    given = task["envs"] | {"RANK": "7"}
    assert stand.start(task["run"], **given, LAST=last, STATUS=status).wait(60) == ends
    assert len(stand.said) == calls
    assert stand.said[0].endswith("RANK=7")
