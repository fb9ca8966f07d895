"""The first day on a GPU: its order, its file, its deadline, and all of it at toy sizes on the interpreter."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from bare_machine import run_bare

from fastkd.bench import day_steps, first_day, predicted
from fastkd.bench.bench_sass import GPUS
from fastkd.bench.day_steps import Sizes, processes, steps_of
from fastkd.bench.first_day import LOG, OK, UNFINISHED, WRONG, Day, Step, Unfinished, WrongResult, run
from fastkd.bench.gpu_day import main
from fastkd.bench.results import markdown
from fastkd.bench.table import Row, Table, load

ROOT = Path(__file__).parent.parent.parent


def day(path: Path) -> Day:
    return Day(path, "cpu", "toy")


class TestSteps:
    """Made-up steps: what is kept, what is skipped, what stops the day."""

    def step(self, name: str, calls: list[str], ratio: float = 1.0, **more) -> Step:
        def work(table: Table) -> None:
            calls.append(name)
            table.title("made up")
            table.ratio(name, ratio, "the floor", "<= 1.10")

        return Step(name, work, "loss", seconds=0, **more)

    def test_what_is_done_is_kept_at_once_and_not_done_again(self, tmp_path: Path) -> None:
        path, calls, kept = tmp_path / "day.json", [], []

        def look(table: Table) -> None:
            kept.append([row.name for recording in load(path) for row in recording.rows])

        steps = [self.step("a", calls), Step("look", look, seconds=0), self.step("b", calls)]
        assert run(day(path), steps, 100.0) == OK
        assert kept == [["a", "a"]]  # its row, and that it is done
        assert run(day(path), [*steps, self.step("c", calls)], 100.0) == OK
        assert calls == ["a", "b", "c"]
        recordings = {recording.suite: recording for recording in load(path)}
        assert [row.name for row in recordings["loss"].rows] == ["a", "b", "c"]
        assert [row.name for row in recordings[LOG].rows] == ["a", "look", "b", "c"]
        assert not list(tmp_path.glob("*.part"))
        assert "| a | 1x | <= 1.10 ok |" in markdown(load(path))

    def test_other_kernels_or_another_machine_begin_anew(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, calls = tmp_path / "day.json", []
        assert run(day(path), [self.step("a", calls)], 100.0) == OK
        monkeypatch.setattr(first_day, "kernels_hash", lambda: "others")
        assert run(day(path), [self.step("a", calls)], 100.0) == OK
        monkeypatch.setattr(first_day, "hardware", lambda device: {"device": "cpu", "name": "another", "cores": 1})
        assert day(path).steps == {}
        assert calls == ["a", "a"]
        assert len(load(path)) == 4  # the first day is still in the file

    def test_a_missed_bound_is_an_error_now_and_later(self, tmp_path: Path) -> None:
        path, calls = tmp_path / "day.json", []
        steps = [self.step("a", calls, 1.2), self.step("b", calls)]
        assert [run(day(path), steps, 100.0) for _ in range(2)] == [WRONG, WRONG]
        assert calls == ["a", "b"]

    def test_a_step_that_cannot_run_leaves_nothing_and_is_tried_again(self, tmp_path: Path) -> None:
        path, calls, broken = tmp_path / "day.json", [], [True]

        def work(table: Table) -> None:
            table.ratio("half", 1.0, "the floor")
            if broken:
                raise RuntimeError(f"kernel {broken.pop()}\nmore")

        steps = [Step("x", work, "loss", seconds=0), self.step("b", calls)]
        assert run(day(path), steps, 100.0) == WRONG
        assert day(path).steps["x"].note == "could not run: RuntimeError: kernel True"
        assert [row.name for row in day(path).table("loss").rows] == ["b"]
        assert run(day(path), steps, 100.0) == OK
        assert [row.name for row in day(path).table("loss").rows] == ["b", "half"]

    def test_a_wrong_smoke_ends_the_day(self, tmp_path: Path) -> None:
        path, calls, wrong = tmp_path / "day.json", [], [True]

        def smoke(table: Table) -> None:
            calls.append("smoke")
            if wrong:
                raise WrongResult("gradient in place")

        steps = [Step("smoke", smoke, seconds=0, always=True, stop=True), self.step("a", calls)]
        assert run(day(path), steps, 100.0) == WRONG
        assert calls == ["smoke"]
        wrong.clear()
        assert run(day(path), steps, 100.0) == OK
        assert run(day(path), steps, 100.0) == OK
        assert calls == ["smoke", "smoke", "a", "smoke"]  # on a machine that was given back, it comes first again

    def test_what_prepares_others_is_run_while_they_are_to_be_done(self, tmp_path: Path) -> None:
        """On a machine that was given back, compiled kernels are gone."""
        path, calls, broken = tmp_path / "day.json", [], [True]

        def work(table: Table) -> None:
            if broken:
                raise RuntimeError(broken.pop())

        steps = [self.step("compile", calls, before=("x",)), Step("x", work, seconds=0)]
        assert [run(day(path), steps, 100.0) for _ in range(3)] == [WRONG, OK, OK]
        assert calls == ["compile", "compile"]

    def test_the_deadline_cuts_a_step_and_the_next_call_goes_on(self, tmp_path: Path) -> None:
        path, calls, slow = tmp_path / "day.json", [], [True]

        def work(table: Table) -> None:
            table.ratio("half", 1.0, "the floor")
            try:
                time.sleep(20.0 if slow else 0.0)
            except Exception:
                calls.append("swallowed")

        steps = [self.step("a", calls), Step("slow", work, "loss", seconds=0), self.step("b", calls)]
        begun = time.monotonic()
        assert run(day(path), steps, 0.5) == UNFINISHED
        assert time.monotonic() - begun < 10
        assert [row.name for row in day(path).table("loss").rows] == ["a"]
        slow.clear()
        assert run(day(path), steps, 100.0) == OK
        assert calls == ["a", "b"]
        assert run(day(path), [self.step("c", calls), Step("long", work, seconds=101)], 100.0) == UNFINISHED
        assert calls == ["a", "b", "c"]

    def test_a_step_in_parts_goes_on_behind_them(self, tmp_path: Path) -> None:
        path, left = tmp_path / "day.json", ["x", "y"]

        def work(table: Table) -> None:
            table.title("parts")
            table.value(left.pop(0), 0.0, "failed", "<= 0")
            if left:
                raise Unfinished(*left)

        steps = [Step("parts", work, seconds=0, in_parts=True)]
        assert [run(day(path), steps, 100.0) for _ in range(2)] == [UNFINISHED, OK]
        assert [row.name for row in day(path).table(LOG).rows if row.case == "parts"] == ["x", "y"]

    def test_a_file_of_something_else_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "day.json"
        path.write_text("{}")
        with pytest.raises(SystemExit):
            main(["--toy", "--json", str(path), "--only", "limits"])
        assert "not recordings" in capsys.readouterr().err


def test_processes_run_together_and_end_in_time() -> None:
    ended = {}
    codes = {
        "good": "print('fine')",
        "bad": "import sys; print('x'); sys.exit(3)",
        "slow": "import time; time.sleep(60)",
    }
    commands = {name: [sys.executable, "-S", "-c", code] for name, code in codes.items()}
    left = processes(commands, lambda name, status, output: ended.update({name: (status, output.strip())}), most=4.0)
    assert ended == {"good": (0, "fine"), "bad": (3, "x")}
    assert left == ["slow"]


def test_failing_gpu_tests_are_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(commands, ended, most):
        ended("test_gpu.py", 1, "lines\n1 failed, 3 passed")
        ended("test_tail.py", 5, "no tests ran")
        return ["test_topk.py"] if len(commands) > 2 else []

    monkeypatch.setattr(day_steps, "processes", fake)
    table, sizes = Table("cpu", LOG), replace(Sizes.toy(), tests=("test_gpu.py", "test_tail.py", "test_topk.py"))
    with pytest.raises(Unfinished, match=r"test_topk\.py"):
        day_steps.gpu_tests(table, sizes)
    with pytest.raises(WrongResult):
        day_steps.gpu_tests(table, replace(sizes, tests=("test_gpu.py", "test_tail.py")))
    row = table.rows[0]
    assert (row.name, row.verdict, row.note) == ("test_gpu.py", "MISSED", "1 failed, 3 passed")


def test_where_every_test_is_skipped_nothing_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(commands, ended, most):
        ended("test_gpu.py", 0, "29 skipped in 0.40s")
        ended("test_tail.py", 0, "3 passed, 2 skipped in 0.40s")
        return []

    monkeypatch.setattr(day_steps, "processes", fake)
    table = Table("cpu", LOG)
    day_steps.gpu_tests(table, Sizes.toy())
    found = [(row.name, row.verdict, row.note) for row in table.rows]
    assert found == [
        ("test_gpu.py", "", "29 skipped in 0.40s"), ("test_tail.py", "ok", "3 passed, 2 skipped in 0.40s"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "shows"), [([], "--toy --list"), (["--peers"], "--toy --peers --list"), (["--list"], "--toy --list")]
)
def test_a_step_that_is_not_there_is_refused(
    more: list[str], shows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "day.json"
    with pytest.raises(SystemExit) as stopped:
        main(["--toy", "--json", str(path), "--only", "peers" if "--peers" in more else "loss", "nosuch", *more])
    assert stopped.value.code == 2
    assert f"--only: no step begins with 'nosuch'; {shows} shows them" in capsys.readouterr().err
    assert not path.exists()


def test_help_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert sum(line.strip().startswith("python bench/gpu_day.py") for line in said.splitlines()) == 3
    assert "smoke, which always runs" in " ".join(said.split())


def test_every_gpu_step_has_bounds_and_a_place() -> None:
    """The steps of a GPU, as far as they can be looked at without one."""
    steps = steps_of(Sizes())
    names = [step.name for step in steps]
    assert names[:4] == ["smoke", "compile", "tests", "limits"]
    assert len(set(names)) == len(names)
    for vocab in (32000, 49152, 50257, 128256, 151936, 262144):
        assert {f"loss V={vocab}, fresh", f"loss V={vocab}, certain"} <= set(names)
    assert sum(name.startswith("head ") for name in names) == 4
    assert {step.suite for step in steps} == {LOG, "loss", "head", "topk"}
    assert max(step.seconds for step in steps) < 540 / 4
    assert all("peers" in step.name for step in steps_of(Sizes(), peers=True))


def test_a_prediction_stands_beside_its_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    h100 = next(gpu for gpu in GPUS if gpu.name == "H100")
    counts = {"loss bucket bfloat16 V=128 T=2: loss_kernel": 400, "topk k=48 draws=16 bfloat16 V=128: _scan": 1000}
    monkeypatch.setattr(predicted, "record", lambda: counts)
    assert predicted.gpu_named("NVIDIA H100 80GB HBM3") == h100
    row = Row("in place forward_kl bucket T=2.0", "made up", ratio=1.2, note="0.5 ms")
    # 400 warps' instructions: 100 a logit of a thread; 132 SMs issue 128 in a clock
    issue = 100 / (132 * 128 * h100.clock * 1e-3) / (4 / h100.copy)
    note = predicted.beside(row, h100, 128, "bfloat16").note
    assert note == f"0.5 ms; predicted {issue:.2f}x for H100 (issue {issue:.2f}x)"
    other = replace(row, name="in place forward_kl bucket T=3.3")
    assert predicted.beside(other, h100, 128, "bfloat16") == other
    assert predicted.beside(row, None, 128, "bfloat16") == row
    drawn = predicted.beside(Row("fastkd, 48 entries and 16 draws", ""), h100, 128, "bfloat16")
    assert drawn.note.startswith("predicted ")


def test_the_whole_day_at_toy_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the interpreter: every step, the file that `fastkd bench --use` takes, and a smoke test that can fail."""
    pytest.importorskip("triton")
    path = tmp_path / "day.json"
    monkeypatch.setattr(day_steps, "gpu_tests", lambda table, sizes: None)
    assert main(["--toy", "--json", str(path)]) == OK
    recordings = {recording.suite: recording for recording in load(path)}
    assert {"loss", "head", "topk", LOG} <= set(recordings)
    names = [row.name for row in recordings["loss"].rows]
    assert {f"in place forward_kl bucket T={t}" for t in (1.0, 2.0, 3.3, 4.0)} <= set(names)
    assert {"evaluation forward_kl bucket T=1.0", "in place forward_kl sampled T=2.0"} <= set(names)
    assert {row.note for row in recordings[LOG].rows} == {"done"}
    assert all("kernels" in recording.versions for recording in recordings.values())
    before = path.read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(day_steps, "TOLERANCE", dict.fromkeys(day_steps.TOLERANCE, -1.0))
    assert main(["--toy", "--json", str(path)]) == WRONG
    assert path.read_bytes() != before
    said = capsys.readouterr().out
    assert said.count("toy: numbers mean nothing") == 1
    assert sum("torch " in line for line in said.splitlines()) == 1  # the machine and the versions
    found = json.loads(path.read_text())
    note = next(row["note"] for r in found if r["suite"] == LOG for row in r["rows"] if row["name"] == "smoke")
    assert note.startswith("failed: ")
    assert "differ from float64" in note


def test_it_runs_on_a_bare_machine(tmp_path: Path) -> None:
    """With torch, triton and numpy alone, and without an installation."""
    command = [str(ROOT / "bench" / "gpu_day.py"), "--toy", "--json", "day.json", "--only", "limits"]
    done = run_bare(command, tmp_path)
    assert done.returncode == OK, done.stderr[-2000:]
    (loss, log) = sorted(
        json.loads((tmp_path / "day.json").read_text()), key=lambda recording: recording["suite"] == LOG
    )
    assert "zarr" not in loss["versions"]
    assert [row["name"] for row in log["rows"]] == ["limits"]
