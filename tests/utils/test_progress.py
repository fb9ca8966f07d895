"""What a job says of itself: the numbers, by a clock of the test's own; and that saying it never ends the job."""

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastkd.utils.numbers import duration
from fastkd.utils.progress import MODES, Progress, counting, mode_for, naming
from fastkd.utils.progress_line import pace_text


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(mode: str, total: int = 1000, **options: Any) -> tuple[Progress, Clock, io.StringIO]:
    clock, stream = Clock(), io.StringIO()
    options = {"unit": "position", "shares": ("teacher_busy",), **options}
    return Progress(total, mode=mode, stream=stream, clock=clock, **options), clock, stream


def test_rates_shares_and_what_is_left() -> None:
    progress, clock, _ = made("none", already=100)
    for _ in range(10):
        clock.now += 2
        progress.add(20, teacher_busy=1.5)
    assert progress.now() == {
        "positions": 300.0,
        "total": 1000.0,
        "positions_per_second": 10.0,
        "teacher_busy": 0.75,
        "seconds_left": 70.0,
    }
    progress.found(100)
    assert progress.now()["positions_per_second"] == 10.0, "what others do is no speed of ours"
    assert progress.now()["seconds_left"] == 60.0


def test_workers_share_what_is_left() -> None:
    progress, clock, _ = made("none", workers=4)
    clock.now += 10
    progress.add(200)
    assert progress.now()["seconds_left"] == 10.0


def test_speeds_are_of_the_last_minute() -> None:
    progress, clock, _ = made("none", total=10**6)
    for speed in (100, 10):
        for _ in range(300):
            clock.now += 1
            progress.add(speed, teacher_busy=speed / 100)
    assert progress.now()["positions_per_second"] == pytest.approx(10)
    assert progress.now()["teacher_busy"] == pytest.approx(0.1)
    assert len(progress._marks) < 130
    # a long wait counts, and so does what comes after it
    clock.now += 600
    assert progress.now()["positions_per_second"] < 1
    for _ in range(100):
        clock.now += 1
        progress.add(10)
    assert progress.now()["positions_per_second"] == pytest.approx(10)


def test_many_small_steps_keep_few_marks() -> None:
    progress, clock, _ = made("none", total=10**9)
    for _ in range(20_000):
        clock.now += 0.01
        progress.add(1)
    assert len(progress._marks) < 130
    assert progress.now()["positions_per_second"] == pytest.approx(100)


@pytest.mark.parametrize("mode", MODES)
def test_work_that_came_to_nothing_is_taken_back(mode: str) -> None:
    progress, clock, _ = made(mode)
    clock.now += 1
    progress.add(50)
    progress.found(-50)
    assert progress.now()["positions"] == 0
    progress.found(-10)
    progress.add(1010)
    assert progress.now()["seconds_left"] == 0
    progress.found(5)
    assert progress.now()["seconds_left"] == 0, "more than there is leaves nothing, not less"
    progress.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("total", [0, 1])
def test_nothing_is_divided_by_zero(mode: str, total: int) -> None:
    """Nothing to do, and no time passed: everything there is to say is a number."""
    progress, clock, stream = made(mode, total=total)
    for wait in (0.0, 0.0, 100.0, 0.0, 100.0):
        clock.now += wait
        progress.add(0, teacher_busy=0.0)
        progress.found(0)
        assert all(abs(value) < 1e12 for value in progress.now().values())
    progress.close()
    text = stream.getvalue()
    assert "nan" not in text.lower()
    assert "inf" not in text.lower()


def test_events_are_json_and_numbers_that_json_has_not_are_null() -> None:
    progress, clock, stream = made("events")
    progress.figure("bytes_per_position", float("nan"), "? B each")
    progress.figure("whole", 3, "3 in all")
    for _ in range(3):
        clock.now += 5
        progress.add(10, teacher_busy=float("inf"))
    progress.event("shard", shard=1, loss=float("-inf"), text="a shard")
    progress.say("for a person")
    progress.close()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    events = [json.loads(line, parse_constant=refuse) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["progress"] * 3 + ["shard"]
    assert events[0]["positions"] == 10
    assert events[0]["positions_per_second"] == 2.0
    assert events[0]["bytes_per_position"] is None
    assert events[0]["teacher_busy"] is None
    assert events[0]["whole"] == 3
    assert events[3] == {"event": "shard", "shard": 1, "loss": None, "text": "a shard"}


def test_a_line_every_half_minute() -> None:
    progress, clock, stream = made("lines", total=2_000_000)
    progress.figure("bytes_per_position", 81.25, "81.2 B each")
    for _ in range(130):
        clock.now += 1
        progress.add(1000, teacher_busy=0.93)
    progress.say("shard 3: another worker was faster")
    progress.event("shard", shard=3)
    progress.event("shard", text="said")
    first, second, _, fourth, *rest = stream.getvalue().splitlines()
    assert first == "30,000 of 2.00M positions (1.5%), 1,000/s, 33 min left, 81.2 B each, teacher busy 93%"
    assert second.startswith("60,000 of 2.00M positions (3.0%)")
    assert fourth.startswith("120k of 2.00M positions (6.0%)")
    assert rest == ["shard 3: another worker was faster", "said"]


def test_a_bar_shows_the_same() -> None:
    progress, clock, stream = made("bar", already=400)
    progress.figure("bytes_per_position", 81.25, "81.2 B each")
    with progress:
        clock.now += 10
        progress.add(300, teacher_busy=5.0)
        progress.say("a line above it")
    text = stream.getvalue()
    assert "700/1,000 positions" in text
    assert "81.2 B each" in text
    assert "a line above it\n" in text
    there = len(text)
    progress.close()
    progress.add(1)
    assert len(stream.getvalue()) == there


def test_nothing_is_said_where_nobody_listens() -> None:
    progress, clock, stream = made("none")
    for _ in range(10):
        clock.now += 100
        progress.add(1)
        progress.say("something")
        progress.event("shard", text="something")
    progress.close()
    assert stream.getvalue() == ""


def test_what_says_how() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert mode_for(events=True, stream=Terminal()) == "events"
    assert mode_for(stream=Terminal()) == "bar"
    assert mode_for(stream=io.StringIO()) == "lines"
    closed = Terminal()
    closed.close()
    assert mode_for(stream=closed) == "lines"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (3600, "1.0 h"), (86400, "24.0 h"), (172800, "2.0 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Broken(io.StringIO):
    """Takes so many writes, then fails as a closed pipe, a full disk, or a terminal that is gone."""

    def __init__(self, number: int, after: int) -> None:
        super().__init__()
        self.number, self.after = number, after

    def write(self, text: str) -> int:
        self.after -= 1
        if self.after < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("after", [0, 1, 2, 7])
def test_a_stream_that_fails_ends_nothing(mode: str, number: int, after: int) -> None:
    clock = Clock()
    progress = Progress(1000, unit="position", shares=("busy",), mode=mode, stream=Broken(number, after), clock=clock)
    for _ in range(30):
        clock.now += 61
        progress.add(10, busy=1.0)
        progress.found(1)
        progress.say("a line")
        progress.event("shard", shard=1, text="a line")
    progress.close()
    assert progress.now()["positions"] == 330


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_that_was_closed_ends_nothing(mode: str) -> None:
    progress, clock, stream = made(mode)
    stream.close()
    for _ in range(3):
        clock.now += 61
        progress.add(10)
        progress.say("a line")
    progress.close()
    assert progress.now()["positions"] == 30


def test_what_is_no_json_is_still_an_error() -> None:
    progress, _, _ = made("events")
    with pytest.raises(TypeError, match="not JSON serializable"):
        progress.event("shard", shard={1})


PROGRAM = """
import sys
from fastkd.utils.numbers import duration
from fastkd.utils.progress import Progress
clock = iter(range(0, 10**9, 61))
progress = Progress(100, unit="position", mode=sys.argv[1], clock=lambda: next(clock))
sys.stdin.readline()
for _ in range(50):
    progress.add(1)
    progress.say("a line")
progress.close()
print("more", flush=True)
sys.exit(7)
"""


@pytest.mark.parametrize("mode", ["events", "lines", "bar"])
def test_a_reader_that_goes_away_does_not_change_the_exit_status(mode: str, tmp_path: Path) -> None:
    """`fastkd capture --json | head`: the status still says whether work remains."""
    reading, writing = os.pipe()
    errors = tmp_path / "errors"
    with open(errors, "wb") as file:
        streams = {"stdout": writing, "stderr": file} if mode == "events" else {"stdout": file, "stderr": writing}
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, mode], stdin=subprocess.PIPE, **streams)  # type: ignore[call-overload]
        os.close(writing)
        os.close(reading)
        process.communicate(b"go\n", timeout=120)
    assert process.returncode == 7
    assert errors.read_text() == ("" if mode == "events" else "more\n")


# What a person sees: slow steps, names, widths, and what is left on the screen


def slow(mode: str, **options: Any) -> tuple[Progress, Clock, io.StringIO]:
    """Three steps of 50 s of 20."""
    progress, clock, stream = made(mode, total=20, unit="step", shares=(), **options)
    for _ in range(3):
        clock.now += 50
        progress.add(1)
    return progress, clock, stream


def test_slow_steps_are_timed_in_seconds_and_move_by_micro_batches() -> None:
    progress, clock, stream = slow("lines")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "1 of 20 steps (5.0%), 50 s/step, 16 min left"
    clock.now += 31
    progress.doing("micro-batch 3/4")
    assert stream.getvalue().splitlines()[-1] == "3 of 20 steps (15.0%), micro-batch 3/4, 50 s/step, 14 min left"
    progress.add(1)
    assert "micro-batch" not in progress.line(120)
    assert progress.line(120).startswith("4/20 steps ")
    silent, _, stream = slow("events")
    before = stream.getvalue()
    silent.doing("micro-batch 3/4")
    assert stream.getvalue() == before


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("names", [(), ("control",), ("alpha=0.5,temperature=2,rate=0.001, seed 0", "control")])
def test_nothing_is_cut(width: int, names: tuple[str, ...]) -> None:
    with naming(*names):
        progress, _, _ = slow("none")
    progress.figure("loss", 3.213, "loss 3.213")
    progress.figure("speed", 1234, "1,234 positions/s")
    progress.doing("micro-batch 3/32")
    line = progress.line(width)
    assert len(line) <= width
    assert line.startswith(names[0][:8] if names else "3/20 steps")
    assert "3/20 steps" in line
    if names:
        assert line.partition(": ")[0].endswith(names[-1])  # also of a long name both ends are shown
    whole = {"15%", "micro-batch 3/32", "50 s/step", "13 min left", "14 min left", "loss 3.213", "1,234 positions/s"}
    shown = line.rpartition("  ")[2].split(", ")
    assert shown[:2] == ["15%", "micro-batch 3/32"]
    assert set(shown) <= whole
    assert set(progress.line(200).rpartition("  ")[2].split(", ")) >= whole - {"13 min left", "14 min left"}


def test_names_are_in_front_for_people_alone() -> None:
    for mode, expected in (("lines", "control: "), ("events", "")):
        with naming("control"):
            progress, clock, stream = made(mode)
        clock.now += 60
        progress.add(10)
        progress.event("note", text="step 1")
        lines = stream.getvalue().splitlines()
        assert lines[0].startswith(f"{expected}10 of 1,000 positions" if expected else '{"event": "progress", "pos')
        assert lines[1] == (f"{expected}step 1" if expected else '{"event": "note", "text": "step 1"}')
    assert made("lines")[0]._names == ""


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after this text."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|[\r\n]|[^\x1b\r\n]+", text):
        if part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row == len(lines))
        elif part == "\x1b[A":
            row -= 1
        elif part == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


def test_bars_within_bars_leave_nothing() -> None:
    outer, clock, stream = made("bar", total=2, unit="step", shares=())
    with outer:
        for _ in range(2):
            inner = Progress(9, unit="window", what="evaluate", passing=True, mode="bar", stream=stream, clock=clock)
            with inner:
                clock.now += 1
                inner.add(4)
                outer.say("a note")
            outer.add(1)
    (last,) = [line for line in screen(stream.getvalue()) if line != "a note"]
    assert last.startswith("2/2 steps")
    assert "evaluate" in stream.getvalue()


def test_a_count_within_another_job_is_shown_there() -> None:
    outer, clock, stream = slow("lines")
    with outer.hosting(), counting(9, "window", "evaluate", shown=False) as inner:
        clock.now += 31
        inner.add(4)
    assert "evaluate 4/9 windows, 50 s/step" in stream.getvalue().splitlines()[-1]
    assert "evaluate" not in outer.line(120)


def test_off_a_terminal_there_are_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with counting(2 * 10**9, "byte", "fingerprint", shown=True) as progress:
        progress._clock = lambda: progress._begun + 31.0
        progress.add(10**9)
    err = capsys.readouterr().err
    assert err == "fingerprint: 1.0 GB of 2.0 GB (50.0%), 32.3 MB/s, 31 s left\n"


@pytest.mark.parametrize(
    ("rate", "unit", "text"),
    [(0, "step", ""), (0.02, "step", "50 s/step"), (0.25, "step", "4.0 s/step"), (2.5, "step", "2.5/s"),
     (1500, "position", "1,500/s"), (2.5e6, "byte", "2.5 MB/s"), (1, "second", "")],
)  # fmt: skip
def test_paces(rate: float, unit: str, text: str) -> None:
    assert pace_text(rate, unit) == text
