"""The ratios of what quantisation costs, of known windows."""

import numpy as np
import pytest

from fastkd.bench.qat_trial import KL, ratios, show
from fastkd.evaluate.result import Windows


def test_the_ratios_of_known_windows(capsys: pytest.CaptureFixture[str]) -> None:
    counts = np.array([10.0, 0.0, 30.0, 20.0])
    plain = np.array([5.0, 0.0, 15.0, 10.0])  # 0.5 a position
    arms = [Windows(counts, {KL: plain * factor}) for factor in (1.0, 1.4, 1.1)]
    found = ratios(*arms)
    assert found["KL"].mean == pytest.approx(1.1 / 1.4)
    assert found["added KL"].mean == pytest.approx(0.25)
    assert found["added KL"].half == pytest.approx(0, abs=1e-9)  # the same of all windows
    show(*arms)
    said = capsys.readouterr().out
    assert "added +0.2000 ± 0.0000, paired" in said
    assert "the latter minus the former        -0.1500 ± 0.0000, paired" in said
    assert "ratio of added KL                0.250 ± 0.000" in said
