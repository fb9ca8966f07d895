"""The mean of several teachers' sparse targets: against dense teachers, by simulation, and as a cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_cases import SMALL, VOCAB, Causal, Without, contents, documents
from torch import Tensor

import fastkd
from fastkd import SparseTargets, topk_targets
from fastkd.cache import CacheError, CacheSpec, StoreError, open_cache, verify_cache
from fastkd.cache.checks import check_sorted, check_targets
from fastkd.cache.inspect import inspect_cache
from fastkd.cache.stores import MemoryStore
from fastkd.capture import mix
from fastkd.capture.mix_caches import mix_targets, mixed_spec
from fastkd.cli.main import main
from fastkd.utils.signals import Stop

TEMPERATURES = (1.0, 1.5, 2.0, 4.0)
SETTINGS: dict[str, Any] = {"temperatures": TEMPERATURES, "draw_temperature": 1.0}


def logits_of(rows: int, vocab: int, *, apart: float = 1.0, teachers: int = 2, seed: int = 0) -> list[Tensor]:
    """Logits `[rows, vocab]` of teachers that agree the less, the further `apart` they are."""
    generator = torch.Generator().manual_seed(seed)
    shared = 2 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return [
        shared + apart * torch.randn(rows, vocab, generator=generator, dtype=torch.float64) for _ in range(teachers)
    ]


def sparse(logits: Tensor, k: int, draws: int = 0, seed: int = 0, **more: Any) -> dict[str, Any]:
    positions = torch.arange(len(logits))
    asked = {"draws": draws, "temperatures": TEMPERATURES, "seed": seed, **more}
    return topk_targets(logits, k, positions=positions, **asked).arrays()


def dense_mean(logits: list[Tensor], weights: list[float]) -> Tensor:
    """Log-probabilities of the mean teacher."""
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return torch.logsumexp(torch.stack([z.log_softmax(1) for z in logits]) + shares.log()[:, None, None], 0)


def mixed(parts: list[Any], vocab: int, weights: list[float] | None = None, **changes: Any) -> SparseTargets:
    most = max(int(part["draws"].sum(1).max()) if "draws" in part else 0 for part in parts)
    given = {"k": vocab, "draws": most, "uniform_N": np.random.default_rng(0).random(len(parts[0]["ids"])), **changes}
    found = mix.mix_rows(parts, weights or [1.0] * len(parts), vocab_size=vocab, **SETTINGS, **given)
    return SparseTargets.from_arrays(found, vocab_size=vocab, temperatures=TEMPERATURES)


def inside(targets: SparseTargets, used: Tensor) -> Tensor:
    """Which tokens are among the used entries of each row, `[N, V]`."""
    ids = torch.where(used, targets.ids.long(), targets.vocab_size)
    return torch.zeros(len(ids), targets.vocab_size + 1, dtype=torch.bool).scatter_(1, ids, True)[:, :-1]


def test_whole_distributions_are_averaged_exactly_at_every_temperature() -> None:
    logits, weights = logits_of(50, 11, teachers=3), [1.0, 2.0, 0.5]
    logits[1][:, 3] = -torch.inf  # a token that one teacher never says
    found = mixed([sparse(z, 11) for z in logits], 11, weights)
    mean = dense_mean(logits, weights)
    for t in (1.0, 1.5, 2.0, 3.0, 4.0):
        at = found.at(t, dtype=torch.float64)
        q = torch.zeros_like(mean).scatter_(1, found.ids.long(), at.weights)
        torch.testing.assert_close(q, (mean / t).softmax(1), rtol=0, atol=1e-6)
        assert (at.log_q_tail == -torch.inf).all()


@pytest.mark.parametrize("draws", [0, 6])
def test_ids_of_every_head_have_exactly_the_mean_and_the_mass_adds_up(draws: int) -> None:
    logits, weights = logits_of(200, 60), [3.0, 1.0]
    parts = [sparse(z, 8, draws) for z in logits]
    found = mixed(parts, 60, weights)
    mean = dense_mean(logits, weights)
    exact = found.logprobs > -torch.inf
    if found.draws is not None:
        exact &= found.draws == 0
    heads = [torch.zeros(200, 60, dtype=torch.bool) for _ in parts]
    for head, part in zip(heads, parts, strict=True):
        head.scatter_(1, torch.from_numpy(part["ids"][:, :8]).long(), True)
    both = (heads[0] & heads[1]).gather(1, found.ids.long()) & exact
    assert both.sum() > 500
    torch.testing.assert_close(found.logprobs[both].double(), mean.gather(1, found.ids.long())[both], rtol=0, atol=2e-6)
    union = inside(found, exact)
    assert (union.sum(1) == (heads[0] | heads[1]).sum(1)).all()
    mass = torch.where(exact, found.logprobs.double().exp(), 0).sum(1) + found.tail[:, 0].double().exp()
    torch.testing.assert_close(mass, torch.ones(200, dtype=torch.float64), rtol=0, atol=2e-6)
    assert (found.outcomes == 60 - exact.sum(1)).all()


@pytest.mark.parametrize(("k", "draw_seeds"), [(99, (1, 2)), (2, (1, 2)), (99, (1, 1))])
def test_sampled_is_unbiased_for_the_mean_teacher(k: int, draw_seeds: tuple[int, int]) -> None:
    """Simulation: one row, drawn 20,000 times, by teachers with draws of their own or the same ones."""
    rows, vocab, weights = 20_000, 14, [2.0, 1.0]
    one = [z.expand(rows, vocab) for z in logits_of(1, vocab)]
    parts = [sparse(z, 3, 4, seed) for z, seed in zip(one, draw_seeds, strict=True)]
    found = mixed(parts, vocab, weights, k=k)
    at = found.at(1.0, "sampled", dtype=torch.float64)
    q = torch.zeros(rows, vocab, dtype=torch.float64).scatter_add_(1, found.ids.long(), at.weights)
    expected = dense_mean([z[:1] for z in one], weights).exp()[0]
    error = (q.mean(0) - expected) / (q.std(0) / rows**0.5 + 1e-6)
    assert error.abs().max() < 4, error
    assert q.std(0).max() > 0.01  # it is random
    assert found.draws is not None
    assert (found.draws.sum(1)[found.draws.any(1)] == 4).all()


@pytest.mark.parametrize("draws", [0, 5])
def test_a_cache_with_itself(draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    part = sparse(logits_of(100, 40)[0].float(), 6, draws)
    same = mixed([part, part], 40)
    for name, array in same.arrays().items():
        np.testing.assert_array_equal(array, part[name])
    # also by the arithmetic that other rows take
    monkeypatch.setattr(mix, "_same_rows", lambda parts, k, draws: np.zeros(len(parts[0]["ids"]), bool))
    computed = mixed([part, part], 40, [1.0, 3.0]).arrays()
    for name in part:
        width = part[name].shape[1:]
        np.testing.assert_allclose(computed[name][..., : width[0]] if width else computed[name], part[name], atol=2e-5)


def test_a_cut_moves_entries_to_the_tail_with_their_own_powers() -> None:
    logits = logits_of(80, 12)
    parts = [sparse(z, 12) for z in logits]
    found, mean = mixed(parts, 12, k=4), dense_mean(logits, [1.0, 1.0])
    assert ((found.logprobs > -torch.inf).sum(1) == 4).all()
    torch.testing.assert_close(found.logprobs[:, :4].double(), mean.topk(4, 1).values, rtol=0, atol=2e-6)
    rest = mean.sort(1, descending=True).values[:, 4:]
    for m, t in enumerate(TEMPERATURES):
        torch.testing.assert_close(found.tail[:, m].double(), (rest / t).logsumexp(1), rtol=0, atol=1e-5)
    assert (found.outcomes == 8).all()


def test_draws_that_are_left_out_say_what_they_know() -> None:
    """With draws=0, a token that was drawn has its stored probability, and another one an estimate, without noise."""
    logits = logits_of(200, 60)
    parts = [sparse(z, 8, 6, seed) for seed, z in enumerate(logits)]
    exact = dense_mean(logits, [1.0, 1.0])

    def distance(targets: SparseTargets) -> float:
        used = targets.logprobs > -torch.inf
        if targets.draws is not None:
            used &= targets.draws == 0
        difference = targets.logprobs.double().exp() - exact.gather(1, targets.ids.long()).exp()
        return float(torch.where(used, difference, 0).abs().sum(1).mean())

    plain = mixed(parts, 60, draws=0)
    assert plain.draws is None
    assert distance(plain) < distance(mixed(parts, 60)) / 2


@pytest.mark.parametrize("apart", [0.1, 0.5])
def test_tails_at_other_temperatures_against_dense_teachers(apart: float) -> None:
    """The stated approximation: too low by an amount that grows with the distance of the teachers."""
    logits = logits_of(100, 2000, apart=apart)
    found, mean = mixed([sparse(z, 16) for z in logits], 2000), dense_mean(logits, [1.0, 1.0])
    used = found.logprobs > -torch.inf
    union = inside(found, used)
    for m, t in enumerate(TEMPERATURES):
        error = found.tail[:, m].double() - (mean / t).masked_fill(union, -torch.inf).logsumexp(1)
        assert error.abs().max() < (0.04 if apart == 0.1 else 0.15), (t, error)
    difference = (found.logprobs.double().exp() - mean.gather(1, found.ids.long()).exp()).abs()[used]
    assert difference.max() < 0.02


def test_all_mass_of_the_tail_in_the_union_is_shared_out() -> None:
    """Two teachers that together name every token: nothing is left for the tail."""
    logits = [torch.tensor([[3.0, 2.0, 0.1, 0.0]]), torch.tensor([[0.0, 0.1, 2.0, 3.0]])]
    found = mixed([sparse(z, 2) for z in logits], 4)
    assert found.outcomes.tolist() == [0]
    assert (found.tail == -torch.inf).all()
    assert found.logprobs.exp().sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 1.5, 2.0, 4.0), (0.1, 1.0, 3.0, 20.0)])
def test_whatever_the_teachers_are_a_cache_takes_the_result(temperatures: tuple[float, ...]) -> None:
    """Drawn vocabularies, sizes, masks, cuts and temperatures; values rounded much more than a codec does."""
    random = np.random.default_rng(len(temperatures))
    for _ in range(30):
        vocab, rows, at = int(random.integers(2, 30)), 20, float(random.choice([0.5, 1.0, 2.0]))
        parts, settings = [], []
        for seed in range(int(random.integers(2, 4))):
            logits = random.normal(size=(rows, vocab)) * random.choice([0.1, 2.0, 40.0])
            logits[random.random((rows, vocab)) < random.choice([0.0, 0.4])] = -np.inf
            logits[:, 0] = 0
            k, draws = int(random.integers(0, vocab + 1)), int(random.integers(1, 7))
            mass = float(random.random()) if k and random.random() < 0.4 else None
            more = {"temperatures": temperatures, "draw_temperature": at, "mass": mass}
            part = sparse(torch.from_numpy(logits).float(), k, draws, seed, **more)
            if random.random() < 0.5:
                part["logprobs"], part["tail"] = np.round(part["logprobs"] * 8) / 8, np.round(part["tail"] * 16) / 16
            parts.append(part)
            settings.append((k, draws))
        k = int(random.integers(1, vocab + 1))
        spec = CacheSpec(vocab, k, max(d for _, d in settings), draw_temperature=at, temperatures=temperatures)
        found = mix.mix_rows(
            parts, random.random(len(parts)) + 0.1, vocab_size=vocab, temperatures=temperatures, draw_temperature=at,
            k=k, draws=spec.draws, uniform_N=random.random(rows),
        )  # fmt: skip
        targets = check_targets(spec, **found)
        check_sorted(targets)
        head = np.where((targets.logprobs > -np.inf) & (targets.draws == 0), np.exp(targets.logprobs), 0).sum(1)
        total = head + np.exp(targets.tail[:, temperatures.index(1.0)])
        np.testing.assert_allclose(total, 1, atol=1e-5, err_msg=str((vocab, settings, k)))


# --- caches -----------------------------------------------------------------------------------------------------------


def capture(teacher: int, data: Any = None, **changes: Any) -> Any:
    store: Any = MemoryStore()
    given = {**SMALL, "fingerprint": "", **changes}
    fastkd.capture(Causal(seed=teacher), documents() if data is None else data, store, **given)
    return store


@pytest.fixture(scope="module")
def caches() -> list[Any]:
    return [capture(0), capture(1, k=7)]


def test_the_mean_is_a_cache_as_any_other(caches: list[Any], tmp_path: Path) -> None:
    report = mix_targets(caches, tmp_path / "mean", weights=[1, 3])
    assert report.complete
    assert report.status == 0
    assert verify_cache(tmp_path / "mean", deep=True).ok
    cache, parents = open_cache(tmp_path / "mean"), [open_cache(one) for one in caches]
    assert cache.sealed
    assert (cache.spec.k, cache.spec.draws) == (12, 3)
    assert all(f"spec {parent.spec.hash}" in cache.spec.teacher for parent in parents)
    assert inspect_cache(cache)["shards"] == len(cache.shards)
    source = cache.spec.provenance
    assert source.plan_sha256 == parents[0].spec.provenance.plan_sha256
    assert [a.content(0)[0] for a in parents] == cache.attributes(0)["record"]["parents"]
    trained = fastkd.train(Causal(), tmp_path / "mean", tmp_path / "run", steps=2, batch_tokens=60, evaluate_every=2)
    assert trained.complete
    assert "cross_entropy" in trained.evaluation


def test_the_same_cache_twice_is_the_same_cache(caches: list[Any], tmp_path: Path) -> None:
    mix_targets([caches[0]] * 3, tmp_path / "mean")
    ours, theirs = open_cache(tmp_path / "mean"), open_cache(caches[0])
    for index in theirs.shards:
        a, b = ours.read_shard(index), theirs.read_shard(index)
        for name, array in b.items():
            wide = a[name][:, : array.shape[1]] if name in ("ids", "logprobs", "draws") else a[name]
            np.testing.assert_array_equal(wide, array, err_msg=name)


def test_stopped_after_every_shard_and_resumed_to_the_same_bytes(caches: list[Any]) -> None:
    whole: Any = MemoryStore()
    mix_targets(caches, whole)
    store: Any = MemoryStore()
    for _ in range(100):
        stop = StopAfter(1)
        report = mix_targets(caches, store, stop=stop)
        if report.complete:
            break
        assert report.status == 75
        assert report.shards_written == 1
        assert not open_cache(store).sealed
    assert contents(store) == contents(whole)
    assert mix_targets(caches, store).shards_written == 0


class StopAfter(Stop):
    """Asks to stop once it was asked a number of times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    @property
    def asked(self) -> bool:
        self.left -= 1
        return self.left < 0

    @asked.setter
    def asked(self, value: bool) -> None:
        pass


@pytest.mark.parametrize("pattern", ["spec.json", "plan.json", "shards/3.*", "shards/.*", "manifest.parquet"])
def test_a_full_disk_loses_nothing(caches: list[Any], pattern: str) -> None:
    whole: Any = MemoryStore()
    mix_targets(caches, whole)
    store: Any = Without(pattern)
    with pytest.raises(StoreError, match="No space left"):
        mix_targets(caches, store)
    store.full = False
    assert mix_targets(caches, store).complete
    assert contents(store) == contents(whole)
    assert verify_cache(store, deep=True).ok


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 8}, r"other window plans \(context: 16 and 8"),
        ({"seed": 5}, r"other window plans \(seed: 0 and 5"),
        ({"held_out": 0.1}, "held_out: 0.2 and 0.1"),
        ({"batch_tokens": 32}, "batch_tokens: 40 and 32"),
        ({"temperatures": (1.0, 2.0)}, r"other temperatures \(\(1.0, 1.5, 2.0, 4.0\) and \(1.0, 2.0\)\)"),
        ({"draw_temperature": 2.0}, "other temperatures of the draws"),
        ({"data": documents(seed=3)}, "other data"),
    ],
)
def test_caches_of_other_rows_are_refused(caches: list[Any], change: dict[str, Any], message: str) -> None:
    store: Any = MemoryStore()
    with pytest.raises(CacheError, match=message):
        mix_targets([caches[0], capture(1, **change)], store)
    assert not list(store.list(""))


def unfinished() -> Any:
    store = capture(1)
    del store._objects["manifest.parquet"], store._objects["shards/2.zarr.zip"]
    return store


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda caches: {"caches": caches[:1]}, "caches: got 1; expected at least two"),
        (lambda caches: {"caches": caches, "weights": [1]}, "expected 2 positive numbers"),
        (lambda caches: {"caches": caches, "weights": [1, -1]}, "expected 2 positive numbers"),
        (lambda caches: {"caches": caches, "k": 0}, "k: got 0; expected an integer from 1 on"),
        (lambda caches: {"caches": caches, "draws": 4}, "draws: got 4; expected an integer from 0 to 3"),
        (lambda caches: {"caches": [caches[0], unfinished()]}, "shard 2 is missing; expected all"),
        (lambda caches: {"caches": caches, "out": caches[0]}, "a cache of other settings exists"),
    ],
)
def test_arguments_that_are_refused(caches: list[Any], given: Callable[[Any], dict[str, Any]], message: str) -> None:
    store: Any = MemoryStore()
    with pytest.raises(CacheError, match=message):
        mix_targets(**{"out": store, **given(caches)})
    assert not list(store.list(""))


def test_without_draws_in_one_there_are_none(caches: list[Any]) -> None:
    without = open_cache(capture(1, draws=0))
    assert mixed_spec([open_cache(caches[0]), without], [0.5, 0.5]).draws == 0
    with pytest.raises(CacheError, match="draws: got 1; expected an integer from 0 to 0, as not every cache has draws"):
        mixed_spec([open_cache(caches[0]), without], [0.5, 0.5], draws=1)
    whole = open_cache(capture(1, draws=0, k=VOCAB))
    assert mixed_spec([open_cache(caches[0]), whole], [0.5, 0.5]).draws == 3


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        fastkd.capture(Causal(seed=seed), documents(), tmp_path / str(seed), **{**SMALL, "fingerprint": ""})
    places = [str(tmp_path / "0"), str(tmp_path / "1")]
    arguments = ["mix-targets", *places, "--out", str(tmp_path / "out"), "--weights", "1", "2", "--k", "4"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "complete and sealed" in out
    assert "weights 0.333, 0.667" in out
    assert open_cache(tmp_path / "out").spec.k == 4
    assert main(["mix-targets", *places, "--out", str(tmp_path / "out")]) == 1
    assert "a cache of other settings exists" in capsys.readouterr().err
