"""The n-th call fails: capture, train, sweep, report and seal with a system call that fails, whichever it is.

The calls are intercepted in libc (fault.c), for files below the job's folder, so that torch, Arrow and safetensors meet
the failure as Python does. Whatever fails: the status is documented, errors are one line, what was committed is kept,
and the same command run again comes to the result of one that nothing disturbed.
"""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from capture_cases import contents
from train_cases import documents

CREATE, WRITE, SYNC, MOVE, OPEN, READ = 1, 2, 4, 8, 16, 32


class Fault(NamedTuple):
    """Calls of some classes fail: the n-th alone, or with `forever` all from it on, as on a full disk."""

    classes: int
    error: int
    forever: bool = False


NONE = Fault(CREATE | WRITE | SYNC | MOVE | OPEN | READ, 0)
NO_CALL = "no call failed"
FAULTS = {
    "full": Fault(CREATE | WRITE, errno.ENOSPC, forever=True),
    "full once": Fault(CREATE | WRITE, errno.ENOSPC),
    "bad": Fault(CREATE | WRITE | SYNC | MOVE, errno.EIO),
    "unreadable": Fault(OPEN | READ, errno.EIO),
    "interrupted": Fault(CREATE | WRITE | SYNC | MOVE | OPEN | READ, errno.EINTR),
}
TRAIN = ("--student", "train_cases:dropping", "--batch-tokens", "60", "--micro-tokens", "32")
JOBS: dict[str, tuple[str, ...]] = {
    "capture": (
        "--teacher", "train_cases:tiny", "--data", "ids.parquet", "--out", "cache", "--k", "6", "--draws", "3",
        "--context", "16", "--shard-positions", "64", "--held-out", "0.2",
    ),
    "seal": ("cache",),
    "train": (*TRAIN, "--cache", "cache", "--out", "run", "--steps", "4", "--checkpoint-every", "2",
              "--evaluate-every", "4"),
    "sweep": (*TRAIN, "--cache", "cache", "--out", "sweep", "--steps", "2", "--evaluate-every", "2", "--alpha", "0",
              "1", "--seeds", "1"),
    "report": ("run",),
}  # fmt: skip
NEEDS = {"capture": [], "seal": ["cache"], "train": ["cache"], "sweep": ["cache"], "report": ["cache", "run"]}
SAMPLE = {"capture": 6, "seal": 3, "train": 3, "sweep": 1, "report": 1}  # cases in `make test`
SAY_EVERY = 25  # cases

_PATHS = {"ids.parquet", "cache", "run", "sweep"}


def _out(job: str) -> str:
    return {"capture": "cache", "seal": "cache", "train": "run", "sweep": "sweep", "report": "run"}[job]


def _untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k not in ("seconds", "waiting", "positions_per_second", "sha256")}


class Faults:
    """A server of commands, the folder that they work in, and their undisturbed results."""

    def __init__(self, root: Path) -> None:
        self.log, self.base, self.place = root / "log", root / "base", root / "place"
        library = root / "fault.so"
        source = Path(__file__).with_name("fault.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fault_server.py"))], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=os.environ | {"LD_PRELOAD": str(library)},
        )  # fmt: skip
        self.base.mkdir()
        pq.write_table(pa.table({"input_ids": documents(16, 16)}), self.base / "ids.parquet")
        shutil.copytree(self.base, self.place)
        self.calls: dict[str, list[int]] = {}  # of each job, by class
        self.whole: dict[str, dict[str, bytes]] = {}
        for job in JOBS:
            if job == "seal":
                (self.place / "cache" / "manifest.parquet").unlink()
            status, text, _, self.calls[job] = self.run(job)
            assert status == 0, text
            self.whole[job] = self.outcome(job)
            if job in ("capture", "train"):
                shutil.copytree(self.place / _out(job), self.base / _out(job))

    def run(self, job: str, fault: Fault = NONE, nth: int = 0) -> tuple[int, str, int, list[int]]:
        """Status, output, how many calls failed, and how many there were of each of the fault's classes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        argv = [job, *(str(self.place / a) if a in _PATHS else a for a in JOBS[job])]
        order = {"argv": argv, "folder": str(self.place), "log": str(self.log), "nth": nth, **fault._asdict()}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        status, failed, calls = json.loads(self.process.stdout.readline())
        return status, self.log.read_text(), failed, calls

    def reset(self, job: str) -> None:
        """The folder as it is before a job."""
        shutil.rmtree(self.place)
        self.place.mkdir()
        for name in ("ids.parquet", *NEEDS[job]):
            copy = shutil.copytree if (self.base / name).is_dir() else shutil.copy
            copy(self.base / name, self.place / name)
        if job == "seal":
            (self.place / "cache" / "manifest.parquet").unlink()

    def outcome(self, job: str) -> dict[str, bytes]:
        """What a job left, but for times."""
        out = self.place / _out(job)
        if job == "report":
            return {"report": (out / "report.html").read_bytes()}
        if job in ("capture", "seal"):
            return {str(shard): content.encode() for shard, content in contents(out).items()}
        found: dict[str, bytes] = {}
        for path in sorted(path for path in out.rglob("*") if path.is_file()):
            name, data = str(path.relative_to(out)), path.read_bytes()
            if path.parent.name == "student":
                found[name] = data
            elif path.name in ("evaluation.json", "metrics.jsonl"):
                found[name] = json.dumps([_untimed(json.loads(line)) for line in data.splitlines()]).encode()
            elif path.name == "sweep.json":
                found[name] = json.dumps([arm["values"] for arm in json.loads(data)["arms"]]).encode()
        return found

    def committed(self, job: str) -> dict[str, bytes]:
        """What must survive: the shards of a cache."""
        return {
            str(path): path.read_bytes()
            for path in (self.place / "cache").rglob("*")
            if path.is_file() and not {"claims", "attempts"} & set(path.parts)
        }

    def case(self, job: str, name: str, nth: int) -> list[str]:
        """Run a job with a fault, and again without. Returns what is wrong."""
        fault, problems = FAULTS[name], []
        self.reset(job)
        status, text, failed, _ = self.run(job, fault, nth)
        if status not in (0, 1, 75):
            problems.append(f"status {status}")
        if fault.error == errno.ENOSPC and status == 1:
            problems.append("a full disk is 1")
        if "Traceback" in text:
            problems.append("a traceback")
        elif status and not text.splitlines()[-1].startswith("fastkd: "):
            problems.append("the last line is no error")
        kept = self.committed(job)
        again, retold, *_ = self.run(job)
        if again:
            problems.append(f"run again: status {again}: {retold[-300:]}")
        else:
            for path, data in kept.items():
                if not Path(path).exists() or Path(path).read_bytes() != data:
                    problems.append(f"lost or changed: {path}")
            found, whole = self.outcome(job), self.whole[job]
            if found != whole:
                different = [n for n in {**found, **whole} if found.get(n) != whole.get(n)]
                problems.append(f"run again: other bytes in {different}")
            hidden = [str(p) for p in self.place.rglob(".*") if p.name != ".metadata"]
            if hidden:
                problems.append(f"left behind: {hidden}")
        if not failed and not problems:
            return [NO_CALL]
        return [f"{job}, {name}, call {nth}: {problem}\n{text[-1500:]}" for problem in problems]

    def count(self, job: str, name: str) -> int:
        """The number of calls of a job that can fail so."""
        return sum(calls for number, calls in enumerate(self.calls[job]) if FAULTS[name].classes >> number & 1)

    def close(self) -> None:
        """End the server."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=120)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    found = Faults(tmp_path_factory.mktemp("faults"))
    yield found
    found.close()


def check(
    faults: Faults, job: str, cases: list[tuple[str, int]], say: Callable[[str], None] = lambda text: None
) -> None:
    """cases: faults of a job by name, and which call fails. say: told what was done so far, and each problem at once:
    all cases of a job take hours, and a run that is cut off shall count for what it did."""
    problems: list[str] = []
    missed = 0
    for done, (name, nth) in enumerate(cases, 1):
        found = faults.case(job, name, nth)
        # threads do not always make the same calls
        missed += found == [NO_CALL]
        problems += found if found != [NO_CALL] else []
        if found not in ([], [NO_CALL]):
            say("\n".join(found))
        if done % SAY_EVERY == 0 or done == len(cases):
            say(
                f"{job}: {done} of {len(cases)} cases, the last {name!r} at call {nth}: {len(problems)} problems so far"
            )
    assert not problems, f"{len(problems)} of {len(cases)}:\n" + "\n\n".join(problems[:12])
    assert missed <= 1 + len(cases) / 10


def test_a_sample_of_calls_fails(faults: Faults) -> None:
    for job, count in SAMPLE.items():
        names = [list(FAULTS)[number % len(FAULTS)] for number in range(count)]
        # evenly over all calls
        check(faults, job, [(name, 1 + faults.count(job, name) * i // count) for i, name in enumerate(names)])


@pytest.mark.soak
@pytest.mark.parametrize("job", JOBS)
def test_every_call_fails(faults: Faults, job: str, capfd: pytest.CaptureFixture[str]) -> None:
    def say(text: str) -> None:
        with capfd.disabled():
            print(text, flush=True)

    cases = [(name, n) for name in FAULTS for n in range(1, faults.count(job, name) + 1)]
    check(faults, job, random.Random(0).sample(cases, len(cases)), say)  # so a part of them is a sample of all
