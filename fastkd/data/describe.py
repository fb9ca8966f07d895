"""What data were taken for, said in a line, so that a wrong guess is seen before a teacher runs on it."""

import numpy as np
from numpy.typing import NDArray

from .documents import Documents

SHORT = 32  # tokens: a line of 80 to 120 columns has some 20
_CUT = {"line": "a document a line", "blank-line": "a document a paragraph", "file": "a document a file"}


def understood(data: Documents, lengths: NDArray[np.int32]) -> list[str]:
    """How many documents of how many tokens were found; and a line more where a text seems to be cut at the wrong
    places. lengths `[documents]`, in tokens."""
    some = lengths[lengths > 0]
    median = int(np.median(some)) if len(some) else 0
    counts = f"{_counted(len(lengths), 'document')} of {_counted(median, 'token')} (median)"
    found = f"{data.name}: {counts}"
    if data.text_documents is None:
        return [found]
    lines = [f"{found}, {_CUT[data.text_documents]}"]
    if data.text_documents == "line" and len(some) > 1 and median < SHORT:
        lines.append(
            f"warning: half of the lines of {data.name} have {median:,} tokens or fewer, and each is a document by "
            "itself: the teacher sees none of the others. If these are the lines of a longer text, say so: "
            "--text-documents blank-line (a document a paragraph) or file (a document a file)."
        )
    return lines


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
