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


def lengths_from_npz(data: bytes, fingerprint: str, where: str) -> NDArray[np.int32] | None:
    """The lengths again; None where they are another dataset's. DataError, naming `where`, where there are none."""
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
    return lengths if found == fingerprint else None
