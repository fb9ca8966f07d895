"""The lengths of a dataset's documents as a file, so that text is tokenized once to measure it, not in every run."""

import io
import struct
import zipfile
import zlib

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

LENGTHS_KEY = "lengths.npz"


def lengths_to_npz(lengths: NDArray[np.int32], fingerprint: str) -> bytes:
    """Lengths `[documents]`, compressed, with the fingerprint of their dataset."""
    sink = io.BytesIO()
    np.savez_compressed(sink, fingerprint=np.array(fingerprint), lengths=lengths)
    return sink.getvalue()


def lengths_from_npz(data: bytes, fingerprint: str, where: str, documents: int = 2**31) -> NDArray[np.int32] | None:
    """The lengths `[documents]`; None if they belong to a dataset with another fingerprint. Raises DataError, naming
    `where`, for data that cannot be read, or that would take more than that many documents do."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            if (size := sum(member.file_size for member in members.infolist())) > 4 * documents + 2**13:
                raise ValueError(f"got {size} bytes for {documents} documents")
        with np.load(io.BytesIO(data)) as arrays:
            stored, lengths = str(arrays["fingerprint"]), np.asarray(arrays["lengths"], np.int32)
    except (
        *(OSError, KeyError, ValueError, EOFError, MemoryError, NotImplementedError, RuntimeError),
        *(SyntaxError, struct.error, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise DataError(
            f"{where}: no lengths can be read from it ({error}). Delete it; the documents are then measured again."
        ) from error
    return lengths if stored == fingerprint else None
