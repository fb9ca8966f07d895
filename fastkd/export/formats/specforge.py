"""`specforge`: what SpecForge (sgl-project/SpecForge) reads offline for EAGLE-3.

    FOLDER/rows_0-2000/data_0.ckpt     of sample 0, by torch.save: input_ids [L] int64, loss_mask [L] int64,
                                       aux_hidden_state [1, L, 3 D], hidden_state [1, L, D]

Its loader is `OfflineManifestReader` in specforge/runtime/data_plane/offline_reader.py with `load_feature_file` of
feature_store.py (torch.load; no safetensors), its normalizer `normalize_offline_sample` in
specforge/algorithms/eagle3/data.py, its writer scripts/prepare_hidden_states.py. hidden_state is the state after the
teacher's final norm: SpecForge multiplies it by the LM head alone (specforge/modeling/target/target_head.py).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from ...errors import ExportError
from ...utils.atomic import write_file
from ..samples import Sample
from ._samples import SampleFormat

FILES = 2000  # in a folder, as their writer has it
LAYERS = 3  # that its EAGLE-3 drafts take


class Format(SampleFormat):
    """See `formats.Format`."""

    NAME = "specforge"
    NEEDS_TEACHER: ClassVar[bool] = True

    def check(self, features: Sequence[str]) -> None:
        if len(features) != LAYERS + 1:
            raise ExportError(
                f"features: got {', '.join(features)}; expected {LAYERS} layers and -1, as SpecForge's EAGLE-3 takes."
            )

    def write(self, number: int, sample: Sample) -> int:
        group = number // FILES * FILES
        path = self._folder / f"rows_{group}-{group + FILES}" / f"data_{number}.ckpt"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            assert self._norm is not None
            weight = next(self._norm.parameters(), None)
            last = sample.states[-1] if weight is None else sample.states[-1].to(weight.device, weight.dtype)
            with torch.no_grad():
                normed = self._norm(last).to("cpu", self._dtype)
            record = {
                "input_ids": sample.tokens.clone(),  # torch.save would write the whole shard of a view
                "loss_mask": sample.loss_mask.clone(),
                "aux_hidden_state": torch.cat([layer.to(self._dtype) for layer in sample.states[:-1]], 1)[None],
                "hidden_state": normed[None],
            }
            write_file(path, lambda temporary: torch.save(record, temporary), sync=False)
        return path.stat().st_size
