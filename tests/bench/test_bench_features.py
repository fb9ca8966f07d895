"""The features suite on made-up states: its codecs, its error, and bytes at equal error."""

import numpy as np
import pytest
import torch
from hf_cases import VOCAB, model_of

from fastkd.bench import bench_features
from fastkd.bench.bench_features import bytes_at, fidelity, peers, speed
from fastkd.bench.hidden_states import made_up, read_states, rest_of
from fastkd.bench.run import run_cases
from fastkd.bench.suites import Case
from fastkd.bench.table import Table


def test_the_rest_of_the_teacher_is_the_teacher() -> None:
    """From the states that enter a layer, the cut model gives what the whole one gives."""
    model = model_of("llama", num_hidden_layers=4)
    windows = torch.randint(0, VOCAB, (3, 10))
    with torch.no_grad():
        expected = model(windows).logits.log_softmax(-1)
        states = read_states(model, windows, 2)
        rest = rest_of(model, 2)
        assert len(model.model.layers) == 2
        for window in range(3):
            found = rest(torch.from_numpy(states[10 * window : 10 * window + 10]))
            torch.testing.assert_close(found, expected[window])


def test_bytes_at_equal_error() -> None:
    """On the measured points, and between and beyond them by a bit a component for a quarter of the error."""
    kl, size = [1e-3, 4e-3, 16e-3], [300.0, 228.0, 156.0]
    assert [bytes_at(kl, size, x) for x in kl] == pytest.approx(size)
    assert bytes_at(kl, size, 2e-3) == pytest.approx(264)
    assert bytes_at(kl, size, 2.5e-4) == pytest.approx(372)
    assert bytes_at(kl, size, 64e-3) == pytest.approx(84)


def test_other_codecs_decode_what_they_encode() -> None:
    """The finer the closer; and their bytes."""
    problem = made_up(width=32)
    error, size = {}, {}
    for name, (peer, _) in peers(32).items():
        decoded, size[name] = peer(problem.held, problem)
        assert decoded.dtype == np.float32
        error[name] = float(
            np.linalg.norm(decoded - problem.held, axis=1).max() / np.linalg.norm(problem.held, axis=1).mean()
        )
    bf16, fp8, int8, int4, pca = error
    assert error[bf16] < error[int8] < error[fp8] < error[int4]
    assert error[bf16] < 0.1
    assert error[pca] > error[fp8]
    assert [size[name] for name in (bf16, fp8, int8, int4, pca)] == [64, 34, 34, 18, 18]


def test_the_suite(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # it would bind this process to one core
    monkeypatch.setattr(bench_features, "one_core", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    table = Table("cpu", "features")
    cases = [
        Case("error and bytes", lambda table: fidelity(table, made_up, 2)),
        Case("reading and writing", lambda table: speed(table, made_up, 1, 1)),
    ]
    run_cases(cases, table, lambda text: None)
    rows = {row.name: row for row in table.rows}
    errors = [rows[f"step {step}: KL"].value for step in ("0.06", "0.12", "0.2", "0.45", "1")]
    sizes = [rows[f"step {step}: bytes a position"].value for step in ("0.06", "0.12", "0.2", "0.45", "1")]
    assert errors == sorted(errors)
    assert sizes == sorted(sizes, reverse=True)
    assert rows["bf16: KL"].value < 0.1 * errors[0]
    assert rows["basis, once for all shards"].value == 4 * (24 * 24 + 24)
    assert rows["to coordinates"].value > 0
    assert all(row.verdict in ("", "ok") for row in table.rows), "limits are for real states alone"
