"""The lengths of a dataset's documents, kept so that text is not tokenised only to be measured again."""

import io
import struct
import zipfile
import zlib

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError


def lengths_to_npz(lengths: NDArray[np.int32], fingerprint: str) -> bytes:
    """The lengths `[documents]` of a dataset of this fingerprint, compressed."""
    sink = io.BytesIO()
    np.savez_compressed(sink, fingerprint=np.array(fingerprint), lengths=lengths)
    return sink.getvalue()


def lengths_from_npz(data: bytes, fingerprint: str, where: str) -> NDArray[np.int32]:
    """The lengths again. DataError where there are none in it, or another dataset's; where: what to name then."""
    try:
        with np.load(io.BytesIO(data)) as arrays:
            found, lengths = str(arrays["fingerprint"]), np.asarray(arrays["lengths"], np.int32)
    except (
        *(OSError, KeyError, ValueError, EOFError, MemoryError, NotImplementedError, RuntimeError),
        *(SyntaxError, struct.error, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise DataError(
            f"{where}: no lengths can be read from it ({error}). Delete it; they are found anew."
        ) from error
    if found != fingerprint:
        raise DataError(
            f"{where}: these are the lengths of the dataset {found[:12]}…, not of {fingerprint[:12]}…. Delete it if "
            "the dataset, the tokenizer or the template has changed."
        )
    return lengths
