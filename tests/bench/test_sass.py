"""The static model: reading recorded SASS, ways through it, times over the floor, and the check of the record."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from fastkd.bench import bench_sass, predicted
from fastkd.bench.bench_sass import GPUS, AnyCase, LossCase, TopKCase, add_rows, measured_on
from fastkd.bench.check import FOLDER, recording_files
from fastkd.bench.sass import Count, Counted, Program, count
from fastkd.bench.suites import SUITES, named
from fastkd.bench.table import Row, Table, load, save

# As cuobjdump prints it: an early exit, a loop of one read, one of a read and a write behind a branch that is seldom
# taken, and a loop over a constant range.
SM_90 = """
	code for sm_90a
		Function : loss_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00000a00ff017b82 */
                                                                                 /* 0x000e300000000800 */
        /*0010*/                   ISETP.NE.U32.AND P0, PT, RZ, UR4, PT ;        /* 0x00000004ff007c0c */
        /*0020*/               @P0 EXIT ;                                        /* 0x0000000000580947 */
        /*0030*/                   LDG.E.EL.128 R4, [R2.64] ;                    /* 0x0000000402047981 */
        /*0040*/                   MUFU.EX2 R5, R4 ;                             /* 0x0000000400057308 */
        /*0050*/                   MUFU.EX2 R6, R4 ;                             /* 0x0000000400067308 */
        /*0060*/               @!P2 BRA 0x30 ;                                   /* 0xfffffff800d0a947 */
        /*0070*/               @!P1 BRA 0x140 ;                                  /* 0x0000000000a0a947 */
        /*0080*/                   LDL R7, [R1] ;                                /* 0x0000000001077983 */
        /*0090*/                   MUFU.RCP R7, R7 ;                             /* 0x0000000700077308 */
        /*00a0*/                   STL [R1], R7 ;                                /* 0x0000000701007387 */
        /*00b0*/                   NOP ;                                         /* 0x0000000000007918 */
        /*0140*/                   LDG.E.EF.128 R4, [R2.64] ;                    /* 0x0000000402047981 */
        /*0150*/                   MUFU.EX2 R5, R4 ;                             /* 0x0000000400057308 */
        /*0160*/                   STG.E.EF.128 [R2.64], R4 ;                    /* 0x0000000402007986 */
        /*0170*/                @P3 BRA 0x140 ;                                  /* 0xfffffffc00c03947 */
        /*0180*/                   VIADD R9, R9, 0x10 ;                          /* 0x0000001009097836 */
        /*0190*/                   ISETP.NE.U32.AND P6, PT, R9, 0x40, PT ;       /* 0x000000400900780c */
        /*01a0*/                @P6 BRA 0x180 ;                                  /* 0xfffffffc00e06947 */
        /*01b0*/                   STG.E [R2.64], R9 ;                           /* 0x0000000902007986 */
        /*01c0*/                   EXIT ;                                        /* 0x000000000000794d */
        /*01d0*/                   BRA 0x1d0;                                    /* 0xfffffffc00fc7947 */
        /*01e0*/                   NOP;                                          /* 0x0000000000007918 */
		..........
"""


def block(*lines: str, start: int = 0) -> str:
    """SASS of these instructions, 16 bytes each."""
    return "\n".join(f"/*{start + 16 * number:04x}*/  {line} ;" for number, line in enumerate(lines))


class TestProgram:
    def test_loops_and_what_they_move(self) -> None:
        read, write, fixed = Program(SM_90).loops
        assert [len(loop.inside) for loop in (read, write, fixed)] == [4, 4, 3]
        assert (read.bytes("LDG"), read.bytes("STG")) == (16, 0)
        assert (write.bytes("LDG"), write.bytes("STG")) == (16, 16)
        assert (read.has_exponentials, fixed.has_exponentials) == (True, False)

    def test_the_way_through_the_loops_avoids_early_exits_and_rare_branches(self) -> None:
        program = Program(SM_90)
        read, write, fixed = program.loops
        outside, within = program.executed([(read, 5), (write, 7)])
        # three before, the branch over the rare block, four times the constant loop, two behind
        assert outside == Count(issued=3 + 1 + 4 * 3 + 2)
        assert within == [Count(20, 10, 10, 80), Count(28, 7, 7, 112)]
        assert fixed.constant_trips == 4
        assert program.spills() == 2

    def test_without_loops_the_shortest_way_is_an_early_exit(self) -> None:
        assert Program(SM_90).executed([]) == (Count(issued=3), [])

    def test_uniform_branches(self) -> None:
        text = block("MOV R1, RZ", "LDG.E.64 R2, [R4]", "UISETP.GE.U32.AND UP0, UPT, UR4, 0x30, UPT",
                     "UIADD3 UR4, UPT, UPT, UR4, 0x10, URZ", "BRA.U !UP0, 0x10", "EXIT")  # fmt: skip
        program = Program(text)
        (loop,) = program.loops
        # compared before the step: 0, 16, 32 and 48
        assert loop.constant_trips == 4
        assert program.executed([]) == (Count(issued=2 + 4 * 4, loaded=4 * 8), [])

    def test_a_call_that_does_not_return_leaves_a_loop(self) -> None:
        """As ptxas writes it for sm_80; the other one is of a subroutine."""
        text = block("CALL.REL.NOINC 0x60", "MUFU.EX2 R2, R2", "@P0 CALL.REL.NOINC 0x40", "BRA 0x10", "MOV R1, R2",
                     "EXIT", "MOV R3, R4", "RET.REL.NODEC R2 0x0")  # fmt: skip
        program = Program(text)
        (loop,) = program.loops
        assert program.executed([(loop, 6)]) == (Count(issued=3), [Count(18, 6, 6)])

    def test_what_a_row_may_do_without_is_asked_for(self) -> None:
        """A loop that runs as often as the data say, behind an early exit; and a kernel without loops."""
        text = block("@P0 EXIT", "@P1 BRA 0x40", "LDG.E.128 R4, [R2]", "@P2 BRA 0x20", "MUFU.EX2 R5, R4", "EXIT")
        program = Program(text)
        assert program.executed([]) == (Count(issued=1), [])
        assert program.executed([(loop, 3) for loop in program.open_loops]) == (Count(4, 1, 1), [Count(6, loaded=48)])
        straight = Program(block("@P0 EXIT", "@P1 BRA 0x30", "MUFU.EX2 R5, R4", "EXIT"))
        assert straight.open_loops == []
        assert straight.executed([(straight.main_block, 1)]) == (Count(issued=3), [Count(1, 1, 1)])

    def test_a_branch_back_from_behind_the_end_is_no_loop(self) -> None:
        """What lanes do that have left their warp lies there."""
        text = block("MOV R1, RZ", "BRA.DIV ~URZ, 0x50", "SHFL.BFLY PT, R2, R3, 0x1, 0x1f", "MUFU.EX2 R4, R2", "EXIT",
                     "WARPSYNC 0xffffffff", "BRA 0x30")  # fmt: skip
        program = Program(text)
        assert program.loops == []
        assert program.executed([]) == (Count(5, 1, 1), [])

    def test_a_loop_that_is_left_in_its_middle(self) -> None:
        text = block("MOV R1, RZ", "@P0 BRA 0x50", "MUFU.EX2 R2, R2", "LDG.E.U16 R3, [R4]", "BRA 0x10", "EXIT")
        program = Program(text)
        (loop,) = program.loops
        outside, within = program.executed([(loop, 3)])
        assert (outside, within) == (Count(issued=2), [Count(12, 3, 3, 6)])

    @pytest.mark.parametrize("branch", ["@!P4 BRA P3, 0x0", "@P3 BRA 0x0"])
    def test_a_loop_whose_end_depends_on_data_counts_once(self, branch: str) -> None:
        text = block("ISETP.GE.U32.AND P3, PT, R7, R5, PT", "IADD3 R7, R7, 0x1, RZ", branch, "EXIT")
        assert [loop.constant_trips for loop in Program(text).loops] == [1]

    def test_widths(self) -> None:
        ops = ["LDG.E.128", "LDG.E.EF.64", "LDG.E", "LDG.E.U16", "LDG.E.U8.CONSTANT", "LDG.E.ENL2.256"]
        text = block(*(f"{op} R0, [R2]" for op in ops), "LDS.128 R0, [R2]", "EXIT")
        assert [i.bytes for i in Program(text).blocks[0][:6]] == [16, 8, 4, 2, 1, 32]
        assert count(Program(text).blocks[0]).loaded == 63

    def test_text_without_instructions(self) -> None:
        with pytest.raises(ValueError, match="no SASS"):
            Program("Fatbin elf code")


def counted(issued: float, *, kernel: str = "loss_kernel", stack: int = 0, vocab: int = 49152) -> Counted:
    """A kernel that executes so many instructions a logit."""
    total = Count(issued=issued, exponentials=2, special=2, loaded=4) * (vocab / 32)
    return Counted(kernel, 16, 64, stack, {"all": total}, bytes=4 * vocab)


class TestModel:
    def test_the_loss_against_one_read_and_one_write(self) -> None:
        table = Table("cpu")
        h100 = GPUS[0]
        add_rows(table, LossCase(49152), h100, [counted(22.0)], 1.07)
        predicted, measured = table.rows
        # 22 instructions on 132 SMs that issue 128 of them in a clock of 1.7 GHz, over 4 bytes at 3.0 TB/s
        assert predicted.ratio == pytest.approx(22 / (132 * 128 * 1.7e9) / (4 / 3.0e12))
        assert (predicted.over, predicted.limit, predicted.verdict) == ("one read and one write", "<= 0.55", "MISSED")
        assert "22.00 instructions a logit (all 22.00), 2.00 exponentials; issue 0.57x" in predicted.note
        # the ratio is not the kernel's time: the note says what is
        assert predicted.note.startswith("issue alone; the kernel takes at least 1.00x; ")
        assert "functions 0.42x, memory 1.00x; 64 registers, no spills" in predicted.note
        assert (measured.name, measured.ratio) == (f"{predicted.name}: measured on H100", 1.07)

    def test_top_k_is_the_sum_of_what_each_kernel_waits_for(self) -> None:
        table = Table("cpu")
        found = [counted(1.0, kernel="_scan"), counted(80.0, kernel="_select", stack=8)]
        add_rows(table, TopKCase(49152), GPUS[0], found, None)
        (row,) = table.rows
        # memory for the first, 4 bytes over 2; issue for the second
        assert row.ratio == pytest.approx(2 + 80 / (132 * 128 * 1.7e9) / (2 / 3.0e12))
        assert "8 BYTES OF SPILLS" in row.note
        assert "_scan 1.00, _select 80.00" in row.note

    @pytest.mark.parametrize(
        ("case", "says"),
        [
            (LossCase(49152), "loss: time to issue its instructions alone, over one read and one write"),
            (
                TopKCase(49152),
                "top-k: sum over its kernels of the largest of issue, functions and memory, over",
            ),
        ],
    )
    def test_the_table_says_what_the_ratio_is(
        self, case: AnyCase, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(bench_sass, "count_all", lambda some, arch: {case.name: [counted(22.0)]})
        table = Table("cpu", "sass")
        bench_sass._bench(table, "sizes", GPUS[1], [case])
        _, _, title, explained, functions, row = capsys.readouterr().out.splitlines()
        assert title == table.rows[0].case == "predicted for B200, sm_100: sizes"
        assert explained.strip().startswith(says)
        assert "functions: exponentials, logarithms and reciprocals" in functions
        assert row.strip().startswith(case.name)

    def test_limits(self) -> None:
        h100, b200, a100 = GPUS
        assert [LossCase(v).limit(h100) for v in (32000, 49152)] == ["<= 0.65", "<= 0.55"]
        assert LossCase(49152, softcap=30.0).limit(h100) == "<= 0.80"
        assert [LossCase(128256).limit(gpu) for gpu in (b200, a100)] == ["<= 1.0", ""]
        assert LossCase(49152, temperature=3.3).limit(h100) == LossCase(49152, torch.float32).limit(h100) == ""
        assert [TopKCase(128256, draws=n).limit(h100) for n in (0, 16)] == ["<= 2.0", ""]

    def test_a_recording_of_a_card_stands_beside_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        table = Table("cpu", "loss")
        for who, ratio in (("a certain student", 1.5), ("a fresh student", 1.08)):
            table.title(f"{who}: N=8192 V=49152 k=64 bfloat16")
            table.ratio("in place forward_kl bucket T=2.0", ratio, "copy")
        table.hardware = {"device": "cuda", "name": "NVIDIA H100 80GB HBM3", "memory_GB": 85}
        table.save(tmp_path / "h100.json")
        monkeypatch.setattr(bench_sass, "recording_files", lambda: [tmp_path / "h100.json"])
        h100, b200, _ = GPUS
        assert measured_on(h100, LossCase(49152)) == 1.08
        others: list[AnyCase] = [LossCase(49152, temperature=1.0), LossCase(128256), TopKCase(49152)]
        assert [measured_on(h100, case) for case in others] == [None, None, None]
        assert measured_on(b200, LossCase(49152)) is None

    @pytest.mark.parametrize("case", [LossCase(128256), LossCase(128256, treatment="sampled"), TopKCase(128256)])
    def test_the_prediction_stands_beside_a_measured_row(self, case: AnyCase) -> None:
        """Both directions know the row by the same name, and take the same counts."""
        row = predicted.beside(Row(case.measured[1], "", ratio=1.1), GPUS[0], case.vocab, "bfloat16")
        assert re.search(r"predicted [\d.]+x for H100", row.note)

    def test_it_runs_only_by_name(self) -> None:
        assert SUITES["sass"] not in named([])
        assert named(["sass"]) == [SUITES["sass"]]


COUNTS = {"loss: loss_kernel": {"instructions": 100, "registers": 64, "spills": 0}}


class TestCheck:
    def checked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triton: str = "", **change: int
    ) -> tuple[int, Path]:
        """The status of the check where the record has COUNTS and the kernels now have this change."""
        path = tmp_path / "sass.json"
        monkeypatch.setattr(bench_sass, "counts", lambda: COUNTS)
        bench_sass.write_record(path)
        if triton:
            path.write_text(json.dumps(json.loads(path.read_text()) | {"triton": triton}))
        now = {name: found | change for name, found in COUNTS.items()}
        monkeypatch.setattr(bench_sass, "counts", lambda: now)
        return bench_sass.check(path), path

    def test_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.checked(tmp_path, monkeypatch)[0] == 0

    @pytest.mark.parametrize("change", [{"instructions": 101}, {"spills": 8}])
    def test_worse(
        self,
        change: dict[str, int],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert self.checked(tmp_path, monkeypatch, **change)[0] == 1
        ((what, now),) = change.items()
        said = capsys.readouterr().out
        assert f"loss: loss_kernel: {what}: got {now}; the record has {COUNTS['loss: loss_kernel'][what]}" in said
        assert "python -m fastkd.bench.bench_sass --record" in said

    def test_better(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.checked(tmp_path, monkeypatch, instructions=99, registers=65)[0] == 0
        assert "1 numbers are lower" in capsys.readouterr().out

    def test_another_triton(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.checked(tmp_path, monkeypatch, triton="2.0", instructions=101)[0] == 0
        assert f"the record is of triton 2.0; {version('triton')} cannot be compared" in capsys.readouterr().out

    def test_a_kernel_that_is_not_recorded_or_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        record = {"kernels": COUNTS}
        assert bench_sass.compare(record, {}) == (["loss: loss_kernel: no longer counted"], [])
        assert bench_sass.compare({"kernels": {}}, COUNTS) == (["loss: loss_kernel: not recorded"], [])

    def test_the_record_is_of_the_default_configurations_and_no_recording(self) -> None:
        record = json.loads((FOLDER / "sass.json").read_text())
        assert {name.rpartition(": ")[0] for name in record["kernels"]} == {case.name for case in bench_sass.CHECKED}
        assert (FOLDER / "sass.json") not in recording_files()
        for file in recording_files():
            assert load(file)


def test_a_row_is_saved_and_read(tmp_path: Path) -> None:
    table = Table("cpu", "sass")
    table.title("predicted for B200")
    add_rows(table, LossCase(128256), GPUS[1], [counted(20.0, vocab=128256)], None)
    save([table.recording()], tmp_path / "rows.json")
    (row,) = load(tmp_path / "rows.json")[0].rows
    assert isinstance(row, Row)
    assert (row.line, dict(row.at), row.better) == ("B200, predicted", {"V": 128256}, "")
