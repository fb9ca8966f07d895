"""A look at one sequence of a cache, in pandas, against its arrays."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_cases import make_shard, make_spec

from fastkd.cache import Cache, CacheError, create_cache, open_cache

pd = pytest.importorskip("pandas")


class Names:
    """A tokenizer that counts what it decodes."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def decode(self, ids: list[int]) -> str:
        self.calls.append(ids)
        return f"<{ids[0]}>"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    spec = make_spec(k=4, draws=5, mass=0.7, temperatures=(1.0, 2.0))
    with create_cache(tmp_path / "cache", spec) as writer:
        for i in range(2):
            shard = make_shard(spec, 40, seed=i) | {"sequence_lengths": [12, 28]}
            writer.write_shard(i, **shard, document_lengths=[5, 10, 25], first_sequence=2 * i)
    return open_cache(tmp_path / "cache")


def test_a_row_is_a_position(cache: Cache) -> None:
    """Documents are of 5, and of 10 in two parts: the label of the last row of each part is another sequence's."""
    empty = 0
    for sequence, ends in ((0, [4, 11]), (1, [2, 27]), (2, [4, 11]), (3, [2, 27])):
        names, arrays = Names(), cache.sequences([sequence])
        table = cache.to_pandas(sequence, names)
        assert list(table) == ["token", "text", "label", "top", "tail", "draws"]
        tokens = arrays["tokens"].tolist()
        assert table["token"].tolist() == tokens
        assert table["text"].tolist() == [f"<{t}>" for t in tokens]
        assert cache.last_rows(sequence).tolist() == ends
        labels = [None if i in ends else t for i, t in enumerate([*tokens[1:], 0])]
        assert [None if label is pd.NA else label for label in table["label"]] == labels
        assert len(names.calls) == len({tuple(ids) for ids in names.calls})
        for i, row in table.iterrows():
            used = arrays["logprobs"][i] > -np.inf
            head, drawn = used & (arrays["draws"][i] == 0), used & (arrays["draws"][i] > 0)
            assert [t for t, _ in row["top"]] == [f"<{t}>" for t in arrays["ids"][i][head]]
            assert [p for _, p in row["top"]] == pytest.approx(np.exp(arrays["logprobs"][i][head]).tolist())
            assert row["draws"] == [
                (f"<{t}>", n) for t, n in zip(arrays["ids"][i][drawn], arrays["draws"][i][drawn], strict=True)
            ]
            if used.any():
                assert sum(p for _, p in row["top"]) + row["tail"] == pytest.approx(1.0, abs=0.03)
            else:
                assert (row["top"], np.isnan(row["tail"])) == ([], True)
                empty += 1
    assert empty
    plain = cache.to_pandas(3)
    assert "text" not in plain
    assert all(isinstance(t, int) for top in plain["top"] for t, _ in top)


def test_a_cache_of_examples_and_names_of_classes(tmp_path: Path) -> None:
    spec = make_spec(vocab_size=6, k=3, inputs=("example", "augmentation_seed"))
    shard: dict[str, Any] = make_shard(spec, 20)
    with create_cache(tmp_path / "cache", spec) as writer:
        writer.write_shard(0, **shard, first_sequence=0)
    cache = open_cache(tmp_path / "cache")
    names = ["cat", "dog", "owl", "bat", "elk"]
    table = cache.to_pandas(1, names)
    arrays = cache.sequences([1])
    assert list(table) == ["example", "augmentation_seed", "top", "tail"]
    assert table["example"].tolist() == arrays["example"].tolist()
    shown = {t for top in table["top"] for t, _ in top}
    assert shown <= {*names, 5}
    assert shown & set(names)


def test_what_cannot_be(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CacheError, match="got sequence 4, which no shard"):
        cache.to_pandas(4)
    with pytest.raises(CacheError, match="numbers: got "):
        cache.to_pandas("first")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(CacheError, match=r"to_pandas: .*pandas.*Use `pip install pandas`"):
        cache.to_pandas(0)
