"""`safetensors-features`: what speculators (vllm-project/speculators) reads offline, for EAGLE-3 and its relatives.

    FOLDER/          a dataset for `datasets.load_from_disk`, one row a sample: input_ids, loss_mask, seq_len
    FOLDER/hidden_states/hs_0.safetensors       of sample 0: token_ids [L] int64, hidden_states [L, layers, D]

Its loader is `ArrowDataset` in src/speculators/train/data.py, its files those of `FileTransfer` in
hs_connectors/src/hs_connectors/transfer.py: the last of the layers is the state that enters the verifier's final norm,
which it applies itself; token_ids and input_ids must be equal.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save_file

from ...errors import ExportError
from ...utils.atomic import write_file, write_text
from ..samples import Sample
from ._samples import SampleFormat


class Format(SampleFormat):
    """See `formats.Format`."""

    NAME = "safetensors-features"

    def check(self, features: Sequence[str]) -> None:
        if len(features) < 2:
            raise ExportError(
                f"features: got {', '.join(features)}; expected a layer or more beside -1, as inputs of a draft."
            )

    def write(self, number: int, sample: Sample) -> int:
        path = self._folder / "hidden_states" / f"hs_{number}.safetensors"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            states = torch.stack([layer.to(self._dtype) for layer in sample.states], 1)
            tensors = {"token_ids": sample.tokens.contiguous(), "hidden_states": states}
            write_file(path, lambda temporary: save_file(tensors, temporary), sync=False)
        return path.stat().st_size

    def finish_shard(self, shard: int, first: int, inputs: Mapping[str, Sequence[Any]]) -> None:
        integers = pa.list_(pa.int64())
        table = pa.table(
            {
                "input_ids": pa.array(inputs["tokens"], integers),
                "loss_mask": pa.array(inputs["loss_mask"], integers),
                "seq_len": pa.array([len(tokens) for tokens in inputs["tokens"]], pa.int64()),
            }
        )

        def write(path: Path) -> None:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)

        write_file(self._folder / _arrow(shard), write)

    def finish(self, shards: Sequence[int]) -> None:
        # what Dataset.save_to_disk writes; it reads the columns' types from the Arrow files if it is given none
        info = {"citation": "", "description": "", "features": None, "homepage": "", "license": ""}
        state = {
            "_data_files": [{"filename": _arrow(shard)} for shard in shards],
            "_fingerprint": "fastkd",
            "_format_columns": ["input_ids", "loss_mask", "seq_len"],
            "_format_kwargs": {},
            "_format_type": "torch",
            "_output_all_columns": False,
            "_split": None,
        }
        write_text(self._folder / "dataset_info.json", json.dumps(info, indent=2))
        write_text(self._folder / "state.json", json.dumps(state, indent=2))


def _arrow(shard: int) -> str:
    return f"data-{shard:08d}.arrow"
