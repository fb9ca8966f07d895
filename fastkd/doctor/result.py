"""`DoctorReport`: what was looked at, and what was found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..utils.text import labelled, printable

State = Literal["ok", "note", "problem"]


class Found(NamedTuple):
    """One check. note: it works, but someone may want to know. problem: work would fail, or give wrong results."""

    name: str
    state: State
    text: str


@dataclass(frozen=True)
class DoctorReport:
    found: Sequence[Found]

    @property
    def status(self) -> int:
        """Exit status: 1 if there is a problem."""
        return int(any(one.state == "problem" for one in self.found))

    def to_json(self) -> dict[str, Any]:
        return {"status": self.status, "found": [one._asdict() for one in self.found]}

    def __str__(self) -> str:
        marks = {"ok": "", "note": "note: ", "problem": "PROBLEM: "}
        lines = [
            line for one in self.found for line in labelled(printable(one.name), marks[one.state] + printable(one.text))
        ]
        count = sum(one.state == "problem" for one in self.found)
        return "\n".join([*lines, "", "No problem was found." if not count else f"Problems: {count}."])
