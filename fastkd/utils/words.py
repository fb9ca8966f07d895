"""The words for a kind of data: what people are told of text, and of examples such as images. Imports nothing heavy.

Names in files, JSON and code are those of text for both: a position is what has a target, a sequence (window) what is
independent of others.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass


def _commas(number: int) -> str:
    return f"{number:,}"


@dataclass(frozen=True)
class Words:
    """kind: "text" or "examples". position: what has a target. window: what is independent of others, and held out as a
    whole. document: an entry of the data set. outcome: what a target gives probabilities of."""

    kind: str
    position: str
    window: str
    document: str
    outcome: str

    @property
    def positions(self) -> str:
        return plural(self.position)

    @property
    def windows(self) -> str:
        return plural(self.window)

    @property
    def documents(self) -> str:
        return plural(self.document)

    @property
    def outcomes(self) -> str:
        return plural(self.outcome)

    def one(self, field: str) -> str:
        """ "a window", "an example"."""
        noun = str(getattr(self, field))
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"

    @property
    def counted_position(self) -> str:
        """One that has a target."""
        return "counted position" if self.kind == "text" else self.position

    def counted(self, positions: int, windows: int, *, before: str = "", number: Callable[[int], str] = _commas) -> str:
        """So many positions in so many windows; of examples without copies, these alone. before: an adjective. number:
        how numbers are written."""
        of = before and before + " "
        if self.kind == "text":
            return f"{counted(positions, of + self.position, number)} in {counted(windows, self.window, number)}"
        if positions == windows:
            return counted(windows, of + self.window, number)
        return f"{counted(positions, of + 'copy', number)} of {counted(windows, self.window, number)}"


TEXT = Words("text", "position", "window", "document", "token")
EXAMPLES = Words("examples", "example", "example", "example", "class")
KINDS = {words.kind: words for words in (TEXT, EXAMPLES)}


def words_of(inputs: Collection[str]) -> Words:
    """The words for a cache with these input columns."""
    return EXAMPLES if "example" in inputs else TEXT


def plural(noun: str) -> str:
    """Of the nouns here: "class" to "classes", "copy" to "copies", "window" to "windows"."""
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith("s") else "s")


def counted(count: int, noun: str, number: Callable[[int], str] = _commas) -> str:
    """ "1 window", "1,200 windows". number: how numbers are written."""
    return f"{number(count)} {noun if count == 1 else plural(noun)}"
