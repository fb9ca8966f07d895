"""Instructions that a compiled kernel executes, read out of its SASS: blocks, loops, and the shortest way through them.

Nothing is run. Of the ways through a kernel, the one with the fewest instructions that passes the given loops is
counted; rows that need more work (ties, a certain student) take another one.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from pathlib import Path

import triton

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def disassemble(cubin: bytes) -> str:
    """SASS of a cubin, by the cuobjdump that comes with triton."""
    return _tool(cubin, "-sass")


def resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK (bytes of spills a thread) and more, by the same tool."""
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", _tool(cubin, "-res-usage"))}


def _tool(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [_TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True
        ).stdout


@dataclass(frozen=True)
class Instruction:
    """An instruction. op: with its modifiers, as LDG.E.128. guard: the predicate it depends on, or ""."""

    address: int
    guard: str
    op: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        if self.op.split(".")[0] != "BRA":
            return None
        found = re.search(r"0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def conditional(self) -> bool:
        """Whether the next instruction may follow a branch or an exit."""
        return bool(self.guard) or bool(re.search(r"\bU?P\d|\.DIV|\.CONV", f"{self.op} {self.operands}"))


@dataclass(frozen=True)
class Count:
    """What a thread executes. issued: instructions. exponentials: MUFU.EX2. special: of all kinds of MUFU. local: loads
    from and stores to local memory, which are spills."""

    issued: float = 0
    exponentials: float = 0
    special: float = 0
    local: float = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(*(a + b for a, b in zip(self.each, other.each, strict=True)))

    def __mul__(self, factor: float) -> "Count":
        return Count(*(a * factor for a in self.each))

    @property
    def each(self) -> tuple[float, float, float, float]:
        """The numbers."""
        return self.issued, self.exponentials, self.special, self.local


def count(instructions: Sequence[Instruction]) -> Count:
    """Each of them once."""
    ops = [instruction.op for instruction in instructions]
    return Count(
        len(ops),
        sum(op.startswith("MUFU.EX2") for op in ops),
        sum(op.startswith("MUFU") for op in ops),
        sum(op.startswith(("LDL", "STL")) for op in ops),
    )


def width(op: str) -> int:
    """Bytes that a load or store moves a thread."""
    found = re.search(r"\.[US]?(8|16|32|64|128|256)\b", op)
    return int(found[1]) // 8 if found else 4


@dataclass(frozen=True)
class Loop:
    """A loop of blocks first..last, which branches back from its last block."""

    first: int
    last: int
    inside: tuple[Instruction, ...]

    def bytes(self, op: str) -> int:
        """Bytes that a thread moves an iteration by instructions of this kind: LDG or STG."""
        return sum(width(i.op) for i in self.inside if i.op.startswith(op))

    @property
    def has_exponentials(self) -> bool:
        """Whether it computes any."""
        return any(i.op.startswith("MUFU.EX2") for i in self.inside)


class Program:
    """A kernel's instructions as basic blocks."""

    def __init__(self, text: str) -> None:
        self.instructions = [
            Instruction(int(address, 16), guard, op, operands) for address, guard, op, operands in _LINE.findall(text)
        ]
        if not self.instructions:
            raise ValueError("no SASS in this text")
        starts = {self.instructions[0].address}
        for here, behind in zip(self.instructions, [*self.instructions[1:], None], strict=True):
            if here.target is not None or _leaves(here):
                starts |= ({here.target} if here.target is not None else set()) | (
                    {behind.address} if behind else set()
                )
        self.blocks: list[list[Instruction]] = []
        for instruction in self.instructions:
            if instruction.address in starts:
                self.blocks.append([])
            self.blocks[-1].append(instruction)
        self._at = {block[0].address: number for number, block in enumerate(self.blocks)}

    def successors(self, number: int) -> list[int | None]:
        """Blocks that may follow; None where the kernel may end."""
        end = self.blocks[number][-1]
        behind = number + 1 if number + 1 < len(self.blocks) else None
        if end.target is not None:
            found: list[int | None] = [self._at.get(end.target)]
            return [*found, behind] if end.conditional else found
        if _leaves(end):
            return [None, behind] if end.conditional and behind is not None else [None]
        return [behind]

    @cached_property
    def loops(self) -> list[Loop]:
        """All loops, by address; those that do nothing, behind the end, are left out."""
        found = {}
        for number in range(len(self.blocks)):
            for to in self.successors(number):
                if to is not None and to <= number:
                    inside = tuple(i for block in self.blocks[to : number + 1] for i in block)
                    if len(inside) > 1:
                        found[to] = Loop(to, number, inside)
        return [found[first] for first in sorted(found)]

    def shortest(
        self, start: int, ends: set[int | None], within: tuple[int, int] | None = None
    ) -> tuple[Count, list[int]]:
        """The way with the fewest instructions from the beginning of a block to that of another, and its blocks."""
        low, high = within or (0, len(self.blocks) - 1)
        best: dict[int | None, tuple[int, list[int]]] = {}
        queue: list[tuple[int, int, int | None, list[int]]] = [(0, 0, start, [])]
        turn = 0
        while queue:
            cost, _, at, path = heappop(queue)
            if at in ends and (path or within is None):
                return sum((count(self.blocks[b]) for b in path), Count()), path
            if at in best or at is None:
                continue
            best[at] = (cost, path)
            for to in self.successors(at):
                if to is None or low <= to <= high or to in ends:
                    turn += 1
                    heappush(queue, (cost + len(self.blocks[at]), turn, to, [*path, at]))
        raise ValueError("no way from one block to the other")

    def through(self, passes: Sequence[tuple[Loop, float]]) -> tuple[Count, list[Count]]:
        """What a thread executes from the first instruction to the last outside the given loops, and an iteration of
        each of these, in this order. passes: loops and the number of their iterations."""
        outside, each, at = Count(), [], 0
        for loop, _ in passes:
            if at != loop.first:
                outside += self.shortest(at, {loop.first})[0]
            each.append(self.iteration(loop))
            at = self._behind(loop)
        outside += self.shortest(at, {None})[0]
        return outside, each

    def iteration(self, loop: Loop) -> Count:
        """What a thread executes in an iteration."""
        if loop.first == loop.last:
            return count(self.blocks[loop.first])
        return self.shortest(loop.first, {loop.last}, (loop.first, loop.last))[0] + count(self.blocks[loop.last])

    def _behind(self, loop: Loop) -> int:
        out = [
            to
            for number in range(loop.last, loop.first - 1, -1)
            for to in self.successors(number)
            if to is not None and not loop.first <= to <= loop.last
        ]
        if not out:
            raise ValueError("a loop without a way out")
        return out[0]


def _leaves(instruction: Instruction) -> bool:
    return instruction.op.split(".")[0] in ("EXIT", "RET", "BRX", "KILL")
