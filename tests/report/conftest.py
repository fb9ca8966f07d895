"""Fixtures of the report's tests."""

import pytest


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are not drawn: for tests of all else."""
    monkeypatch.setattr("fastkd.report.render.svg", lambda chart: "")
