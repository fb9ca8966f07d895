"""The columns of `--to parquet`, from the arrays of a shard; and the card of the data set.

axolotl: what the KD plugin of Axolotl (axolotl-ai-cloud/axolotl) trains on. Its collator is `DataCollatorForKD` in
src/axolotl/integrations/kd/collator.py, its loss `LigerFusedLinearKLTopKLogprobLoss` in kernels/liger.py there: labels
are shifted by it, targets are not; target_mask is 0 where the next label is -100 (collator_online_teacher.py). A
position with fewer than k entries is filled up with id 0, log-probability -1e9 and mask 0, as its collator does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ...stream.gather import IGNORED
from ...utils.front_matter import front_matter

if TYPE_CHECKING:
    from ...cache import CacheSpec

FASTKD, AXOLOTL = "fastkd", "axolotl"
FILL = -1e9


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a shard. arrays: of `Cache.read_shard`. bounds `[rows + 1]`: the first position of each, and the end
    of the last."""

    arrays: dict[str, NDArray[Any]]
    bounds: NDArray[np.int64]
    spec: "CacheSpec"

    @property
    def text(self) -> bool:
        return "tokens" in self.spec.inputs

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """`[n]`: the token itself, or -100 where it is not to be predicted: first of its row, or masked out."""
        counts = self.arrays["logprobs"][:, 0] > -np.inf
        if "loss_mask" in self.arrays:
            counts = counts & self.arrays["loss_mask"].astype(bool)
        tokens = self.arrays["tokens"]
        labels = np.full(len(tokens), IGNORED, np.int32)
        labels[1:][counts[:-1]] = tokens[1:][counts[:-1]]
        labels[self.bounds[:-1]] = IGNORED
        return labels

    @cached_property
    def sequences(self) -> NDArray[np.int64]:
        """`[rows]`: the number of the sequence that each row is in."""
        ends = np.cumsum(self.arrays["sequence_lengths"], dtype=np.int64)
        inside: NDArray[np.int64] = np.searchsorted(ends, self.bounds[:-1], side="right")
        return inside + int(self.arrays["first_sequence"])

    def positions(self, begin: int, end: int) -> slice:
        return slice(int(self.bounds[begin]), int(self.bounds[end]))

    def lists(self, column: pa.Array, begin: int, end: int) -> pa.Array:
        """A column with a value for each position, as one with a list for each row; of examples, it is one already."""
        return _lists(column, self.bounds[begin : end + 1] - self.bounds[begin]) if self.text else column


def _lists(values: pa.Array, offsets: NDArray[np.int64]) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def fastkd_columns(rows: Rows, begin: int, end: int) -> pa.Table:
    """sequence, input_ids, labels, other input columns, top_ids, top_logprobs, tail, and draws if the cache has some:
    exactly what the cache's reader returns."""
    part, arrays = rows.positions(begin, end), rows.arrays
    inputs: dict[str, pa.Array] = {}
    for name in rows.spec.inputs:
        if name == "tokens":
            inputs |= {
                "input_ids": pa.array(arrays[name][part].astype(np.int32)),
                "labels": pa.array(rows.labels[part]),
            }
        elif name != "loss_mask":
            inputs[name] = pa.array(arrays[name][part])
    used = arrays["logprobs"][part] > -np.inf
    offsets = np.concatenate([[0], used.sum(1, dtype=np.int64).cumsum()])
    entries = {"top_ids": arrays["ids"], "top_logprobs": arrays["logprobs"]}
    entries |= {"draws": arrays["draws"]} if "draws" in arrays else {}
    found = {name: _lists(pa.array(array[part][used]), offsets) for name, array in entries.items()}
    tail = arrays["tail"][part]
    found["tail"] = _lists(pa.array(np.ascontiguousarray(tail).reshape(-1)), np.arange(len(tail) + 1) * tail.shape[1])
    columns = {name: rows.lists(column, begin, end) for name, column in (inputs | found).items()}
    return pa.table({"sequence": pa.array(rows.sequences[begin:end]), **columns})


def axolotl_columns(rows: Rows, begin: int, end: int) -> pa.Table:
    """input_ids, attention_mask, labels, and target_token_ids, target_logprobs, target_mask, each of k entries a
    position: the top-k entries, without the drawn ones."""
    part, arrays, k = rows.positions(begin, end), rows.arrays, rows.spec.k
    labels = rows.labels
    head = arrays["logprobs"][part, :k] > -np.inf
    if "draws" in arrays:
        head &= arrays["draws"][part, :k] == 0
    following = np.concatenate([labels[1:], [IGNORED]]).astype(np.int32)[part] != IGNORED
    entries = {
        "target_token_ids": np.where(head, arrays["ids"][part, :k], 0).astype(np.int32),
        "target_logprobs": np.where(head, arrays["logprobs"][part, :k], np.float32(FILL)),
        "target_mask": (head & following[:, None]).astype(np.int8),
    }
    found = {
        "input_ids": pa.array(arrays["tokens"][part].astype(np.int32)),
        "attention_mask": pa.array(np.ones(len(head), np.int8)),
        "labels": pa.array(labels[part]),
    }
    for name, values in entries.items():
        found[name] = _lists(pa.array(values.reshape(-1)), np.arange(len(values) + 1) * values.shape[1])
    return pa.table({name: rows.lists(column, begin, end) for name, column in found.items()})


COLUMNS: dict[str, Callable[[Rows, int, int], pa.Table]] = {FASTKD: fastkd_columns, AXOLOTL: axolotl_columns}
_SAYS = {
    FASTKD: {
        "sequence": "number of the cache's sequence (window) that the row is in",
        "input_ids": "tokens of a document, or of the part of it in one window",
        "labels": "the same tokens, -100 where one is not to be predicted; not shifted",
        "top_ids": "for each position, the teacher's most likely next tokens, best first; then the drawn ones, if any",
        "top_logprobs": "their log-probabilities in nats at temperature 1, under the full softmax",
        "draws": "how often each was drawn from the rest; 0 for the top-k entries",
        "tail": "log of the sum of p^(1/T) over all tokens outside the top-k entries, at each temperature T",
    },
    AXOLOTL: {
        "input_ids, attention_mask, labels": "tokens of a document, or of the part of it in one window; not shifted",
        "target_token_ids": "for each position, the k most likely next tokens, best first",
        "target_logprobs": "their log-probabilities in nats at temperature 1, under the full softmax: use "
        "kd_normalize_topk: false, and kd_temperature: 1.0",
        "target_mask": "1 where an entry is one, and the next token is to be predicted",
    },
}


def dataset_card(about: dict[str, Any], splits: Sequence[str], columns: str, *, text: bool) -> str:
    """The README.md of the data set. about: the metadata of its files."""
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    tags = ["knowledge-distillation", "fastkd"]
    head = front_matter({"tags": tags, "configs": [{"config_name": "default", "data_files": files}]})
    says = {name: what for name, what in _SAYS[columns].items() if (name != "draws" or about["draws"])}
    if not text:
        says = {"example, augmentation_seed": "the example, and the seed of its augmentation"} | {
            name: what for name, what in says.items() if name not in ("input_ids", "labels")
        }
    rows = "\n".join(f"| {name} | {what} |" for name, what in says.items())
    temperatures = ", ".join(f"{t:g}" for t in about["temperatures"])
    drawn = f", {about['draws']} draws at T = {about['draw_temperature']:g}" if about["draws"] else ""
    return (
        f"{head}\n# Soft targets of a teacher\n\nWritten by `fastkd export-cache` from a cache with spec sha256 "
        f"`{about['spec']}`: {about['vocab_size']:,} outcomes, k = {about['k']}{drawn}, tails at T = {temperatures}."
        f"\n\n| column | |\n|---|---|\n{rows}\n"
    )
