"""`fastkd capture`: teachers and data by name, what it says, and with which exit status."""

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from capture_cases import contents
from forked import Forked
from hf_cases import model_of, saved, tokenizer_of

from fastkd.cache import StoreError, open_cache, verify_cache
from fastkd.cache.stores.local import LocalStore
from fastkd.capture import answers
from fastkd.cli import main as cli

TEXTS = ["the quick brown fox", "the lazy dog", "", "and the other dogs jumps over the lazy dog " * 4] * 3
SMALL = ("--k", 8, "--draws", 4, "--context", 16, "--shard-positions", 64, "--batch-tokens", 64)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose head is wider than its tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    saved(folder, "llama", vocab_size=300)
    tokenizer_of().save_pretrained(folder / "llama")
    return folder / "llama"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*args: object) -> tuple[int, str, str]:
        status = cli.main(["capture", *(str(a) for a in args)])
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out, captured.err

    return run


def lines(path: Path, values: list[Any], column: str) -> Path:
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return path


def test_text_ids_and_files_of_all_kinds_make_the_same_cache(teacher: Path, tmp_path: Path, run: Any) -> None:
    tokenizer = tokenizer_of()
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] if text else [] for text in TEXTS]
    pq.write_table(pa.table({"text": TEXTS, "other": range(len(TEXTS))}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"input_ids": ids}), tmp_path / "ids.parquet")
    lines(tmp_path / "a.jsonl", TEXTS, "text")
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n")
    found = {}
    for name in ("a.parquet", "a.jsonl", "a.txt", "ids.parquet"):
        out = tmp_path / f"{name}.cache"
        status, text, told = run("--teacher", teacher, "--data", tmp_path / name, "--out", out, *SMALL)
        assert status == 0, told
        assert "complete" in text
        assert "plan: 12 documents (3 empty, left out; 1 held out, with 6 positions; " in told
        arrays = open_cache(out).sequences(range(open_cache(out).manifest.column("sequences").to_numpy().sum()))
        found[name] = {k: v.tolist() for k, v in arrays.items()}
        assert open_cache(out).spec.vocab_size == 300
        assert ("tokenizer sha256" in open_cache(out).spec.tokenizer) == (name != "ids.parquet")
    # the held-out split goes by numbers of documents alone
    assert found["a.parquet"] == found["a.jsonl"] == found["a.txt"] == found["ids.parquet"]
    assert found["a.parquet"]["tokens"].count(tokenizer.eos_token_id) == 9


def test_conversations(teacher: Path, tmp_path: Path, run: Any) -> None:
    said = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "the dog"}]
    data = lines(tmp_path / "a.jsonl", [said] * 3, "messages")
    given = ("--teacher", teacher, "--data", data, *SMALL, "--context", 64)
    assert run(*given, "--out", tmp_path / "all")[0] == 0
    assert run(*given, "--out", tmp_path / "assistant", "--loss-on", "assistant")[0] == 0
    counted = {n: sum(open_cache(tmp_path / n).manifest.column("counted").to_pylist()) for n in ("all", "assistant")}
    reply = tokenizer_of()("the dog<|end|>\n")["input_ids"]
    assert counted["assistant"] == 3 * len(reply) < counted["all"]
    assert "template sha256" in open_cache(tmp_path / "all").spec.tokenizer
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    status, _, told = run(*given, "--out", tmp_path / "all", "--template", template)
    assert status == 1
    assert "now: --tokenizer: " in told


def test_events_for_a_scheduler(teacher: Path, tmp_path: Path, run: Any) -> None:
    data = lines(tmp_path / "a.jsonl", TEXTS, "text")
    given = ("--teacher", teacher, "--data", data, "--out", tmp_path / "cache", *SMALL, "--json")
    status, out, _ = run(*given)
    events = [json.loads(line) for line in out.splitlines()]
    assert (status, [e["event"] for e in events[:3]], events[-1]["event"]) == (0, ["note", "note", "plan"], "done")
    assert events[-1]["complete"] is True
    assert events[-1]["status"] == 0
    assert sum(e["event"] == "shard" for e in events) == events[2]["shards"] == events[-1]["shards_written"]
    status, out, _ = run(*given)
    assert (status, json.loads(out.splitlines()[-1])["shards_written"]) == (0, 0)


def test_what_differs_is_named_and_is_1(teacher: Path, tmp_path: Path, run: Any) -> None:
    data = lines(tmp_path / "a.jsonl", TEXTS, "text")
    given = ("--teacher", teacher, "--data", data, "--out", tmp_path / "cache", *SMALL)
    assert run(*given)[0] == 0
    other = saved(tmp_path, "llama", vocab_size=300, seed=1)
    tokenizer_of().save_pretrained(other)
    for changes, named in (
        (("--k", 9), "(there, and now: --k: 8 and 9)"),
        (("--teacher", other), "now: --teacher: "),
        (("--dtype", "bfloat16"), "float32, attention"),
        (("--attention", "eager"), "attention sdpa"),
        (("--data", lines(tmp_path / "b.jsonl", TEXTS[1:], "text")), "now: --data: 12 documents and 23"),
    ):
        status, out, told = run(*given, *changes)
        assert (status, out) == (1, "")
        assert named in told
        assert told.rstrip().count("\n") <= 2  # what is loaded, the plan, and the error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--teacher", "/nowhere/at-all"), "/nowhere/at-all"),
        (("--data", "/nowhere/a.parquet"), "/nowhere/a.parquet: there is no such file"),
        (("--data", "absent_module:make"), "absent_module:make: No module named"),
        (("--teacher", "json:absent"), "json:absent: module 'json' has no attribute 'absent'"),
        (("--column", "absent"), "there is no column 'absent'. It has 'text'"),
        (("--tokenizer", "{folder}/other"), "expected the teacher's"),
        (("--context", "5000", "--shard-positions", "8192"), "--context 5000: expected at most 2048"),
        (("--mass", "2"), "--mass 2.0: "),
        (("--rank", "3", "--world-size", "2"), "--rank: got 3 of a --world-size of 2"),
        (("--loss-on", "assistant"), "has text; expected messages, or prompts with completions"),
        (("--device", "abacus"), "--device: got 'abacus'"),
    ],
)
def test_bad_input_is_one_line_and_1(
    changes: tuple[str, ...], message: str, teacher: Path, tmp_path: Path, run: Any
) -> None:
    tokenizer_of(words="zebra giraffe " * 9).save_pretrained(tmp_path / "other")
    data = lines(tmp_path / "a.jsonl", TEXTS, "text")
    changes = tuple(c.format(folder=tmp_path) for c in changes)
    # files of several --data add up
    given = () if "--data" in changes else ("--data", data)
    status, out, told = run("--teacher", teacher, *given, "--out", tmp_path / "cache", *SMALL, *changes)
    assert status == 1, told
    assert out == ""
    assert message in told
    assert not (tmp_path / "cache" / "spec.json").exists()


def test_another_tokenizer_can_be_allowed(teacher: Path, tmp_path: Path, run: Any) -> None:
    tokenizer_of(words="zebra giraffe " * 9).save_pretrained(tmp_path / "other")
    data = lines(tmp_path / "a.jsonl", TEXTS, "text")
    given = ("--teacher", teacher, "--data", data, "--out", tmp_path / "cache", *SMALL)
    assert run(*given, "--tokenizer", tmp_path / "other", "--allow-other-tokenizer")[0] == 0


FACTORIES = """
import torch
from fastkd.data.examples import Examples
def teacher():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 5))
def data():
    torch.manual_seed(1)
    return Examples(torch.randn(40, 3, 3))
"""


def test_factories_of_ones_own(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "cache"
    status, _, told = run("--teacher", "own_factories:teacher", "--data", "own_factories:data", "--out", out, "--k", 3)
    assert status == 0, told
    assert sum(open_cache(out).manifest.column("counted").to_pylist()) == 40


def test_a_full_disk_is_75(teacher: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    create, room = LocalStore.create, [2]

    def limited(store: LocalStore, key: str, data: Any) -> bool:
        if key.startswith("shards/"):
            room[0] -= 1
            if room[0] < 0:
                raise StoreError("creation failed: No space left on device.")
        return create(store, key, data)

    data = lines(tmp_path / "a.jsonl", TEXTS, "text")
    given = ("--teacher", teacher, "--data", data, "--out", tmp_path / "cache", *SMALL)
    monkeypatch.setattr(LocalStore, "create", limited)
    status, _, told = run(*given)
    assert status == 75
    assert "No space left on device. Committed shards are kept" in told
    monkeypatch.setattr(LocalStore, "create", create)
    assert run(*given)[0] == 0


@pytest.mark.parametrize("name", ["spec.json", "plan.json", "shards/0.zarr.zip"])
@pytest.mark.parametrize("how", ["fifo", "link"])
def test_what_is_no_file_is_no_work_that_remains(teacher: Path, tmp_path: Path, run: Any, name: str, how: str) -> None:
    """The same command would fail again: 1, not 75."""
    path = tmp_path / "cache" / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path) if how == "fifo" else path.symlink_to("/etc/hostname")
    data = lines(tmp_path / "a.jsonl", TEXTS, "text")
    status, _, told = run("--teacher", teacher, "--data", data, "--out", tmp_path / "cache", *SMALL)
    assert status == 1
    assert name in told


def test_a_folder_that_cannot_be_written_is_no_work_that_remains(teacher: Path, tmp_path: Path, run: Any) -> None:
    (tmp_path / "file").write_text("")
    data = lines(tmp_path / "a.jsonl", TEXTS, "text")
    status, _, told = run("--teacher", teacher, "--data", data, "--out", tmp_path / "file" / "cache", *SMALL)
    assert status in (1, 2)
    assert "file" in told


def started(*args: object, **environment: str) -> Forked:
    return Forked(forked.command, "capture", *map(str, args), **environment)


def test_sigterm_is_75_and_the_same_command_goes_on(teacher: Path, tmp_path: Path, run: Any) -> None:
    data = lines(tmp_path / "a.jsonl", TEXTS * 20, "text")
    given = ("--teacher", teacher, "--data", data, "--out", tmp_path / "cache", *SMALL)
    process = started(*given)
    shards = tmp_path / "cache" / "shards"
    for _ in range(1200):
        if shards.exists() and len(list(shards.iterdir())) >= 2:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert "SIGTERM: stopping after the current batch" in told
    there = len(list(shards.iterdir()))
    assert there >= 2
    assert not verify_cache(tmp_path / "cache").problems
    status, _, _ = run(*given)
    assert status == 0
    assert len(list(shards.iterdir())) > there
    assert run(*given, "--out", tmp_path / "whole")[0] == 0
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_two_workers_of_two_processes_each(teacher: Path, tmp_path: Path, run: Any) -> None:
    """torchrun's variables, four processes; pairs of them make up a worker."""
    data = lines(tmp_path / "a.jsonl", TEXTS, "text")
    given = ("--teacher", teacher, "--data", data, *SMALL)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "4"}
    processes = [
        started(*given, "--out", tmp_path / "four", "--teacher-parallel", 2, RANK=str(r), LOCAL_RANK=str(r), **meet)
        for r in range(4)
    ]
    for process in processes:
        _, told = process.communicate(timeout=240)
        assert process.returncode == 0, told
    assert run(*given, "--out", tmp_path / "one")[0] == 0
    one, four = open_cache(tmp_path / "one"), open_cache(tmp_path / "four")
    assert one.spec == four.spec
    assert one.shards == four.shards
    for index in one.shards:
        ours, theirs = one.read_shard(index), four.read_shard(index)
        assert np.array_equal(ours["tokens"], theirs["tokens"])
        # rounding may put a code to the other side of a step
        assert np.abs(ours["tail"] - theirs["tail"]).max() < 0.07
        assert (ours["ids"][:, 0] == theirs["ids"][:, 0]).mean() > 0.9


def test_a_gguf_file(teacher: Path, tmp_path: Path, run: Any) -> None:
    from hf_cases import write_gguf

    file = write_gguf(tmp_path / "tiny.gguf", model_of("llama", vocab_size=300), tokenizer_of())
    data = lines(tmp_path / "a.jsonl", TEXTS, "text")
    status, _, told = run("--teacher", file, "--data", data, "--out", tmp_path / "cache", *SMALL)
    assert status == 0, told
    assert "%|" not in told  # no bar where there is no terminal
    assert "GGUF" in open_cache(tmp_path / "cache").spec.teacher


def test_a_teacher_that_says_nan_names_the_document(tmp_path: Path, run: Any) -> None:
    model = model_of("llama", vocab_size=300)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    folder = tmp_path / "broken"
    model.save_pretrained(folder)
    data = lines(tmp_path / "a.jsonl", [[1, 2, 3], [4, 5, 7, 6]], "input_ids")
    given = ("--teacher", folder, "--data", data, "--out", tmp_path / "cache", *SMALL, "--held-out", 0)
    status, _, told = run(*given)
    assert status == 1
    # attention multiplies what it must not see by 0, which leaves NaN what it is: all of the document is lost
    assert "a.jsonl, line 2, position 0: the teacher failed there" in told
    assert not list((tmp_path / "cache").glob("shards/*"))


def test_a_cache_against_its_teacher(teacher: Path, tmp_path: Path, run: Any, capfd: Any) -> None:
    data = lines(tmp_path / "a.jsonl", TEXTS, "text")
    cache = tmp_path / "cache"
    assert run("--teacher", teacher, "--data", data, "--out", cache, *SMALL)[0] == 0
    assert cli.main(["verify", str(cache), "--teacher", str(teacher), "--positions", "100"]) == 0
    assert "ok: the cache matches the teacher to within the codec's error" in capfd.readouterr().out
    other = saved(tmp_path, "llama", vocab_size=300, seed=1)
    assert cli.main(["verify", str(cache), "--teacher", str(other), "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert found["problems"] == []  # of the bytes
    assert found["ok"] is found["teacher"]["ok"] is False


def test_more_entries_than_outcomes(
    teacher: Path, tmp_path: Path, run: Any, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = lines(tmp_path / "a.jsonl", TEXTS[:2], "text")
    given = ["--teacher", str(teacher), "--data", str(data), *map(str, SMALL), "--k", "301"]
    refused = "--k 301: expected at most 300, the outcomes of this teacher"
    status, _, told = run(*given, "--out", tmp_path / "none")
    assert (status, refused in told) == (1, True)
    assert cli.main(["plan", *given]) == 1
    assert refused in capfd.readouterr().err
    monkeypatch.setattr(answers, "_DEFAULT_K", (301,))  # the default is not asked for
    status, text, told = run(*given, "--out", tmp_path / "cache")
    said = "k = 301 exceeds the teacher's 300 outcomes: every target holds all of them, and the 4 draws are unused"
    assert (status, said in told, "complete and sealed" in text) == (0, True, True)
    assert open_cache(tmp_path / "cache").sealed
    assert cli.main(["plan", *given, "--seconds", "0"]) == 0
    assert said in capfd.readouterr().err
    assert "outcomes" not in run(*given, "--k", 300, "--out", tmp_path / "whole")[2]


def test_a_plan_writes_nothing(teacher: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = lines(tmp_path / "a.jsonl", TEXTS, "text")
    monkeypatch.chdir(tmp_path)
    given = ["--teacher", str(teacher), "--data", str(data), *map(str, SMALL), "--seconds", "0.1"]
    assert cli.main(["plan", *given, "--price-per-hour", "3", "--workers", "2"]) == 0
    out = capfd.readouterr().out
    for word in ("positions", "requests", "cost", "with 2 workers", "Other k"):
        assert word in out
    assert cli.main(["plan", *given, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["plan"]["documents"] == 12
    assert [cost["k"] for cost in found["by_k"]] == sorted({16, 32, 64, 128, found["settings"]["k"]})
    for flag in ("--no-others", "--student-rate"):
        assert cli.main(["plan", *given, flag, "1"]) == 2
    assert "--no-others" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
