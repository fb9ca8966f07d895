"""What earlier versions accepted: a warning where it still means something, an error that names the new way else."""

from typing import Any

import pytest

from fastkd import targets_from_raw
from fastkd.errors import StreamError
from fastkd.utils.deprecated import deprecated_decode


def test_decode_on_the_host_warns_and_anything_else_is_refused() -> None:
    def loader(decode: Any) -> None:
        deprecated_decode(decode, StreamError, stacklevel=2)

    with pytest.warns(DeprecationWarning, match="always decoded on the host") as caught:
        loader("host")
    assert caught[0].filename == __file__
    with pytest.raises(StreamError, match=r"decode: got 'device'; expected no value.*on the host now"):
        loader("device")


def test_raw_streams_are_no_longer_decoded_on_a_device() -> None:
    with pytest.raises(StreamError, match=r"on the host now.*read_shard"):
        targets_from_raw({})
