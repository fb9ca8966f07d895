"""The demos without the processes that measure the deployed student, which take seconds to start."""

from collections.abc import Iterator

import pytest

from fastkd.deploy.measure import Measured


@pytest.fixture(scope="package", autouse=True)
def unmeasured() -> Iterator[None]:
    same = Measured("here", 0.5, 0.25, 2**20, {"prefill": 1.0, "decode": 1.0, "memory": 1.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastkd.deploy.api.measure", lambda model, exports, *_, **__: [same] * (1 + len(exports)))
        yield
