"""Exports of a cache for other programs, read back as these programs' loaders read them."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from cache_cases import make_shard, make_spec
from feature_cases import make_states
from hf_cases import model_of, saved
from safetensors.torch import load_file

from fastkd.cache import Basis, FeatureSpec, create_cache, create_feature, encode_hidden, open_cache
from fastkd.cli import main as cli
from fastkd.errors import ExportError
from fastkd.export.api import export_cache
from fastkd.export.formats import names
from fastkd.export.formats.safetensors_features import Format
from fastkd.models.final_norm import find_final_norm
from fastkd.utils.signals import Stop

POSITIONS, WIDTH, LAYERS = 60, 32, 8
SEQUENCES, DOCUMENTS = [20, 25, 15], [8, 12, 20, 1, 4, 15]
"""Rows of the windows of each shard, and of the documents in them: of six parts, one has a single token."""
FEATURES = ("2", "4", "5", "-1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with states of three layers and of the final norm."""
    place = tmp_path_factory.mktemp("export") / "cache"
    base = make_spec(vocab_size=96, k=3, teacher="Llama, 9 parameters, sha256 " + "0" * 64 + ", float32")
    with create_cache(place, base) as writer:
        for i in range(3):
            shard = make_shard(base, POSITIONS, seed=i) | {"sequence_lengths": SEQUENCES}
            writer.write_shard(i, **shard, document_lengths=DOCUMENTS, first_sequence=3 * i)
    basis = Basis.learn(make_states(99, 800, WIDTH))
    for number, name in enumerate(FEATURES):
        layer = LAYERS if name == "-1" else int(name)
        spec = FeatureSpec(base.hash, name, "state", layer, LAYERS, (WIDTH,), 0.1, "all", 0, "bfloat16", basis.sha256)
        with create_feature(place, spec, basis) as features:
            for i in range(3):
                features.write_shard(i, encode_hidden(make_states(10 * i + number, POSITIONS, WIDTH), basis, 0.1))
    return place


def expected(cache: Path, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, torch.Tensor]]:
    """What the samples are, from the cache's own reader: tokens, mask, and states [L, layers, D]."""
    opened, found = open_cache(cache), []
    ends = np.cumsum([0, 8, 12, 20, 1, 4, 15])  # no document goes on in the next window here
    for shard in opened.shards:
        arrays = opened.read_shard(shard)
        states = torch.stack([torch.from_numpy(opened.features[name].read_shard(shard)) for name in FEATURES], 1)
        for first, stop in pairwise(ends):
            if stop - first > 1:
                counts = [row > -np.inf for row in arrays["logprobs"][first : stop - 1, 0]]
                found.append(
                    {
                        "tokens": torch.from_numpy(arrays["tokens"][first:stop].astype(np.int64)),
                        "mask": torch.tensor([0, *map(int, counts)]),
                        "states": states[first:stop].to(dtype),
                    }
                )
    return found


def read_speculators(folder: Path) -> list[dict[str, torch.Tensor]]:
    """As `ArrowDataset._get_raw_data` of src/speculators/train/data.py (vllm-project/speculators) does, with
    `check_hidden_states` of data_generation/offline.py and `FileTransfer` of hs_connectors/transfer.py; the dataset as
    `load_from_disk` and the format "torch" of the package datasets do."""
    state = json.loads((folder / "state.json").read_text())
    assert state["_format_type"] == "torch"
    assert json.loads((folder / "dataset_info.json").read_text())["features"] is None
    rows: list[dict[str, Any]] = []
    for file in state["_data_files"]:
        with pa.memory_map(str(folder / file["filename"])) as source:
            rows += pa.ipc.open_stream(source).read_all().to_pylist()
    found = []
    for index, row in enumerate(rows):
        assert list(row) == ["input_ids", "loss_mask", "seq_len"]
        assert row["seq_len"] == len(row["input_ids"]) == len(row["loss_mask"])
        loaded = load_file(folder / "hidden_states" / f"hs_{index}.safetensors")
        assert loaded.keys() == {"token_ids", "hidden_states"}
        assert torch.equal(loaded["token_ids"], torch.tensor(row["input_ids"]))
        assert loaded["hidden_states"].isfinite().all()
        found.append(
            {
                "hidden_states": loaded["hidden_states"][:, :-1].flatten(1),
                "input_ids": loaded["token_ids"],
                "verifier_last_hidden_states": loaded["hidden_states"][:, -1],
                "loss_mask": torch.tensor(row["loss_mask"]),
            }
        )
    return found


def read_specforge(folder: Path) -> list[dict[str, torch.Tensor]]:
    """As `list_feature_files` (specforge/runtime/data_plane/offline_reader.py of sgl-project/SpecForge), then
    `load_feature_file` (feature_store.py) and `normalize_offline_sample` (specforge/algorithms/eagle3/data.py) do."""
    files = sorted(folder.rglob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("data_")))
    assert {path.parent.name for path in files} == {"rows_0-2000"}
    found = []
    for path in files:
        raw = torch.load(path, weights_only=False, mmap=True)
        assert list(raw) == ["input_ids", "loss_mask", "aux_hidden_state", "hidden_state"]
        found.append(
            {
                "hidden_state": raw["aux_hidden_state"].squeeze(0),
                "target": raw["hidden_state"].squeeze(0),
                "input_ids": raw["input_ids"],
                "loss_mask": raw["loss_mask"],
            }
        )
        assert raw["hidden_state"].shape == (1, len(raw["input_ids"]), WIDTH)
        own = sum(tensor.nbytes for tensor in raw.values())
        assert path.stat().st_size < own + 4000, "of a view, all that it is a view of was saved"
    return found


def test_speculators_reads_it(cache: Path, tmp_path: Path) -> None:
    report = export_cache(cache, tmp_path / "out", to="safetensors-features")
    samples, wanted = read_speculators(tmp_path / "out"), expected(cache)
    assert report.samples == len(samples) == len(wanted) == 15
    assert (report.status, report.shards, report.features) == (0, 3, FEATURES)
    assert report.tokens == sum(len(sample["input_ids"]) for sample in samples)
    for sample, right in zip(samples, wanted, strict=True):
        assert torch.equal(sample["input_ids"], right["tokens"])
        assert torch.equal(sample["loss_mask"], right["mask"])
        assert sample["hidden_states"].dtype == torch.bfloat16
        torch.testing.assert_close(sample["hidden_states"], right["states"][:, :3].flatten(1))
        torch.testing.assert_close(sample["verifier_last_hidden_states"], right["states"][:, 3])
    assert any(0 < int(sample["loss_mask"].sum()) < len(sample["loss_mask"]) - 1 for sample in samples)


def test_specforge_reads_it(cache: Path, tmp_path: Path) -> None:
    teacher = HF(model_of("llama"))
    torch.nn.init.normal_(norm := teacher.model.model.norm.weight)
    export_cache(cache, tmp_path / "out", to="specforge", teacher=teacher, dtype="float32")
    samples, wanted = read_specforge(tmp_path / "out"), expected(cache, torch.float32)
    assert len(samples) == len(wanted)
    for sample, right in zip(samples, wanted, strict=True):
        assert torch.equal(sample["input_ids"], right["tokens"])
        assert torch.equal(sample["loss_mask"], right["mask"])
        torch.testing.assert_close(sample["hidden_state"], right["states"][:, :3].flatten(1))
        last = right["states"][:, 3]
        normed = last * torch.rsqrt(last.square().mean(-1, keepdim=True) + 1e-6) * norm
        torch.testing.assert_close(sample["target"], normed)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "cohere", "phi", "bloom"])
def test_the_final_norm_is_found(name: str) -> None:
    """Also where norms of other layers have the same class and shape."""
    model = model_of(name)
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            torch.nn.init.normal_(module.weight)
    found = find_final_norm(model)
    named = {id(module): path for path, module in model.named_modules()}
    assert named[id(found)].rpartition(".")[2] in ("norm", "ln_f", "final_layernorm")


def test_a_stopped_export_resumes(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped again and again: in the end the folder is that of one call."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    export_cache(cache, whole, to="safetensors-features")
    real = Format.write
    for limit in (1, 2, 6, 6):
        stop, count = Stop(), 0

        def write(self: Any, number: int, sample: Any, stop: Stop = stop, limit: int = limit) -> int:
            nonlocal count
            count += 1
            stop.asked = count == limit
            return real(self, number, sample)

        monkeypatch.setattr(Format, "write", write)
        report = export_cache(cache, part, to="safetensors-features", stop=stop)
        assert report.status == 75
        assert report.samples == limit
        assert not (part / "state.json").exists()
    monkeypatch.setattr(Format, "write", real)
    assert export_cache(cache, part, to="safetensors-features").samples == 5, "of the last shard"
    assert contents(part) == contents(whole)
    again = export_cache(cache, part, to="safetensors-features")
    assert (again.samples, again.status, again.shards) == (0, 0, 3)
    assert contents(part) == contents(whole)


def test_a_killed_export_resumes(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at each write of a file, before and after it has its name."""
    import fastkd.utils.atomic as atomic

    whole = tmp_path / "whole"
    export_cache(cache, whole, to="safetensors-features")
    real, count = atomic.os.replace, 0

    class Killed(BaseException):
        pass

    def replace(limit: int, after: bool) -> Callable[..., None]:
        def replace(source: Any, target: Any) -> None:
            nonlocal count
            count += 1
            if count == limit and not after:
                raise Killed
            real(source, target)
            if count == limit:
                raise Killed

        return replace

    for limit in range(1, 25, 4):
        for after in (False, True):
            part, count = tmp_path / f"{limit}-{after}", 0
            monkeypatch.setattr(atomic.os, "replace", replace(limit, after))
            with pytest.raises(Killed):
                export_cache(cache, part, to="safetensors-features")
            monkeypatch.setattr(atomic.os, "replace", real)
            export_cache(cache, part, to="safetensors-features")
            assert contents(part) == contents(whole), (limit, after)


class TestRefusals:
    """Each in one sentence, and before anything is written."""

    def refused(self, match: str, cache: Any, out: Path, **arguments: Any) -> None:
        there = contents(out) if out.exists() else None
        with pytest.raises(ExportError, match=match):
            export_cache(cache, out, **({"to": "safetensors-features"} | arguments))
        assert (contents(out) if out.exists() else None) == there

    def test_what_is_not_there(self, cache: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        self.refused("no states of 3 .it has 2, 4, 5, -1.*--features 3,-1", cache, out, features=["3"])
        self.refused("got 8 twice|got -1 twice", cache, out, features=["2", "8"])
        self.refused("got 4 twice", cache, out, features=["4", "4"])
        self.refused("expected a layer or more beside -1", cache, out, features=["-1"])
        self.refused(
            "to: got 'eagle'; expected one of parquet, safetensors-features, specforge", cache, out, to="eagle"
        )
        self.refused("dtype: got 'int8'", cache, out, dtype="int8")

    def test_a_cache_that_does_not_fit(self, tmp_path: Path) -> None:
        base = make_spec(vocab_size=40, k=3)
        basis = Basis.learn(make_states(99, 800, WIDTH))
        with create_cache(tmp_path / "cache", base) as writer:
            writer.write_shard(0, **make_shard(base, POSITIONS))
        self.refused("has no states of -1 .it has none", tmp_path / "cache", tmp_path / "out")
        common: Any = ("state", LAYERS, LAYERS, (WIDTH,), 0.1)
        spec = FeatureSpec(base.hash, "-1", *common, "counted", 0, "float32", basis.sha256)
        create_feature(tmp_path / "cache", spec, basis).close()
        self.refused("-1: got states of counted positions", tmp_path / "cache", tmp_path / "out")
        spec = FeatureSpec(base.hash, "2", "state", 2, *common[2:], "all", 0, "float32", basis.sha256)
        create_feature(tmp_path / "cache", spec, basis).close()
        self.refused(
            "2: 1 of the 1 shards is missing .the first is 0", tmp_path / "cache", tmp_path / "out", features=["2"]
        )

    def test_specforge_needs_the_teacher(self, cache: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        self.refused("teacher: specforge stores the states after the teacher's final norm", cache, out, to="specforge")
        self.refused(
            "got other weights .sha256 .*expected those of the capture", cache, out, to="specforge",
            teacher=str(saved(tmp_path, "llama")),
        )  # fmt: skip
        teacher = HF(model_of("llama"))
        self.refused("expected 3 layers and -1", cache, out, to="specforge", teacher=teacher, features=["2", "4"])

    def test_another_folder(self, cache: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        export_cache(cache, out, to="safetensors-features")
        self.refused("exported with dtype 'bfloat16', now 'float16'", cache, out, dtype="float16")
        self.refused("exported with features ", cache, out, features=["4"])
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "notes.txt").write_text("mine")
        self.refused("got 'notes.txt'; expected an empty folder", cache, tmp_path / "other")
        ledger = out / "fastkd-export.json"
        text = ledger.read_text()
        assert '"0": 5' in text
        ledger.write_text(text.replace('"0": 5', '"0": 4'))
        self.refused("it is damaged", cache, out)


def test_the_command(cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    args = ["export-cache", str(cache), "--to", "safetensors-features", "--out", str(out)]
    assert cli.main([*args, "--features", "4", "--json"]) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert report["event"] == "done"
    assert report["features"] == ["4", "-1"]
    assert report["samples"] == 15
    assert read_speculators(out)[0]["hidden_states"].shape == (8, WIDTH)
    assert cli.main([*args, "--features", "4"]) == 0
    assert "complete. Written: 0 samples" in capfd.readouterr().out
    assert cli.main([*args, "--features", "4,-1"]) == 0, "as in --features of a capture"
    assert "complete. Written: 0 samples" in capfd.readouterr().out
    assert cli.main([*args, "--features", "7"]) == 1
    assert "has no states of 7" in capfd.readouterr().err
    assert cli.main(["export-cache", str(tmp_path), "--to", "specforge", "--out", str(out)]) == 2
    assert names() == ["parquet", "safetensors-features", "specforge"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def HF(model: Any) -> Any:
    """A teacher whose fingerprint names no weights."""
    from fastkd.models.hub import ModelFiles
    from fastkd.teachers.hf import HFTeacher

    teacher = HFTeacher(model, ModelFiles(Path("."), "made up"), name="made up", notes=[], trust_remote_code=False)
    teacher.__dict__["fingerprint"] = "made up"
    return teacher
