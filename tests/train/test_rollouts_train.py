"""Training with rollouts: what a step does, what a run leaves, how it goes on after a kill, and what it refuses."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import train_jobs
from hf_cases import VOCAB, saved, tokenizer_of
from moments import Killed, Moments
from rollout_cases import ROLLOUTS, teacher
from train_cases import CAPTURE, SMALL, Tiny, bits, documents, make_cache

import fastkd
from fastkd import kd_loss
from fastkd.cache import StoreError, open_cache
from fastkd.cache.stores.local import LocalStore
from fastkd.capture.runner import CaptureRunner
from fastkd.cli.main import main
from fastkd.errors import StreamError, TrainError, WorkRemains
from fastkd.live import rollouts
from fastkd.live.rollouts import RolloutBatch
from fastkd.live.rounds import Rounds
from fastkd.settings import LiveSettings, RolloutSettings
from fastkd.train.checkpoint import newest
from fastkd.train.metrics import read_metrics
from fastkd.train.trainer import Trainer
from fastkd.utils.signals import Stop

TEACHER = "rollout_cases:teacher"
CHANGES: dict[str, Any] = {
    **SMALL, "steps": 5, "micro_tokens": 48, "checkpoint_every": 2, "teacher": TEACHER,
    "rollouts": RolloutSettings(**{**ROLLOUTS, "rollout_every": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache, and a run that nobody killed."""
    folder = tmp_path_factory.mktemp("rollouts-train")
    make_cache(folder / "cache")
    train(folder, folder / "one")
    return folder


def train(place: Path, out: Path, student: Any = "train_cases:dropping", **changes: Any) -> fastkd.TrainReport:
    return fastkd.train(student, place / "cache", out, **{**CHANGES, **changes})


def result(run: Path) -> dict[str, Any]:
    """The outcome of a run: weights, optimizer, rounds, and the logged figures except times."""
    found: dict[str, Any] = bits(run, CHANGES["steps"])
    found["student"] = (run / "student" / "model.safetensors").read_bytes()
    for path in sorted((run / "rollouts").glob("*")):
        found[path.name] = [open_cache(path).content(0)] if path.is_dir() else path.read_bytes()
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, CHANGES["steps"] + 1))
    names = ("loss", "hard", "soft", "rollout/soft", "rollout/sequences", "rollout/length", "grad_norm", "positions")
    for name in names:
        found[name] = repr([line.get(name) for line in lines]).encode()
    return found


def test_steps_against_a_loss_written_out(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels and targets on the data, the divergence alone on what the student said, all divided by one count."""
    taken, make = [], Trainer._make

    def noted(self: Trainer, step: Any) -> Any:
        model = self.student.model
        total = {"loss": torch.zeros(()), "hard": torch.zeros(()), "soft": torch.zeros(()), "said": torch.zeros(())}
        counts = [0, 0]
        for batch in step.micro_batches:
            said, sampled = model(batch.input_ids), isinstance(batch, RolloutBatch)
            logits = (said.states @ said.lm_head.weight.T).flatten(0, 1).detach()
            found = kd_loss(
                logits, batch.targets, batch.labels.flatten(), alpha=0.0 if sampled else 0.3, divergence="jsd",
                num_items=1, impl="reference",
            )  # fmt: skip
            counts[sampled] += batch.count
            total["loss"] += found.loss
            if sampled:
                total["said"] += found.soft
            else:
                total["hard"], total["soft"] = total["hard"] + found.hard, total["soft"] + found.soft
        assert sum(counts) == step.count
        divided = {"loss": step.count, "hard": counts[0], "soft": counts[0], "said": counts[1]}
        taken.append([float(total[name]) / max(1, divisor) for name, divisor in divided.items()])
        return make(self, step)

    monkeypatch.setattr(Trainer, "_make", noted)
    train(place, tmp_path / "run", Tiny(seed=1), alpha=0.3, divergence="jsd")
    lines = read_metrics(tmp_path / "run")
    for line, expected in zip(lines, taken, strict=True):
        got = [line[name] for name in ("loss", "hard", "soft", "rollout/soft")]
        assert got == pytest.approx(expected, rel=1e-5)
        assert line["rollout/sequences"] > 0
    assert {"rollout/seconds", "rollout/tokens_per_second"} <= lines[2].keys()
    assert "rollout/seconds" not in lines[1]
    last = pq.read_table(tmp_path / "run" / "rollouts" / "round-00002.parquet")
    assert set(last.column("step").to_pylist()) == {4}, "nothing is continued for steps that are not made"


def test_no_rollouts_are_a_plain_run(place: Path, tmp_path: Path) -> None:
    """Bit by bit, and without a folder of them."""
    plain = {name: value for name, value in CHANGES.items() if name not in ("teacher", "rollouts")}
    for name, more in (("plain", {}), ("none", {"rollouts": RolloutSettings(rollouts=0.0)})):
        fastkd.train("train_cases:dropping", place / "cache", tmp_path / name, **plain, **more)
    assert result(tmp_path / "plain") == result(tmp_path / "none")
    assert not (tmp_path / "none" / "rollouts").exists()
    assert result(tmp_path / "plain")["model.model.head"] != result(place / "one")["model.model.head"]


POINTS = (
    (rollouts, "find"), (Rounds, "commit"), (os, "link"), (CaptureRunner, "_seal"), (rollouts, "open_split"),
    (Trainer, "_make"),
)  # fmt: skip


def ended_at(place: Path, out: Path, moment: int) -> bool:
    """A run that is ended at the n-th moment, and gone on with: before a round is made, its tokens are committed, or
    appear under their name, its targets are complete, or read, and before each step. Whether there is this moment."""
    with pytest.MonkeyPatch.context() as patch:
        Moments(moment).watch(POINTS, patch)
        try:
            train(place, out)
            return False
        except Killed:
            pass
    train(place, out)
    return True


@pytest.mark.parametrize(
    "moment", [pytest.param(4, marks=pytest.mark.soak), 9, pytest.param(14, marks=pytest.mark.soak)]
)
def test_ended_at_a_moment_it_goes_on_to_the_same_bytes(place: Path, tmp_path: Path, moment: int) -> None:
    assert ended_at(place, tmp_path / "run", moment)
    assert result(tmp_path / "run") == result(place / "one")


@pytest.mark.soak
def test_ended_at_every_moment(place: Path, tmp_path: Path) -> None:
    wanted, moment = result(place / "one"), 1
    while ended_at(place, tmp_path / str(moment), moment):
        assert result(tmp_path / str(moment)) == wanted, f"ended at moment {moment}"
        moment += 1
    assert moment > 15


@pytest.mark.parametrize("moment", [30])
def test_killed_as_a_process(place: Path, tmp_path: Path, moment: int) -> None:
    arguments = ("train_cases:dropping", place / "cache", tmp_path / "run", CHANGES)
    assert train_jobs.finish(train_jobs.start(train_jobs.train_and_die, *arguments, moment)) == [-signal.SIGKILL]
    train_jobs.run(train_jobs.train, *arguments)
    assert result(tmp_path / "run") == result(place / "one")


def test_two_processes_say_the_same(place: Path, tmp_path: Path) -> None:
    """Each generates and scores a part of a round; a step comes to 1e-6 of one process's."""
    changes = {**CHANGES, "layout": "padded"}
    double = "train_cases:double"
    train_jobs.run(train_jobs.train, double, place / "cache", tmp_path / "one", changes)
    train_jobs.run(train_jobs.train, double, place / "cache", tmp_path / "two", changes, ranks=2)
    ours, theirs = (newest(tmp_path / name) for name in ("one", "two"))
    assert ours is not None
    assert theirs is not None
    assert ours.step == theirs.step == 5
    a, b = ours.tensors("model"), theirs.tensors("model")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-6)
    for path in (tmp_path / "one" / "rollouts").glob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "two" / "rollouts" / path.name).read_bytes()


@pytest.mark.parametrize("written", [False, True])
def test_beside_a_live_teacher(place: Path, tmp_path: Path, written: bool) -> None:
    """Data and targets without a cache: as from the cache that a capture with the same settings writes."""
    live = LiveSettings(**CAPTURE)
    report = fastkd.train(
        "train_cases:dropping", None, tmp_path / "live", data=documents(), live=live,
        write_cache=tmp_path / "cache" if written else None, **{**CHANGES, "evaluate_every": 5},
    )  # fmt: skip
    assert report.complete
    assert report.evaluation["kl_sampled"] > 0
    ours, theirs = (
        sorted(path.name for path in (run / "rollouts").glob("*")) for run in (tmp_path / "live", place / "one")
    )
    assert ours == theirs
    first = "rollouts/round-00000.parquet"

    def tokens(run: Path) -> list[list[int]]:
        found: list[list[int]] = pq.read_table(run / first).column("tokens").to_pylist()
        return found

    assert tokens(tmp_path / "live") == tokens(place / "one")
    if written:  # with the codec, too
        assert bits(tmp_path / "live", 5) == bits(place / "one", 5)


def test_a_model_of_transformers_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Conversations: continued where the assistant begins. Then another student learns from the rounds alone."""
    words = tokenizer_of()
    folders = []
    for name, seed in (("teacher", 1), ("student", 2)):
        folder = saved(tmp_path / name, "llama", seed=seed, vocab_size=320, max_position_embeddings=96)
        words.save_pretrained(folder)
        folders.append(str(folder))
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"the quick {i}"},
                {"role": "assistant", "content": "brown fox " * 3},
            ]
        }
        for i in range(24)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    command = [
        "train", "--student", folders[1], "--teacher", folders[0], "--data", str(tmp_path / "chats.jsonl"),
        "--loss-on", "assistant", "--packing", "keep", "--k", "6", "--draws", "0", "--held-out", "0", "--rollouts",
        "0.6", "--rollout-tokens", "8", "--rollout-every", "2", "--alpha", "0", "--divergence", "reverse_kl",
        "--batch-size", "6", "--steps", "3", "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(command) == 0, capsys.readouterr()
    table = pq.read_table(tmp_path / "run" / "rollouts" / "round-00000.parquet")
    turn = words("<|turn|>assistant\n", add_special_tokens=False)["input_ids"]
    for row in table.to_pylist():
        assert row["tokens"][row["prompt"] - len(turn) : row["prompt"]] == turn
        assert len(row["tokens"]) <= row["prompt"] + 8
        assert sum(row["loss_mask"]) == len(row["tokens"]) - row["prompt"]
    replay = ["train", "--student", folders[1], "--cache", str(tmp_path / "run" / "rollouts"), "--alpha", "0",
              "--batch-size", "4", "--steps", "2", "--out", str(tmp_path / "replay")]  # fmt: skip
    assert main(replay) == 0, capsys.readouterr()


def test_others_score_the_rounds(place: Path, tmp_path: Path) -> None:
    """The training ends with its work kept when targets are missing, and goes on when they are there."""
    settings = RolloutSettings(**{**ROLLOUTS, "rollout_every": 2, "rollout_scoring": "external"})
    changes = {"rollouts": settings, "timeout_minutes": 0.0, "checkpoint_every": None}
    for number in range(3):
        with pytest.raises(
            WorkRemains, match=f"round {number} has no targets yet. Make them with: fastkd capture "
        ) as e:
            train(place, tmp_path / "run", **changes)
        found = newest(tmp_path / "run")
        assert (0 if found is None else found.step) == 2 * number
        words = str(e.value).partition("fastkd ")[2].partition(";")[0].split()
        assert main(words) == 0
    assert train(place, tmp_path / "run", **changes).complete
    ours, theirs = result(tmp_path / "run"), result(place / "one")
    for name in ("student", "loss", "rollout/soft"):
        assert ours[name] == theirs[name]


@pytest.mark.parametrize("what", ["tokens", "targets"])
def test_a_full_disk_in_a_round(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """One sentence, nothing half made, and the same call goes on."""

    def full(*arguments: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if what == "tokens":
            patch.setattr(os, "link", full)
        else:
            patch.setattr(LocalStore, "_put", full)
        with pytest.raises((StoreError, WorkRemains), match="No space left") as caught:
            train(place, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run" / "rollouts").rglob(".*"))
    assert train(place, tmp_path / "run").complete
    assert result(tmp_path / "run") == result(place / "one")


def test_a_stop_ends_the_scoring_of_a_round(place: Path, tmp_path: Path) -> None:
    """Between two of the teacher's batches, of which it has one for each shard of a round here."""
    for step in (0, 2):
        stop, by = Stop(), teacher()
        handle = by.model.register_forward_pre_hook(lambda *_, stop=stop: stop())
        report = train(place, tmp_path / "run", teacher=by, stop=stop)
        handle.remove()
        assert (report.step, report.status) == (step, 75)
        train(place, tmp_path / "run", teacher=by, stop=stop)  # the round is there now, and the next one is not made
    assert train(place, tmp_path / "run").complete
    assert result(tmp_path / "run") == result(place / "one")


def test_a_stop_ends_the_wait_for_others(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stop()
    monkeypatch.setattr(rollouts.time, "sleep", lambda seconds: stop())
    settings = RolloutSettings(**{**ROLLOUTS, "rollout_every": 2, "rollout_scoring": "external"})
    report = train(place, tmp_path / "run", teacher=None, rollouts=settings, timeout_minutes=600.0, stop=stop)
    assert (report.step, report.status) == (0, 75)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": 1.5}, "rollouts: got 1.5; expected a number from 0 to 1"),
        ({"rollout_eos": VOCAB}, f"rollout_eos: got {VOCAB}; expected a token of the vocabulary, from 0 to"),
        ({"rollout_tokens": 0}, "rollout_tokens: got 0; expected an integer from 1 on"),
        ({"rollout_temperature": -1.0}, "rollout_temperature: got -1.0"),
        ({"rollout_scoring": "there"}, "rollout_scoring: got 'there'; expected here or external"),
        ({"parallel": "fsdp"}, "parallel='fsdp'; expected ddp: a sharded student cannot generate"),
        ({"match": ("20:1:mse:1",)}, "match=20:1:mse:1; expected none"),
        ({"teacher": None}, "no teacher; expected one that scores what the student says"),
        ({"teacher": "ema:0.9"}, "the teacher 'ema:0.9', made of the student"),
        ({"teacher": Tiny(vocab=VOCAB + 5)}, f"vocabulary of {VOCAB + 5}; expected {VOCAB}, that of the cache"),
    ],
    ids=str,
)
def test_what_is_refused_before_anything_is_written(
    place: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    own = {name: changes.pop(name) for name in list(changes) if name.startswith("rollout")}
    with pytest.raises(TrainError, match=message):
        train(place, tmp_path / "run", **changes, rollouts=RolloutSettings(**{**ROLLOUTS, **own}))
    assert not (tmp_path / "run").exists()


def test_a_cache_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", vocab_size=320)
    tokenizer_of().save_pretrained(folder)
    text = ["the quick brown fox jumps over the lazy dog"] * 8
    fastkd.capture(str(folder), text, tmp_path / "cache", tokenizer=tokenizer_of(), k=4, draws=0, context=32)
    other = saved(tmp_path / "other", "llama", vocab_size=320)
    tokenizer_of(words="completely different words for another tokenizer " * 3).save_pretrained(other)
    with pytest.raises(TrainError, match=r"a teacher with the tokenizer llama \(sha256 .*…\); expected the cache's"):
        train(tmp_path, tmp_path / "run", str(folder), teacher=str(other))


def test_changed_settings_are_named_on_resume(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "one", tmp_path / "run")
    changed = RolloutSettings(**{**ROLLOUTS, "rollout_every": 2, "rollout_temperature": 0.5})
    with pytest.raises(StreamError, match=r"rollout_temperature: 1.0 there, 0.5 here"):
        train(place, tmp_path / "run", rollouts=changed)
    with pytest.raises((StreamError, TrainError), match=r"objective|rollouts: 0.5 there, None here"):
        train(place, tmp_path / "run", rollouts=RolloutSettings(), teacher=None)
    speed = RolloutSettings(**{**ROLLOUTS, "rollout_every": 2, "rollout_batch": 3})
    assert train(place, tmp_path / "run", rollouts=speed).complete


def test_a_control_has_no_rollouts(place: Path, tmp_path: Path) -> None:
    report = train(place, tmp_path / "run", control=True)
    assert report.control is not None
    assert report.control.complete
    assert not (tmp_path / "run" / "control" / "rollouts").exists()
    line = read_metrics(tmp_path / "run" / "control")[0]
    assert line["alpha"] == 1
    assert "rollout/soft" not in line
