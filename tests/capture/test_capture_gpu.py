"""A capture whose teacher runs on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from capture_cases import Causal, documents

from fastkd import capture
from fastkd.cache import open_cache
from fastkd.errors import TeacherError

pytestmark = pytest.mark.gpu


def test_capture_says_what_the_cpu_says(tmp_path: Path) -> None:
    """The teacher on the GPU, its targets copied to the host beside the next batch; halved batches, too."""
    caches = []
    for device, most in (("cpu", None), ("cuda", None), ("cuda", 60)):
        model = Causal(hidden=True).to(device)
        if most:
            forward = model.forward

            def limited(tokens: torch.Tensor, forward: Any = forward, most: int = most) -> Any:
                if tokens.numel() > most:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return forward(tokens)

            model.forward = limited  # type: ignore[method-assign]
        out = tmp_path / f"{device}{most}"
        report = capture(model, documents(200), out, k=5, draws=3, context=16, batch_tokens=120, fingerprint="x")
        assert report.complete
        assert (report.batches_halved > 0) == bool(most)
        assert 0 < report.teacher_busy <= 1
        cache = open_cache(out)
        caches.append(cache.sequences(range(report.plan["windows"])))
    for found in caches[1:]:
        assert (found["tokens"] == caches[0]["tokens"]).all()
        assert (found["ids"][:, 0] == caches[0]["ids"][:, 0]).mean() > 0.99
        assert (abs(found["tail"] - caches[0]["tail"]) < 0.07).all()


def test_capture_names_nan_on_a_gpu(tmp_path: Path) -> None:
    model = Causal(hidden=True).cuda()
    with torch.no_grad():
        model.embedding[96] = torch.nan
    with pytest.raises(TeacherError, match=r"document 1 \(from 0\), position 2"):
        capture(model, [[1, 2, 3], [4, 5, 96, 6], [7, 8]], tmp_path, held_out=0.0)
