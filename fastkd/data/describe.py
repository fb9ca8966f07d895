"""One line on what documents were read, so that a wrong setting is noticed before the teacher runs."""

import numpy as np
from numpy.typing import NDArray

from .documents import Documents

SHORT = 32  # tokens; a line of 80 to 120 columns has some 20
_PER_DOCUMENT = {"line": "one per line", "blank-line": "one per paragraph", "file": "one per file"}


def describe_documents(data: Documents, lengths: NDArray[np.int32]) -> list[str]:
    """Number and median length of the documents, in one line; and a second line, a warning, if the lines of a text file
    seem to belong to longer documents. lengths: in tokens, `[documents]`."""
    nonzero = lengths[lengths > 0]
    median = int(np.median(nonzero)) if len(nonzero) else 0
    line = f"{data.name}: {_plural(len(lengths), 'document')}, median length {_plural(median, 'token')}"
    if data.text_documents is None:
        return [line]
    lines = [f"{line}, {_PER_DOCUMENT[data.text_documents]}"]
    if data.text_documents == "line" and len(nonzero) > 1 and median < SHORT:
        lines.append(
            f"warning: half of the lines of {data.name} have {median:,} tokens or fewer, and every line is a separate "
            "document, without context from the others. If the lines belong to longer texts, use --text-documents "
            "blank-line (one document per paragraph) or file (one per file)."
        )
    return lines


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
