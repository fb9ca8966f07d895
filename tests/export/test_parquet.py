"""`export-cache --to parquet`, read back by `datasets` and pyarrow, against the cache's own reader."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import vision_cases
from cache_cases import make_shard, make_spec
from huggingface_hub import DatasetCard
from train_cases import documents, make_cache

import fastkd.export.formats.parquet as parquet
import fastkd.utils.atomic as atomic
from fastkd.cache import Cache, create_cache, open_cache
from fastkd.cli import main as cli
from fastkd.errors import ExportError
from fastkd.export.api import export_cache
from fastkd.stream.split import plan_of
from fastkd.utils.signals import Stop

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Text with draws, several tails, documents that are packed and cut, and a held-out split."""
    place = tmp_path_factory.mktemp("parquet") / "cache"
    return make_cache(place, documents(40, 40), shard_positions=96, temperatures=(1.0, 2.0))


@pytest.fixture(scope="module")
def exported(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parquet") / "out"
    report = export_cache(cache, out, to="parquet")
    assert report.status == 0
    assert report.tokens == int(cache.manifest.column("positions").to_numpy().sum())
    return out


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def load(folder: Path, tmp_path: Path, **more: Any) -> Any:
    return datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "datasets"), **more)


def test_datasets_reads_exactly_what_the_cache_says(cache: Cache, exported: Path, tmp_path: Path) -> None:
    found = load(exported, tmp_path)
    assert list(found) == ["train", "held_out"]
    columns = ["sequence", "input_ids", "labels", "document", "top_ids", "top_logprobs", "draws", "tail"]
    plan = plan_of(cache)
    assert plan is not None
    packed = cut = 0
    for split, shards in (("train", range(plan.train_shards)), ("held_out", range(plan.train_shards, plan.shards))):
        assert found[split].column_names == columns
        rows = iter(found[split])
        for shard in shards:
            arrays = cache.read_shard(shard)
            sequences = np.cumsum([0, *arrays["sequence_lengths"]])
            ends = np.cumsum([0, *arrays["document_lengths"]])
            packed += len(ends) > len(sequences)
            for first, stop in pairwise(sorted({*sequences, *ends})):
                row = next(rows)
                number = int(np.searchsorted(sequences, first, side="right")) - 1
                assert row["sequence"] == number + arrays["first_sequence"]
                assert row["document"] == arrays["document"][first:stop].tolist()
                assert row["input_ids"] == arrays["tokens"][first:stop].tolist()
                counts = arrays["logprobs"][first:stop, 0] > -np.inf
                if "loss_mask" in arrays:
                    counts &= arrays["loss_mask"][first:stop].astype(bool)
                tokens = arrays["tokens"][first:stop].tolist()
                labels = [t if c else -100 for t, c in zip(tokens[1:], counts[:-1], strict=True)]
                assert row["labels"] == [-100, *labels]
                cut += -100 in labels
                for i in range(first, stop):
                    used = arrays["logprobs"][i] > -np.inf
                    for name, theirs in (("top_ids", "ids"), ("top_logprobs", "logprobs"), ("draws", "draws")):
                        assert row[name][i - first] == arrays[theirs][i][used].tolist()
                    assert row["tail"][i - first] == arrays["tail"][i].tolist()
        assert next(rows, None) is None
    assert packed
    table = pq.read_schema(exported / "data" / "train-00000.parquet")
    about = json.loads(table.metadata[b"fastkd"])
    assert (about["spec"], about["temperatures"]) == (cache.spec.hash, [1.0, 2.0])
    streamed = load(exported, tmp_path, split="held_out", streaming=True)
    assert next(iter(streamed)) == found["held_out"][0]
    files = {"train": str(exported / "data" / "train-*.parquet")}
    assert (
        datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "b"))["train"][0]
        == (found["train"][0])
    )
    card = DatasetCard.load(exported / "README.md")
    assert card.data.tags == ["knowledge-distillation", "fastkd"]
    assert cache.spec.hash in card.text


def test_row_groups_are_bounded(cache: Cache, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole rows, with at most GROUP positions, or one row; the contents are the same."""
    monkeypatch.setattr(parquet, "GROUP", 24)
    export_cache(cache, tmp_path / "out", to="parquet")
    for path in sorted((exported / "data").iterdir()):
        one, other = pq.ParquetFile(path), pq.ParquetFile(tmp_path / "out" / "data" / path.name)
        assert one.read().equals(other.read())
        sizes = [[len(ids) for ids in other.read_row_group(i)["input_ids"]] for i in range(other.num_row_groups)]
        assert len(sizes) > one.num_row_groups
        assert all(sum(group) <= 24 or len(group) == 1 for group in sizes)
        assert any(len(group) > 1 for group in sizes)


def kl_as_axolotl(batch: dict[str, torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """The sum of `distillation_loss_fn` of src/axolotl/integrations/kd/kernels/liger.py, with beta = 0, T = 1 and
    normalize_topk = False."""
    ours = torch.gather(logits, -1, batch["target_token_ids"]) - torch.logsumexp(logits, -1, keepdim=True)
    valid = batch["target_mask"].bool()
    teacher = batch["target_logprobs"][valid]
    return (teacher.exp() * (teacher - ours[valid])).sum()


def test_axolotl_reads_it(tmp_path: Path) -> None:
    """Rows with k entries a position, whose loss is the truncated KL over positions with a label; short rows too."""
    spec = make_spec(k=5, draws=3, mass=0.8)
    with create_cache(tmp_path / "cache", spec) as writer:
        for i in range(2):
            shard = make_shard(spec, 60, seed=i, sequences=3)
            writer.write_shard(i, **shard, document_lengths=[10, 1, 49], first_sequence=3 * i)
    cache = open_cache(tmp_path / "cache")
    export_cache(cache, tmp_path / "out", to="parquet", columns="axolotl")
    rows = load(tmp_path / "out", tmp_path)["train"]
    names = ["input_ids", "attention_mask", "labels", "target_token_ids", "target_logprobs", "target_mask"]
    assert rows.column_names == names
    torch.manual_seed(0)
    total, expected, short = 0.0, 0.0, 0
    for row in rows:
        length = len(row["input_ids"])
        assert row["attention_mask"] == [1] * length
        batch = {name: torch.tensor(row[name]) for name in names}
        for name in names[3:]:
            assert batch[name].shape == (length, 5)
        logits = torch.randn(length, spec.vocab_size)
        total += float(kl_as_axolotl(batch, logits))
        mask = batch["target_mask"]
        assert not mask[-1].any()
        assert torch.equal(mask[:-1].any(1), batch["labels"][1:] != -100)
        short += int(((mask.sum(1) > 0) & (mask.sum(1) < 5)).sum())
        assert (batch["target_logprobs"][mask == 1] > -1e8).all()
        logprobs = torch.log_softmax(logits, 1)
        for i in range(length):
            for entry in range(5):
                if mask[i, entry]:
                    q = batch["target_logprobs"][i, entry].double()
                    expected += float(q.exp() * (q - logprobs[i, batch["target_token_ids"][i, entry]]))
    assert short
    assert total == pytest.approx(expected, rel=1e-5)
    # against the cache: all rows together are its shards, without draws
    flat = {name: [x for row in rows for x in row[name]] for name in names}
    arrays = [cache.read_shard(i) for i in range(2)]
    assert flat["input_ids"] == [t for one in arrays for t in one["tokens"].tolist()]
    head = np.concatenate([(one["logprobs"] > -np.inf) & (one["draws"] == 0) for one in arrays])[:, :5]
    logprobs = np.concatenate([one["logprobs"] for one in arrays])[:, :5]
    assert np.array_equal(np.array(flat["target_logprobs"], np.float32), np.where(head, logprobs, np.float32(-1e9)))


def test_a_cache_of_examples(tmp_path: Path) -> None:
    """A row is a copy of an example."""
    cache = vision_cases.make_cache(tmp_path / "cache")
    export_cache(cache, tmp_path / "out", to="parquet")
    rows = load(tmp_path / "out", tmp_path)["train"]
    assert "labels" not in rows.column_names
    arrays = cache.read_shard(0)
    for i, row in enumerate(rows.select(range(len(arrays["ids"])))):
        used = arrays["logprobs"][i] > -np.inf
        assert (row["example"], row["augmentation_seed"]) == (arrays["example"][i], arrays["augmentation_seed"][i])
        assert row["top_ids"] == arrays["ids"][i][used].tolist()
        assert row["top_logprobs"] == arrays["logprobs"][i][used].tolist()
    assert "input_ids" not in (tmp_path / "out" / "README.md").read_text()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stopped_or_killed_export_resumes(cache: Cache, exported: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """In the end the folder is that of one call."""
    stop = Stop()
    stop.asked = True
    report = export_cache(cache, tmp_path / "out", to="parquet", stop=stop)
    assert (report.status, report.shards, report.samples) == (75, 0, 0)
    assert not list((tmp_path / "out" / "data").iterdir())
    real, count = atomic.os.replace, 0

    class Killed(BaseException):
        pass

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count % 3 == 2:
            raise Killed
        real(source, target)

    monkeypatch.setattr(atomic.os, "replace", replace)
    for _ in range(100):
        try:
            export_cache(cache, tmp_path / "out", to="parquet")
            break
        except Killed:
            pass
    assert count > 10
    assert contents(tmp_path / "out") == contents(exported)
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    assert export_cache(cache, tmp_path / "out", to="parquet").samples == 0
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"


def test_what_cannot_be(cache: Cache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(match: str, what: Any = cache, **arguments: Any) -> None:
        with pytest.raises(ExportError, match=match):
            export_cache(what, tmp_path / "out", **{"to": "parquet", **arguments})
        assert not (tmp_path / "out").exists()

    refused("columns: got 'trl'; expected one of fastkd, axolotl", columns="trl")
    refused("features: got .'2',. with to='parquet', which takes none", features=["2"])
    refused("dtype: got 'float32' with to='parquet'", dtype="float32")
    refused("columns: got 'axolotl' with to='specforge'", to="specforge", columns="axolotl")
    spec = make_spec(k=0, draws=4)
    with create_cache(tmp_path / "cache", spec) as writer:
        writer.write_shard(0, **make_shard(spec), first_sequence=0)
    refused("without top-k entries; expected text with top-k", open_cache(tmp_path / "cache"), columns="axolotl")
    place = cache.store.describe().removeprefix("file://")
    args = ["export-cache", place, "--to", "parquet", "--out", str(tmp_path / "out"), "--columns", "axolotl"]
    assert cli.main([*args, "--json"]) == 0
    capsys.readouterr()
    wrong = ["export-cache", place, "--to", "parquet", "--out", str(tmp_path / "other"), "--state-dtype", "float32"]
    assert cli.main(wrong) == 1
    assert capsys.readouterr().err.startswith(
        "fastkd: --state-dtype: got 'float32' with --to parquet, which takes none"
    )
    assert cli.main([*args, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["shards"] == len(cache.shards)
