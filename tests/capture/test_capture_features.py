"""Features of a capture: the states that are stored are the teacher's, whenever and by whomever they are captured."""

import json
import threading
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_cases import SMALL, Causal, Layered, contents, documents, feature_contents
from hf_cases import saved
from vision_cases import CAPTURE as IMAGES
from vision_cases import Net, examples

import fastkd
from fastkd.cache import Cache, CacheError, drop_feature, open_cache, verify_cache
from fastkd.cache.stores import MemoryStore
from fastkd.capture.check import check_teacher, check_text
from fastkd.capture.estimate import estimate, estimate_text
from fastkd.capture.feature_settings import positions_text
from fastkd.capture.features import prepare
from fastkd.capture.runner import CaptureReport, capture_text
from fastkd.data.load import load_documents
from fastkd.errors import DataError, TeacherError
from fastkd.models.attention import from_bytes, read_attention
from fastkd.models.taps import Taps
from fastkd.settings import CaptureSettings
from fastkd.teachers import TopK
from fastkd.teachers.hf import load_hf
from fastkd.teachers.load import as_teacher

FEATURES: dict[str, Any] = {"features": ("1", "-1")}


def capture(out: Any, teacher: Any = None, data: Any = None, **changes: Any) -> CaptureReport:
    given = {**SMALL, "shard_positions": 128, **changes}
    return fastkd.capture(teacher or Layered(), documents() if data is None else data, out, **given)


def states(cache: Cache, index: int, name: str, teacher: Any = None) -> np.ndarray:
    """The teacher's states at the rows of a shard, each document run alone."""
    arrays, found, start = cache.read_shard(index), [], 0
    model = (teacher or Layered()).eval()
    for length in arrays["document_lengths"].tolist():
        tokens = torch.from_numpy(arrays["tokens"][start : start + length].astype(np.int64))[None]
        with Taps(model, [name]) as taps, torch.inference_mode():
            model(tokens)
        found.append(taps.values[name][0].numpy())
        start += length
    return np.concatenate(found)


def close(coded: np.ndarray, exact: np.ndarray, step: float) -> bool:
    """Whether states differ by the codec's error: half a step in each coordinate, of the state's scale."""
    scale = np.sqrt((exact**2).mean(-1, keepdims=True))
    error = np.sqrt((((coded - exact) / scale) ** 2).mean(-1))
    return bool((error <= step / 2 + 2e-3).all() and (not len(error) or error.max() > step / 20))


@pytest.mark.parametrize("hidden", [False, True])
def test_states_are_the_teachers_and_the_rest_of_the_cache_does_not_change(hidden: bool) -> None:
    store = MemoryStore()
    report = capture(store, Layered(hidden=hidden), overlap=3, **FEATURES)
    cache = open_cache(store)
    assert report.complete
    assert cache.sealed
    assert list(cache.features) == ["1", "-1"]
    sinks = 0
    for name in cache.features:
        feature = cache.features[name]
        assert feature.sealed
        assert feature.shards == cache.shards
        assert (feature.spec.layer, feature.spec.layers) == ({"1": 1, "-1": 3}[name], 3)
        for index in cache.shards:
            exact = states(cache, index, name)
            assert close(feature.read_shard(index), exact, 0.2)
            codes = feature.read_codes(index)
            sinks += len(codes["exact_rows"])
            np.testing.assert_array_equal(codes["exact"], exact[codes["exact_rows"]])
        assert (
            report.features[name].positions_written
            == report.positions_written
            == cache.manifest["positions"].to_numpy().sum()
        )
        assert f"feature {name}: {report.shards_written} shards" in capture_text(report)
    assert sinks > 20
    assert verify_cache(store, deep=True).ok
    with_overlap = MemoryStore()
    capture(with_overlap, Layered(hidden=hidden), overlap=3)
    assert contents(with_overlap) == contents(store)
    assert not any(entry.key.startswith("features") for entry in with_overlap.list(""))


def test_added_to_a_finished_cache_nothing_of_it_is_written_again() -> None:
    together, store = MemoryStore(), MemoryStore()
    capture(together, **FEATURES)
    capture(store)
    before = {entry.key: store.get(entry.key) for entry in store.list("")}
    teacher = Layered()
    report = capture(store, teacher, **FEATURES)
    assert report.complete
    assert report.shards_written == report.bytes_written == 0
    assert "this run: features of" in capture_text(report)
    after = {entry.key: store.get(entry.key) for entry in store.list("")}
    claims = [key for key in after if key.startswith("claims/")]
    assert {key for key in after if key not in before} - set(claims) == {k for k in after if k.startswith("features/")}
    assert all(after[key] == data for key, data in before.items())
    assert feature_contents(store) == feature_contents(together)
    calls = len(teacher.calls)
    again = capture(store, teacher, **FEATURES)
    assert len(teacher.calls) == calls + 2, "for its vocabulary, and the places of its states"
    assert "nothing to do" in capture_text(again)
    # one more, and one that was dropped, at other settings
    drop_feature(store, "1")
    assert capture(store, features=("1", "-1", "2"), feature_step=0.2).features["2"].shards_written > 3
    assert set(open_cache(store).features) == {"1", "2", "-1"}
    assert feature_contents(store)["1"] == feature_contents(together)["1"]


def test_a_module_that_is_called_twice_is_refused() -> None:
    class Twice(Net):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.convolution(images)
            return super().forward(images)

    store = MemoryStore()
    with pytest.raises(TeacherError, match="feature convolution: the teacher calls convolution 2 times in a forward"):
        fastkd.capture(Twice(), examples(), store, **IMAGES, features=("convolution",))
    assert not list(store.list(""))


def test_a_feature_that_is_dropped_as_it_is_created(monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare.create_feature

    def create(store: Any, spec: Any, *rest: Any) -> Any:
        writer = made(store, spec, *rest)
        drop_feature(store, spec.name)
        return writer

    monkeypatch.setattr(prepare, "create_feature", create)
    with pytest.raises(CacheError, match="feature 1 was dropped meanwhile"):
        capture(MemoryStore(), **FEATURES)


def test_a_shard_whose_features_are_missing_is_run_alone() -> None:
    store = MemoryStore()
    capture(store, **FEATURES)
    whole, base = feature_contents(store), contents(store)
    early = without(store, "features/-1/shards/2.zarr.zip")
    with pytest.raises(CacheError, match=r"feature -1: the feature is sealed, with \d+ of"):
        capture(early, **FEATURES)
    store = without(store, "features/1/shards/4.zarr.zip", "features/1/manifest.parquet")
    report = capture(store, **FEATURES)
    assert report.complete
    assert report.positions_captured == int(open_cache(store).manifest["positions"][4].as_py())
    assert [report.features[name].shards_written for name in ("1", "-1")] == [1, 0]
    assert (feature_contents(store), contents(store)) == (whole, base)


def test_chosen_positions_do_not_depend_on_the_plan() -> None:
    chosen: list[set[tuple[int, int]]] = []
    for changes in ({}, {"shard_positions": 300, "batch_tokens": 200, "k": 3}):
        store = MemoryStore()
        capture(store, **changes, features=("2",), feature_positions="0.30", on_long="truncate")
        cache = open_cache(store)
        assert cache.features["2"].spec.positions == "0.3"
        here: set[tuple[int, int]] = set()
        for index in cache.shards:
            arrays, coded = cache.read_shard(index), cache.features["2"].read_shard(index)
            kept = ~np.isnan(coded).any(-1)
            assert close(coded[kept], states(cache, index, "2")[kept], 0.2)
            starts = np.repeat(
                np.cumsum(arrays["document_lengths"]) - arrays["document_lengths"], arrays["document_lengths"]
            )
            here |= {
                *zip(arrays["document"][kept].tolist(), (np.flatnonzero(kept) - starts[kept]).tolist(), strict=True)
            }
        chosen.append(here)
        total = sum(len(cache.read_shard(i)["tokens"]) for i in cache.shards)
        assert 0.2 < len(here) / total < 0.4
    assert chosen[0] == chosen[1]


def test_counted_positions_are_those_with_a_target() -> None:
    store = MemoryStore()
    capture(store, features=("1",), feature_positions="counted", overlap=4)
    cache = open_cache(store)
    for index in cache.shards:
        stored = ~np.isnan(cache.features["1"].read_shard(index)).any(-1)
        np.testing.assert_array_equal(stored, cache.read_shard(index)["logprobs"][:, 0] > -np.inf)
    assert [positions_text(CaptureSettings(feature_positions=p)) for p in ("1.0", "0.5", "1e-6")] == [
        "counted",
        "0.5",
        "0.000001",
    ]


@pytest.mark.parametrize("name", ["1", "-1"])
def test_the_step_is_what_a_divergence_costs(name: str) -> None:
    store = MemoryStore()
    data = [[(7 * i + j * j) % 97 for j in range(16)] for i in range(140)]
    capture(store, data=data, features=(name,), feature_kl=1e-2, shard_positions=2**12)
    feature = open_cache(store).features[name]
    found = json.loads(feature.spec.notes)["step_search"]
    assert found["step"] == feature.spec.step
    assert 0.5e-2 < found["kl"] <= 1e-2 < found["next_kl"] < 1.5e-2
    assert 1 < found["next_step"] / found["step"] <= 1.06
    # measured again, with other positions and plain code
    cache, model = open_cache(store), Layered().eval()
    total = count = 0.0
    for index in cache.shards:
        tokens = torch.from_numpy(cache.read_shard(index)["tokens"].astype(np.int64)).view(-1, 16)
        coded = torch.from_numpy(feature.read_shard(index)).view(len(tokens), 16, -1)
        with torch.inference_mode():
            exact = model(tokens).double().log_softmax(-1)
            x = coded
            for layer in model.layers[1 if name == "1" else 3 :]:
                x = layer(x)
            other = (model.norm(x) @ model.head.T).double().log_softmax(-1)
        total += float((exact.exp() * (exact - other)).sum())
        count += tokens.numel()
    assert total / count == pytest.approx(found["kl"], rel=0.15)
    report = capture(store, data=data, features=(name,), feature_kl=1e-2, shard_positions=2**12)
    assert report.complete
    with pytest.raises(CacheError, match=r"feature_kl: 0\.01 and 0\.02"):
        capture(store, data=data, features=(name,), feature_kl=2e-2, shard_positions=2**12)
    with pytest.raises(CacheError, match="feature_step: "):
        capture(store, data=data, features=(name,), shard_positions=2**12)


def server_teacher(tokens: torch.Tensor) -> Any:
    return TopK(torch.zeros((*tokens.shape, 1), dtype=torch.int64), torch.zeros((*tokens.shape, 1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": ("3", "4")}, "4: got a layer that Layered lacks; expected 0 to 2, or -1"),
        ({"features": ("-5",)}, "-5: got a layer"),
        ({"features": ("nothing",)}, "no module 'nothing'"),
        ({"features": ("norm",)}, r"feature norm: got torch.float32 of shape \(2, 5, 8\) at norm; expected the state"),
        ({"features": ("norm:at",)}, "feature norm:at: got"),
        ({"features": ("1",), "feature_step": -1.0}, "feature_step: got -1.0; expected a number"),
        ({"features": ("1",), "feature_kl": float("nan")}, "feature_kl: got nan"),
        ({"features": ("1",), "feature_kl": 0.1, "feature_step": 0.1}, "expected one of them"),
        ({"features": ("1",), "feature_positions": "some"}, "feature_positions: got 'some'; expected all, counted, or"),
        ({"features": ("1",), "feature_positions": "1.5"}, "feature_positions: got '1.5'"),
        ({"feature_block": True}, "feature_block: got True without features"),
        ({"features": ("1",), "feature_step": 0.3}, r"feature 1 .*feature_step: 0\.2 and 0\.3"),
        ({"features": ("1",), "feature_positions": "0.5"}, "feature_positions: 'all' and '0.5'"),
        ({"features": ("2",), "k": 6}, "k: 5 and 6"),
        ({"features": ("2",), "shard_positions": 64}, "shard_positions: 128 and 64"),
        ({"features": ("2",), "data": documents(seed=1)}, "data: sha256"),
        ({"features": ("2",), "fingerprint": "another"}, "teacher: "),
        ({"features": ("1",), "teacher": server_teacher, "vocab_size": 97}, "whose layers are not in this process"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(changes: dict[str, Any], message: str) -> None:
    store = without(finished())
    before = {entry.key: store.get(entry.key) for entry in store.list("")}
    with pytest.raises((TeacherError, DataError, CacheError), match=message):
        capture(store, **changes)
    assert {entry.key: store.get(entry.key) for entry in store.list("")} == before


@cache
def finished() -> MemoryStore:
    """A cache with a feature."""
    store = MemoryStore()
    capture(store, features=("1",))
    return store


def without(store: MemoryStore, *keys: str) -> MemoryStore:
    """A copy that lacks some objects."""
    copy = MemoryStore()
    for entry in store.list(""):
        if entry.key not in keys:
            copy.create(entry.key, store.get(entry.key))
    return copy


def test_shards_that_are_too_large_are_refused_with_the_number_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.cache.features.spec.MOST_ELEMENTS", 8 * 100)
    store = MemoryStore()
    with pytest.raises(
        DataError, match=r"shards of up to 12\d positions; expected at most 100 .*--shard-positions 100"
    ):
        capture(store, features=("1",))
    assert {entry.key for entry in store.list("")} <= {"lengths.npz", "claims/lengths/0.json"}
    assert capture(store, features=("1",), shard_positions=100).complete


class Broken(Layered):
    """Its second layer returns NaN or an infinity at a token of a document."""

    def __init__(self, value: float, documents: list[list[int]], at: tuple[int, int]) -> None:
        super().__init__()
        self.value, self.given = value, torch.tensor(documents[at[0]])
        self.layers[1].register_forward_hook(self.broken)
        self.at, self.tokens = at[1], None

    def broken(self, module: Any, arguments: Any, result: torch.Tensor) -> torch.Tensor:
        result = result.clone()
        for row, tokens in enumerate(self.tokens):
            if torch.equal(tokens[: len(self.given)], self.given):
                result[row, self.at, 3] = self.value
        return result

    def forward(self, tokens: torch.Tensor) -> Any:
        self.tokens = tokens
        return super().forward(tokens).nan_to_num(0.0, 0.0, 0.0)


@pytest.mark.parametrize(("value", "document"), [(np.nan, 1), (np.inf, 27)])  # in the first positions, behind them
def test_a_state_that_is_not_finite_is_named(value: float, document: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkd.capture.features.sample.POSITIONS", 64)
    monkeypatch.setattr("fastkd.capture.features.prepare.sample_states.__defaults__", (64,))
    data, store = [tokens[:16] or [1] for tokens in documents()], MemoryStore()
    position = len(data[document]) - 1
    teacher = Broken(value, data, (document, position))
    with pytest.raises(
        TeacherError, match=f"document {document}.* position {position}: .*the state that enters layer 2 has NaN or inf"
    ):
        capture(store, teacher, data, features=("0", "2"), held_out=0.0)
    shard = next(i for i in range(20) if i not in open_cache(store).shards)
    assert not any(f"shards/{shard}.zarr" in entry.key for entry in store.list(""))
    assert capture(store, None, data, features=("0", "2"), held_out=0.0, fingerprint="the same").complete


def test_workers_share_the_work_and_the_basis() -> None:
    alone, store = MemoryStore(), MemoryStore()
    capture(alone, **FEATURES)
    found: list[Any] = [None] * 3

    def work(rank: int) -> None:
        found[rank] = capture(store, rank=rank, world_size=3, **FEATURES)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(report.complete for report in found)
    assert (contents(store), feature_contents(store)) == (contents(alone), feature_contents(alone))
    written = [report.features["1"].shards_written for report in found]
    assert sum(written) == len(contents(alone))


def test_maps_of_images_and_their_attention_maps(tmp_path: Path) -> None:
    plain, folder, data = tmp_path / "plain", tmp_path / "cache", examples()
    fastkd.capture(Net(seed=7), data, plain, **IMAGES)
    report = fastkd.capture(Net(seed=7), data, folder, **IMAGES, features=("convolution", "convolution:at"))
    assert report.complete
    assert contents(folder) == contents(plain)
    cache, model = open_cache(folder), Net(seed=7).eval()
    assert cache.features["convolution"].spec.kind == "map"
    assert cache.features["convolution:at"].spec.kind == "attention_map"
    for index in cache.shards:
        arrays = cache.read_shard(index)
        with torch.inference_mode():
            exact = model.convolution(data.read(arrays["example"], arrays["augmentation_seed"])).numpy()
        coded = cache.features["convolution"].read_shard(index)
        assert coded.shape == exact.shape == (len(arrays["example"]), 5, 4, 4)
        pixels = [np.moveaxis(x, 1, 3).reshape(-1, 5) for x in (coded, exact)]
        assert close(*pixels, 0.2)
        assert close(
            cache.features["convolution:at"].read_shard(index).reshape(-1, 16),
            np.square(exact).mean(1).reshape(-1, 16),
            0.2,
        )
    for name in ("head", "head:at", "convolution.weight"):
        with pytest.raises(TeacherError, match=r"expected a map|no module"):
            fastkd.capture(Net(seed=7), data, folder, **IMAGES, features=(name,))
    with pytest.raises(TeacherError, match="no list of layers"):
        fastkd.capture(Net(seed=7), data, folder, **IMAGES, features=("1",))
    report = fastkd.capture(Net(seed=7), data, plain, **IMAGES, features=("convolution",), feature_kl=1e-3)
    found = json.loads(open_cache(plain).features["convolution"].spec.notes)["step_search"]
    assert 0 < found["kl"] <= 1e-3 < found["next_kl"]


def test_the_plan_states_what_features_take() -> None:
    data = load_documents(
        documents(60), column=None, text_documents="line", tokenizer=None, loss_on="all", vocab_size=97
    )
    settings = {name: value for name, value in SMALL.items() if name != "fingerprint"}
    found = {}
    for names in ((), ("1", "-1")):
        given = CaptureSettings(**settings, features=names)
        model = as_teacher(Layered())
        found[names] = estimate(model, data, given, seconds=0.5, min_batches=40)
    plain, both = found.values()
    assert "feature" not in estimate_text(plain)
    assert "features" not in plain.to_json()
    assert not any(name.startswith("feature") for name in plain.settings)
    store = MemoryStore()
    report = fastkd.capture(Layered(), documents(60), store, **SMALL, features=("1", "-1"))
    for name, cost in both.features.items():
        stored = sum(entry.size for entry in store.list(f"features/{name}/") if entry.key.endswith(".zip"))
        assert cost.positions == report.positions_written
        assert cost.bytes == pytest.approx(stored, rel=0.1)
        assert f"feature {name}" in estimate_text(both)
    assert "with features" in estimate_text(both)
    half = CaptureSettings(**settings, features=("1",), feature_positions="0.5")
    cost = estimate(as_teacher(Layered()), data, half, seconds=0.1).features["1"]
    assert cost.positions == pytest.approx(report.positions_written / 2)


def test_the_block_of_a_layer_is_kept_beside_its_state(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", num_hidden_layers=3)
    teacher = load_hf(folder)
    data = [[token % 90 for token in tokens] for tokens in documents()]
    store = MemoryStore()
    given = {**SMALL, "shard_positions": 512, "fingerprint": "", "features": ("1,-1",), "feature_block": True}
    assert fastkd.capture(teacher, data, store, **given).complete
    cache = open_cache(store)
    assert cache.features["-1"].block is None, "no layer follows"
    block = from_bytes(cache.features["1"].block)
    states = torch.randn(5, 32)
    expected = read_attention(teacher.model, 1).block().queries_keys_values(states, torch.arange(5))
    for one, other in zip(block.queries_keys_values(states, torch.arange(5))[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other)
    without_block = {**given, "features": ("1", "2"), "feature_block": False}
    assert fastkd.capture(teacher, data, store, **without_block).complete, "a block does no harm"
    with pytest.raises(CacheError, match=r"feature 2 .*feature_block: False and True"):
        fastkd.capture(teacher, data, store, **{**without_block, "feature_block": True})
    with pytest.raises(TeacherError, match="no model of transformers"):
        capture(MemoryStore(), features=("1",), feature_block=True)


@pytest.mark.parametrize("kind", ["text", "images"])
def test_the_teacher_is_asked_again(kind: str) -> None:
    store: Any = MemoryStore()
    data = examples() if kind == "images" else None
    teacher: Any = Net(seed=7) if kind == "images" else Layered()
    if kind == "images":
        fastkd.capture(teacher, data, store, **IMAGES, features=("convolution", "convolution:at"))
    else:
        capture(store, teacher, features=("1", "-1"), feature_positions="0.5")
    model, cache = as_teacher(teacher, data, fingerprint="the same" if data is None else ""), open_cache(store)
    report = check_teacher(cache, model, data=data, positions=10**6, seed=1)
    assert report.ok
    assert report.problems == []
    for name, difference in report.features.items():
        feature = cache.features[name]
        assert difference.compared == sum(len(feature.read_codes(i)["rows"]) for i in feature.shards)
        assert 0.9 * feature.spec.step / 2 < difference.largest <= feature.spec.step / 2 + 1e-3
        assert difference.excess == 0
        assert f"  {name} " in check_text(report)
    assert "ok: the cache matches" in check_text(report)
    # the same answers from other states
    if kind == "text":
        teacher.layers[0].register_forward_hook(lambda module, given, states: states * 1.5)
        original = teacher.layers[1].forward
        teacher.layers[1].forward = lambda states: original(states / 1.5)
        report = check_teacher(cache, model, positions=200, seed=1)
        assert [problem.split(": ")[1].split(" is")[0] for problem in report.problems] == ["feature 1"]
        assert not report.ok
        assert report.features["-1"].excess == 0
        assert json.dumps(report.to_json())
    other: Any = Causal() if kind == "text" else torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 7))
    with pytest.raises(TeacherError, match=r"no list of layers|no module"):
        check_teacher(cache, as_teacher(other, data, fingerprint="x"), data=data)
