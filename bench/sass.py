"""Instructions that a compiled kernel executes, read out of its SASS: blocks, loops, and the shortest way through them.

Nothing is run. Of the ways through a kernel, the one with the fewest instructions that passes the given loops is
counted: rows that need more work (ties, a certain student) take another one. Other loops on the way count as often as
their SASS says, or once where it does not say.
"""

import math
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heappop, heappush
from pathlib import Path

from fastkd.bench.compiled import Launch, at_temperature
from fastkd.errors import BenchError

WARP = 32
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def disassemble(cubin: bytes) -> str:
    """SASS of a cubin, by the cuobjdump that comes with triton."""
    return _cuobjdump(cubin, "-sass")


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK (bytes of spills a thread) and more, by the same tool."""
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", _cuobjdump(cubin, "-res-usage"))}


def _cuobjdump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Instruction:
    """An instruction. guard: the predicate it depends on, or "". op: with its modifiers, as LDG.E.128."""

    address: int
    guard: str
    op: str
    operands: str

    @property
    def kind(self) -> str:
        """The op without modifiers."""
        return self.op.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.kind == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def leaves(self) -> bool:
        """Whether it ends the kernel."""
        return self.kind in ("EXIT", "RET", "BRX", "KILL")

    @property
    def predicates(self) -> list[str]:
        """Those that decide whether a branch or an exit is taken."""
        return [self.guard.lstrip("!")] * bool(self.guard) + re.findall(r"\bU?P\d", self.operands)

    @property
    def conditional(self) -> bool:
        """Whether what follows a branch or an exit may be executed."""
        return bool(self.predicates) or ".DIV" in self.op or ".CONV" in self.op

    @property
    def bytes(self) -> int:
        """Bytes that a load or a store moves a thread."""
        found = re.search(r"\.[US]?(8|16|32|64|128|256)\b", self.op)
        return int(found[1]) // 8 if found else 4


@dataclass(frozen=True)
class Count:
    """What is executed. issued: instructions. exponentials: MUFU.EX2. special: all kinds of MUFU. loaded: bytes that
    global loads ask for."""

    issued: float = 0
    exponentials: float = 0
    special: float = 0
    loaded: float = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.issued + other.issued,
            self.exponentials + other.exponentials,
            self.special + other.special,
            self.loaded + other.loaded,
        )

    def __mul__(self, factor: float) -> "Count":
        return Count(self.issued * factor, self.exponentials * factor, self.special * factor, self.loaded * factor)


def count(instructions: Sequence[Instruction]) -> Count:
    """Each of them once."""
    return Count(
        len(instructions),
        sum(i.op.startswith("MUFU.EX2") for i in instructions),
        sum(i.kind == "MUFU" for i in instructions),
        sum(i.bytes for i in instructions if i.kind == "LDG"),
    )


@dataclass(frozen=True)
class Loop:
    """A loop of the blocks first to last, which branches back from the last one."""

    first: int
    last: int
    inside: tuple[Instruction, ...]

    def bytes(self, kind: str) -> int:
        """Bytes that a thread moves in an iteration by instructions of this kind: LDG or STG."""
        return sum(i.bytes for i in self.inside if i.kind == kind)

    @property
    def has_exponentials(self) -> bool:
        """Whether it computes any."""
        return any(i.op.startswith("MUFU.EX2") for i in self.inside)

    @cached_property
    def constant_trips(self) -> int:
        """The number of iterations of a loop over a constant range from 0; 1 where its branch does not say so."""
        branch = self.inside[-1]
        if len(set(branch.predicates)) != 1:
            return 1
        setter = rf"{branch.predicates[0]}, U?PT, (U?R\d+)(?:\.reuse)?, (0x[0-9a-f]+|\d+), U?PT$"
        tests = [
            (number, m)
            for number, i in enumerate(self.inside)
            if "ISETP" in i.kind and not i.op.endswith(".EX") and (m := re.match(setter, i.operands))
        ]
        if not tests:
            return 1
        at, match = tests[-1]
        step_of = rf"(U?R\d+),.*?\b{match[1]}(?:\.reuse)?, (0x[0-9a-f]+|\d+)\b"
        steps = [
            (number, m)
            for number, i in enumerate(self.inside)
            if i.kind in ("IADD3", "UIADD3", "VIADD") and (m := re.match(step_of, i.operands))
        ]
        if not steps:
            return 1
        where, step = steps[-1]
        # compared after the step, it is the number of the next iteration; before it, that of this one
        after = where < at and step[1] == match[1]
        return math.ceil(int(match[2], 0) / int(step[2], 0)) + (0 if after else 1)


class Program:
    """A kernel's instructions as basic blocks."""

    def __init__(self, text: str) -> None:
        found = [Instruction(int(address, 16), *rest) for address, *rest in _LINE.findall(text)]
        if not found:
            raise ValueError("no SASS in this text")
        found = [_as_branch(i, found) for i in found]
        starts = {found[0].address}
        for here, behind in zip(found, [*found[1:], None], strict=True):
            if here.target is not None or here.leaves:
                starts |= {a for a in (here.target, behind.address if behind else None) if a is not None}
        self.blocks: list[list[Instruction]] = []
        for instruction in found:
            if instruction.address in starts:
                self.blocks.append([])
            self.blocks[-1].append(instruction)
        self._at = {block[0].address: number for number, block in enumerate(self.blocks)}

    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return sum(i.kind in ("LDL", "STL") for block in self.blocks for i in block)

    def successors(self, number: int) -> list[int | None]:
        """Blocks that may follow; None where the kernel may end."""
        end = self.blocks[number][-1]
        behind = number + 1 if number + 1 < len(self.blocks) else None
        if end.target is not None:
            return [self._at.get(end.target), *([behind] if end.conditional else [])]
        if end.leaves:
            return [None, behind] if end.conditional and behind is not None else [None]
        return [behind]

    @cached_property
    def loops(self) -> list[Loop]:
        """The loops in the order of their addresses, without the empty one behind the end, and without branches back
        from what lies out of the way."""
        found: dict[int, Loop] = {}
        for number in range(len(self.blocks)):
            for to in self.successors(number):
                if to is not None and to <= number:
                    inside = tuple(i for block in self.blocks[to : number + 1] for i in block)
                    loop = Loop(to, number, inside)
                    if len(inside) > 1 and self._find_way([to], number, loop) is not None:
                        found[to] = loop
        return [found[first] for first in sorted(found)]

    def executed(self, passes: Sequence[tuple[Loop, float]]) -> tuple[Count, list[Count]]:
        """What a thread executes from the first instruction to the last: outside the given loops, and within each.
        passes: loops in the order in which they are taken, and the numbers of their iterations."""
        outside, within = Count(), list[Count]()
        starts: list[int | None] = [0]
        for loop, trips in passes:
            outside += self._cost(self._way(starts, loop.first))
            within.append(self.iteration(loop) * trips)
            starts = self._behind(loop)
        if None in starts:
            return outside, within
        return outside + self._cost(self._way(starts, None)), within

    @property
    def open_loops(self) -> list[Loop]:
        """The outermost loops whose number of iterations is not in the SASS."""
        outermost = [
            loop
            for loop in self.loops
            if not any(other.first < loop.first and loop.last <= other.last for other in self.loops)
        ]
        return [loop for loop in outermost if loop.constant_trips == 1]

    @property
    def main_block(self) -> Loop:
        """The block with the most exponentials, as a loop of one iteration."""
        number = max(range(len(self.blocks)), key=lambda number: count(self.blocks[number]).exponentials)
        return Loop(number, number, tuple(self.blocks[number]))

    def iteration(self, loop: Loop) -> Count:
        """What a thread executes in an iteration."""
        return sum((count(self.blocks[b]) for b in self._inside(loop)), Count())

    def _inside(self, loop: Loop) -> list[int]:
        return [*self._way([loop.first], loop.last, loop), loop.last]

    def _cost(self, way: Sequence[int]) -> Count:
        """Of blocks in turn, and of what the loops among them repeat."""
        total = sum((count(self.blocks[b]) for b in way), Count())
        for loop in self.loops:
            if loop.first in way:
                total += self.iteration(loop) * (loop.constant_trips - (loop.last in way))
        return total

    def _way(self, starts: Sequence[int | None], end: int | None, within: Loop | None = None) -> list[int]:
        way = self._find_way(starts, end, within)
        if way is None:
            raise ValueError("no way from one block to the other")
        return way

    def _find_way(self, starts: Sequence[int | None], end: int | None, within: Loop | None = None) -> list[int] | None:
        """The blocks with the fewest instructions from one block until before another one (None: the kernel's end)."""
        queue: list[tuple[int, int, int | None, list[int]]] = [(0, turn, at, []) for turn, at in enumerate(starts)]
        done: set[int | None] = set()
        turn = len(queue)
        while queue:
            cost, _, at, path = heappop(queue)
            if at == end:
                return path
            if at in done or at is None:
                continue
            done.add(at)
            for to in self.successors(at):
                if within is None or (to is not None and within.first <= to <= within.last):
                    turn += 1
                    heappush(queue, (cost + len(self.blocks[at]), turn, to, [*path, at]))
        return None

    def _behind(self, loop: Loop) -> list[int | None]:
        """Where a loop is left to from its last block that it is left from."""
        for number in range(loop.last, loop.first - 1, -1):
            if out := [to for to in self.successors(number) if to is None or not loop.first <= to <= loop.last]:
                return out
        raise ValueError("a loop without a way out")


def _as_branch(call: Instruction, all_of_them: Sequence[Instruction]) -> Instruction:
    """A call of code that never returns, as ptxas leaves a loop by on sm_80, as the branch that it is."""
    if call.kind != "CALL" or not (goes := re.search(r"0x([0-9a-f]+)$", call.operands)):
        return call
    ends = (i.kind for i in all_of_them if i.address >= int(goes[1], 16) and i.kind in ("EXIT", "RET"))
    return replace(call, op="BRA") if next(ends, "EXIT") == "EXIT" else call


@dataclass(frozen=True)
class Counted:
    """A kernel, a row of logits. registers: a thread's. stack: bytes of spills a thread. parts: what its warps execute,
    by the part of the kernel. bytes: of memory, at most."""

    kernel: str
    warps: int
    registers: int
    stack: int
    parts: Mapping[str, Count]
    bytes: float

    @property
    def total(self) -> Count:
        """Of all parts."""
        return sum(self.parts.values(), Count())


def count_loss(launch: Launch, arch: int, temperature: float) -> Counted:
    """Pass 1, the write pass, and the rest of the loss's kernel, for a student that is not certain of its answer."""
    built = launch.compile(arch)
    used = resources(built.asm["cubin"])
    program = Program(disassemble(at_temperature(launch, arch, built, temperature).asm["cubin"]))
    warps, vocab, size = built.metadata.num_warps, launch.values["V"], launch.values["x_ptr"].itemsize
    loops = [loop for loop in program.loops if loop.has_exponentials and loop.bytes("LDG")]
    read = next((loop for loop in loops if not loop.bytes("STG")), None)
    write = next((loop for loop in reversed(loops) if loop.bytes("STG")), None)
    if read is None or write is None:
        raise BenchError(
            f"{launch.name}, sm_{arch}: no loop that reads and one that writes, with exponentials in both."
        )
    trips = [math.ceil(vocab * size / (warps * WARP * loop.bytes("LDG"))) for loop in (read, write)]
    rest, (first, second) = program.executed(list(zip((read, write), trips, strict=True)))
    parts = {"pass 1": first * warps, "write": second * warps, "rest": rest * warps}
    return Counted(launch.name, warps, used["REG"], used["STACK"], parts, sum(launch.bytes_a_row))


def count_kernel(launch: Launch, arch: int, trips: float = 1.0) -> Counted:
    """The shortest way through a kernel of top-k. trips: of its loops whose iterations depend on the data; 0: it does
    not come to its work."""
    built = launch.compile(arch)
    used = resources(built.asm["cubin"])
    program = Program(disassemble(built.asm["cubin"]))
    warps = built.metadata.num_warps
    passes = [(loop, trips) for loop in program.open_loops] or [(program.main_block, 1.0)]
    rest, within = program.executed(passes if trips else [])
    total = sum(within, rest) * (warps * launch.programs_a_row)
    *others, logits = launch.bytes_a_row
    moved = sum(others) + min(logits, total.loaded * WARP)  # of the logits it may read a part
    return Counted(launch.name, warps, used["REG"], used["STACK"], {"all": total}, moved if trips else 0.0)
